"""What a run needs beside memory: is it here? Looks at the disk and the hub's cache, never at the network, but for the
addresses of judges that a recipe itself names as services."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dancegrpo.config import RunConfig
from dancegrpo.doctor.architectures import model_folder
from dancegrpo.doctor.machine import disk_free
from dancegrpo.dotted import import_dotted
from dancegrpo.errors import DanceError, RewardError
from dancegrpo.judging import _cached, _installed
from dancegrpo.policies import loading
from dancegrpo.rewards import CATALOG, load_reward
from dancegrpo.settings import RewardConfig
from dancegrpo.shapes import JUDGES


@dataclass(frozen=True)
class Check:
    """One thing a run needs. remedy: what to do where it is not ok, else empty."""

    name: str
    ok: bool
    told: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return asdict(self)


def check_run(config: RunConfig) -> list[Check]:
    """The model, the prompts and every judge of a run."""
    found = [_model(config), *_prompts(config)]
    for name, judge in config.rewards.items():
        found += _judge(f"judge {name}", judge)
    backend = config.tracking.backend
    if backend in ("wandb", "tensorboard"):
        found.append(_extra(f"tracking {backend}", backend))
    return found


def check_disk(config: RunConfig, checkpoint_bytes: int) -> Check:
    """Whether the checkpoints that are kept fit on the disk, and the one that is written before an old one goes."""
    needed, free = checkpoint_bytes * (config.checkpoint.keep + 1), disk_free(Path(config.output))
    told = f"{needed / 1e9:.1f} GB of checkpoints, {free / 1e9:.1f} GB free at {config.output}"
    remedy = "free space, set output to a larger disk, or lower checkpoint.keep"
    return Check("disk", needed <= free, told, "" if needed <= free else remedy)


def _model(config: RunConfig) -> Check:
    model = config.model
    folder = model_folder(model)
    if folder is None:
        hub = loading.HUB_ID.fullmatch(model.path)
        remedy = f"download it (`hf download {model.path}`), or" if hub else "put it there, or"
        return Check("model", False, f"{model.path} is not here", f"{remedy} set model.path to its folder")
    try:
        index = loading._read_index(folder / "model_index.json")
        loading._check_files(folder, index, loading._family(model, str(index.get("_class_name"))))
    except DanceError as error:
        return Check("model", False, str(error), "copy or download the model again")
    return Check("model", True, f"{model.path} is whole")


def _prompts(config: RunConfig) -> Iterator[Check]:
    from dancegrpo.prompts import open_prompts

    for key in ("train", "evaluation"):
        source = getattr(config.prompts, key)
        if source is None:
            continue
        name = f"prompts.{key}"
        if ":hf:" in f":{source}":
            yield _extra(name, "hf", f"{source}, on the hub: not looked up")
            continue
        try:
            count = len(open_prompts(source, **config.prompts.reading()))
        except DanceError as error:
            yield Check(name, False, str(error), f"name a file of yours: {name}=FILE")
        else:
            yield Check(name, True, f"{count} prompts in {source}")


def _judge(name: str, config: RewardConfig) -> Iterator[Check]:
    entry = CATALOG.get(config.judge)
    if entry is None:
        yield _python(name, config)
        return
    if entry.extra is not None:
        yield _extra(f"{name} ({config.judge})", entry.extra)
    if config.judge == "service":
        yield _service(name, config)
        return
    given = {key: str(value) for key, value in config.options.items() if key in _SOURCES}
    absent = [path for path in given.values() if path not in JUDGES and _is_path(path) and not Path(path).exists()]
    own = set(given) - {"tokenizer", "template"}
    named = [] if own else [(repo, file) for repo, file in entry.weights if not (file or "").startswith("tokenizer")]
    if "tokenizer" not in given and not set(given.values()) & set(JUDGES):
        named += [(repo, file) for repo, file in entry.weights if (file or "").startswith("tokenizer")]
    absent += [f"{repo}/{file}" if file else repo for repo, file in named if not _cached(repo, file)]
    if absent:
        remedy = "download it where there is a network, or give its path in " + f"rewards.{name.split()[1]}.options"
        yield Check(f"{name} ({config.judge})", False, f"{', '.join(absent)} not here", remedy)
    elif entry.extra is None:
        needs = "its weights are here" if entry.weights else "needs no weights"
        yield Check(f"{name} ({config.judge})", True, needs)


_SOURCES = ("weights", "model", "tokenizer", "head", "base", "processor", "template", "detector")
"""Options that name files, folders or repositories."""


def _is_path(source: str) -> bool:
    return Path(source).suffix in (".pt", ".pth", ".py", ".txt", ".safetensors") or source.startswith(("/", ".", "~"))


def _python(name: str, config: RewardConfig) -> Check:
    try:
        import_dotted(config.judge, f"judge {config.judge!r}", RewardError)
    except DanceError as error:
        return Check(name, False, str(error), "write package.module:function of an installed module, or of this folder")
    return Check(name, True, f"{config.judge} is there")


def _service(name: str, config: RewardConfig) -> Check:
    try:
        judge: Any = load_reward(name, config.model_copy(update={"options": {**config.options, "wait": 0}}))
    except DanceError as error:
        return Check(
            f"{name} (service)", False, str(error), "start it with `dancegrpo serve-reward`, or mend its address"
        )
    inner = getattr(judge, "reward", judge)
    told = f"{inner.judge} answers"
    inner.close()
    return Check(f"{name} (service)", True, told)


def _extra(name: str, group: str, told: str = "") -> Check:
    if _installed(group):
        return Check(name, True, told or f"dancegrpo[{group}] is installed")
    return Check(name, False, f"dancegrpo[{group}] is not installed", f"pip install 'dancegrpo[{group}]'")
