"""The threads in which plain methods of applications' endpoints run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from zerog.exceptions import TooBusy

T = TypeVar("T")


class Bounded(ThreadPoolExecutor):
    """``threads`` calls at a time, and ``waiting`` that wait for a thread; what comes beyond is refused at once."""

    def __init__(self, threads: int, waiting: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._most = threads + waiting
        self._open = 0
        self._counting = threading.Lock()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have something called; ``TooBusy`` if too much waits already."""
        with self._counting:
            if self._open >= self._most:
                error = TooBusy(f"{self._most} requests to endpoints of applications are under way already")
                error.headers["Retry-After"] = "1"
                raise error
            self._open += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        with self._counting:
            self._open -= 1
