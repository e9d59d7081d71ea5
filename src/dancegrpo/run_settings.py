"""What a run is started or resumed with: settings that may change, judges that come as Python objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dancegrpo.config import RunConfig, diff_configs, load_config
from dancegrpo.distributed import ALONE, World
from dancegrpo.errors import CheckpointError
from dancegrpo.rewards import CATALOG, IN_PYTHON, FunctionReward, Reward, load_placed
from dancegrpo.run_folder import RunFolder
from dancegrpo.settings import RewardConfig

MAY_CHANGE = ("iterations", "output", "checkpoint.", "tracking.", "parallel.", "health.")
"""Settings that a resumed run may change: they do not touch what an iteration computes from its weights."""
MEMORY = (
    "rollout.batch_size",
    "rollout.store",
    "update.micro_batch_size",
    "evaluation.batch_size",
    "model.offload",
    "model.gradient_checkpointing",
    "model.vae_slicing",
)
"""Settings that may change too, after memory ran out: what they change is rounding."""


def resumed_config(
    folder: RunFolder,
    config: RunConfig | str | Path | None,
    overrides: Sequence[str],
    rewards: Mapping[str, Any] | None,
) -> RunConfig:
    """The run's own settings with the changes asked for. Raises CheckpointError naming those that may not change."""
    held = folder.config()
    if config is None:
        wanted = load_config(folder.config_file, overrides)
    else:
        wanted = config if isinstance(config, RunConfig) and not overrides else load_config(config, overrides)
    wanted = with_rewards(wanted, rewards)
    judges = {name: CATALOG[reward.judge] for name, reward in wanted.rewards.items() if reward.judge in CATALOG}
    placing = {f"rewards.{name}.options.{option}" for name, entry in judges.items() for option in entry.placing}
    placing |= {f"rewards.{name}.{key}" for name in wanted.rewards for key in ("device", "ranks")}
    changed = {
        key: pair
        for key, pair in diff_configs(held, wanted).items()
        if key not in placing and not key.startswith(MAY_CHANGE) and key not in MEMORY
    }
    if changed:
        listed = ", ".join(f"{key} ({before} -> {after})" for key, (before, after) in sorted(changed.items()))
        rule = "resume without them, or start a new run"
        raise CheckpointError(f"{folder.path} was started with other settings: {listed}; {rule}")
    return wanted


def with_rewards(config: RunConfig, rewards: Mapping[str, Any] | None) -> RunConfig:
    """The settings with judges that come as Python objects in place of the recipe's."""
    if not rewards:
        return config
    called = {name: getattr(judge, "__qualname__", type(judge).__name__) for name, judge in rewards.items()}
    named = {name: {"judge": f"{IN_PYTHON}{word}"} for name, word in called.items()}
    return load_config(config.model_dump() | {"rewards": named})


def own_folder(settings: RunConfig, out: Path | None, world: World, call: int, *, auto: bool) -> tuple[str, bool]:
    """The folder of a run that was not named to resume, and whether it holds one that this is to go on with: what
    torchrun started before under this launch, or with `auto` what `out` holds."""
    name = f"run/{call}"
    known = world.launch.recall(name) if world.launch else None
    if known is not None:
        return str(RunFolder.open(Path(known)).path), True
    if auto and out is not None and RunFolder(out).config_file.is_file():
        resumed_config(RunFolder(out), settings, (), None)  # refuses other settings
        folder, again = RunFolder(out), True
    else:
        folder, again = RunFolder.create(settings, out), False
    if world.launch:
        world.launch.remember(name, str(folder.path.absolute()))
    return str(folder.path), again


def find_judge(name: str, config: RewardConfig, given: Mapping[str, Any] | None, world: World = ALONE) -> Reward:
    """A judge of the run: the Python object of its name, where one was given, else what its settings name.

    Every rank must ask; those that `config.ranks` leaves out load nothing.
    """
    if given and name in given:
        judge = given[name]
        return judge if isinstance(judge, Reward) else FunctionReward(judge, name)
    return load_placed(name, config, world)
