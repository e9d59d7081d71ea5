"""The loop: prompts -> encode -> rollout -> decode -> rewards -> advantages -> update -> checkpoint, report."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dancegrpo import evaluate as measure
from dancegrpo.algorithms import build_algorithm
from dancegrpo.background import BackgroundWriter
from dancegrpo.config import RunConfig, load_config
from dancegrpo.distributed import ALONE, World, started
from dancegrpo.errors import ConfigError, RankError
from dancegrpo.faults import memory_explained, stop_requests
from dancegrpo.group_sampler import GroupSampler
from dancegrpo.health import (
    Clock,
    Decision,
    Guard,
    Looks,
    Monitor,
    log_prob_rounding,
    peak_memory_mb,
    restart_peak,
    reward_metrics,
    use_threads,
)
from dancegrpo.milestones import Milestones
from dancegrpo.policies import Condition, Policy, load_policy
from dancegrpo.policies.cache import CachedEncoder, ConditionCache
from dancegrpo.preferences import match_pairs
from dancegrpo.progress import Progress
from dancegrpo.prompts import Prompt, open_prompts
from dancegrpo.report import FILE_NAME, write_report
from dancegrpo.rewards import Judges, Reward, Scores
from dancegrpo.run_checks import refuse_idle_negative, require_batches, require_images, require_judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.run_plan import RunPlan
from dancegrpo.run_settings import find_judge, own_folder, resumed_config, with_rewards
from dancegrpo.run_state import RunState
from dancegrpo.sampling import step_plan
from dancegrpo.tracking import Tracker, open_tracker
from dancegrpo.update import Updater
from dancegrpo.watchdog import lost_connection

_calls = itertools.count()
"""Of `train` in this process: a script that torchrun starts again makes them in the same order."""


_A_DAY = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    run_dir: Path
    report: Path
    iterations: int
    """Iterations finished in all."""
    main: bool = True
    """False on those of several processes that leave writing and printing to the first."""
    verdict: str | None = None
    """Why health ended the run before its last iteration (see `docs/health.md`)."""


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
    to go on with; "auto" goes on with what `out` holds, and starts there where it holds nothing.

    Started again by torchrun (`--max-restarts`), it goes on with its own run.

    Raises a `DanceError` for whatever is the user's to mend.
    """
    folder, call = None, next(_calls)
    if resume is not None and str(resume) != "auto":
        if out is not None:
            raise ConfigError(f"--out {out} does not go with --resume: the run goes on in {resume}, leave --out away")
        folder = RunFolder.open(Path(resume))
        settings = resumed_config(folder, config, overrides, rewards)
    elif config is None:
        raise ConfigError("no recipe given: name one (`dancegrpo recipes` lists them), or a run folder to resume")
    elif resume is not None and out is None:
        raise ConfigError("--resume auto needs a folder to look in: name it with --out")
    else:
        settings = config if isinstance(config, RunConfig) and not overrides else load_config(config, overrides)
        settings = with_rewards(settings, rewards)
    with started(settings.parallel) as world, memory_explained(settings, world.place):
        require_judges(settings, world)
        judges = {name: find_judge(name, r, rewards, world) for name, r in settings.rewards.items()}
        trainer = Trainer(settings, judges, world)
        world.all_reach("loaded", seconds=_A_DAY)  # no message: those have a time limit, which a download has not
        again = folder is not None
        if folder is None:
            path = Path(out) if out is not None else None
            found = own_folder(settings, path, world, call, auto=resume is not None) if world.main else None
            place, again = world.from_main(found)
            folder = RunFolder(Path(place))
            verdict = world.from_main(folder.info().get("verdict") if again else None)
            if verdict is not None:  # started again by a scheduler: it would only end like this once more
                return RunResult(folder.path, folder.path / FILE_NAME, 0, world.main, verdict)
        if world.watchdog is not None:
            world.watchdog.folder = folder.path
        if not world.main:
            return trainer.fit(replace(folder, writes=False), resume=again)
        with folder.lock():
            if again:
                folder.write_config(settings)
            return trainer.fit(folder, resume=again)


