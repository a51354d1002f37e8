"""Cancelling jobs (R11)."""

from __future__ import annotations

from zerog import failpoints
from zerog.exceptions import Conflict, StoreAmbiguous
from zerog.manager.records import CONFLICTS, Held, too_busy
from zerog.manager.settling import Settling
from zerog.record import JobRecord, State


class Cancelling(Settling):
    """The verbs of a cancel."""

    def cancel(self, uuid: str) -> tuple[Held, bool]:
        """Cancel a job, or mark a running one; returns it as it is then, and whether it had ended before.

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
                after = self._end_seen(held, self._asked)
            except (Conflict, StoreAmbiguous):
                continue
            failpoints.hit("cancel.after_write")
            if after.record.state is State.RUNNING and after.record.agent is not None:
                self.tell_agents([after.record.agent], uuid)
            return after, False
        raise too_busy(uuid)

    def _asked(self, record: JobRecord) -> JobRecord:
        if record.state is State.RUNNING:
            return record.after("cancel", cancel_requested=True)
        return self._cancelled(record)
