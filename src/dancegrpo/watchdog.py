"""Ranks that look after each other: one that is gone, stopped or hangs is named, with its stack, and all end."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dancegrpo.errors import RankError
from dancegrpo.launch import Launch, read
from dancegrpo.redaction import redact

BEAT = 5.0
"""Seconds between two signs of life."""
LOST = 30.0
"""Seconds of silence after which a rank is lost."""
EXIT_CODE = 75
"""Of a process that its watchdog ends: a failure that may be gone at the next try (sysexits.h)."""
_FRAMES = 40


class Place:
    """What a process's main thread is doing; other threads may read it at any time."""

    iteration: int | None
    """Counted from 0; None where no iteration is under way."""
    waiting: float | None
    """Since when it waits for other ranks, None = it does not."""
    moved: float
    """When it last did anything that shows here."""

    def __init__(self) -> None:
        self._phases: list[str] = ["load"]
        self.iteration, self.waiting, self.moved = None, None, time.monotonic()

    @property
    def phase(self) -> str:
        """The innermost phase."""
        return self._phases[-1]

    @property
    def idle(self) -> float:
        """Seconds without a sign; none while it loads, which may mean a download of any length."""
        return 0.0 if self.phase == "load" else time.monotonic() - self.moved

    def __str__(self) -> str:
        return self.phase if self.iteration is None else f"{self.phase} of iteration {self.iteration}"

    def begin(self, phase: str, iteration: int | None = None) -> None:
        """Something new, within nothing else."""
        self._phases, self.iteration, self.waiting = [phase], iteration, None
        self.move()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase inside the present one. An error leaves the place as it is: that is where it came from."""
        held, self._phases = self._phases, [*self._phases, phase]
        self.move()
        yield
        self._phases = held
        self.move()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Around what ends when all ranks have come."""
        self.waiting = time.monotonic()
        try:
            yield
        finally:
            self.waiting = None
            self.move()

    def move(self, *_: object) -> None:
        """A sign that the main thread goes on; also as a hook of a module."""
        self.moved = time.monotonic()

    def follow(self, modules: Iterable[object]) -> None:
        """Every forward pass of these is such a sign: a phase may take longer than anyone may hang."""
        for module in modules:
            if isinstance(module, torch.nn.Module):
                module.register_forward_pre_hook(self.move)


