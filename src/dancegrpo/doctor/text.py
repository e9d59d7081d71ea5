"""A diagnosis as JSON and as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dancegrpo.doctor import Diagnosis


def as_json(found: Diagnosis) -> dict[str, Any]:
    """One JSON object."""
    return asdict(found)


def as_table(found: Diagnosis) -> str:
    """Aligned text: the machine, what is here, the phases, what to change."""
    blocks = [_machine(found.machine), _checks(found.checks)]
    if found.phases:
        blocks += [_phases(found), _verdict(found)]
    blocks += [_advice(found), [_row("note", note) for note in found.notes]]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _row(name: str, told: str) -> str:
    return f"{name:{_WIDTH}} {told}"


_WIDTH = 9


def _machine(machine: dict[str, Any]) -> list[str]:
    ram, libraries = machine["ram"], machine["libraries"]
    lines = [_row("machine", f"{machine['system']}, {machine['cores']} cores")]
    lines += [_row("memory", f"{_size(ram['free'])} free of {_size(ram['total'])}")]
    for entry in machine["accelerators"]:
        room = f", {_size(entry['free'])} free of {_size(entry['total'])}" if entry["total"] else ""
        lines.append(_row("device", f"{entry['device']} ({entry['name']}){room}"))
    if not machine["accelerators"]:
        lines.append(_row("device", "no accelerator"))
    lines += [_row("disk", f"{_size(machine['disk']['free'])} free at {machine['disk']['folder']}")]
    lines += [_row("versions", ", ".join(f"{name} {told or 'missing'}" for name, told in libraries.items()))]
    absent = [f"dancegrpo[{name}]" for name, here in machine["extras"].items() if not here]
    return lines + ([_row("optional", f"not installed: {', '.join(absent)}")] if absent else [])


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    lines = []
    for check in checks:
        lines.append(_row("ok" if check["ok"] else "MISSING", f"{check['name']}: {check['told']}"))
        if check["remedy"]:
            lines.append(_row("", f"-> {check['remedy']}"))
    return lines


def _phases(found: Diagnosis) -> list[str]:
    hosted = any(phase["host_bytes"] for phase in found.phases)
    lines = [f"{'phase':{_WIDTH}} {'peak':>10}" + (f" {'host':>10}" if hosted else "") + f" {'seconds':>10}"]
    highest = max(phase["peak_bytes"] for phase in found.phases)
    for phase in found.phases:
        seconds = "-" if phase["seconds"] is None else _seconds(phase["seconds"])
        host = f" {_size(phase['host_bytes']):>10}" if hosted else ""
        mark = "  <- highest" if phase["peak_bytes"] == highest else ""
        lines.append(f"{phase['name']:{_WIDTH}} {_size(phase['peak_bytes']):>10}{host} {seconds:>10}{mark}")
    return lines


def _verdict(found: Diagnosis) -> list[str]:
    kept = ", ".join(f"{name} {_size(size)}" for name, size in found.resident.items() if size)
    lines = [_row("resident", kept)]
    if found.gpus > 1:
        sent = ", ".join(f"{name} {_size(size)}" for name, size in found.traffic.items() if size)
        lines += [_row("traffic", f"into each of {found.gpus} GPUs in an iteration: {sent}")]
    if found.iteration_seconds is not None:
        more = found.communication_seconds
        waiting = "" if more is None else f" and at most {_seconds(more)} s of communication"
        lines += [_row("iteration", f"{_seconds(found.iteration_seconds)} s{waiting}")]
    if found.run_seconds is not None:
        cost = "" if found.cost is None else f", cost {found.cost:,.2f}"
        lines += [_row("run", f"{_time(found.run_seconds)}{cost}")]
    each = f"each of {found.gpus} GPUs: " if found.gpus > 1 else ""
    peak = max(phase["peak_bytes"] for phase in found.phases)
    verdict = "fits" if found.fits else "does not fit"
    return [*lines, _row("verdict", f"{verdict}: {each}{_size(peak)} of {_size(found.capacity)} ({found.device})")]


def _advice(found: Diagnosis) -> list[str]:
    if not found.advice:
        return []
    width = max(len(step["setting"]) for step in found.advice)
    lines = ["what would make it fit, each line with those above it:"]
    for step in found.advice:
        saved = f"{_size(step['before'])} -> {_size(step['after'])}"
        lines.append(f"  {step['setting']:{width}}  {saved:>20}  ({step['phase']}; costs {step['costs']})")
    if found.advice[-1]["after"] > found.capacity:
        lines.append("  and no further setting helps: take a larger device, or more of them (parallel.fsdp)")
    return lines


def _size(size: int | None) -> str:
    if size is None:
        return "?"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"
