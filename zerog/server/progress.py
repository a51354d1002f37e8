"""The endpoints that a client follows: how far a job is, and what it says."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import ClassVar

from zerog import codec, views
from zerog.exceptions import (
    TooManyStreams,
)
from zerog.manager import Page
from zerog.server.collection import CURSOR, LIMIT, OfJob, collection
from zerog.server.endpoint import (
    EVENTS,
    HTML,
    JSON,
    WAIT,
    Answer,
    Parameter,
    chosen,
    header,
)
from zerog.server.live import COMMENT, COMMENT_EVERY, EVERY, event
from zerog.server.negotiation import matches


class Progress(OfJob):
    """How far a job is."""

    name = "progress"
    url = "/jobs/{uuid}/progress"
    offers = (JSON, HTML, EVENTS)
    responses = {"GET": {200: ("how far it is", "Progress"), 304: ("nothing has changed", None)}}
    problems: ClassVar = {"GET": (TooManyStreams,)}
    headers: ClassVar = {"GET": (WAIT, header("If-None-Match", "an ETag: 304 while nothing has changed"))}

    async def get(self) -> Answer:
        """Show progress at once, when it changes (``Prefer: wait``), or as a stream of events."""
        if self.request.offer == EVENTS:
            return self.services.streams.answer(self._stream())
        view = views.progress(self.record)
        headers = {}
        known = self.request.headers.get("If-None-Match")
        wait = self.preferred_wait()
        if wait is not None:
            headers["Preference-Applied"] = f"wait={wait}"
            if known is None or matches(known, views.etag(view)):
                view = views.progress(await self.as_asked(self.services.watcher.next(self.record, wait)))
        headers["ETag"] = views.etag(view)
        if known is not None and matches(known, headers["ETag"]):
            return Answer(status=304, headers=headers)
        return Answer(view, 200, headers, "job")

    async def _stream(self) -> AsyncIterator[bytes]:
        record = self.record
        while True:
            view = views.progress(record)
            tag = views.etag(view).strip('"')
            yield event("progress", tag, codec.dumps(view))
            if record.terminal:
                return
            while (after := await self.services.watcher.next(record, COMMENT_EVERY)) is record:
                yield COMMENT
            record = after


class Events(OfJob):
    """All that a job said."""

    name = "events"
    url = "/jobs/{uuid}/events"
    offers = (JSON, HTML, EVENTS)
    parameters = {
        "GET": (
            Parameter("level", chosen("event", "warning", "error"),
                      {"type": "string", "enum": ["event", "warning", "error"]}, "only entries of this level"),
            LIMIT,
            CURSOR,
        )
    }  # fmt: skip
    responses = {"GET": {200: ("a page of events, oldest first", "Events")}}
    problems: ClassVar = {"GET": (TooManyStreams,)}
    headers: ClassVar = {"GET": (header("Last-Event-ID", "the number of the last entry that a stream had"),)}

    async def get(self) -> Answer:
        """Page through the log of the job's events."""
        level = self.request.query["level"]
        if self.request.offer == EVENTS:
            return self.services.streams.answer(self._stream(level))
        scope = f"events/{self.record.uuid}?level={level}"
        page = await self.off_loop(self._read, level, scope)
        filters = {} if level is None else {"level": level}
        return await collection(self, page, list(page.items), filters, scope, "events")

    def _read(self, level: str | None, scope: str) -> Page:
        cursor = self.request.query["cursor"]
        after = 0 if cursor is None else self.manager.read_cursor(cursor, scope)
        return self.manager.events(self.record.uuid, level, after, self.request.query["limit"])

    async def _stream(self, level: str | None) -> AsyncIterator[bytes]:
        """Yield what the job says from now on, or after ``Last-Event-ID``, a page at a time, until it has ended."""
        known = self.request.headers.get("Last-Event-ID", "")
        after = int(known) if re.fullmatch("[0-9]{1,15}", known) else await self.off_loop(self._last)
        yield event("change", after, b"[]")
        silent = 0.0
        while True:
            ended = self.record.terminal
            page = await self.off_loop(self.manager.events, self.record.uuid, level, after, 100)
            if page.items:
                after, silent = page.items[-1]["number"], 0.0
                yield event("change", after, codec.dumps(page.items))
                continue
            if ended:
                return
            self.record = await self.services.watcher.next(self.record, EVERY)
            silent += EVERY
            if silent >= COMMENT_EVERY:
                silent = 0.0
                yield COMMENT

    def _last(self) -> int:
        return self.manager.last_event(self.record.uuid)
