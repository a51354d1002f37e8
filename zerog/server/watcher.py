"""Watcher: one look at all watched jobs together, for ``Prefer: wait`` and event streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from zerog.exceptions import UnknownJob, ZerogError
from zerog.manager.records import visible
from zerog.record import JobRecord

#: Seconds between two looks, and the reads a second that they may cost.
_EVERY = 0.05
_READS_A_SECOND = 1000


class Watcher:
    """Looks at watched jobs every 50 ms while anyone waits, more slowly as more are watched."""

    def __init__(self, read: Callable[[Sequence[str]], Awaitable[dict[str, JobRecord]]]) -> None:
        self._read = read
        self._waiting: dict[str, list[tuple[JobRecord, asyncio.Future[JobRecord]]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    def end(self) -> None:
        """Let nobody wait any longer: everybody goes on with what was seen last."""
        self._ended = True
        if self._task is not None:
            self._task.cancel()
        for entries in self._waiting.values():
            for record, future in entries:
                if not future.done():
                    future.set_result(record)

    async def next(self, record: JobRecord, timeout: float) -> JobRecord:
        """Wait until what clients see of a job differs from ``record``; returns it, or ``record`` after ``timeout``."""
        if record.terminal or self._ended:
            return record
        future: asyncio.Future[JobRecord] = asyncio.get_running_loop().create_future()
        entry = (record, future)
        self._waiting.setdefault(record.uuid, []).append(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            return await asyncio.wait_for(future, max(0.0, timeout))
        except TimeoutError:
            return record
        finally:
            entries = self._waiting.get(record.uuid, [])
            if entry in entries:
                entries.remove(entry)
            if not entries:
                self._waiting.pop(record.uuid, None)

    async def terminal(self, record: JobRecord, timeout: float) -> JobRecord:
        """Wait until a job has ended; returns it as it is then, or after ``timeout``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while not record.terminal and not self._ended and (left := end - loop.time()) > 0:
            record = await self.next(record, left)
        return record

    async def _look(self) -> None:
        while self._waiting:
            await asyncio.sleep(max(_EVERY, len(self._waiting) / _READS_A_SECOND))
            uuids = list(self._waiting)
            try:
                records = await self._read(uuids)
            except ZerogError:
                continue  # the store is away: whoever waits gets the last known state when its time is up
            for uuid in uuids:
                self._tell(uuid, records.get(uuid))

    def _tell(self, uuid: str, record: JobRecord | None) -> None:
        for known, future in self._waiting.get(uuid, ()):
            if future.done():
                continue
            if record is None:
                future.set_exception(UnknownJob(f"there is no job {uuid}"))
            elif visible(record) != visible(known):
                future.set_result(record)
