"""From a recipe's words to a judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from dancegrpo.dotted import import_dotted, nearest
from dancegrpo.errors import DanceError, RewardError
from dancegrpo.rewards.base import FunctionReward, Reward, describe
from dancegrpo.rewards.catalog import CATALOG
from dancegrpo.rewards.compose import Binary, OnDevice, OverFrames, TimeLimit
from dancegrpo.rewards.panel import Judges
from dancegrpo.settings import RewardConfig

IN_PYTHON = "python:"
"""Begins the `judge` of one that was handed over as a Python object: a config names it but cannot load it."""


def load_judges(configs: Mapping[str, RewardConfig]) -> Judges:
    """The panel of a run, by the names the recipe gives its judges. Raises RewardError as `load_reward` does."""
    rewards = {name: load_reward(name, config) for name, config in configs.items()}
    return Judges(rewards, {name: config.weight for name, config in configs.items()})


def load_reward(name: str, config: RewardConfig) -> Reward:
    """The judge that `config` describes; `name` is what the run calls it.

    `config.judge` is a shipped name or `package.module:attribute`, looked up in the current folder too. The attribute
    is a class (built with the options), an object that is a `Reward` already, or a function in the convention of
    `FunctionReward`: its options become keyword arguments, but for `batch_size`, which bounds the images per call.
    `config.device`, `config.frames`, `config.timeout` and `config.threshold` wrap it in `OnDevice`, `OverFrames`,
    `TimeLimit` and `Binary`; `config.ranks` is for `load_placed` to read.
    Raises RewardError for an unknown judge, a failing import, a missing or unknown option, a device that is not here.
    """
    place = None if config.device is None else find_device(name, config.device)
    reward = _load(name, config)
    frames = config.frames or ("mean" if getattr(reward, "pictures_only", False) else None)
    if place is not None:
        if getattr(reward, "remote", False):
            raise RewardError(f"device={config.device} of judge {name!r}, which runs elsewhere: leave it away.")
        reward = OnDevice(reward, place)
    if frames is not None:
        reward = OverFrames(reward, frames)
    if config.timeout is not None:
        if not getattr(reward, "in_evaluation", True):
            raise RewardError(f"timeout={config.timeout:g} of judge {name!r}: people are given time by options.wait.")
        reward = TimeLimit(reward, config.timeout)
    return reward if config.threshold is None else Binary(reward, config.threshold)


def find_device(name: str, device: str) -> torch.device:
    """A judge's device by its name. Raises RewardError, saying what there is, where this machine has none such."""
    here = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        here += [f"{kind.type if kind else ''}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or not any(known in (str(found), f"{found}:0") for known in here):
        raise RewardError(
            f"device={device!r} of judge {name!r} is not here, this machine has {_list(here)}: name one of them, or "
            "leave it away."
        )
    return found


def _load(name: str, config: RewardConfig) -> Reward:
    if config.judge.startswith(IN_PYTHON):
        raise RewardError(
            f"judge {name!r} ({config.judge.removeprefix(IN_PYTHON)}) was given in Python and has no name to load: "
            f"call dancegrpo.train(resume=..., rewards={{{name!r}: ...}})."
        )
    options = dict(config.options)
    target = _resolve(config.judge)
    if inspect.isclass(target):
        _check_options(config.judge, target, (), options)
        target, options = _build(config.judge, target, options), {}
    if isinstance(target, Reward):
        if options:
            raise RewardError(
                f"judge {config.judge!r} is an object already built: remove its options {_list(options)}."
            )
        return target
    if not callable(target):
        raise RewardError(f"judge {config.judge!r} is a {type(target).__name__}: name a function, a class or a Reward.")
    batch_size = options.pop("batch_size", None)
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise RewardError(f"judge {config.judge!r} has batch_size={batch_size!r}: use a whole number of 1 or more.")
    _check_options(config.judge, target, ([], []), options)
    return FunctionReward(partial(target, **options) if options else target, name, batch_size)


def _resolve(judge: str) -> Any:
    if ":" not in judge and judge not in CATALOG:
        hint = nearest(judge, CATALOG)
        names = _list(sorted(CATALOG))
        raise RewardError(f"judge {judge!r} is unknown{hint}: use {names}, or package.module:function.")
    path = CATALOG[judge].target if judge in CATALOG else judge
    return import_dotted(path, f"judge {judge!r}", RewardError)


def _build(judge: str, cls: type, options: Mapping[str, Any]) -> Any:
    try:
        return cls(**options)
    except DanceError:
        raise
    except Exception as error:
        raise RewardError(f"judge {judge!r} could not be built: {describe(error)}; check its options.") from error


def _check_options(judge: str, target: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Refuse options that do not fit before anything heavy is loaded."""
    try:
        signature = inspect.signature(target)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        known = _list(list(signature.parameters)[len(args) :]) or "none"
        raise RewardError(f"judge {judge!r}: {error}; its options are: {known}.") from error


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
