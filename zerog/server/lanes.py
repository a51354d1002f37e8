"""Lanes: the way from the event loop to the Manager.

What arrives while the last batch is in its thread goes as the next one: one hand-over, one transaction, one write of
puts for all of it.  A lane has a thread of its own, and with it connections of its own, and one batch in flight.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


#: Seconds in which the loop has nothing to do and no item comes, after which a batch goes; and after which it goes
#: anyway.
_QUIET, _GATHER = 0.0002, 0.005


class Lane(Generic[Item, Result]):
    """Calls ``call`` with many items at a time; each caller gets its own result, or its own exception."""

    def __init__(self, name: str, call: Callable[[Sequence[Item]], Sequence[Result | Exception]], limit: int = 500):
        self._call = call
        self._limit = limit
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._busy = False
        self._served, self._served_at = 0, 0.0
        self._inbox: queue.SimpleQueue[list[tuple[Item, asyncio.Future[Result]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._ended: Callable[[], None] = lambda: None

    def start(self, ended: Callable[[], None] = lambda: None) -> None:
        """Start the thread; ``ended`` is called in it at the end, to close what belongs to it."""
        self._loop = asyncio.get_running_loop()
        self._ended = ended
        self._thread.start()

    def __call__(self, item: Item) -> asyncio.Future[Result]:
        """Hand an item over; the future has its result."""
        assert self._loop is not None
        future: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append((item, future))
        if not self._busy:
            self._busy = True
            self._begin()
        return future

    def stop(self) -> None:
        """End the thread after the batch in flight."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(10)

    def _begin(self) -> None:
        """Begin a batch.  After one that served several callers it waits a moment for them: most of them ask again.

        Otherwise two halves of the callers take turns for ever, and the thread of the one and the loop of the other
        contend for the interpreter: twice the hand-overs and commits, and five times the time for each.
        """
        assert self._loop is not None
        now = self._loop.time()
        if self._served > 1 and now - self._served_at < _GATHER:
            self._loop.call_soon(self._gather, 0, now, now, now)
        else:
            self._loop.call_soon(self._send)

    def _gather(self, seen: int, last: float, since: float, began: float) -> None:
        """Look once a turn of the loop whether the moment is over: a turn that took long had something to do."""
        assert self._loop is not None
        now = self._loop.time()
        if len(self._waiting) > seen or now - last > _QUIET / 2:
            since = now
        if now - since < _QUIET and now - began < _GATHER and len(self._waiting) < self._limit:
            self._loop.call_soon(self._gather, len(self._waiting), now, since, began)
        else:
            self._send()

    def _send(self) -> None:
        batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
        self._inbox.put(batch)

    def _work(self) -> None:
        while (batch := self._inbox.get()) is not None:
            try:
                results = self._call([item for item, _ in batch])
            except Exception as error:  # handed to every caller, who answers for it
                results = [error] * len(batch)
            assert self._loop is not None
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch, results)
            except RuntimeError:
                break  # the loop has ended, and with it everybody who waits
        self._ended()

    def _deliver(
        self, batch: Sequence[tuple[Item, asyncio.Future[Result]]], results: Sequence[Result | Exception]
    ) -> None:
        assert self._loop is not None
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue  # whoever asked has gone
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        self._served, self._served_at = len(batch), self._loop.time()
        if self._waiting:
            self._begin()
        else:
            self._busy = False
