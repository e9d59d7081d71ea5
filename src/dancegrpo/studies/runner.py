"""Runs of a study as processes of their own, as many at a time as there are workers."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dancegrpo.config import dump_config
from dancegrpo.files import remove, write_text
from dancegrpo.run_folder import RunFolder
from dancegrpo.studies.plan import Job


class Runner(Protocol):
    """Trains a job in a folder, or goes on with it there; returns an exit code. Called from several threads."""

    def __call__(self, job: Job, folder: Path, log: Path, threads: int) -> int:
        """folder: the run's own. log: where its output goes. threads: the processor's, for this run."""
        ...

    def stop(self) -> None:
        """Asks the runs under way to save and stop."""
        ...


class Processes:
    """Each run is `dancegrpo train` in a process of its own."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def __call__(self, job: Job, folder: Path, log: Path, threads: int) -> int:
        """See `Runner`. A folder with an unfinished run is resumed."""
        started = folder.is_dir() and (folder / "config.yaml").is_file()
        if started:
            words = ["--resume", str(folder)]
        else:
            remove(folder)  # a run that was killed before it wrote its settings
            settings = log.with_suffix(".yaml")
            own = {"threads": threads, "output": str(folder.parent)}
            write_text(settings, dump_config(job.config.model_copy(update=own)))
            words = [str(settings), "--out", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            with self._lock:
                if self._stopped:
                    return 0
                process = subprocess.Popen(
                    [sys.executable, "-m", "dancegrpo", "train", *words],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """SIGTERM to each: it finishes its iteration, saves and ends."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


@dataclass(frozen=True)
class Ended:
    """A run that is over. code: 0 also where it was asked to stop. error: the last line it said, where it failed.
    seconds: from its start, or from where it was resumed."""

    job: Job
    folder: Path
    code: int
    error: str | None
    seconds: float


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder went to its end."""
    return (folder / "config.yaml").is_file() and RunFolder(folder).info().get("status") == "finished"


def work(
    take: Callable[[], Job | None],
    run: Runner,
    out: Path,
    *,
    workers: int,
    threads: int,
    stopped: threading.Event,
) -> Iterator[Ended]:
    """Runs what `take` gives, `workers` at a time, and yields each as it ends, until there is no more or `stopped`.

    take: the next job, or None: nothing now; it is asked again whenever a run has ended.
    """
    ended: queue.Queue[Ended] = queue.Queue()
    running = 0
    while True:
        while running < workers and not stopped.is_set() and (job := take()) is not None:
            threading.Thread(target=_work_one, args=(job, run, out, threads, ended), daemon=True).start()
            running += 1
        if not running:
            return
        try:
            one = ended.get(timeout=0.2)  # not for ever: signals are only heard between
        except queue.Empty:
            continue
        running -= 1
        yield one


def _work_one(job: Job, run: Runner, out: Path, threads: int, ended: queue.Queue[Ended]) -> None:
    folder, log = out / "runs" / job.key, out / "logs" / f"{job.key}.log"
    started = time.perf_counter()
    try:
        code = run(job, folder, log, threads)
        error = None if code == 0 else _last_line(log) or f"exit code {code}"
    except Exception as broken:  # whatever it is, the other runs go on
        code, error = 1, f"{type(broken).__name__}: {broken}"
    ended.put(Ended(job, folder, code, error, time.perf_counter() - started))


def _last_line(log: Path) -> str:
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


@contextmanager
def stop_signals(runner: Runner) -> Iterator[tuple[threading.Event, list[int]]]:
    """Ctrl-C and SIGTERM set the event and ask the runner to stop: (event, the signals that came)."""
    stopped, came = threading.Event(), list[int]()

    def request(number: int, _: object) -> None:
        came.append(number)
        stopped.set()
        # In a thread: the lock it takes may be held by the very code that this signal interrupts.
        threading.Thread(target=runner.stop, daemon=True).start()

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped, came
    finally:
        runner.stop()  # an error of our own may have ended the work; without one, nothing runs any more
        for number, handler in previous.items():
            signal.signal(number, handler)


def commit() -> str | None:
    """The checkout's commit that this package runs from, with `-dirty` where its files were changed; None elsewhere."""
    here = Path(__file__).parents[1]
    try:
        told = [_git(here, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", str(here)))]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0] + ("-dirty" if told[1] else "")


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()
