"""What a run measures and draws on its way: held-out evaluations and the fixed-seed samples, each at most once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from dancegrpo import evaluate as measure
from dancegrpo.background import BackgroundWriter
from dancegrpo.config import RunConfig
from dancegrpo.distributed import World
from dancegrpo.files import write_json
from dancegrpo.policies import Policy
from dancegrpo.policies.cache import CachedEncoder
from dancegrpo.progress import Progress
from dancegrpo.prompts import Prompt, PromptSource
from dancegrpo.rewards import MIN_VALID_FRACTION, Judges
from dancegrpo.run_folder import RunFolder
from dancegrpo.samples import MOVING_SHEET, SHEET, write_samples
from dancegrpo.statistics import summarize
from dancegrpo.tracking import Tracker
from dancegrpo.update import Updater


@dataclass(frozen=True)
class Milestones:
    """Evaluations and samples of one run, with the weights that are exported: the moving average where one is kept."""

    config: RunConfig
    policy: Policy
    encoder: CachedEncoder
    judges: Judges
    prompts: PromptSource
    """Those trained on: drawn where there are no held-out ones."""
    held_out: Sequence[Prompt]
    updater: Updater
    writer: BackgroundWriter
    world: World

    def due(self, done: int) -> bool:
        """Before the first iteration, after the last, and every `evaluation.every` between."""
        every = self.config.evaluation.every
        return done in (0, self.config.iterations) or (every > 0 and done % every == 0)

    def measures(self, done: int) -> bool:
        """Whether held-out prompts are scored then."""
        return self.due(done) and self.config.evaluation.num_prompts > 0

    def reach(self, folder: RunFolder, done: int, progress: Progress, tracker: Tracker) -> None:
        """Draws and measures where that is due after `done` iterations, and not yet done."""
        if not self.due(done):
            return
        config, ema = self.config.evaluation, self.updater.ema
        self.world.place.begin("evaluation")
        with nullcontext() if ema is None else self.policy.use_weights(ema):
            shown = self.held_out or [self.prompts[i] for i in range(min(len(self.prompts), config.samples))]
            # The main process looks for all: what it writes may appear between two looks.
            sheet, file = folder.samples_folder(done) / SHEET, folder.evaluation_file(done)
            drawn, measured = self.world.from_main([sheet.is_file(), file.is_file()])
            if config.samples and not drawn and self.world.with_main:
                self._draw(folder, done, shown[: config.samples], tracker)
            if not measured:
                self._measure(folder, done, progress, tracker)

    def _measure(self, folder: RunFolder, done: int, progress: Progress, tracker: Tracker) -> None:
        config, judges = self.config.evaluation, self.judges.for_evaluation()
        if not config.num_prompts or not judges.rewards:
            return
        settings: Any = {"seed": config.seed, "batch_size": config.batch_size, "encode": self.encoder.encode}
        record = measure.evaluate(self.policy, judges, self.held_out, **settings, world=self.world)
        for name in judges.trained:
            known, total = sum(record["valid"][name]), len(self.held_out)
            if known < MIN_VALID_FRACTION * total:
                # Not written: a resumed run measures again, perhaps with the judge mended.
                told = f"judge {name!r} scored {known} of {total} pictures"
                progress.message(f"the evaluation after {done} iterations is left out: {told}")
                return
        if not self.world.main:
            return
        record = {"iteration": done, "weights": "current" if self.updater.ema is None else "ema", **record}
        write_json(folder.evaluation_file(done), record)
        summary = summarize(record)
        progress.evaluation(summary)
        tracker.log({f"evaluation/{column}": mean for column, mean in summary.means.items()}, done)

    def _draw(self, folder: RunFolder, done: int, prompts: Sequence[Prompt], tracker: Tracker) -> None:
        """Draws now, writes while the run goes on; the tracker hears of them once they are written."""
        config, target = self.config.evaluation, folder.samples_folder(done)
        settings: Any = {"seed": config.seed, "batch_size": config.batch_size, "encode": self.encoder.encode}
        drawn = measure.pictures(self.policy, prompts, **settings)
        if not self.world.main:  # only for company
            for _ in drawn:
                pass
            return
        labels = [{"text": prompt.text, "task": prompt.metadata.get("task")} for prompt in prompts]
        write_json(folder.path / "samples" / "prompts.json", labels)

        def track() -> None:
            tracker.log_images("samples", [target / SHEET], done)
            if (target / MOVING_SHEET).is_file():
                tracker.log_clips("clips", [target / MOVING_SHEET], done)

        media = (sample for _, batch in drawn for sample in batch)
        write_samples(media, target, fps=self.config.model.fps, writer=self.writer, then=track)
