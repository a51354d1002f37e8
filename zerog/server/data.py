"""The endpoint of what a job made."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar

from zerog import views
from zerog.exceptions import (
    REASONS,
    JobCancelled,
    JobFailed,
    NotAcceptable,
    NotFound,
    RangeNotSatisfiable,
)
from zerog.outcome import Result
from zerog.record import JobRecord, State
from zerog.server.collection import OfJob
from zerog.server.endpoint import (
    ANY,
    HTML,
    JSON,
    Answer,
    header,
)
from zerog.server.negotiation import choose, matches

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
#: Seconds after which a client should ask again for data that are not there yet.
_RETRY_AFTER = "1"
#: Reasons that a problem names; the rest have failed as jobs do.
_FAILED = sorted(set(REASONS) - {"exception", "failed", "retry", "cancelled"})


class Data(OfJob):
    """The output of a job."""

    name = "data"
    url = "/jobs/{uuid}/data"
    offers = ANY
    responses = {
        "GET": {
            200: ("the bytes, with the media type of the output", "Bytes"),
            202: ("it has not finished; Retry-After says when to ask again", "Progress"),
            204: ("it has no data", None),
            206: ("the range of bytes that was asked for", "Bytes"),
            304: ("nothing has changed", None),
        }
    }
    headers: ClassVar = {
        "GET": (
            header("Range", "one range of bytes"),
            header("If-Range", "the ETag for which the range is meant"),
            header("If-None-Match", "an ETag: 304 while nothing has changed"),
        )
    }
    problems: ClassVar = {
        "GET": (JobFailed, JobCancelled, RangeNotSatisfiable, *((JobFailed.status, code) for code in _FAILED))
    }

    async def get(self) -> Answer:
        """Send the bytes as they were written, a piece at a time."""
        record = self.record
        match record.state:
            case State.SUCCEEDED:
                return Answer(status=204) if record.result is None else self._bytes(record.result)
            case State.FAILED:
                raise _failed(record)
            case State.CANCELLED:
                raise JobCancelled(record.message or "", resultCode=record.result_code)
        return Answer(views.progress(record), 202, {"Retry-After": _RETRY_AFTER}, "job", self._readable())

    def _readable(self) -> str:
        return HTML if choose(self._accept(), (JSON, HTML)) == HTML else JSON

    def _accept(self) -> str:
        return self.request.headers.get("Accept", "")

    def _bytes(self, result: Result) -> Answer:
        if choose(self._accept(), (result.media_type,)) is None:
            raise NotAcceptable(f"the data are {result.media_type}", offers=[result.media_type])
        tag = f'"{self.record.uuid}-{self.record.attempt}"'
        name = f"{self.record.uuid}.{views.extension(result.media_type)}"
        headers = {
            "ETag": tag,
            "Accept-Ranges": "bytes",
            "Content-Disposition": f'attachment; filename="{name}"',
            "Vary": "Accept",
        }
        known = self.request.headers.get("If-None-Match")
        if known is not None and matches(known, tag):
            return Answer(status=304, headers=headers)
        start, stop, partial = self._range(result.size, tag)
        headers["Content-Length"] = str(stop - start)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{result.size}"
        pieces = self._pieces(self.manager.open_data(result, start, stop), stop - start)
        return Answer(None, 206 if partial else 200, headers, media_type=result.media_type, stream=pieces)

    def _range(self, size: int, tag: str) -> tuple[int, int, bool]:
        """Return the bytes that are asked for: one range is served, several or unreadable ones are the whole."""
        header = self.request.headers.get("Range")
        condition = self.request.headers.get("If-Range")
        match = _RANGE.fullmatch(header.strip()) if header is not None else None
        if match is None or match.group() == "bytes=-" or (condition is not None and condition.strip() != tag):
            return 0, size, False
        first, last = match.groups()
        if first == "":
            start, stop = max(0, size - int(last)), size
        else:
            start, stop = int(first), min(size, int(last) + 1) if last else size
            if last and int(last) < start:
                return 0, size, False
        if start >= stop:
            error = RangeNotSatisfiable(f"the data have {size} bytes")
            error.headers["Content-Range"] = f"bytes */{size}"
            raise error
        return start, stop, True

    async def _pieces(self, pieces: Iterator[bytes], length: int) -> AsyncIterator[bytes]:
        sent = 0
        while (piece := await self.off_loop(next, pieces, None)) is not None:
            sent += len(piece)
            yield piece
        if sent != length:
            raise NotFound(f"{length - sent} bytes of the data of job {self.record.uuid} are missing")


def _failed(record: JobRecord) -> JobFailed:
    error = JobFailed(record.message or "", resultCode=record.result_code)
    if record.reason in _FAILED:
        error.code = record.reason
    return error
