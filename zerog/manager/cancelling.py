"""Cancelling jobs (R11)."""

from __future__ import annotations

from zerog import failpoints
from zerog.manager.modifying import Modifying
from zerog.manager.records import Held
from zerog.record import State


class Cancelling(Modifying):
    """The verbs of a cancel."""

    def cancel(self, uuid: str) -> tuple[Held, bool]:
        """Cancel a job, or mark a running one; returns it as it is then, and whether it had ended before.

        Whichever write came first wins: a job that ended in the meantime stays as it is.
        """
        after, ended = self.mark_cancelled(uuid)
        record = after.record
        if not ended:
            failpoints.hit("cancel.after_write")
        if not ended and record.state is State.RUNNING and record.agent is not None:
            self.tell_agent_of(record, "cancel", {"uuid": uuid})
        return after, ended