class Trainer:
    """One run: what `fit` loops over, and the pieces one iteration needs."""

    def __init__(self, config: RunConfig, judges: Mapping[str, Reward], world: World = ALONE) -> None:
        self.config, self.world = config, world
        self.threads = use_threads(config.threads, world.neighbours)
        require_batches(config, world)
        prompts = config.prompts
        match_pairs(config)
        self.prompts = open_prompts(prompts.train, **prompts.reading())
        known = min(len(self.prompts), prompts.limit or len(self.prompts))
        self.sampler = GroupSampler(known, prompts.per_iteration, config.seed)
        self.held_out = measure.held_out(config)
        self.policy: Policy = load_policy(config.model, config.rollout, seed=config.seed)
        refuse_idle_negative(config, self.policy)
        require_images(config, self.policy, self.prompts, self.held_out)
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
        self.judges = Judges(judges, weights)
        if not world.leads:  # what it draws, the first rank of its share shows to the judges
            self.judges = self.judges.unasked(but_trained=config.algorithm.name == "refl")
        self.judges = self.judges.to(self.policy.device)
        self.algorithm = build_algorithm(config, self.judges, world)
        if self.algorithm.needs_reference:
            self.policy.keep_reference()
        self.policy.shard(world)
        self.monitor, self.guard = Monitor(config.model_dump(mode="json")), Guard(config.health)
        self.updater = Updater(self.policy, config, world, self.guard)
        self.plan = RunPlan(config, self.policy, self.algorithm)
        self.plan.derived()  # what cannot be is refused before there is a folder
        self._whole: int | None = 0
        """Iterations after which the state in memory is that of a run; None in the middle of one."""
        self._start = 0
        """Iterations done when this process took the run up."""
        self._row: dict[str, Any] = {}
        """Metrics that are not yet written."""
        self._verdict: str | None = None
        if world.size > 1:
            parts = getattr(self.policy.pipeline, "components", {}).values()
            world.place.follow({id(part): part for part in (self.policy.module, *parts)}.values())
        self.writer = BackgroundWriter()
        self.state = RunState(config, self.updater, self.algorithm, self.judges, self.guard, world)
        self.milestones = Milestones(
            config,
            self.policy,
            self.encoder,
            self.judges,
            self.prompts,
            self.held_out,
            self.updater,
            self.writer,
            world,
        )

    def fit(self, folder: RunFolder, *, resume: bool = False) -> RunResult:
        """Runs to `config.iterations`, leaving checkpoints, evaluations, samples and the report in the folder."""
        config, status = self.config, "failed"
        console = Console(stderr=True, quiet=not self.world.main)  # standard output is for results
        with Progress(config.iterations, 0, config.name, console=console) as progress, stop_requests() as stopped:
            done, seconds = self._resume(folder, progress) if resume else (0, 0.0)
            self._keep_sizes(folder, progress)
            self._epoch = time.perf_counter() - seconds
            folder.describe_machine(str(self.policy.device), self.threads, self.plan.derived())
            progress.message(self.plan.text())
            if ties := self.prompts.ties:
                progress.message(f"{ties} ties of {config.prompts.train} make no pair and are left out")
            settings = config.model_dump(mode="json")
            tracking = config.tracking if self.world.main else config.tracking.model_copy(update={"backend": "none"})
            tracker = open_tracker(tracking, folder.path, folder.path.name, settings, first_step=done)
            try:
                with self.state.saving(folder), self.writer:
                    done = self._loop(folder, done, progress, tracker, stopped)
                status = "finished" if done >= config.iterations else "stopped"
            finally:
                tracker.finish()
                folder.write_info(status=status, seconds=self._seconds())
            report = write_report(folder.path) if self.world.main else folder.path / FILE_NAME
            self.world.barrier()
            progress.message(f"{status} after {done} iterations")
        return RunResult(folder.path, report, done, self.world.main, self._verdict)

    def _loop(
        self, folder: RunFolder, start: int, progress: Progress, tracker: Tracker, stopped: threading.Event
    ) -> int:
        """Iterations `start` to the last; returns how many are done. A request to stop is heard after each.

        What was learnt since the last checkpoint is saved before an error ends the run.
        """
        self._whole = self._start = start
        try:
            with memory_explained(self.config, self.world.place):
                return self._iterations(folder, start, progress, tracker, stopped)
        except Exception as error:
            self._rescue(folder, error, progress)
            raise

    def _iterations(
        self, folder: RunFolder, start: int, progress: Progress, tracker: Tracker, stopped: threading.Event
    ) -> int:
        config, done, world = self.config, start, self.world
        self.milestones.reach(folder, done, progress, tracker)
        asked = world.any(stopped.is_set())
        while done < config.iterations and not asked:
            metrics = self.iterate(done)
            decision = self._watch(metrics, progress)
            done += 1
            self.state.check(progress)
            self._whole, self._row = done, metrics
            trouble = self._tell(folder, metrics, done, progress, tracker)
            if decision.action != "go on":
                self._whole = None  # an error on the way back leaves neither these weights nor those
                self.state.roll_back(folder, done, self._seconds(), decision, progress)
                self._whole = done
            if decision.action == "stop":  # with the last good weights: they are what is exported
                folder.write_info(verdict=decision.reason)
                self._verdict = decision.reason
                self._heard(stopped, trouble)
                break
            asked = self._heard(stopped, trouble)
            saved = done == config.iterations or _due(config.checkpoint.every, done) or asked
            saved = saved or (config.checkpoint.best and self.milestones.measures(done))
            if saved:
                # Before the evaluation: whoever asks to stop may not wait for it, and a resumed run makes it up.
                self._save(folder, done)
                self.writer.flush()  # a run that goes on from here does not draw again what was drawn before
            if not asked:
                self.milestones.reach(folder, done, progress, tracker)
            asked = world.any(stopped.is_set())
            if asked and not saved:  # asked to stop meanwhile
                self._save(folder, done)
        return done

    def _tell(
        self, folder: RunFolder, metrics: dict[str, Any], done: int, progress: Progress, tracker: Tracker
    ) -> Exception | None:
        """Writes and shows an iteration's metrics; returns what went wrong with that, for all ranks to hear of."""
        try:
            self.writer.check()
            folder.append_metrics(metrics)
            self._row = {}
            tracker.log(metrics, done)
            progress.iteration(metrics)
        except Exception as error:
            return error
        return None

    def _heard(self, stopped: threading.Event, trouble: Exception | None) -> bool:
        """Whether any rank was asked to stop; raises on every rank what went wrong on one."""
        told = self.world.gather_json([stopped.is_set(), None if trouble is None else str(trouble)])
        if trouble is not None:
            raise trouble
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                raise RankError(f"rank {rank} of {self.world.size} cannot go on: {reason}")
        return any(asked for asked, _ in told)

    def _save(self, folder: RunFolder, done: int) -> None:
        self.world.place.begin("save")
        self.state.save(folder, done, self._seconds())

    def _rescue(self, folder: RunFolder, error: Exception, progress: Progress) -> None:
        """Saves the last finished iteration before an error ends the run, where the state in memory is still that."""
        if self.world.size == 1:
            self.state.saver.wait()  # one that was under way counts
        done, kept = self._whole, self.state.saver.saved or self._start
        back = f"a resumed run repeats what came after iteration {kept}"
        if done is None:
            progress.message(f"the error came in the middle of an update, which is not saved: {back}")
        elif done != kept and (lost_connection(error) or not self.world.all_reach(f"rescue/{done}")):
            progress.message(f"nothing can be saved without the other ranks: {back}")
        elif done != kept:
            try:
                if self._row:
                    folder.append_metrics(self._row)
                self._save(folder, done)
                self.state.finish(folder)
                progress.message(f"saved after {done} iterations, before the error: nothing is lost")
            except Exception as failure:
                progress.message(f"{failure}: {back}")
        if self.world.watchdog is not None:
            self.world.watchdog.leaving = True  # what is left to do waits for nobody

    def _keep_sizes(self, folder: RunFolder, progress: Progress) -> None:
        """Goes on with the micro-batches that an earlier part of the run came to, and records those to come."""
        sizes, main = self.updater.micro_batch, self.world.main

        def record(changes: Sequence[Sequence[int]]) -> None:
            # Sharded ranks end where memory runs out: whichever it happens to records it.
            replace(folder, writes=main or self.world.together).write_info(micro_batch_sizes=changes)
            iteration, _, size = changes[-1]
            progress.message(f"out of memory in the update of iteration {iteration}: micro-batches of {size} from here")

        sizes.changes = [list(change) for change in self.world.from_main(folder.info().get("micro_batch_sizes", []))]
        sizes.record = record

    def _resume(self, folder: RunFolder, progress: Progress) -> tuple[int, float]:
        """Goes on where the folder's newest whole checkpoint ends: (iterations done, seconds so far)."""
        done, seconds, rows = self.state.restore(folder, progress)
        for row in rows:
            progress.iteration(row)
            if self.config.health.watch != "none":
                self.monitor.see(row)
        return done, seconds

    def _seconds(self) -> float:
        return time.perf_counter() - self._epoch

    def _watch(self, metrics: dict[str, Any], progress: Progress) -> Decision:
        """Tells of what is wrong with an iteration, adds the count of alarms to its metrics, and says what to do."""
        alarms = self.monitor.see(metrics) if self.config.health.watch != "none" else []
        metrics["health/alarms"] = len(self.monitor.standing)
        for alarm in alarms:
            progress.message(alarm.sentence)
        return self.guard.after(metrics["iteration"], alarms)

    def iterate(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns its metrics, flat."""
        place, policy = self.world.place, self.policy
        clock = Clock(policy.device, place)
        place.begin("start", iteration)
        restart_peak(policy.device)
        prompts = [self.prompts[index] for index in self.sampler.indices(iteration)]
        with clock("encode"):
            condition = self.encoder.encode(prompts)
        batch, scores, looks = self._sample(iteration, prompts, condition, clock)
        self._whole = None
        with clock("update"):
            learning = self.algorithm.learn(policy, batch, scores, prompts)
            metrics = self.updater.update(learning)
        if learning.scores and not scores:  # judged while learning
            self.judges.require_valid(learning.scores)
        group = torch.arange(len(prompts)).repeat_interleave(self.config.rollout.group_size)
        return {
            "iteration": iteration,
            **reward_metrics(learning.scores, learning.advantage, group),
            **looks.gathered(self.world).metrics(group, learning.advantage),
            **metrics,
            "train/log_prob_rounding": log_prob_rounding(self.config, policy.dynamics, iteration),
            **self.guard.metrics(),
            **clock.metrics(),
            "memory/peak_mb": peak_memory_mb(policy.device),
        }

    @torch.no_grad()
    def _sample(
        self, iteration: int, prompts: Sequence[Prompt], condition: Condition, clock: Clock
    ) -> tuple[Any, dict[str, Scores], Looks]:
        """Draws and judges this rank's share of the groups: (what the algorithm keeps, all ranks' scores, looks)."""
        config, policy, looks = self.config, self.policy, Looks()
        drawn = [prompt for prompt in prompts for _ in range(config.rollout.group_size)]
        drawn = drawn[self.world.rows(len(drawn), config.rollout.batch_size).slice]
        scores: dict[str, Scores] = {}
        with self.judges.scoring(drawn) as scoring:

            def judge(x0: Tensor, told: Condition) -> None:
                with clock("decode"):
                    media = policy.decode(x0, told)
                with clock("reward"):
                    scoring.add(media)
                if config.health.watch != "none":
                    looks.add(media)

            with clock("rollout"), policy.sampling():
                batch = self.algorithm.collect(policy, condition, iteration, judge)
            if scoring.arrived:
                with clock("reward"):
                    own = {name: verdict.to("cpu") for name, verdict in self.judges.finish(scoring).items()}
                    scores = {name: verdict.gathered(self.world) for name, verdict in own.items()}
                self.judges.require_valid(scores)
        return batch, scores, looks


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0
