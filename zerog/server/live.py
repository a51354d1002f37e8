"""What pages show of now: the queue, and what runs; looked at once for everybody who watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, ClassVar, Generic, TypeVar

from zerog import codec, views
from zerog.exceptions import TooManyStreams, ZerogError
from zerog.manager import Manager
from zerog.server.endpoint import EVENTS, HTML, JSON, Answer, Endpoint

T = TypeVar("T")

#: Seconds between two looks, and between two comments that keep a silent stream open.
EVERY, COMMENT_EVERY = 1.0, 15.0
#: Event streams that a process serves at once: each holds a connection open.
_STREAMS = 500


#: What keeps a silent stream open.
COMMENT = b": still here\n\n"


def event(name: str, identity: str | int, data: bytes) -> bytes:
    """Return one event of a stream; ``data`` is JSON on one line."""
    return b"event: %s\nid: %s\ndata: %s\n\n" % (name.encode(), str(identity).encode(), data)


def streamed(pieces: AsyncIterator[bytes]) -> Answer:
    """Return the answer that is a stream of events."""
    return Answer(stream=pieces, media_type=EVENTS, headers={"Cache-Control": "no-store"})


class Shared(Generic[T]):
    """Something that is looked at by one at a time, however many ask."""

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        self._look = look
        self._lock = asyncio.Lock()
        self._at = float("-inf")
        self._found: T | None = None

    async def get(self, within: float = 0.0) -> T:
        """Return it as it was at most ``within`` seconds ago; 0 for now, and all who ask meanwhile share that look."""
        time = asyncio.get_running_loop().time
        asked = time()
        async with self._lock:
            if self._found is None or self._at < asked - within:
                self._at, self._found = time(), await self._look()
            return self._found


class Streams:
    """Counts event streams, so that a process does not serve more than it can."""

    def __init__(self) -> None:
        self._open = 0

    async def _counted(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._open += 1
        try:
            async for piece in pieces:
                yield piece
        finally:
            self._open -= 1

    def answer(self, pieces: AsyncIterator[bytes]) -> Answer:
        """Return the answer that is a stream; ``TooManyStreams`` if there are as many as there may be."""
        if self._open >= _STREAMS:
            error = TooManyStreams(f"this process serves {_STREAMS} event streams already")
            error.headers["Retry-After"] = "5"
            raise error
        return streamed(self._counted(pieces))


class Watched(Endpoint):
    """Base of what can be watched: a stream says when what ``view`` returns has changed."""

    offers = (JSON, HTML, EVENTS)
    problems: ClassVar = {"GET": (TooManyStreams,)}
    #: Seconds that what is shown may be old: a stream has time until its next look.
    within = 0.0

    async def view(self) -> dict[str, Any]:
        """Return what is shown."""
        raise NotImplementedError

    async def shown(self, page: str) -> Answer:
        """Return it as JSON or as a page, or the stream of its changes."""
        if self.request.offer != EVENTS:
            return Answer(await self.view(), page=page)
        return self.services.streams.answer(self._changes())

    async def _changes(self) -> AsyncIterator[bytes]:
        """Yield an event for what is there now, and one whenever it is not the same any more."""
        known, silent, self.within = "", 0.0, EVERY
        while True:
            with suppress(ZerogError):  # an outage: what was seen last stays
                body = codec.dumps(await self.view())
                tag = views.digest(body)
                if tag != known:
                    yield event("change", tag, body)
                    known, silent = tag, 0.0
            await asyncio.sleep(EVERY)
            silent += EVERY
            if silent >= COMMENT_EVERY:
                silent = 0.0
                yield COMMENT


class Queue(Watched):
    """What waits, by type."""

    name = "queue"
    url = "/queue"
    responses = {"GET": {200: ("depth, age and pause of every type", "Queue")}}

    async def get(self) -> Answer:
        """Show for every job type how much waits, for how long, and whether it is paused."""
        return await self.shown("queue")

    async def view(self) -> dict[str, Any]:
        """Return the queue as whoever asks may see it."""
        items = await self.services.queue.get(self.within)
        seen = [one for one in items if self.sees(one["jobType"])]
        return {"href": self.url, "available": all(one["queue"] is not None for one in seen), "items": seen}


def queue_items(manager: Manager, job_types: Iterable[str]) -> list[dict[str, Any]]:
    """Return how much of each type waits, for how long the next one has been due, and its pause."""
    pauses = manager.pauses()
    items = []
    for name in job_types:
        stats = manager.queue_stats_or_none(name)
        age = manager.next_has_waited(name, stats)
        items.append(views.queued_type(name, stats, None if age is None else round(age, 1), pauses.get(name)))
    return items
