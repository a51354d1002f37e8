"""What jobs need, and which agents have it: one document of the service lists the needs in use, by job type."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zerog import codec
from zerog.exceptions import CorruptDocument, NotFound, StoreUnavailable
from zerog.fleet import AgentRecord
from zerog.manager.records import Records
from zerog.needs import Limits, Needs
from zerog.orders import Orders, Wanted
from zerog.record import JobRecord

logger = logging.getLogger(__name__)

_KEY = "needs"

#: Needs that one type may have in use beside its own: each is a tube that agents watch.
_MOST = 200

#: Seconds for which the agents are taken for what they were.
_FRESH = 1.0


class Needing(Records):
    """The verbs about needs."""

    def look_at_needs(self) -> None:
        """Renew what this process knows of the needs in use; agents and the sweep go by that."""
        try:
            known = _read(self.store.get(_KEY).body)
        except NotFound:
            known = {}
        if known != self.needs_in_use:
            self.needs_in_use = known
            self.on_needs()

    def note_needs(self, job_type: str, needs: Needs) -> None:
        """See that agents know of what jobs of a type need, before the first of them is put into its tube."""
        if not needs or needs in self.needs_in_use.get(job_type, ()):
            return

        known: dict[str, tuple[Needs, ...]] = {}
        new = False

        def change(body: bytes | None) -> bytes | None:
            nonlocal known, new
            known = dict(_read(body))
            ours = known.get(job_type, ())
            new = needs not in ours
            if new:
                known[job_type] = (*ours, needs)[-_MOST:]
            return _document(known) if new else None

        self.store.change(_KEY, change)
        self.needs_in_use = known
        self.on_needs()
        if new:
            self.tell_agents((one.id for one in self.fleet.living()), "pauses")

    def tubes_within(self, job_types: Iterable[str], room: Limits, labels: Iterable[str]) -> list[str]:
        """Return the tubes of what an agent with some room and labels can run; those of paused types are not among
        them."""
        has = set(labels)
        tubes = []
        for job_type in job_types:
            if job_type in self.paused:
                continue
            tubes.append(self.tube(job_type))
            tubes += [
                self.tube(job_type, needs)
                for needs in self.needs_of(job_type)
                if has.issuperset(needs.labels) and room.fit(needs)
            ]
        return tubes

    def shares(
        self, job_types: Sequence[str], room: Limits, labels: Sequence[str], count: int
    ) -> list[tuple[str, ...]]:
        """Return the tubes for each of some places that share some room, whatever the others get meanwhile.

        A place counts the most that those before it may get as taken: two never take what there is room for once.
        """
        has = set(labels)
        found = []
        for _ in range(count):
            found.append(tuple(self.tubes_within(job_types, room, labels)))
            fitting = [
                needs
                for name in job_types
                for needs in self.needs_of(name)
                if name not in self.paused and has.issuperset(needs.labels) and room.fit(needs)
            ]
            most_ram = max((one.ram for one in fitting), default=0)
            room = room.less([Needs(most_ram, max((one.cpus for one in fitting), default=0.0))])
        return found

    def enqueue(self, records: Iterable[JobRecord]) -> bool:
        """Put the UUIDs of queued records into their tubes, which agents know; False if that is left to the sweep."""
        several = list(records)
        try:
            for record in several:
                self.note_needs(record.job_type, record.needs)
        except StoreUnavailable as error:
            logger.warning("needs cannot be noted, %d entries are left to the sweep: %s", len(several), error)
            return False
        return super().enqueue(several)

    def tell_agent_of(self, record: JobRecord, command: str, members: Mapping[str, Any]) -> None:
        """Tell the agent of a running job to look at it; one that speaks HTTP alone is given a command, once."""
        agent = record.agent
        if agent is None:
            return
        if self.fleet.speaks_http(agent):
            key = f" {command} {record.uuid} {record.revision} {record.attempt}"  # no request can have such a key
            self.orders.give(agent, command, members, key)
        else:
            self.tell_agents([agent], record.uuid)

    @property
    def orders(self) -> Orders:
        """The orders of all agents."""
        return Orders(self.store, self.clock)

    # Who could run a job

    def agents(self, within: float = _FRESH) -> list[tuple[AgentRecord, Wanted]]:
        """Return the agents that run now and what is wanted of each, as of so many seconds ago at most."""
        known, read_at = getattr(self, "_agents", ([], float("-inf")))
        now = self.clock.monotonic()
        if now - read_at >= within:
            records = [one for one in self.fleet.living() if self.fleet.state(one) == "running"]
            wanted = self.orders.wanted_of([one.id for one in records])
            known = [(one, wanted[one.id]) for one in records if not wanted[one.id].drained]
            self._agents = (known, now)
        return list(known)

    def could_run_elsewhere(self, record: JobRecord, agent: str) -> bool:
        """Return whether another agent than ``agent`` could run a job, one where it has not failed."""
        return any(
            one.id != agent and one.id not in record.failed_on and could_run(record, one, wanted)
            for one, wanted in self.agents()
        )


def could_run(record: JobRecord, agent: AgentRecord, wanted: Wanted) -> bool:
    """Return whether an agent that runs serves a job's type and has in total what it needs."""
    return record.job_type in agent.job_types and has_all(agent, wanted, record.needs)


def has_all(agent: AgentRecord, wanted: Wanted, needs: Needs) -> bool:
    """Return whether an agent has in total what is needed."""
    return set(agent.labels).issuperset(needs.labels) and limits_of(agent, wanted).fit(needs)


def limits_of(agent: AgentRecord, wanted: Wanted) -> Limits:
    """Return what an agent has in total: the smallest of what it has, its own limits, and those set from outside."""
    return agent.has.least(agent.limits, wanted.limits)


def _read(body: bytes | None) -> dict[str, tuple[Needs, ...]]:
    if body is None:
        return {}
    try:
        types = codec.loads(body)["types"]
        return {name: tuple(Needs.read(one) for one in several) for name, several in types.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptDocument(f"no document of needs: {error}") from error


def _document(known: dict[str, Sequence[Needs]] | dict[str, tuple[Needs, ...]]) -> bytes:
    types = {name: [one.members() for one in several] for name, several in known.items()}
    return codec.dumps({"types": types, "schema": 1})
