"""Re-runs studies: tuning first, then every arm seed by seed; what is finished is kept and never run again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dancegrpo.errors import ConfigError, DanceError
from dancegrpo.files import write_atomically, write_text
from dancegrpo.progress import duration
from dancegrpo.studies.checks import check_measured, diverged
from dancegrpo.studies.pace import Pace
from dancegrpo.studies.plan import TUNING_SEED, Job, Plan
from dancegrpo.studies.results import Result, distill, failed, read_results, relabelled, write_result
from dancegrpo.studies.rows import write_row
from dancegrpo.studies.runner import Ended, Processes, Runner, commit, is_finished, stop_signals, work
from dancegrpo.studies.study import Study, load_study, study_names

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What `reproduce` did. failures: a line for each run that failed. signal: what interrupted it, or None."""

    pages: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0; 1 with failures; 128 + the signal where one came, as shells count."""
        return 128 + self.signal if self.signal is not None else 1 if self.failures else 0


def studies_named(name: str) -> list[Study]:
    """`all`, a shipped study or a YAML file. Raises ConfigError."""
    return [load_study(each) for each in (study_names() if name == "all" else [name])]


def reproduce(
    studies: Sequence[Study],
    *,
    seeds: int = 3,
    out: Path = Path("reproduce"),
    results: Path | None = None,
    workers: int | None = None,
    rerun: bool = False,
    runner: Runner | None = None,
    say: Say = print,
) -> Outcome:
    """Runs what is missing of the studies and writes their pages.

    seeds: 0 to seeds - 1 of each arm. out: folder of the runs and their logs. results: of what is kept of them and of
    the pages; None = `out`. workers: runs at a time; None = one per core this process may use. rerun: as if there were
    no results yet. Raises DanceError for whatever is the user's to mend.
    """
    if not 1 <= seeds <= TUNING_SEED:
        raise ConfigError(f"--seeds {seeds}: use 1 to {TUNING_SEED}; seed {TUNING_SEED} is kept for tuning")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if workers is None else workers
    if workers < 1:
        raise ConfigError(f"--workers {workers}: use 1 or more")
    runner, outcome = runner or Processes(), Outcome()
    bench = Bench(studies, seeds, out, results or out, rerun, say)
    bench.settle()
    done, left = bench.progress()
    say(f"{done} of {done + len(left)} runs done; {workers} at a time")
    with stop_signals(runner) as (stopped, came):
        threads = max(1, cores // workers)
        for ended in work(bench.take, runner, out, workers=workers, threads=threads, stopped=stopped):
            bench.finish(ended, workers, stopping=stopped.is_set())
        outcome.signal = came[0] if came else None
    outcome.failures = bench.failures
    outcome.pages = bench.write_pages(seeds)
    return outcome


class Bench:
    """What is done and what is next, over all studies asked for."""

    def __init__(self, studies: Sequence[Study], seeds: int, out: Path, results: Path, rerun: bool, say: Say) -> None:
        self.studies, self.seeds, self.out, self.results, self.say = list(studies), seeds, out, results, say
        self.plans = {study.name: Plan(study) for study in self.studies}
        self.found = {study.name: read_results(results, study) for study in self.studies}
        others = [load_study(name) for name in study_names() if name not in self.plans and (results / name).is_dir()]
        known = [*self.found.values(), *(read_results(results, study) for study in others)]
        if rerun:
            self.found, known = {study.name: {} for study in self.studies}, []
        self.by_key = {
            result.key: (file, result) for found in known for file, result in found.items() if not result.error
        }
        self.started: set[str] = set()
        self.running: set[str] = set()
        self.lost: set[str] = set()
        self.failures: list[str] = []
        self.pace = Pace()
        for study in self.studies:
            self._try_all(study)

    def _try_all(self, study: Study) -> None:
        """Resolves every arm once, so that settings and judges that don't fit are refused before anything runs."""
        plan = self.plans[study.name]
        for arm in study.trained:
            tried = plan.candidates(arm)
            first = dict(tried[0].candidate or {}) if tried else {}
            for place in study.places:
                check_measured(study, plan.job(arm, place, 0, first))

    def choice(self, study: Study, arm: str) -> Mapping[str, Any] | None:
        """What tuning chose for an arm: {} where nothing is tuned, None while candidates are missing.

        Raises ConfigError where no candidate has a score.
        """
        tried = self.plans[study.name].candidates(arm)
        told = [self.done(job) for job in tried]
        if any(result is None for result in told):
            return None
        scored = [(result.column(study.main), job) for result, job in zip(told, tried, strict=True) if result]
        ranked = [(score, job) for score, job in scored if score is not None and math.isfinite(score)]
        if tried and not ranked:
            raise ConfigError(f"study {study.name}, arm {arm}: no candidate of tuning has a score in {study.main}")
        return dict(max(ranked, key=lambda pair: pair[0])[1].candidate or {}) if ranked else {}

    def done(self, job: Job) -> Result | None:
        """The job's result where it need not run (again).

        A candidate that diverged stands, and counts as the worst; one that failed otherwise is tried again by the next
        call, and counts as the worst within this one.
        """
        result = self.found[job.study].get(job.file)
        if result is None or result.key != job.key:
            return None
        stands = job.candidate is not None and (job.key in self.lost or diverged(result.error or ""))
        return result if result.error is None or stands else None

    def jobs(self, study: Study) -> Iterator[Job]:
        """The study's runs in order, as far as tuning has settled them."""
        plan = self.plans[study.name]
        for arm in study.trained:
            yield from plan.candidates(arm)
        tuned: dict[str, Mapping[str, Any]] = {}
        for arm in study.trained:
            try:
                chosen = self.choice(study, arm)
            except ConfigError as error:
                self._fail(str(error))
                self.lost.update(job.key for job in self._untuned(study, arm))
                continue
            if chosen is not None:
                tuned[arm] = chosen
        for seed in range(self.seeds):
            for place in study.places:
                yield from (plan.job(arm, place, seed, tuned[arm]) for arm in study.trained if arm in tuned)

    def settle(self) -> None:
        """Takes over whatever is known already: results of other studies, and finished runs."""
        changed = True
        while changed:  # a study's tuning, once settled, opens its arms
            changed = False
            for study in self.studies:
                for job in self.jobs(study):
                    if self.done(job) is None and self._known(job):
                        changed = True

    def _known(self, job: Job) -> bool:
        """Writes the job's result where the run exists, in whatever study. A run folder knows more than a result."""
        folder = self.out / "runs" / job.key
        if job.key not in self.running and is_finished(folder):
            return self._keep(job, folder)
        shared = self.by_key.get(job.key)
        if shared is None:
            return False
        file, result = shared
        needed = self._metric(job)
        if needed is not None and needed not in result.curves:
            return False
        write_result(self.results, job, relabelled(result, job))
        self._copy_row(file, job.file)
        self.found[job.study][job.file] = relabelled(result, job)
        return True

    def _copy_row(self, source: str, target: str) -> None:
        for suffix in (".webp", ".start.webp"):
            row = (self.results / source).with_suffix(suffix)
            if row.is_file():
                data = row.read_bytes()
                write_atomically((self.results / target).with_suffix(suffix), partial(_put, data))

    def _metric(self, job: Job) -> str | None:
        study = self.plans[job.study].study
        return study.curve if study.curve and job.candidate is None else None

    def _keep(self, job: Job, folder: Path) -> bool:
        needed = self._metric(job)
        try:
            result = distill(job, folder, self._commit_of(job), (needed,) if needed else ())
            write_result(self.results, job, result)
            if job.candidate is None and job.seed == 0:
                target, study = self.results / job.file, self.plans[job.study].study
                write_row(folder, target.with_suffix(".webp"))
                if job.arm == study.trained[0] and len(study.trained) < len(study.arms):
                    write_row(folder, target.with_suffix(".start.webp"), first=True)
        except DanceError as error:
            self._fail(f"{job.title}: {error}")
            return False
        self.found[job.study][job.file] = result
        self.by_key[job.key] = (job.file, result)
        return True

    def take(self) -> Job | None:
        """The next run that nobody has begun; None where all others wait for what is running."""
        for study in self.studies:
            for job in self.jobs(study):
                if job.key not in self.started and self.done(job) is None:
                    self.started.add(job.key)
                    self.running.add(job.key)
                    self._note_commit(job)
                    return job
        return None

    def _commit_of(self, job: Job) -> str | None:
        file = self.out / "logs" / f"{job.key}.commit"
        return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None

    def _note_commit(self, job: Job) -> None:
        """Beside the log, before it starts; a run that goes on with other code has two commits."""
        before = self._commit_of(job)
        begun = (self.out / "runs" / job.key / "config.yaml").is_file()
        commits = (before or "").split(", ") if begun and before else []
        now = commit()  # of each run as it starts: the code may change while a study is under way
        if now and now not in commits:
            commits.append(now)
        write_text(self.out / "logs" / f"{job.key}.commit", ", ".join(commits))

    def finish(self, ended: Ended, workers: int, *, stopping: bool) -> None:
        """Keeps what a run left, for every study that shares it, and tells how far things are."""
        job, folder = ended.job, ended.folder
        self.running.discard(job.key)
        if is_finished(folder):  # whatever the exit code: what it left is whole
            self.pace.add(job.recipe, job.config.iterations, ended.seconds)
            self.settle()
            self.say(self._line(ended, workers))
            return
        if stopping:
            return  # asked to stop: it goes on from its checkpoint next time
        error = ended.error or "it ended before its last iteration"
        self.lost.add(job.key)
        if ended.code >= 0:  # a process that was killed says nothing about its settings
            result = failed(job, error, self._commit_of(job))
            write_result(self.results, job, result)
            self.found[job.study][job.file] = result
        if job.candidate is not None and ended.code > 0:
            self.say(f"{job.title} ended in an error and counts as the worst: {error}")
        else:
            self._fail(f"{job.title}: {error} (log: {self.out / 'logs' / job.key}.log)")

    def _fail(self, line: str) -> None:
        if line not in self.failures:
            self.failures.append(line)
            self.say(f"failed: {line}")

    def _line(self, ended: Ended, workers: int) -> str:
        job = ended.job
        result = self.found[job.study].get(job.file)
        main = self.plans[job.study].study.main
        score = result.column(main) if result else None
        told = f", {main} {score:.4g}" if score is not None else ""
        done, left = self.progress()
        waiting = [job for job in left if job.key not in self.lost]
        seconds = sum(self.pace.seconds(job.recipe, job.config.iterations) for job in waiting)
        rest = f"; about {duration(seconds / workers)} left" if left else ""
        return f"[{done}/{done + len(left)}] {job.title}: {duration(ended.seconds)}{told}{rest}"

    def progress(self) -> tuple[int, list[Job]]:
        """Different runs done, and those left; for an arm that waits for its tuning, as if its first candidate won."""
        done, left = dict[str, Job](), dict[str, Job]()
        for study in self.studies:
            settled = set()
            for job in self.jobs(study):
                settled.add(job.arm if job.candidate is None else None)
                (done if self.done(job) else left)[job.key] = job
            for arm in (name for name in study.trained if name not in settled):
                left.update({job.key: job for job in self._untuned(study, arm)})
        return len(done), list(left.values())

    def _untuned(self, study: Study, arm: str) -> Iterator[Job]:
        """The runs of an arm that waits for its tuning, as if its first candidate won."""
        plan = self.plans[study.name]
        first = dict(plan.candidates(arm)[0].candidate or {})
        yield from (plan.job(arm, place, seed, first) for seed in range(self.seeds) for place in study.places)

    def write_pages(self, seeds: int) -> list[Path]:
        """The page of every study that has results, and the index."""
        from dancegrpo.studies.pages import write_index, write_page

        written = [write_page(study, self.results, seeds) for study in self.studies if self.found[study.name]]
        return [*written, write_index(self.results)] if written else []


def _put(data: bytes, file: Path) -> None:
    file.write_bytes(data)
