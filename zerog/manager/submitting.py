"""Submitting jobs: R1 (the order of the writes) and R2 (idempotency keys)."""

from __future__ import annotations

import hashlib
import logging
import uuid as uuids
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zerog import codec, failpoints
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    DatastoreError,
    IdempotencyKeyReused,
    NotRetryable,
    QueueUnavailable,
    StoreAmbiguous,
    UnknownJob,
    ZerogError,
)
from zerog.manager.records import CONFLICTS, Held
from zerog.manager.waiting import Waiting
from zerog.record import JobRecord, State, to_document
from zerog.registry import Parameters

logger = logging.getLogger(__name__)

#: Seconds between a job's entry in the log and its record, after which readers may have given the entry up.
_STALE_ENTRY = 60.0

_NAMESPACE = uuids.UUID("6f1b7a52-61c5-5f0e-9d3f-7a65726f6721")


@dataclass(frozen=True, slots=True)
class Options:
    """How a job is to be run: ``priority`` (lower is more urgent) and ``not_before`` (seconds since 1970).

    ``written`` is what the client wrote, by name, for the fingerprint of R2: ``delay=2`` and not the moment.
    ``retried_from`` is the UUID of the job that this one tries again; ``parents`` those of jobs that must have
    succeeded before this one may run.
    """

    priority: int = 1000
    not_before: float | None = None
    written: tuple[tuple[str, str], ...] = ()
    retried_from: str | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Submission:
    """One job to be submitted.  ``key`` is the Idempotency-Key, ``principal`` whose it is."""

    job_type: str
    parameters: Parameters
    options: Options = field(default_factory=Options)
    key: str | None = None
    principal: str = ""
    #: The UUID that it gets in any case: others name it already.
    fixed: str | None = None

    @property
    def fingerprint(self) -> str:
        """A digest of the type, the validated parameters and the options as written."""
        content = [self.job_type, self.parameters.values, list(self.options.written)]
        if self.options.retried_from is not None:
            content.append({"retriedFrom": self.options.retried_from})
        return hashlib.sha256(codec.canonical(content)).hexdigest()

    @property
    def uuid(self) -> str:
        """The UUID that the job gets: made from principal and key, else random."""
        if self.fixed is not None:
            return self.fixed
        if self.key is None:
            return str(uuids.uuid4())
        return uuid_of(self.principal, self.key)


