"""Waiters: one look at the store for all requests that wait; Watcher, for ``Prefer: wait`` and event streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Generic, TypeVar

from zerog.exceptions import UnknownJob, ZerogError
from zerog.manager.records import visible
from zerog.record import JobRecord

Known = TypeVar("Known")
Seen = TypeVar("Seen")
Told = TypeVar("Told")

#: The reads a second that looking may cost.
_READS_A_SECOND = 1000


class Waiters(Generic[Known, Seen, Told]):
    """Requests that wait for a change of what they know.

    One look at all of it together, every ``EVERY`` seconds while anyone waits, more slowly as more is waited for.
    """

    EVERY: ClassVar[float]

    def __init__(self, read: Callable[[Sequence[str]], Awaitable[dict[str, Seen]]]) -> None:
        self._read = read
        self._waiting: dict[str, list[tuple[Known, asyncio.Future[Told]]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    def tell(self, key: str, known: Known, seen: Seen | None, future: asyncio.Future[Told]) -> None:
        """Answer one who waits, if what was seen differs from what it knows; ``seen`` is None if nothing is there."""
        raise NotImplementedError

    def let_go(self, known: Known, future: asyncio.Future[Told]) -> None:
        """Answer one who is not to wait any longer."""
        raise NotImplementedError

    def end(self) -> None:
        """Let nobody wait any longer."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()
        for key in list(self._waiting):
            self._let_go_all(key)

    async def _wait(self, key: str, known: Known, timeout: float) -> Told:
        """Wait until ``tell`` or ``let_go`` answers; ``TimeoutError`` if none does for ``timeout`` seconds."""
        future: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        entry = (known, future)
        self._waiting.setdefault(key, []).append(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            return await asyncio.wait_for(future, max(0.0, timeout))
        finally:
            entries = self._waiting[key]
            entries.remove(entry)
            if not entries:
                del self._waiting[key]

    def _let_go_all(self, key: str) -> None:
        for known, future in self._waiting.get(key, ()):
            if not future.done():
                self.let_go(known, future)

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(max(self.EVERY, len(self._waiting) / _READS_A_SECOND))
            keys = list(self._waiting)
            try:
                found = await self._read(keys)
            except ZerogError:
                continue  # the store is away: whoever waits is answered when its time is up
            for key in keys:
                for known, future in self._waiting.get(key, ()):
                    if not future.done():
                        self.tell(key, known, found.get(key), future)


class Watcher(Waiters[JobRecord, JobRecord, JobRecord]):
    """Those who wait for a job; who is let go, or waits too long, goes on with what was seen last."""

    EVERY = 0.05

    def tell(self, key: str, known: JobRecord, seen: JobRecord | None, future: asyncio.Future[JobRecord]) -> None:
        """Answer with the job's record if what clients see of it is another."""
        if seen is None:
            future.set_exception(UnknownJob(f"there is no job {key}"))
        elif visible(seen) != visible(known):
            future.set_result(seen)

    def let_go(self, known: JobRecord, future: asyncio.Future[JobRecord]) -> None:
        """Answer with what was seen last."""
        future.set_result(known)

    async def next(self, record: JobRecord, timeout: float) -> JobRecord:
        """Wait until what clients see of a job differs from ``record``; returns it, or ``record`` after ``timeout``."""
        if record.terminal or self._ended:
            return record
        try:
            return await self._wait(record.uuid, record, timeout)
        except TimeoutError:
            return record

    async def terminal(self, record: JobRecord, timeout: float) -> JobRecord:
        """Wait until a job has ended; returns it as it is then, or after ``timeout``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not record.terminal and not self._ended and (left := end - loop.time()) > 0:
            record = await self.next(record, left)
        return record
