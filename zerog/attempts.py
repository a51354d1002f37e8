"""Attempts: how attempts go and end that run where there is only HTTP, and what they make.

Every write is checked against the job's record: only the current attempt may write, and an outcome that comes twice is
written once.  Events are kept within their caps, whichever master they come to.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from zerog.datastore.blobs import CHUNK, BlobWriter
from zerog.exceptions import (
    AlreadyExists,
    AlreadyFinished,
    Conflict,
    InvalidParameter,
    NotFound,
    StateConflict,
    StoreAmbiguous,
    StoreUnavailable,
    Superseded,
    UnknownResource,
)
from zerog.manager import Held, Manager
from zerog.notes import Notes, change_notes
from zerog.outcome import INLINE, Outcome, Requeued, Result, Succeeded
from zerog.record import Event, JobRecord, State
from zerog.recorder import Recorder, said_at_end

#: How often what an attempt says is tried to be written against other masters.
_TRIES = 20

#: Numbers of batches of an attempt that are remembered.
_BATCHES = 100


@dataclass(frozen=True, slots=True)
class Report:
    """How an attempt goes.  ``checkpoint`` has the job's new state, if there is one; ``batch`` numbers the events."""

    uuid: str
    attempt: int
    completeness: float | None = None
    message: str | None = None
    events: tuple[Event, ...] = ()
    checkpoint: tuple[Any, ...] = ()
    batch: int | None = None
    dropped: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Settlement:
    """How an attempt ended: what it came to, ``data`` as JSON if it returned some, and a digest of all of it."""

    report: Report
    outcome: Outcome
    digest: str
    told: bool = False
    data: bytes | None = None
    #: A requeue that says nothing of the state, which stays.
    keeps_state: bool = False


def check_current(record: JobRecord, attempt: int) -> None:
    """Raise what is wrong with writing a job's record for an attempt."""
    if attempt > record.attempt or attempt < 1:
        raise UnknownResource(f"job {record.uuid} has no attempt {attempt}")
    if record.terminal:
        raise AlreadyFinished(f"the job is {record.state}", state=str(record.state))
    if record.attempt != attempt or record.state is not State.RUNNING:
        raise Superseded(
            f"attempt {attempt} of job {record.uuid} is over: the job is {record.state} in attempt {record.attempt}",
            state=str(record.state),
        )


