"""Running jobs: claim (R3), renewal and reports of the current attempt (R4, R6), and its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zerog import codec
from zerog.datastore.blobs import BlobWriter
from zerog.exceptions import Conflict, CorruptDocument, NewerVersion, QueueError, StoreAmbiguous, UnknownJob
from zerog.leases import LeaseWatch
from zerog.manager.records import CONFLICTS, Held, too_busy
from zerog.manager.settling import Settling, with_progress
from zerog.queue.base import Reservation
from zerog.record import JobRecord, Lease, State

#: How often the lease of a job must have been seen to move before a second entry of it is deleted.
_LOOKS = 3

#: Seconds after which the entry of a job that runs elsewhere is looked at for the second time.
_SOON = 1.0

#: Seconds after which an entry of a paused type is looked at again, if somebody watches its tube at all.
_PAUSED = 1.0

#: Seconds for which an agent leaves a job that failed there to the others that could run it.
_ELSEWHERE = 1.0


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims: the agent's id, and what its leases name (``AgentRecord.holder``)."""

    id: str
    holder: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The attempt is ours."""

    held: Held


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Not now: the entry goes back into the queue for ``delay`` seconds."""

    delay: float
    priority: int = 1000


@dataclass(frozen=True, slots=True)
class Drop:
    """There is nothing to run: the entry is deleted."""


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no record: the entry is given back a few times, since its submit may be under way, then deleted."""


Verdict = Claimed | GiveBack | Drop | Missing


class Running(Settling):
    """The verbs of a running attempt."""

    def claim(
        self, uuid: str, agent: Claimant | str, claim: str, watch: LeaseWatch, entry: Reservation | None = None
    ) -> Verdict:
        """Begin an attempt, or say what is to be done with the queue's entry (R3).

        ``claim`` is a random text that the caller makes for this claim and repeats when it is in doubt.  ``entry`` is
        asked where it lies if the job was modified since it was put.
        """
        agent = agent if isinstance(agent, Claimant) else Claimant(agent, agent)
        for _ in range(CONFLICTS):
            try:
                held = self.read(uuid)
            except UnknownJob:
                return Missing()
            except NewerVersion:
                return GiveBack(self.lease)
            except CorruptDocument:
                return Drop()
            watch.heard()
            verdict = self._claim_once(held, agent, claim, watch, entry)
            if verdict is not None:
                return verdict
        raise too_busy(uuid)

    def _claim_once(
        self, held: Held, agent: Claimant, claim: str, watch: LeaseWatch, entry: Reservation | None
    ) -> Verdict | None:
        record = held.record
        try:
            match record.state:
                case State.RUNNING if record.lease is not None and record.lease.claim == claim:
                    return Claimed(held)
                case State.RUNNING if self.lost(record) or watch.lapsed_for_sure(record, self.prove_writable):
                    return self._take_over(held, agent, claim, watch)
                case State.RUNNING:
                    return self._busy(record, watch)
                case State.QUEUED if record.job_type in self.paused:
                    return GiveBack(_PAUSED, record.priority)
                case State.QUEUED if record.revised and entry is not None and (moved := self._moved(record, entry)):
                    return moved
                case State.QUEUED if agent.id in record.failed_on and self.could_run_elsewhere(record, agent.id):
                    return GiveBack(_ELSEWHERE, record.priority)
                case State.QUEUED if record.due(self.clock.now()):
                    watch.forget(record.uuid)
                    if self.refuse_worn(held):
                        return Drop()
                    return Claimed(self._write_at("run.claim_ambiguous", held, self._claimed(record, agent, claim)))
                case State.QUEUED:
                    wait = (record.not_before or 0.0) - self.clock.now()
                    return GiveBack(max(0.0, wait), record.priority)
                case _:
                    return Drop()
        except (Conflict, StoreAmbiguous):
            return None  # read again: the claim in the lease says whose it is

    def _busy(self, record: JobRecord, watch: LeaseWatch) -> Verdict:
        """Say what to do with an entry of a job that runs elsewhere.

        The first look is soon followed by another: when an agent dies its entry can come free before its lock does.
        """
        if watch.moves(record.uuid) >= _LOOKS:
            return Drop()
        delay = self.lease / 3
        return GiveBack(min(_SOON, delay) if watch.looks(record.uuid) == 1 else delay, record.priority)

    def _moved(self, record: JobRecord, entry: Reservation) -> Verdict | None:
        """Say what to do with an entry that was put before its job was modified; None if it lies where it should."""
        try:
            tube, priority = entry.where()
        except QueueError:
            return None  # the queue forgets it by itself; the record is what counts
        if tube != self.tube(record.job_type, record.needs):
            return Drop()  # another one was put where it belongs
        return GiveBack(0.0, record.priority) if priority != record.priority else None

    def _claimed(self, record: JobRecord, agent: Claimant, claim: str) -> JobRecord:
        now = self.clock.now()
        # After a failure the message speaks of the attempt before; a Requeue has reset the counters and goes on.
        failed_before = record.errors or record.crashes or record.losses
        once = not self.registry.policy(record.job_type).rerun_after_crash
        return record.after(
            "claim",
            message=None if failed_before else record.message,
            attempt=record.attempt + 1,
            lease=Lease(agent.holder, claim, 0, now + self.lease),
            agent=agent.id,
            started_at=now,
            not_before=None,
            once=once,
        )

    def _take_over(self, held: Held, agent: Claimant, claim: str, watch: LeaseWatch) -> Verdict:
        after = self.lose(held)
        watch.forget(held.record.uuid)
        if after.record.state is not State.QUEUED:
            return Drop()
        if after.record.job_type in self.paused:
            return GiveBack(_PAUSED, after.record.priority)
        return Claimed(self.write(after, self._claimed(after.record, agent, claim)))

    def report(
        self,
        held: Held,
        attempt: int,
        completeness: float | None = None,
        message: str | None = None,
        state: tuple[Any, ...] = (),
    ) -> Held:
        """Write the progress of an attempt, which also renews its lease; without progress it only renews it.

        Completeness never goes back within an attempt.  ``state`` has the job's new state, if there is one.
        """
        kept: Mapping[str, Any] = {"job_state": state[0]} if state else {}

        def change(record: JobRecord) -> JobRecord:
            assert record.lease is not None  # R4 has checked that it is running
            lease = record.lease
            renewed = Lease(lease.agent, lease.claim, lease.sequence + 1, self.clock.now() + self.lease)
            return with_progress(record, completeness, message).after("renew", lease=renewed, **kept)

        return self.guarded(held, attempt, change)

    @property
    def shares_commits(self) -> bool:
        """Whether the store does what is asked of it together at once, or not at all."""
        return self.store.shares_commits

    def append_events(self, uuid: str, batch: Mapping[str, Any]) -> int:
        """Append a batch of what an attempt said; returns its number in the log of the job's events."""
        return self.store.append(self.events_log(uuid), codec.dumps(batch))

    def drop_events(self, uuid: str, number: int, keep: int = 0) -> None:
        """Remove a batch again but for its last ``keep`` entries: the rest lies between those that are kept.

        Doing it twice is doing it once.
        """
        log = self.events_log(uuid)
        if keep == 0:
            self.store.amend(log, number, None)
            return
        for entry in self.store.read(log, after=number - 1, limit=1):
            if entry.number == number:
                batch = codec.loads(entry.body)
                self.store.amend(log, number, codec.dumps({**batch, "entries": batch["entries"][-keep:]}))

    def open_output(self, uuid: str, attempt: int, media_type: str = "") -> BlobWriter:
        """Return a writer for the output of an attempt, under the attempt's own name (R15)."""
        return BlobWriter(self.store, self.blob_name(uuid, attempt))
