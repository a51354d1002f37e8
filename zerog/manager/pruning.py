"""Pruning (R18): what has ended and is older than its retention goes, with all that belongs to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zerog import codec, failpoints
from zerog.clock import from_iso
from zerog.consumer import FINISHED
from zerog.datastore.base import Entry
from zerog.documents import OwnDocuments
from zerog.exceptions import Conflict, CorruptDocument, NotFound
from zerog.manager.records import Held
from zerog.manager.waiting import Waiting
from zerog.notes import Notes, notes_key
from zerog.record import JobRecord, to_document
from zerog.topics import log_of, message_of

logger = logging.getLogger(__name__)

#: Entries of a log that are looked at in one go, and jobs that go in one commit.
_PAGE, _TOGETHER = 200, 20

#: Seconds by which the order of the log of ends and that of the times in it may differ: clocks are never quite right.
_SLACK = 3600.0

#: Seconds for which an agent that is gone is known in any case.
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many jobs are gone, and where in the log of ends to go on; ``None`` when there is nothing left to look at."""

    jobs: int
    position: int | None


class Pruning(Waiting):
    """The verbs that remove jobs."""

    def retention_of(self, job_type: str) -> float:
        """Return the seconds for which jobs of a type are kept after their end."""
        own = self.registry.get(job_type).retention
        return self.retention if own is None else own

    def shortest_retention(self) -> float:
        """Return the shortest retention of all types."""
        return min([self.retention, *(self.retention_of(name) for name in self.registry.names)])

    def prune(self, after: int = 0, job_type: str | None = None, older_than: float | None = None) -> Pruned:
        """Remove jobs that ended longer ago than their retention; looks at one page of the log of ends.

        ``after`` is where an earlier call stopped.  ``job_type`` spares all others; ``older_than``, in seconds, stands
        for the retention, and without it jobs of types that this process does not know stay.  A job for which others
        wait is never removed.  What a crash leaves half removed goes later.  At the end of the log ``tidy`` and
        ``trim`` are due.  What a consumer of ``finished`` is still to hear of stays.
        """
        needed = self.consumers.upto(FINISHED, self.registry.followers(FINISHED))
        entries = self.store.read("finished", after=after, limit=_PAGE)
        now = self.clock.now()
        shortest = older_than if older_than is not None else self.shortest_retention()
        held = self.read_many([_members(entry)["uuid"] for entry in entries])
        old: list[tuple[Entry, Held | None]] = []
        position: int | None = None
        for entry in entries:
            members = _members(entry)
            if needed is not None and entry.number > needed:
                break  # somebody is still to hear of it
            if "at" in members and from_iso(members["at"]) > now - shortest + _SLACK:
                break
            position = entry.number
            found = held.get(members["uuid"])
            if found is None or self._is_old(found.record, now, job_type, older_than):
                old.append((entry, found))
        removed = sum(self._remove(old[start : start + _TOGETHER]) for start in range(0, len(old), _TOGETHER))
        if position is None or position != entries[-1].number:
            position = None
        return Pruned(removed, position)

    def _is_old(self, record: JobRecord, now: float, job_type: str | None, older_than: float | None) -> bool:
        if not record.terminal or record.finished_at is None or (job_type is not None and record.job_type != job_type):
            return False
        if older_than is None and record.job_type not in self.registry:
            return False  # who knows the type knows for how long it is kept, and what belongs to its jobs
        kept = older_than if older_than is not None else self.retention_of(record.job_type)
        if record.finished_at + kept > now:
            return False
        # Not only where the record is marked: a job that had ended before its child came bears no mark.
        return not any(self._children(record.uuid))

    def _remove(self, old: Sequence[tuple[Entry, Held | None]]) -> int:
        """Remove some jobs and their entries in the log of ends; return how many jobs are gone."""
        gone: dict[str, bool] = {}
        with self.store.together():
            for entry, found in old:
                if found is not None and found.record.uuid not in gone:
                    gone[found.record.uuid] = self._remove_job(found)
                # Last: as long as it is there, the next prune comes past here.
                if found is None or gone[found.record.uuid]:
                    self.store.amend("finished", entry.number, None)
        return sum(gone.values())

    def _remove_job(self, held: Held) -> bool:
        """Remove what a job wrote in any attempt, what is said of it elsewhere, and then its record.

        Only the very version that was judged: another prune may have removed that job, and the same idempotency key
        have made the next one, under the same UUID.  False if the record is another now.
        """
        record, key = held.record, self.key(held.record.uuid)
        try:
            cas = self.store.replace(key, to_document(record), held.cas)
        except NotFound:
            return True
        except Conflict:
            return False
        for attempt in range(1, record.attempt + 1):
            self.store.remove_blob(self.blob_name(record.uuid, attempt))
        self._remove_notes(record)
        self._remove_documents(record)
        for log in (self.events_log(record.uuid), self.children_log(record.uuid)):
            self.store.remove_log(log)
        failpoints.hit("prune.mid")
        self.store.amend("jobs", record.number, None)
        if record.type_number:
            self.store.amend(f"jobs.{record.job_type}", record.type_number, None)
        try:
            self.store.remove(key, cas)
        except Conflict:
            return False
        except NotFound:
            return True  # another prune was faster
        return True

    def _remove_notes(self, record: JobRecord) -> None:
        """Remove what came over HTTP: the result, and what attempts left that never ended."""
        if record.result is not None and record.result.blob is not None:
            self.store.remove_blob(record.result.blob)
        keys = [notes_key(record.uuid, attempt) for attempt in range(1, record.attempt + 1)]
        for start in range(0, len(keys), _PAGE):
            for key, document in self.store.get_many(keys[start : start + _PAGE]).items():
                for blob in Notes.blobs_of(document.body):
                    self.store.remove_blob(blob)
                with suppress(NotFound):
                    self.store.remove(key)

    def _remove_documents(self, record: JobRecord) -> None:
        """Remove what the application has said to belong to the job."""
        if record.job_type not in self.registry:
            return
        documents = OwnDocuments(self.store, self.registry.application(record.job_type))
        for key in self.registry.get(record.job_type).own_documents:
            with suppress(NotFound):
                documents.remove(key.replace("{uuid}", record.uuid))

    def tidy(self, after: int = 0) -> int | None:
        """Remove the dead letters of jobs that are gone.

        Looks at one page of them, from where an earlier call stopped; returns where to go on, or None.
        """
        entries = self.store.read("failed", after=after, limit=_PAGE)
        held = self.read_many([_members(entry)["uuid"] for entry in entries])
        with self.store.together():
            for entry in entries:
                if _members(entry)["uuid"] not in held:
                    self.store.amend("failed", entry.number, None)
        return entries[-1].number if len(entries) == _PAGE else None

    def forget_agents(self, after: int = 0) -> int | None:
        """Forget the agents that have been silent for longer than jobs are kept, and for a day.

        Looks at one page of them, from where an earlier call stopped; returns where to go on, or None.
        """
        old, position = self.fleet.old(max(self.retention, _DAY), after)
        for one in old:
            try:
                self.fleet.forget(one, self.orders.forget)
            except CorruptDocument as error:
                logger.warning("agent %s cannot be forgotten: %s", one.id, error)
        return position

    def prune_topic(self, topic: str, after: int = 0) -> int | None:
        """Remove messages of a declared topic that are older than its retention and behind all its consumers.

        Looks at one page, from where an earlier call stopped; returns where to go on, or None.
        """
        needed = self.consumers.upto(topic, self.registry.followers(topic))
        entries = self.topics.entries(topic, after, _PAGE)
        oldest = self.clock.now() - self.registry.topics[topic]
        upto = None
        for entry in entries:
            if needed is not None and entry.number > needed:
                break
            try:
                if message_of(topic, entry).at > oldest:
                    break
            except CorruptDocument:
                pass  # its consumers have passed over it, and nobody else can read it
            upto = entry.number
        if upto is not None:
            self.store.trim(log_of(topic), upto)
        return upto if len(entries) == _PAGE and upto == entries[-1].number else None

    def trim(self) -> None:
        """Remove what lies before the first entry of each log, and give freed room back to the disk."""
        for log in ("finished", "failed", "jobs", "agents", *(f"jobs.{name}" for name in self.registry.names)):
            first = self.store.read(log, after=0, limit=1)
            if first and first[0].number > 1:
                self.store.trim(log, first[0].number - 1)
        self.store.give_back_space()


def _members(entry: Entry) -> dict[str, Any]:
    members: dict[str, Any] = codec.loads(entry.body)
    return members
