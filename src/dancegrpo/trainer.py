"""The loop: prompts -> encode -> rollout -> decode -> rewards -> advantages -> update -> checkpoint, report."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dancegrpo import evaluate as measure
from dancegrpo.algorithms import build_algorithm
from dancegrpo.background import BackgroundWriter
from dancegrpo.checkpoint import Checkpoint, load_latest, save, truncate_metrics
from dancegrpo.config import RunConfig, diff_configs, load_config
from dancegrpo.errors import CheckpointError, ConfigError
from dancegrpo.files import write_json
from dancegrpo.group_sampler import GroupSampler
from dancegrpo.health import Clock, peak_memory_mb, restart_peak, reward_metrics, use_threads
from dancegrpo.policies import Condition, Policy, load_policy
from dancegrpo.policies.cache import CachedEncoder, ConditionCache
from dancegrpo.preferences import match_pairs
from dancegrpo.progress import Progress
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.report import write_report
from dancegrpo.rewards import (
    CATALOG,
    IN_PYTHON,
    MIN_VALID_FRACTION,
    FunctionReward,
    Judges,
    Reward,
    Scores,
    load_reward,
)
from dancegrpo.run_folder import RunFolder
from dancegrpo.run_plan import RunPlan
from dancegrpo.samples import MOVING_SHEET, SHEET, write_samples
from dancegrpo.sampling import step_plan
from dancegrpo.settings import RewardConfig
from dancegrpo.statistics import summarize
from dancegrpo.tracking import Tracker, open_tracker
from dancegrpo.update import Updater

MAY_CHANGE = ("iterations", "output", "checkpoint.", "tracking.")
"""Settings that a resumed run may change: they do not touch what any iteration computes."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    run_dir: Path
    report: Path
    iterations: int
    """Iterations finished in all."""


def train(
    config: RunConfig | str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    rewards: Mapping[str, Reward | Callable[..., Any]] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
) -> RunResult:
    """Trains a recipe, or goes on with a run.

    config: a validated config, a shipped recipe's name or a YAML file; None only with `resume`. overrides: dotted
    `key=value` strings. rewards: judges as Python objects, each of weight 1; they replace the recipe's. A plain
    function is called as `judge(images, prompts)` (see `FunctionReward`). out: the run's folder. resume: a run folder
    to go on with.

    Raises a `DanceError` for whatever is the user's to mend.
    """
    folder = None
    if resume is not None:
        if out is not None:
            raise ConfigError(f"--out {out} does not go with --resume: the run goes on in {resume}, leave --out away")
        folder = RunFolder.open(Path(resume))
        settings = _resumed_config(folder, config, overrides, rewards)
    elif config is None:
        raise ConfigError("no recipe given: name one (`dancegrpo recipes` lists them), or a run folder to resume")
    else:
        settings = config if isinstance(config, RunConfig) and not overrides else load_config(config, overrides)
        settings = _with_rewards(settings, rewards)
    judges = {name: _judge(name, r, rewards) for name, r in settings.rewards.items()}
    trainer = Trainer(settings, judges)
    if folder is None:
        folder = RunFolder.create(settings, Path(out) if out is not None else None)
    with folder.lock():
        if resume is not None:
            folder.write_config(settings)
        return trainer.fit(folder, resume=resume is not None)


