"""Explaining why a job is not done: exactly one reason, the first that holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zerog.exceptions import QueueError
from zerog.fleet import AgentRecord
from zerog.manager.needing import has_all, limits_of
from zerog.manager.pausing import Pausing
from zerog.needs import Needs
from zerog.orders import Wanted
from zerog.record import JobRecord, State


def _unmet(needs: Needs, serving: Sequence[tuple[AgentRecord, Wanted]]) -> dict[str, Any]:
    """Return those of a job's needs that no agent of its type has, each by itself; all of them if each is had."""
    found: dict[str, Any] = {}
    if needs.ram and not any(limits_of(*one).fit(Needs(ram=needs.ram)) for one in serving):
        found["ram"] = needs.ram
    if needs.cpus and not any(limits_of(*one).fit(Needs(cpus=needs.cpus)) for one in serving):
        found["cpus"] = needs.cpus
    missing = [label for label in needs.labels if not any(label in one.labels for one, _ in serving)]
    if missing:
        found["labels"] = missing
    return found or needs.members()


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
        return self._without_room(record) or ("ahead", {"ahead": self._ahead(record)})

    def _without_room(self, record: JobRecord) -> tuple[str, dict[str, Any]] | None:
        """Say why no agent could take a job now; None if one could."""
        serving = [(one, wanted) for one, wanted in self.agents(0.0) if record.job_type in one.job_types]
        if not serving:
            return "no_agent", {"jobType": record.job_type}
        if not record.needs:
            return None
        fitting = [(one, wanted) for one, wanted in serving if has_all(one, wanted, record.needs)]
        facts = {"jobType": record.job_type, "needs": record.needs.members()}
        if not fitting:
            return "no_agent_fits", {**facts, "unmet": _unmet(record.needs, serving)}
        if not any(
            limits_of(one, wanted).less(held.needs for held in one.assignments).fit(record.needs)
            for one, wanted in fitting
        ):
            return "no_room", facts
        return None

    def _ahead(self, record: JobRecord) -> int | None:
        """Return how many entries may come before this job's own; None while the queue is away."""
        if self.queue_away:
            return None
        try:
            return max(0, self.queue.stats(self.tube(record.job_type, record.needs)).ready - 1)
        except QueueError:
            return None