class Watchdog:
    """A thread that tells the other ranks of this one's life, and ends the process when one of them is lost.

    timeout: seconds that a rank may keep others waiting. end: given the one line to say when the process is to end.
    """

    folder: Path | None = None
    """The run's folder, once it is known: stacks are written there."""
    leaving = False
    """Whether the main thread is on its way out, and does not wait for anyone: it is left alone."""

    def __init__(
        self,
        launch: Launch,
        place: Place,
        timeout: float,
        *,
        end: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.launch, self.place, self.timeout, self.clock = launch, place, timeout, clock
        self.end = end or self._end
        self._others = [rank for rank in range(launch.size) if rank != launch.rank]
        self._keys = [launch.key(f"beat/{rank}") for rank in self._others]
        self._main = threading.get_ident()
        self._last: dict[int, tuple[str, float]] = {}  # of each other rank, the last beat and when it came
        self._looked = self._heard = clock()
        self._count = self._strikes = 0
        self._announced: float | None = None  # when another rank's end was heard of
        self._over, self._blaming, self._verdict = threading.Event(), False, ""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """The first sign of life, before anyone looks for it; then the thread."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Says goodbye, so that nobody misses this rank."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT)
        with suppress(Exception):
            self._beat(left=True)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank ends."""
        self.leaving = True
        first = redact(" ".join(str(error).split()))[:400]
        with suppress(Exception):
            self._announce(f"rank {self.launch.rank} of {self.launch.size} ended: {type(error).__name__}: {first}")

    def blame(self, error: BaseException) -> str:
        """Who it was that made a message to another rank fail: one line, within a few beats."""
        self._blaming, self.leaving, deadline = True, False, self.clock() + 4 * BEAT
        while not self._verdict and self.clock() < deadline:
            time.sleep(0.1)
        self.leaving = True
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return self._verdict or self._told(f"the connection to another rank broke ({first})")

    # --------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        while not self._over.wait(0.2 if self._blaming else BEAT):
            self.look()

    def look(self) -> None:
        """One round: tells of this rank, looks at the others, ends the process where that is due."""
        now = self.clock()
        if now - self._looked > 3 * BEAT:  # this process itself was stopped for a while: no silence counts
            self._last = {rank: (beat, now) for rank, (beat, _) in self._last.items()}
            self._heard = now
        self._looked = now
        try:
            self._beat()
            beats = self._beats(now)
            said = read(self.launch.client, self.launch.key("end"))
            self._heard = now
        except Exception:  # whatever the store's trouble: only that it lasts matters
            beats, said = {}, None
            if now - self._heard > LOST and not self.leaving:
                self._finish(f"the store of the launch has been silent for {now - self._heard:.0f} s")
            return
        if not self.leaving:
            self._judge(now, beats, said)

    def _judge(self, now: float, beats: Mapping[int, dict[str, Any]], said: str | None) -> None:
        lost = [rank for rank, beat in beats.items() if self._is_lost(rank, beat, now)]
        if lost:
            self._name_lost(lost[0], beats[lost[0]], now)
            return
        self._judge_hanging(now, beats)
        if said is not None and not self._over.is_set():
            # An error that all ranks met is each one's own to tell: a beat's time to do so.
            self._announced = now if self._announced is None else self._announced
            if now - self._announced >= BEAT or json.loads(said)["final"] or self._blaming:
                self._finish(json.loads(said)["text"])

    def _beat(self, *, left: bool = False) -> None:
        self._count += 1
        place, now = self.place, time.monotonic()
        told = {
            "count": self._count,
            "where": str(place),
            "waiting": None if place.waiting is None else now - place.waiting,
            "idle": place.idle,
            "loading": place.phase == "load",
            "host": _machine(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "left": left,
        }
        store, rank = self.launch.client, self.launch.rank
        store.set(self.launch.key(f"stack/{rank}"), self._stack())
        store.set(self.launch.key(f"beat/{rank}"), json.dumps(told))

    def _beats(self, now: float) -> dict[int, dict[str, Any]]:
        """The others' last beats, of those that are not through; notes when each came."""
        beats: dict[int, dict[str, Any]] = {}
        if not self.launch.client.check(self._keys):  # not all have begun
            return beats
        for rank, value in zip(self._others, self.launch.client.multi_get(self._keys), strict=True):
            text, beat = value.decode(), json.loads(value)
            if self._last.get(rank, ("", 0.0))[0] != text:
                self._last[rank] = (text, now)
            if not beat["left"]:
                beats[rank] = beat
        return beats

    def _is_lost(self, rank: int, beat: Mapping[str, Any], now: float) -> bool:
        silent = now - self._last[rank][1]
        return silent > (3 * BEAT if self._blaming else LOST) or not _lives(beat)

    def _name_lost(self, rank: int, beat: Mapping[str, Any], now: float) -> None:
        how = f"has been silent for {now - self._last[rank][1]:.0f} s" if _lives(beat) else "is gone"
        text = f"rank {rank} of {self.launch.size} {how}, last seen in {beat['where']}"
        if self._announce(text, final=True):
            stack = read(self.launch.client, self.launch.key(f"stack/{rank}")) or ""
            file = self._stacks_file(rank)
            if file is not None:
                with suppress(OSError):
                    file.write_text(f"{text}\n{stack}", encoding="utf-8")
            sys.stderr.write(f"the last stack of rank {rank}, innermost frame last:\n{stack}")
        if beat["host"] == _machine() and _lives(beat) and beat["pid"] != os.getpid():
            with suppress(OSError):
                os.kill(beat["pid"], signal.SIGKILL)  # stopped, it would not hear torchrun, which waits long for it
        self._finish(text)

    def _judge_hanging(self, now: float, beats: Mapping[int, dict[str, Any]]) -> None:
        """A rank that kept another waiting for too long, or all of them where nobody went on at all."""
        if not beats or self.place.phase == "load" or any(beat["loading"] for beat in beats.values()):
            return  # whoever waits for one that loads waits for a download, of any length
        place, clock = self.place, time.monotonic()
        waits = {rank: beat["waiting"] for rank, beat in beats.items()}
        idle = {rank: beat["idle"] for rank, beat in beats.items()}
        waits[self.launch.rank] = None if place.waiting is None else clock - place.waiting
        idle[self.launch.rank] = place.idle
        longest = max((wait for wait in waits.values() if wait is not None), default=0.0)
        if max(longest, min(idle.values())) <= self.timeout:
            self._strikes = 0
            return
        self._strikes += 1  # twice in a row: beats are seconds old
        hanging = [rank for rank, wait in waits.items() if wait is None] or list(waits)
        if self._strikes >= 2 and self.launch.rank in hanging:
            self._dump()
            file = self._stacks_file(self.launch.rank)
            where = f"; its stack is in {file}" if file else ""
            text = f"rank {self.launch.rank} of {self.launch.size} hangs in {place} ({clock - place.moved:.0f} s), and "
            text += f"others may wait for {self.timeout:g} s (parallel.timeout){where}"
            self._announce(text, final=True)
            self._finish(text)
        elif self._strikes >= 5:  # who hangs should have said so
            self._finish(f"rank {min(hanging)} of {self.launch.size} kept others waiting for {longest:.0f} s")

    def _announce(self, text: str, *, final: bool = False) -> bool:
        """Says it to all where nobody has said anything yet; whether it did."""
        said = json.dumps({"text": text, "final": final, "by": self.launch.rank})
        held = self.launch.client.compare_set(self.launch.key("end"), "", said)
        return held.decode() == said

    def _told(self, text: str) -> str:
        rule = f"go on with --resume {self.folder}" if self.folder else "start again"
        return f"{text}: all ranks end, {rule}"

    def _finish(self, text: str) -> None:
        if self._blaming:
            self._verdict = self._verdict or self._told(text)
        else:
            self._over.set()
            self.end(self._told(text))

    def _end(self, line: str) -> None:
        sys.stderr.write(f"dancegrpo: {line}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)  # the main thread may hang where no exception reaches it

    # -------------------------------------------------------------------------------------------------------- stacks

    def _stacks_file(self, rank: int) -> Path | None:
        return self.folder / f"stacks-rank{rank}.txt" if self.folder else None

    def _stack(self) -> str:
        """The main thread's stack, innermost frame last; of files and lines alone, which costs no look at the disk."""
        frame, lines = sys._current_frames().get(self._main), []
        for inner, number in traceback.walk_stack(frame) if frame else ():
            code = inner.f_code
            lines.append(f'  File "{code.co_filename}", line {number}, in {code.co_name}\n')
            if len(lines) == _FRAMES:
                break
        return "".join(reversed(lines))

    def _dump(self) -> None:
        """All threads' stacks of this process, to the terminal and to the run's folder."""
        with suppress(Exception):
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        file = self._stacks_file(self.launch.rank)
        if file is not None:
            with suppress(OSError), file.open("w", encoding="utf-8") as out:
                faulthandler.dump_traceback(file=out, all_threads=True)


def _machine() -> str:
    """Where process numbers mean the same: containers may share a host's name and count their own processes."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a living process of this machine began, in the kernel's own ticks; None where there is none, or no telling.

    One that is dead, and whose parent has not asked yet, is not living.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _lives(beat: Mapping[str, Any]) -> bool:
    """False where the process of a beat ran on this machine and does no more."""
    return beat["host"] != _machine() or beat["born"] is None or _born(beat["pid"]) == beat["born"]


def lost_connection(error: BaseException) -> bool:
    """Whether an error says that a message to another rank failed: then the cause lies with that one."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "NCCL" in str(error))


@contextmanager
def watching(launch: Launch, place: Place, timeout: float) -> Iterator[Watchdog]:
    """Looks after the ranks while the block runs.

    Raises RankError in place of an error that only says that another rank's connection broke.
    """
    if not faulthandler.is_enabled():
        with suppress(Exception):  # a terminal that is none
            faulthandler.enable()
    watchdog = Watchdog(launch, place, timeout)
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        if not lost_connection(error):
            watchdog.fail(error)
            raise
        with _deaf_to_sigterm():  # torchrun sends it as soon as a rank dies; first say which
            line = watchdog.blame(error)
        raise RankError(line) from error
    finally:
        watchdog.stop()


@contextmanager
def _deaf_to_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, held)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends the process where the block takes longer: a broken process group may not let go."""
    timer = threading.Timer(seconds, os._exit, [EXIT_CODE])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