def uuid_of(principal: str, key: str) -> str:
    """Return the UUID of the job that a key of a principal stands for (R2)."""
    return str(uuids.uuid5(_NAMESPACE, f"{len(principal)}:{principal}{len(key)}:{key}"))


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is stored.  ``replayed`` says that an earlier request with the same key had made it."""

    record: JobRecord
    replayed: bool = False


def check_retryable(record: JobRecord) -> None:
    """Raise ``NotRetryable`` unless a job failed or was cancelled."""
    if record.state not in (State.FAILED, State.CANCELLED):
        raise NotRetryable(f"the job is {record.state}: only one that failed or was cancelled can be retried")


class Submitting(Waiting):
    """The verbs that make jobs."""

    def submit(self, submission: Submission) -> Submitted:
        """Store a job and enqueue its UUID."""
        done = self.submit_all([submission])[0]
        if isinstance(done, ZerogError):
            raise done
        return done

    def run(
        self,
        job_type: str,
        parameters: Mapping[str, Any],
        key: str | None = None,
        principal: str = "",
        uuid: str | None = None,
    ) -> JobRecord:
        """Check parameters, store a job and return its record.

        Where the ``uuid``, or the ``key``, has made a job before, that one comes back; ``IdempotencyKeyReused`` if it
        is for something else.
        """
        checked = self.registry.validate(job_type, codec.canonical(parameters))
        if uuid is not None:
            key = uuid
        return self.submit(Submission(job_type, checked, key=key, principal=principal, fixed=uuid)).record

    def check_key(self, submission: Submission) -> bool:
        """Return whether the key of a submission has made this job before; ``IdempotencyKeyReused`` for another one."""
        held = self.read_many([submission.uuid]).get(submission.uuid) if submission.key is not None else None
        done = compare(submission, held) if held is not None else None
        if isinstance(done, ZerogError):
            raise done
        return done is not None

    def submit_all(self, submissions: Sequence[Submission]) -> list[Submitted | ZerogError]:
        """Store many jobs side by side: the log entries, the records, and only then the queue's entries (R1).

        For each the stored job, or what went wrong with it alone.  A queue that is away is no failure: the sweep puts
        what is missing.
        """
        results: list[Submitted | ZerogError | None] = [None] * len(submissions)
        chosen = [submission.uuid for submission in submissions]
        self._replay_known(submissions, chosen, results)
        fresh: dict[str, int] = {}
        for index, uuid in enumerate(chosen):
            if results[index] is None:
                results[index] = self._refusal(submissions[index])
            if results[index] is None:
                fresh.setdefault(uuid, index)
        started = self.clock.monotonic()
        items = [(uuid, submissions[index]) for uuid, index in fresh.items()]
        inserted: Mapping[str, Held | DatastoreError]
        try:
            inserted = failpoints.ambiguous(
                "submit.insert_ambiguous", lambda: self._insert_together(items), StoreAmbiguous
            )
        except StoreAmbiguous as error:
            inserted = dict.fromkeys(fresh, error)  # any of it may have happened: each is read again
        except DatastoreError as error:
            return [result if result is not None else error for result in results]
        for uuid, index in fresh.items():
            results[index] = self._verdict(submissions[index], uuid, inserted[uuid], started)
        # What remains has a key that another submission of this very batch used first.
        for index, uuid in enumerate(chosen):
            if results[index] is None:
                results[index] = self._replay(submissions[index], uuid)
        self._put_new(
            [
                done.record
                for done in results
                if isinstance(done, Submitted) and done.record.state is State.QUEUED and not done.replayed
            ]
        )
        return [self._decided_now(result) for result in results if result is not None]

    def _refusal(self, submission: Submission) -> ZerogError | None:
        """Return why a submission must not be stored, if it must not."""
        if not submission.options.parents:
            return None
        try:
            self.check_parents(submission.options.parents)
        except ZerogError as error:
            return error
        return None

    def _decided_now(self, done: Submitted | ZerogError) -> Submitted | ZerogError:
        """Look at the parents of a new job once more: one may have ended before it could know of its child."""
        if isinstance(done, ZerogError) or done.replayed or done.record.state is not State.WAITING:
            return done
        try:
            return Submitted(self.decide(self.read(done.record.uuid)))
        except ZerogError as error:
            logger.warning("job %s is left to the sweep: %s", done.record.uuid, error)
            return done

    def _put_new(self, records: Sequence[JobRecord]) -> None:
        failpoints.hit("submit.after_insert")
        try:
            failpoints.hit("submit.put_fails", QueueUnavailable)
            failpoints.ambiguous("submit.put_ambiguous", lambda: self.enqueue(records), QueueUnavailable)
        except QueueUnavailable as error:
            self.say_queue_away(error, len(records))
        failpoints.hit("submit.after_put")

    def _replay_known(
        self, submissions: Sequence[Submission], chosen: Sequence[str], results: list[Submitted | ZerogError | None]
    ) -> None:
        keyed = [uuid for uuid, submission in zip(chosen, submissions, strict=True) if submission.key is not None]
        if not keyed:
            return
        try:
            known = self.read_many(keyed)
        except DatastoreError as error:
            results[:] = [error] * len(results)
            return
        for index, (uuid, submission) in enumerate(zip(chosen, submissions, strict=True)):
            if submission.key is not None and uuid in known:
                results[index] = compare(submission, known[uuid])

    def _insert_together(self, items: Sequence[tuple[str, Submission]]) -> dict[str, Held | DatastoreError]:
        with self.store.together():
            for uuid, submission in items:
                self.tie(uuid, submission.options.parents)
            return self._insert(items)

    def _insert(self, items: Sequence[tuple[str, Submission]]) -> dict[str, Held | DatastoreError]:
        entries = [("jobs", codec.dumps({"uuid": uuid})) for uuid, _ in items]
        numbers = self.store.append_all(entries)
        failpoints.hit("submit.after_append")
        numbered: list[tuple[str, Submission, int]] = []
        made: dict[str, JobRecord] = {}
        done: dict[str, Held | DatastoreError] = {}
        for (uuid, submission), number in zip(items, numbers, strict=True):
            if isinstance(number, DatastoreError):
                done[uuid] = number
            else:
                numbered.append((uuid, submission, number))
        by_type = [
            (f"jobs.{submission.job_type}", codec.dumps({"uuid": uuid, "number": number}))
            for uuid, submission, number in numbered
        ]
        for (uuid, submission, number), entry in zip(numbered, self.store.append_all(by_type), strict=True):
            if isinstance(entry, DatastoreError):
                done[uuid] = entry
            else:
                made[uuid] = self._record(uuid, submission, number, entry)
        written = self.store.insert_all({self.key(uuid): to_document(record) for uuid, record in made.items()})
        for uuid, record in made.items():
            cas = written[self.key(uuid)]
            done[uuid] = cas if isinstance(cas, DatastoreError) else Held(record, cas)
        return done

    def _record(self, uuid: str, submission: Submission, number: int, type_number: int) -> JobRecord:
        now = self.clock.now()
        return JobRecord(
            uuid=uuid,
            job_type=submission.job_type,
            number=number,
            type_number=type_number,
            parameters=submission.parameters.values,
            created_at=now,
            updated_at=now,
            priority=submission.options.priority,
            not_before=submission.options.not_before,
            state=State.WAITING if submission.options.parents else State.QUEUED,
            parents=submission.options.parents,
            needs=self.registry.policy(submission.job_type).needs,
            retried_from=submission.options.retried_from,
            secrets=submission.parameters.secrets,
            fingerprint=submission.fingerprint if submission.key is not None else None,
        )

    def _verdict(
        self, submission: Submission, uuid: str, done: Held | DatastoreError, started: float
    ) -> Submitted | ZerogError:
        try:
            if isinstance(done, AlreadyExists):
                return self._replay(submission, uuid)
            if isinstance(done, StoreAmbiguous):
                done = self.read(uuid)
                if submission.key is not None and done.record.fingerprint != submission.fingerprint:
                    return compare(submission, done)
            if isinstance(done, DatastoreError):
                return done
            if self.clock.monotonic() - started > _STALE_ENTRY:
                done = self._append_again(done)
            return Submitted(done.record)
        except UnknownJob:
            return StoreAmbiguous("the store did not confirm the job in time; repeat the request with the same key")
        except ZerogError as error:
            return error

    def _append_again(self, held: Held) -> Held:
        """Give a job another number: readers of the log may have given up the entry with its first one (R1)."""
        number = self.store.append("jobs", codec.dumps({"uuid": held.record.uuid}))
        for _ in range(CONFLICTS):
            try:
                return self.write(held, held.record.evolve(number=number))
            except (Conflict, StoreAmbiguous):
                held = self.read(held.record.uuid)
        raise StoreAmbiguous(f"job {held.record.uuid} is being changed by too many at once")

    def _replay(self, submission: Submission, uuid: str) -> Submitted | ZerogError:
        try:
            return compare(submission, self.read(uuid))
        except ZerogError as error:
            return error


def compare(submission: Submission, held: Held) -> Submitted | ZerogError:
    """Return the job that a key has made before, or the error that says that it was for other content."""
    if held.record.fingerprint != submission.fingerprint:
        return IdempotencyKeyReused("this Idempotency-Key was used for another request")
    return Submitted(held.record, replayed=True)
