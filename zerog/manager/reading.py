"""Reading jobs: one, many, pages of the logs, events, and data."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zerog import codec
from zerog.datastore.blobs import read_blob
from zerog.exceptions import (
    AlreadyExists,
    CorruptDocument,
    InvalidParameter,
    NewerVersion,
    NotFound,
    QueueError,
    UnknownJob,
)
from zerog.manager.records import Held, Records, shown_damaged
from zerog.outcome import Result
from zerog.queue.base import TubeStats
from zerog.record import JobRecord

#: Entries of a log that one page looks at; a filtered page may be short and still have a next one.
_LOOKED_AT = 1000

#: Pages of 50 batches that the newest events are looked for in: a job may have run for weeks.
_BATCH_PAGES = 40

#: An event's number is its batch's number times this, plus its place in the batch.
EVENTS_PER_BATCH = 1000

_CURSOR_KEY = "cursor-key"


@dataclass(frozen=True, slots=True)
class Page:
    """Some items of a collection; ``next`` is where the following page starts, or ``None`` at the end."""

    items: Sequence[Any]
    next: int | None


class Reading(Records):
    """The verbs that change nothing."""

    def get(self, uuid: str) -> JobRecord:
        """Return a record, a damaged one as far as it can be shown; ``UnknownJob`` if there is none."""
        try:
            return self.read(uuid).record
        except (CorruptDocument, NewerVersion) as error:
            document = self.store.get(self.key(uuid))
            return shown_damaged(uuid, document.body, error)

    def by_number(self, number: int) -> JobRecord:
        """Return the job that has a number; ``UnknownJob`` if none has."""
        for entry in self.store.read("jobs", after=number - 1, limit=1) if 0 < number < 2**53 else ():
            if entry.number == number:
                record = self.get(str(codec.loads(entry.body)["uuid"]))
                if record.number == number:
                    return record
        raise UnknownJob(f"there is no job with the number {number}")

    def get_many(self, uuids: Sequence[str]) -> dict[str, JobRecord]:
        """Return those of the records that exist, by UUID."""
        return {uuid: held.record for uuid, held in self.read_many(uuids).items()}

    def page(
        self, job_type: str | None = None, state: str | None = None, before: int | None = None, limit: int = 50
    ) -> Page:
        """Return jobs, newest first: those of a type, in a state, with entries before ``before``.

        It never counts and looks at a bounded number of entries.
        """
        log = "jobs" if job_type is None else f"jobs.{job_type}"
        items: list[JobRecord] = []
        looked = 0
        while looked < _LOOKED_AT:
            entries = self.store.read(log, before=before, limit=min(200, max(limit + 1, 20)))
            if not entries:
                return Page(items, None)
            uuids = {entry.number: codec.loads(entry.body) for entry in entries}
            held = self.read_many([members["uuid"] for members in uuids.values()])
            for entry in entries:
                if len(items) == limit:
                    return Page(items, before)
                before = entry.number
                looked += 1
                record = self._of_entry(held, entry.number, uuids[entry.number])
                if record is not None and (state is None or record.state == state):
                    items.append(record)
        return Page(items, before)

    @staticmethod
    def _of_entry(held: dict[str, Held], number: int, members: dict[str, Any]) -> JobRecord | None:
        """Return the record of a log's entry; ``None`` if the entry does not count (R1)."""
        found = held.get(members["uuid"])
        if found is None:
            return None
        if found.cas == 0:  # damaged: shown where its entry stands
            return found.record.evolve(number=members.get("number", number))
        return found.record if found.record.number == members.get("number", number) else None

    def children(self, uuid: str, after: int = 0, limit: int = 50) -> Page:
        """Return the jobs that wait, or waited, for a job, in the order in which they were submitted."""
        items: list[JobRecord] = []
        while True:
            entries = self.store.read(f"children.{uuid}", after=after, limit=max(limit, 100))
            if not entries:
                return Page(items, None)
            named = {entry.number: str(codec.loads(entry.body)["uuid"]) for entry in entries}
            held = self.read_many(list(dict.fromkeys(named.values())))
            for number, child in named.items():
                if len(items) == limit:
                    return Page(items, after)
                after = number
                found = held.pop(child, None)  # a submit that was tried again left more than one entry
                if found is not None and uuid in found.record.parents:
                    items.append(found.record)

    # Events

    def events(self, uuid: str, level: str | None = None, after: int = 0, limit: int = 50) -> Page:
        """Return what a job said, oldest first: entries as views with numbers greater than ``after``."""
        items: list[dict[str, Any]] = []
        batch_after = max(0, after // EVENTS_PER_BATCH - 1)
        seen: set[tuple[Any, Any]] = set()
        while True:
            entries = self.store.read(self.events_log(uuid), after=batch_after, limit=100)
            for entry in entries:
                batch_after = entry.number
                batch = codec.loads(entry.body)
                if _repeated(batch, seen):
                    continue
                for item in batch_items(entry.number, batch):
                    if item["number"] <= after or (level is not None and item["level"] != level):
                        continue
                    if len(items) == limit:
                        return Page(items, items[-1]["number"])
                    items.append(item)
            if not entries:
                return Page(items, None)

    def last_event(self, uuid: str) -> int:
        """Return a number that no entry which is there now exceeds."""
        entries = self.store.read(self.events_log(uuid), limit=1)
        return (entries[0].number + 1) * EVENTS_PER_BATCH - 1 if entries else 0

    def newest_events(self, uuid: str, count: int = 100) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
        """Return the newest ``count`` entries of each level, in order, and what was dropped: events and bytes."""
        found: dict[str, list[dict[str, Any]]] = {"event": [], "warning": [], "error": []}
        dropped: dict[int, dict[str, int]] = {}
        before: int | None = None
        seen: set[tuple[Any, Any]] = set()
        for _ in range(_BATCH_PAGES):
            if all(len(items) >= count for items in found.values()):
                break
            entries = self.store.read(self.events_log(uuid), before=before, limit=50)
            if not entries:
                break
            before = entries[-1].number
            for entry in entries:
                batch = codec.loads(entry.body)
                if _repeated(batch, seen):
                    continue
                if "dropped" in batch:
                    dropped.setdefault(batch["attempt"], batch["dropped"])
                for item in reversed(list(batch_items(entry.number, batch))):
                    if len(found[item["level"]]) < count:
                        found[item["level"]].append(item)
        totals = {name: sum(part[name] for part in dropped.values()) for name in ("events", "bytes")}
        # What was said and what was printed come in batches of their own: only their times tell the order.
        for items in found.values():
            items.reverse()
            items.sort(key=_when)
        return found, totals

    # Data

    def open_data(self, result: Result, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start`` to ``stop`` (exclusive) of a result, in pieces of bounded size."""
        if result.blob is None:
            yield (result.inline or "").encode()[start:stop]
        else:
            yield from read_blob(self.store, result.blob, start, stop)

    def value(self, record: JobRecord) -> Any:
        """Return what a job returned; ``ValueError`` if its data are no JSON, None if it has none."""
        if record.result is None:
            return None
        if record.result.media_type != "application/json":
            raise ValueError(f"the data of job {record.uuid} are {record.result.media_type}")
        return json.loads(b"".join(self.open_data(record.result, 0, record.result.size)))

    # Queues and cursors

    def queue_stats_or_none(self, job_type: str) -> TubeStats | None:
        """Return what ``queue_stats`` does, or ``None`` while the queue is away, which then is not asked."""
        if self.queue_away:
            return None
        try:
            return self.queue_stats(job_type)
        except QueueError:
            self.queue_away = True
            return None

    def next_has_waited(self, job_type: str, stats: TubeStats | None) -> float | None:
        """Return the seconds for which the job of a type that comes next has been due; None if none is known of."""
        if stats is None or not stats.ready or self.queue_away:
            return None
        try:
            record = self.get(self.next_in_queue(job_type) or "")
        except QueueError:
            self.queue_away = True
            return None
        except UnknownJob:
            return None
        return max(0.0, self.clock.now() - record.due_since)

    def sign_cursor(self, position: int, scope: str) -> str:
        """Return an opaque cursor for ``position``, good for this ``scope`` (a collection and its filter) only."""
        text = str(position).encode()
        return base64.urlsafe_b64encode(self._cursor_mac(text, scope) + text).decode().rstrip("=")

    def read_cursor(self, cursor: str, scope: str) -> int:
        """Return the position of a cursor that ``sign_cursor`` made for ``scope``; else ``InvalidParameter``."""
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            mac, text = raw[:12], raw[12:]
            if hmac.compare_digest(mac, self._cursor_mac(text, scope)):
                return int(text)
        except ValueError:
            pass  # answered below, like a forged one
        raise InvalidParameter("cursor", "not a cursor of this collection")

    def _cursor_mac(self, text: bytes, scope: str) -> bytes:
        return hmac.digest(self._shared_key(), scope.encode() + b"\0" + text, hashlib.sha256)[:12]

    def prepare_cursors(self) -> None:
        """Make the key of the cursors while there is room for it: a full store must still be read."""
        self._shared_key()

    def _shared_key(self) -> bytes:
        """Return the key that all servers share; whoever comes first makes it."""
        key: bytes | None = getattr(self, "_key", None)
        while key is None:
            try:
                key = bytes.fromhex(codec.loads(self.store.get(_CURSOR_KEY).body)["key"])
            except NotFound:
                try:
                    self.store.insert(_CURSOR_KEY, codec.dumps({"key": secrets.token_hex(32)}))
                except AlreadyExists:
                    continue
        self._key: bytes | None = key
        return key


def _when(item: dict[str, Any]) -> tuple[int, str]:
    return item["attempt"], item["at"]


def _repeated(batch: dict[str, Any], seen: set[tuple[Any, Any]]) -> bool:
    """Return whether a batch was read before: a writer that was in doubt may have appended it twice."""
    name = (batch["attempt"], batch["batch"])
    if name in seen:
        return True
    seen.add(name)
    return False


def batch_items(number: int, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the entries of a stored batch as views."""
    for place, entry in enumerate(batch["entries"]):
        item = {
            "number": number * EVENTS_PER_BATCH + place,
            "at": entry["at"],
            "level": entry["level"],
            "attempt": batch["attempt"],
            "message": entry["message"],
            "code": entry.get("code"),
        }
        if entry.get("source"):
            item["source"] = entry["source"]
        if entry["level"] == "error":
            item["traceback"] = entry.get("traceback")
            item["reason"] = entry.get("reason")
        yield item
