"""Modifying jobs that are not over: their priority, when they may run, what they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zerog.exceptions import AlreadyFinished, Conflict, PreconditionFailed, StoreAmbiguous
from zerog.manager.records import CONFLICTS, Held, same_content, too_busy
from zerog.manager.settling import Settling
from zerog.record import JobRecord, State


class Modifying(Settling):
    """The verb that changes what was asked for."""

    def modify(self, uuid: str, changes: Mapping[str, Any], revision: int | None = None) -> JobRecord:
        """Change a job's ``priority``, ``not_before`` (seconds since 1970, or None), ``ram``, ``cpus`` or ``labels``.

        ``AlreadyFinished`` if it has ended, ``PreconditionFailed`` if its revision is another one.  The entry of a
        queued job is put anew: who meets the old one sees that it lies in the wrong place.  The agent of a running one
        is told by whoever calls.
        """
        for _ in range(CONFLICTS):
            held = self.read(uuid)
            record = held.record
            if record.terminal:
                raise AlreadyFinished(f"the job is {record.state}", state=str(record.state))
            if revision is not None and record.revision != revision:
                raise PreconditionFailed(f"the job's revision is {record.revision}", revision=record.revision)
            after = self._modified(record, changes)
            if after == record:
                return record
            after = after.evolve(revised=record.revised + 1)
            try:
                self.write(held, after)
            except Conflict:
                continue
            except StoreAmbiguous:
                found = self.read(uuid)
                if not same_content(found.record, after):
                    continue
            if after.state is State.QUEUED:
                self.enqueue([after])
            return after
        raise too_busy(uuid)

    @staticmethod
    def _modified(record: JobRecord, changes: Mapping[str, Any]) -> JobRecord:
        wanted = record.needs.with_limits(
            {name: changes[name] for name in ("ram", "cpus", "labels") if name in changes}
        )
        simple = {name: changes[name] for name in ("priority", "not_before") if name in changes}
        return record.evolve(**simple, needs=wanted)

    def mark_cancelled(self, uuid: str) -> tuple[Held, bool]:
        """Cancel a job, or mark a running one, without telling its agent; returns it, and whether it had ended before.

        Whichever write came first wins: a job that ended in the meantime stays as it is.
        """
        for _ in range(CONFLICTS):
            held = self.read(uuid)
            record = held.record
            if record.terminal:
                return held, True
            if record.cancel_requested:
                return held, False
            try:
                return self._end_seen(held, self._asked), False
            except (Conflict, StoreAmbiguous):
                continue
        raise too_busy(uuid)

    def _asked(self, record: JobRecord) -> JobRecord:
        if record.state is State.RUNNING:
            return record.after("cancel", cancel_requested=True)
        return self._cancelled(record)
