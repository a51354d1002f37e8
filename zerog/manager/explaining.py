"""Explaining why a job is not done: exactly one reason, the first that holds."""

from __future__ import annotations

from typing import Any

from zerog.exceptions import QueueError
from zerog.manager.pausing import Pausing
from zerog.record import JobRecord, State


class Explaining(Pausing):
    """The verb that says why."""

    def explain(self, record: JobRecord) -> tuple[str, dict[str, Any]]:
        """Return the reason, a key of ``views.WHY``, and its facts: times in seconds since 1970, parents as UUIDs."""
        if record.reason == "newer_version":
            return "newer_version", {}
        if record.terminal:
            return "finished", {}
        if record.cancelling:
            return "cancelling", {}
        if record.state is State.RUNNING:
            return self._running(record)
        if record.state is State.WAITING:
            return "waiting_for_parent", {"parents": self._open_parents(record)}
        return self._queued(record)

    def _running(self, record: JobRecord) -> tuple[str, dict[str, Any]]:
        # The wall clocks of two machines: good enough to be shown, and nothing is decided by it.
        renewed = record.lease.until - self.lease if record.lease is not None else record.updated_at
        seconds = round(max(0.0, self.clock.now() - renewed), 1)
        facts = {"agent": record.agent, "seconds": seconds}
        if self.lost(record):
            return "agent_gone", facts
        return "lease_silent" if seconds >= self.lease / 2 else "running", facts

    def _open_parents(self, record: JobRecord) -> list[str]:
        known = self.read_many(record.parents)
        return [one for one in record.parents if one not in known or known[one].record.state is not State.SUCCEEDED]

    def _queued(self, record: JobRecord) -> tuple[str, dict[str, Any]]:
        pause = self.pauses().get(record.job_type)
        if pause is not None:
            return "paused", {"by": pause.by, "at": pause.at, "message": pause.message}
        if record.not_before is not None and record.not_before > self.clock.now():
            return "not_before", {"notBefore": record.not_before}
        if not self.fleet.serves(record.job_type):
            return "no_agent", {"jobType": record.job_type}
        return "ahead", {"ahead": self._ahead(record)}

    def _ahead(self, record: JobRecord) -> int | None:
        """Return how many entries may come before this job's own; None while the queue is away."""
        if self.queue_away:
            return None
        try:
            return max(0, self.queue_stats(record.job_type).ready - 1)
        except QueueError:
            return None
