"""Turn: what a master writes for agents in one commit: how attempts go and end, and which begin."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

from zerog.attempts import Report, Settlement
from zerog.exceptions import (
    CorruptDocument,
    InternalError,
    NewerVersion,
    StateConflict,
    StoreUnavailable,
    Superseded,
    UnknownResource,
)
from zerog.fleet import LOG_FAILURES, LOG_JOBS, AgentRecord, Assignment
from zerog.leases import LeaseWatch
from zerog.manager import Claimant, Claimed, GiveBack, Held, Verdict
from zerog.master import Ended, Master, room_beside, word_of
from zerog.orders import Wanted
from zerog.outcome import GivenBack
from zerog.queue.base import Reservation
from zerog.record import JobRecord, State

#: Seconds for which the entry of a job is left to others that had no room here after all.
_NO_ROOM = 0.1

logger = logging.getLogger(__name__)

#: What is wrong with one item, and no other.
_WRONG = (Superseded, StateConflict, UnknownResource, CorruptDocument, NewerVersion)


def item_uuid(item: Report | Settlement) -> str:
    """Return whose job an item speaks of."""
    return item.uuid if isinstance(item, Report) else item.report.uuid


class Turn:
    """Used once: ``answer`` and ``take`` inside a commit, then ``write``; ``after`` when it has ended."""

    def __init__(self, master: Master) -> None:
        self._master = master
        self._manager = master.manager
        self._clock = master.manager.clock
        self._ended: dict[str, list[Ended]] = defaultdict(list)
        self._begun: dict[str, list[tuple[Assignment, Held]]] = defaultdict(list)
        self._seconds: list[tuple[str, float]] = []
        self._queued: list[JobRecord] = []
        #: Jobs that were claimed for an agent that had no room for them after all, with what is to be done.
        self.refused: dict[str, GiveBack] = {}

    def answer(self, item: Report | Settlement) -> JobRecord | Exception:
        """Write how an attempt goes, or how it ended; returns the job's record, or what is wrong."""
        attempts = self._master.attempts
        try:
            if isinstance(item, Report):
                return attempts.report(item)
            before, after = attempts.settle(item)
        except _WRONG as error:
            return error
        except StoreUnavailable:
            raise
        except Exception:  # a defect shown by one item: the others, and other agents, go on
            logger.exception("an item of job %s could not be written", item_uuid(item))
            return InternalError()
        if before is not None:
            self._note_end(item, before, after)
        return after

    def _note_end(self, item: Settlement, before: JobRecord, after: JobRecord) -> None:
        now = self._clock.now()
        if before.agent is not None:
            word = word_of(item.outcome) if after.state is not State.CANCELLED else "cancelled"
            self._ended[before.agent].append(Ended(after.uuid, before.attempt, word, now))
        if not isinstance(item.outcome, GivenBack):
            self._seconds.append((after.job_type, max(0.0, now - (before.started_at or 0.0))))
        if after.state is State.QUEUED:
            self._queued.append(after)

    def take(self, id: str, uuid: str, claim: str, watch: LeaseWatch, entry: Reservation) -> Verdict:
        """Claim a job for an agent (R3, R16)."""
        verdict = self._manager.claim(uuid, Claimant(id, id), claim, watch, entry)
        if isinstance(verdict, Claimed):
            record = verdict.held.record
            since = record.started_at or self._clock.now()
            self._begun[id].append((Assignment(uuid, record.attempt, since, record.needs), verdict.held))
        return verdict

    def write(self) -> None:
        """Write the accounts of the agents: what has ended there, and what begins, as far as there is room."""
        for id in {*self._ended, *self._begun}:
            self._write_account(id)

    def _write_account(self, id: str) -> None:
        ended, begun = self._ended[id], self._begun[id]
        over = {(one.uuid, one.attempt) for one in ended}
        # What was given back has not ended here: it goes on elsewhere.
        counted = [one for one in ended if one.outcome != "givenBack"]
        failed = [one for one in counted if one.failed]
        # What needs nothing was given from what was seen a moment ago; a command that came since is heard soon enough.
        wanted = self._master.wanted(id) if any(one.needs for one, _ in begun) else Wanted()
        refused: list[Held] = []

        def change(before: AgentRecord | None) -> AgentRecord | None:
            refused[:] = []
            if before is None or before.direct:
                refused.extend(held for _, held in begun)
                return None
            left = [one for one in before.assignments if one.key not in over]
            takes = before.state == "running" and not wanted.drained
            for assignment, held in begun:
                if assignment in left:
                    continue
                if takes and room_beside(before, wanted, left).fit(assignment.needs):
                    left.append(assignment)
                else:
                    refused.append(held)
            return replace(
                before,
                assignments=tuple(left),
                processed=before.processed + len(counted),
                failures=before.failures + len(failed),
                heard_at=self._clock.now(),
            )

        record = self._master.fleet.change(id, change)
        for held in refused:
            self._manager.settle(held, held.record.attempt, GivenBack(started=False))
            self.refused[held.record.uuid] = GiveBack(_NO_ROOM, held.record.priority)
        if record is not None and not record.direct:
            self._master.fleet.keep(id, LOG_JOBS, [one.members() for one in counted])
            self._master.fleet.keep(id, LOG_FAILURES, [one.members() for one in failed])

    def after(self) -> None:
        """Do what comes after the commit: put what goes on later, and count."""
        self._manager.enqueue(self._queued)
        for job_type, seconds in self._seconds:
            self._master.statistics.observe(job_type, seconds)
        begun = sum(len(several) for several in self._begun.values()) - len(self.refused)
        if begun:
            self._master.statistics.add("attempts", begun)