class Trainer:
    """One run: what `fit` loops over, and the pieces one iteration needs."""

    def __init__(self, config: RunConfig, judges: Mapping[str, Reward]) -> None:
        self.config = config
        self.threads = use_threads(config.threads)
        prompts = config.prompts
        match_pairs(config)
        self.prompts = open_prompts(prompts.train, **prompts.reading())
        known = min(len(self.prompts), prompts.limit or len(self.prompts))
        self.sampler = GroupSampler(known, prompts.per_iteration, config.seed)
        self.held_out = measure.held_out(config)
        self.policy: Policy = load_policy(config.model, config.rollout, seed=config.seed)
        self._refuse_idle_negative()
        self._require_images()
        if config.offline:
            _ = self.policy.media_shape  # a model that cannot learn from recorded pictures is refused now
        cache = (
            ConditionCache(Path(config.output) / ".conditions", prompts.cache_mb * 1_000_000)
            if prompts.cache_mb
            else None
        )
        self.encoder = CachedEncoder(self.policy, cache)
        if not config.offline:  # a plan that cannot be is refused now
            step_plan(config.rollout, self.policy.dynamics, 1, config.seed, 0)
        weights = {name: reward.weight for name, reward in config.rewards.items()}
        self.judges = Judges(judges, weights).to(self.policy.device)
        self.algorithm = build_algorithm(config, self.judges)
        if self.algorithm.needs_reference:
            self.policy.keep_reference()
        self.updater = Updater(self.policy, config)
        self.plan = RunPlan(config, self.policy, self.algorithm)
        self.plan.derived()  # what cannot be is refused before there is a folder
        self.writer = BackgroundWriter()
        self._warned = False

    def _refuse_idle_negative(self) -> None:
        """Raises ConfigError for a negative prompt that the model would never be told."""
        negative, model = self.config.prompts.negative, self.config.model
        if negative and not self.policy.guided:
            scale = "true_cfg_scale" if "true_cfg_scale" in getattr(self.policy, "settings", ()) else "guidance_scale"
            raise ConfigError(
                f"prompts.negative={negative!r} would do nothing: {model.path} at model.{scale}="
                f"{getattr(model, scale):g} uses no classifier-free guidance; leave it empty"
            )

    def _require_images(self) -> None:
        """Raises ConfigError where the model animates images and the prompts bring none."""
        if not self.policy.takes_image:
            return
        prompts, held_out = self.config.prompts, self.held_out
        lacking = next((f"held-out prompt {prompt.id}" for prompt in held_out if prompt.image is None), None)
        for key, source, place in (
            ("train", prompts.train, self.prompts.first_without_image),
            ("evaluation", prompts.evaluation, lacking),
        ):
            if place is not None:
                raise ConfigError(
                    f"prompts.{key}={source} has prompts without images ({place} first), and {self.config.model.path} "
                    "animates images: give each an `image`, or draw them first (`dancegrpo make-images`)"
                )

    def fit(self, folder: RunFolder, *, resume: bool = False) -> RunResult:
        """Runs to `config.iterations`, leaving checkpoints, evaluations, samples and the report in the folder."""
        config, status = self.config, "failed"
        console = Console(stderr=True)  # standard output is for results
        with Progress(config.iterations, 0, config.name, console=console) as progress, _stop_requests() as stopped:
            done, seconds = self._restore(folder, progress) if resume else (0, 0.0)
            self._epoch = time.perf_counter() - seconds
            folder.describe_machine(str(self.policy.device), self.threads, self.plan.derived())
            progress.message(self.plan.text())
            if ties := self.prompts.ties:
                progress.message(f"{ties} ties of {config.prompts.train} make no pair and are left out")
            settings = config.model_dump(mode="json")
            tracker = open_tracker(config.tracking, folder.path, folder.path.name, settings, first_step=done)
            try:
                with self.writer:
                    done = self._loop(folder, done, progress, tracker, stopped)
                status = "finished" if done >= config.iterations else "stopped"
            finally:
                tracker.finish()
                folder.write_info(status=status, seconds=time.perf_counter() - self._epoch)
            report = write_report(folder.path)
            progress.message(f"{status} after {done} iterations")
        return RunResult(folder.path, report, done)

    def _loop(
        self, folder: RunFolder, start: int, progress: Progress, tracker: Tracker, stopped: threading.Event
    ) -> int:
        """Iterations `start` to the last; returns how many are done. A request to stop is heard after each."""
        config, done = self.config, start
        self._evaluate_if_due(folder, done, progress, tracker)
        while done < config.iterations and not stopped.is_set():
            metrics = self.iterate(done)
            folder.append_metrics(metrics)
            tracker.log(metrics, done)
            progress.iteration(metrics)
            self._warn_of_rounding(metrics, progress)
            done += 1
            saved = done == config.iterations or _due(config.checkpoint.every, done) or stopped.is_set()
            if saved:
                # Before the evaluation: whoever asks to stop may not wait for it, and a resumed run makes it up.
                self._save(folder, done)
            try:
                if saved:
                    self.writer.flush()  # a run that goes on from here does not draw again what was drawn before
                else:
                    self.writer.check()
                if not stopped.is_set():
                    self._evaluate_if_due(folder, done, progress, tracker)
            except Exception:  # a sample that cannot be written may not cost what was learnt since the last checkpoint
                if not saved:
                    self._save(folder, done)
                raise
            if stopped.is_set() and not saved:  # asked to stop meanwhile
                self._save(folder, done)
        return done

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its metrics, flat."""
        clock, policy, config = Clock(self.policy.device), self.policy, self.config
        restart_peak(policy.device)
        prompts = [self.prompts[index] for index in self.sampler.indices(iteration)]
        with clock("encode"):
            condition = self.encoder.encode(prompts)
        size = config.rollout.group_size
        drawn = [prompt for prompt in prompts for _ in range(size)]
        with torch.no_grad(), self.judges.scoring(drawn) as scoring:

            def judge(x0: Tensor, told: Condition) -> None:
                with clock("decode"):
                    media = policy.decode(x0, told)
                with clock("reward"):
                    scoring.add(media)

            with clock("rollout"):
                batch = self.algorithm.collect(policy, condition, iteration, judge)
            scores: dict[str, Scores] = {}
            if scoring.arrived:
                with clock("reward"):
                    scores = {name: verdict.to("cpu") for name, verdict in self.judges.finish(scoring).items()}
                self.judges.require_valid(scores)
        with clock("update"):
            learning = self.algorithm.learn(policy, batch, scores, prompts)
            metrics = self.updater.update(learning)
        if learning.scores and not scores:  # judged while learning
            self.judges.require_valid(learning.scores)
        group = torch.arange(len(prompts)).repeat_interleave(size)
        rewards = reward_metrics(learning.scores, learning.advantage, group)
        return {
            "iteration": iteration,
            **rewards,
            **metrics,
            **clock.metrics(),
            "memory/peak_mb": peak_memory_mb(policy.device),
        }

    def _weights(self) -> Any:
        """The weights that are measured and exported: the moving average where one is kept."""
        return nullcontext() if self.updater.ema is None else self.policy.use_weights(self.updater.ema)

    def _evaluate_if_due(self, folder: RunFolder, done: int, progress: Progress, tracker: Tracker) -> None:
        """Measures and draws before the first iteration, after the last, and every `evaluation.every` between."""
        config, last = self.config.evaluation, self.config.iterations
        if done not in (0, last) and not _due(config.every, done):
            return
        with self._weights():
            shown = self.held_out or [self.prompts[i] for i in range(min(len(self.prompts), config.samples))]
            if config.samples and not (folder.samples_folder(done) / SHEET).is_file():
                self._draw_samples(folder, done, shown[: config.samples], tracker)
            judges = self.judges.for_evaluation()
            if not config.num_prompts or not judges.rewards or folder.evaluation_file(done).is_file():
                return
            settings: Any = {"seed": config.seed, "batch_size": config.batch_size, "encode": self.encoder.encode}
            record = measure.evaluate(self.policy, judges, self.held_out, **settings)
        for name in judges.trained:
            known, total = sum(record["valid"][name]), len(self.held_out)
            if known < MIN_VALID_FRACTION * total:
                # Not written: a resumed run measures again, perhaps with the judge mended.
                told = f"judge {name!r} scored {known} of {total} pictures"
                progress.message(f"the evaluation after {done} iterations is left out: {told}")
                return
        record = {"iteration": done, "weights": "current" if self.updater.ema is None else "ema", **record}
        write_json(folder.evaluation_file(done), record)
        summary = summarize(record)
        progress.evaluation(summary)
        tracker.log({f"evaluation/{column}": mean for column, mean in summary.means.items()}, done)

    def _draw_samples(self, folder: RunFolder, done: int, prompts: list[Prompt], tracker: Tracker) -> None:
        """Draws now, writes while the run goes on; the tracker hears of them once they are written."""
        config, target, encode = self.config.evaluation, folder.samples_folder(done), self.encoder.encode
        labels = [{"text": prompt.text, "task": prompt.metadata.get("task")} for prompt in prompts]
        write_json(folder.path / "samples" / "prompts.json", labels)

        def track() -> None:
            tracker.log_images("samples", [target / SHEET], done)
            if (target / MOVING_SHEET).is_file():
                tracker.log_clips("clips", [target / MOVING_SHEET], done)

        size, fps = config.batch_size, self.config.model.fps
        drawn = measure.pictures(self.policy, prompts, seed=config.seed, batch_size=size, encode=encode)
        media = (sample for _, batch in drawn for sample in batch)
        write_samples(media, target, fps=fps, writer=self.writer, then=track)

    def _warn_of_rounding(self, metrics: Mapping[str, Any], progress: Progress) -> None:
        """Says once that sampling and training round differently by more than the clip range bears."""
        found, bound = metrics.get("train/replay_difference"), self.config.algorithm.clip_range / 10
        if found is not None and found > bound and not self._warned:
            self._warned = True
            progress.message(
                f"warning: log-probs of rollout and training differ by {found:.2g}, more than a tenth of "
                f"algorithm.clip_range={self.config.algorithm.clip_range}"
                + (": later updates of a rollout recompute them" if self.config.update.updates_per_rollout > 1 else "")
            )

    def _save(self, folder: RunFolder, done: int) -> None:
        seconds = time.perf_counter() - self._epoch
        state = {"num_updates": self.updater.num_updates, "algorithm": self.algorithm.state_dict(), "seconds": seconds}
        tensors = self.updater.state_dict() | {"algorithm": self.algorithm.tensors()}
        save(folder.path, Checkpoint(done, tensors, state), self.config.checkpoint.keep)

    def _restore(self, folder: RunFolder, progress: Progress) -> tuple[int, float]:
        """Loads the newest whole checkpoint and drops later metrics: (iterations done, seconds so far)."""
        checkpoint = load_latest(folder.path, progress.message)
        done = 0 if checkpoint is None else checkpoint.iteration
        for row in truncate_metrics(folder.metrics_file, done):
            progress.iteration(row)
        if checkpoint is None:
            return 0, 0.0
        self.updater.load_state_dict(checkpoint.tensors, checkpoint.state["num_updates"])
        self.algorithm.load_state_dict(checkpoint.state["algorithm"], checkpoint.tensors.get("algorithm", {}))
        return done, checkpoint.state["seconds"]


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM finish the iteration and save; a second Ctrl-C interrupts at once."""
    stopped = threading.Event()
    previous: dict[int, Any] = {}

    def request(number: int, _: object) -> None:
        stopped.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _resumed_config(
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
    wanted = _with_rewards(wanted, rewards)
    judges = {name: CATALOG[reward.judge] for name, reward in wanted.rewards.items() if reward.judge in CATALOG}
    placing = {f"rewards.{name}.options.{option}" for name, entry in judges.items() for option in entry.placing}
    changed = {
        key: pair
        for key, pair in diff_configs(held, wanted).items()
        if key not in placing and not key.startswith(MAY_CHANGE)
    }
    if changed:
        listed = ", ".join(f"{key} ({before} -> {after})" for key, (before, after) in sorted(changed.items()))
        rule = "resume without them, or start a new run"
        raise CheckpointError(f"{folder.path} was started with other settings: {listed}; {rule}")
    return wanted


def _with_rewards(config: RunConfig, rewards: Mapping[str, Any] | None) -> RunConfig:
    if not rewards:
        return config
    called = {name: getattr(judge, "__qualname__", type(judge).__name__) for name, judge in rewards.items()}
    named = {name: {"judge": f"{IN_PYTHON}{word}"} for name, word in called.items()}
    return load_config(config.model_dump() | {"rewards": named})


def _judge(name: str, config: RewardConfig, given: Mapping[str, Any] | None) -> Reward:
    if given and name in given:
        judge = given[name]
        return judge if isinstance(judge, Reward) else FunctionReward(judge, name)
    return load_reward(name, config)


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
