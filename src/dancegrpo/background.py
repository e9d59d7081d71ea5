"""Files written on a thread of their own, while the run goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType

Call = Callable[[], object]


class BackgroundWriter:
    """Does what it is given one by one, in order; a context that is left only when everything is written.

    A failure is raised by the next `check`, `submit` or `flush`, or on leaving the context, once. What was queued
    behind it is dropped: so a file that is written last says that all before it are there.
    """

    def __init__(self, capacity: int = 8) -> None:
        """capacity: how many calls wait at most; whoever submits more has to wait."""
        self._waiting: queue.Queue[tuple[Call, Call | None] | None] = queue.Queue(capacity)
        self._written: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, write: Call, then: Call | None = None) -> None:
        """Queues `write`; `then` is called afterwards, by the thread that checks or flushes."""
        self.check()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="media writer", daemon=True)
            self._thread.start()
        self._waiting.put((write, then))

    def check(self) -> None:
        """Calls each `then` whose write is done; raises the failure of a write, if there was one. Never waits."""
        while True:
            try:
                then = self._written.get_nowait()
            except queue.Empty:
                break
            then()
        if self._error is not None:
            self._waiting.join()  # what is queued behind the failure is dropped, not written after all
            error, self._error = self._error, None
            raise error

    def flush(self) -> None:
        """Waits until everything is written, then as `check`."""
        self._waiting.join()
        self.check()

    def __enter__(self) -> BackgroundWriter:
        """The writer itself; its thread starts with the first call submitted."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Waits for what is queued and ends the thread. An error that is under way goes before the writer's own."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        if kind is None:
            self.check()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            write, then = item
            try:
                if self._error is None:
                    write()
                    if then is not None:
                        self._written.put(then)
            except BaseException as error:  # raised again where the run can hear it
                self._error = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()
