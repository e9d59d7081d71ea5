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
    lines = [*_machine(found.machine), *_checks(found.checks)]
    if found.phases:
        lines += _phases(found)
    lines += [f"note: {note}" for note in found.notes]
    lines += _advice(found)
    return "\n".join(lines)


def _machine(machine: dict[str, Any]) -> list[str]:
    ram, libraries = machine["ram"], machine["libraries"]
    lines = [
        f"machine:  {machine['system']}, {machine['cores']} cores",
        f"memory:   {_size(ram['free'])} free of {_size(ram['total'])}",
    ]
    for entry in machine["accelerators"]:
        room = f", {_size(entry['free'])} free of {_size(entry['total'])}" if entry["total"] else ""
        lines.append(f"device:   {entry['device']} ({entry['name']}){room}")
    if not machine["accelerators"]:
        lines.append("device:   no accelerator")
    lines.append("versions: " + ", ".join(f"{name} {told or 'missing'}" for name, told in libraries.items()))
    lines.append("extras:   " + ", ".join(f"{n} {'yes' if here else 'no'}" for n, here in machine["extras"].items()))
    lines.append(f"disk:     {_size(machine['disk']['free'])} free at {machine['disk']['folder']}")
    return lines


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    lines = [""] if checks else []
    for check in checks:
        remedy = f"; {check['remedy']}" if check["remedy"] else ""
        lines.append(f"{'ok     ' if check['ok'] else 'MISSING'}  {check['name']}: {check['told']}{remedy}")
    return lines


def _phases(found: Diagnosis) -> list[str]:
    hosted = any(phase["host_bytes"] for phase in found.phases)
    lines = ["", f"{'phase':10} {'peak':>10}" + (f" {'host':>10}" if hosted else "") + f" {'seconds':>10}"]
    for phase in found.phases:
        seconds = "-" if phase["seconds"] is None else f"{phase['seconds']:.3g}"
        host = f" {_size(phase['host_bytes']):>10}" if hosted else ""
        lines.append(f"{phase['name']:10} {_size(phase['peak_bytes']):>10}{host} {seconds:>10}")
    kept = ", ".join(f"{name} {_size(size)}" for name, size in found.resident.items() if size)
    lines.append(f"resident: {kept}")
    if found.iteration_seconds is not None and found.run_seconds is not None:
        cost = "" if found.cost is None else f", cost {found.cost:,.2f}"
        lines.append(
            f"time:     {found.iteration_seconds:,.3g} s an iteration, {_time(found.run_seconds)} the run{cost}"
        )
    verdict = "fits" if found.fits else "does not fit"
    lines.append(f"verdict:  {verdict} {_size(found.capacity)} of {found.device}")
    return lines


def _advice(found: Diagnosis) -> list[str]:
    if not found.advice:
        return []
    width = max(len(step["setting"]) for step in found.advice)
    lines = ["", "what would make it fit, each with those above it:"]
    for step in found.advice:
        saved = f"{_size(step['before'])} -> {_size(step['after'])}"
        lines.append(f"  {step['setting']:{width}}  {saved:>22}  highest in {step['phase']}; costs {step['costs']}")
    if found.advice[-1]["after"] > found.capacity:
        lines.append("  and no further setting helps: take a larger device")
    return lines


def _size(size: int | None) -> str:
    if size is None:
        return "?"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} h" if seconds >= 3600 else f"{seconds / 60:,.1f} min"