class Attempts:
    """The writes of attempts.  Safe to use from many threads."""

    def __init__(self, manager: Manager) -> None:
        self.manager = manager
        self._store = manager.store
        self._clock = manager.clock

    def report(self, report: Report) -> JobRecord:
        held = self._current(report.uuid, report.attempt)
        self._events(report, held.record.job_type)
        return self.manager.report(held, report.attempt, report.completeness, report.message, report.checkpoint).record

    def settle(self, item: Settlement) -> tuple[JobRecord | None, JobRecord]:
        """Write an outcome; returns the record before it, if it was not written before, and after it."""
        report = item.report
        uuid, attempt = report.uuid, report.attempt
        written_as = f"{attempt}.{item.digest}"
        held = self.manager.read(uuid)
        if held.record.attempt == attempt and held.record.settled_as == written_as:
            return None, held.record
        check_current(held.record, attempt)
        notes = self._events(report, held.record.job_type, item)
        outcome = item.outcome
        if isinstance(outcome, Requeued) and item.keeps_state:
            outcome = Requeued(outcome.delay, held.record.job_state)
        if isinstance(outcome, Succeeded):
            outcome = Succeeded(self._result(uuid, attempt, item, notes), outcome.code)
        after = self.manager.settle(
            held, attempt, outcome, item.told, report.completeness, report.message, written_as=written_as
        )
        if notes is not None:
            notes.remove(self._store, uuid, attempt, after.record.result)
        return held.record, after.record

    def _current(self, uuid: str, attempt: int) -> Held:
        """Return the record of an attempt that may be written; raises what is wrong otherwise."""
        held = self.manager.read(uuid)
        check_current(held.record, attempt)
        return held

    def _events(self, report: Report, job_type: str, end: Settlement | None = None) -> Notes | None:
        """Write what an attempt says, once, within its caps; returns its notes, if it has any.

        Its batches bear names that come of what was said: what was written before this process lost the race, or its
        life, is known for the same, and what another one wrote is not taken for it.
        """
        name = f"http.{secrets.token_hex(6) if report.batch is None else report.batch}"
        name = name if end is None else f"{name}.{end.digest}"
        for _ in range(_TRIES):
            try:
                return self._events_once(report, job_type, end, name)
            except (Conflict, AlreadyExists, NotFound, StoreAmbiguous):
                continue  # another master writes for it: what it has written counts
        raise StoreUnavailable(f"attempt {report.attempt} of job {report.uuid} is being written by too many at once")

    def _events_once(self, report: Report, job_type: str, end: Settlement | None, name: str) -> Notes | None:
        uuid, attempt = report.uuid, report.attempt
        notes, cas = Notes.read(self._store, uuid, attempt)
        is_known = report.batch is not None and report.batch in notes.batches
        events, dropped = ((), (0, 0)) if is_known else (report.events, report.dropped)
        last = None
        if end is not None and notes.ended != end.digest:
            once = not self.manager.registry.policy(job_type).rerun_after_crash
            last = said_at_end(end.outcome, self._clock.now(), once)
        if not events and not dropped[0] and last is None:
            return notes if cas is not None else None
        recorder = Recorder.read(uuid, attempt, notes.recorder) if notes.recorder else Recorder(uuid, attempt)
        for event in (*events, *([last] if last is not None else [])):
            recorder.add(event)
        recorder.drop(*dropped)
        recorder.name = name
        recorder.flush(self.manager)
        recorder.confirm()
        batches = notes.batches if report.batch is None else [*notes.batches, report.batch][-_BATCHES:]
        after = replace(
            notes,
            batches=batches,
            recorder=recorder.document(),
            ended=end.digest if end is not None else notes.ended,
        )
        after.write(self._store, uuid, attempt, cas)
        return after

    def _result(self, uuid: str, attempt: int, item: Settlement, notes: Notes | None) -> Result | None:
        """Return the result of a success: what was uploaded, or what it returned."""
        if item.data is not None:
            if len(item.data) <= INLINE:
                return Result("application/json", len(item.data), inline=item.data.decode())
            writer = BlobWriter(self._store, self.manager.blob_name(uuid, attempt))
            writer.write(item.data)
            writer.close()
            return Result("application/json", writer.size, blob=writer.blob)
        if notes is not None and notes.part is not None and notes.output is None:
            raise StateConflict("the last piece of the data has not come: it names the total in Content-Range")
        if notes is None or notes.output is None:
            return None
        return Result(notes.output["mediaType"], notes.output["size"], blob=notes.output["blob"])

    # Data

    def check_attempt(self, uuid: str, attempt: int) -> JobRecord:
        """Return the record of the current attempt; raises what is wrong with it otherwise."""
        return self._current(uuid, attempt).record

    def _new_blob(self, uuid: str, attempt: int) -> str:
        return f"{self.manager.blob_name(uuid, attempt)}.{secrets.token_hex(4)}"

    def _keep_name(self, uuid: str, attempt: int, blob: str) -> None:
        """Note a blob before anything is kept under it: whoever removes the job must know of it."""
        change_notes(self._store, uuid, attempt, lambda notes: replace(notes, blobs=[*notes.blobs, blob]))

    def upload(self, uuid: str, attempt: int, media_type: str) -> Upload:
        """Begin what an attempt made, anew; it counts when it is closed, and is seen when the outcome is written."""
        self._current(uuid, attempt)
        blob = self._new_blob(uuid, attempt)
        self._keep_name(uuid, attempt, blob)
        return Upload(self, uuid, attempt, media_type, BlobWriter(self._store, blob))

    def finish_upload(self, upload: Upload) -> None:
        """Let what was uploaded be what the attempt made, in place of what it had made before."""
        uuid, attempt, blob = upload.uuid, upload.attempt, upload.writer.blob
        self._current(uuid, attempt)
        output = {"blob": blob, "size": upload.writer.size, "mediaType": upload.media_type}
        before: list[str] = []

        def change(notes: Notes) -> Notes:
            before[:] = [one for one in notes.blobs if one != blob]
            return replace(notes, output=output, part=None, blobs=[blob])

        change_notes(self._store, uuid, attempt, change)
        for one in before:
            self._store.remove_blob(one)

    def abandon_upload(self, upload: Upload) -> None:
        """Remove what was half uploaded."""
        blob = upload.writer.blob
        self._store.remove_blob(blob)
        change_notes(
            self._store,
            upload.uuid,
            upload.attempt,
            lambda notes: replace(notes, blobs=[one for one in notes.blobs if one != blob]),
        )

    def put_piece(self, uuid: str, attempt: int, media_type: str, start: int, data: bytes, total: int | None) -> None:
        """Add a piece to what an attempt made; with the ``total`` of its bytes it is the last one.

        Pieces follow each other, begin where a chunk begins, and may come twice.  The first begins it anew.
        """
        self._current(uuid, attempt)
        notes, _ = Notes.read(self._store, uuid, attempt)
        end = start + len(data)
        if total is not None and notes.part is None and notes.output is not None and notes.output["size"] == end:
            return  # it was the last one, and is said again
        if start == 0 or notes.part is None:
            size, blob = 0, self._new_blob(uuid, attempt)
        else:
            size, blob = notes.part["size"], notes.part["blob"]
        if start % CHUNK or start > size:
            raise InvalidParameter("Content-Range", f"the next piece begins at {size - size % CHUNK}")
        if total is None and len(data) % CHUNK:
            raise InvalidParameter("Content-Range", f"all pieces but the last have a multiple of {CHUNK} bytes")
        if blob not in notes.blobs:
            self._keep_name(uuid, attempt, blob)
        for offset in range(0, len(data), CHUNK):
            self._store.put_chunk(blob, (start + offset) // CHUNK, data[offset : offset + CHUNK])
        part = {"blob": blob, "size": max(size, end), "mediaType": media_type}
        last = total is not None

        def change(notes: Notes) -> Notes:
            return replace(notes, part=None if last else part, output=part if last else notes.output)

        change_notes(self._store, uuid, attempt, change)


@dataclass(slots=True)
class Upload:
    """What one request sends as the data of an attempt."""

    attempts: Attempts
    uuid: str
    attempt: int
    media_type: str
    writer: BlobWriter

    def write(self, data: bytes) -> None:
        """Add bytes."""
        self.writer.write(data)

    def close(self) -> None:
        """Let it count."""
        self.writer.close()
        self.attempts.finish_upload(self)

    def abandon(self) -> None:
        """Leave nothing of it."""
        self.attempts.abandon_upload(self)
