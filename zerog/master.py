"""Master: what a server does for agents, and what an agent that reaches the store itself does for itself.

An agent says what it is and that it lives (``hear``), and hears what it is to do (``wanted``); over HTTP it is also
given attempts and says how they go (``Turn``).  Any master does for any request: what one must know of an agent is in
its record, what it must know of an attempt in the job's record and in the attempt's notes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from zerog import codec
from zerog.attempts import Attempts
from zerog.clock import from_iso, to_iso
from zerog.exceptions import (
    AgentAlive,
    Conflict,
    CorruptDocument,
    NewerVersion,
    Superseded,
    UnknownAgent,
    UnknownJob,
)
from zerog.fleet import LOG_EXCEPTIONS, LOG_FAILURES, LOG_JOBS, AgentRecord, Assignment, Presence
from zerog.manager import Held, Manager
from zerog.manager.needing import limits_of
from zerog.needs import UNSAID, Limits
from zerog.orders import Command, Orders, Wanted
from zerog.outcome import Cancelled, Crashed, Failed, GivenBack, Outcome, Requeued, Succeeded
from zerog.record import JobRecord, State
from zerog.statistics import Statistics

logger = logging.getLogger(__name__)

#: Agents of which it is remembered when they spoke, and instances that one was before.
_NOTED, _FORMER = 10_000, 5

T = TypeVar("T")

#: Numbers of batches of an attempt that are remembered.
_BATCHES = 100

#: Seconds for which the entry of a job is left to others that had no room here after all.
_NO_ROOM = 0.1


@dataclass(frozen=True, slots=True)
class Ended:
    """How one attempt came out, for the agent's own account."""

    uuid: str
    attempt: int
    outcome: str
    at: float

    @property
    def failed(self) -> bool:
        """Whether it counts among the agent's failures."""
        return self.outcome in ("failed", "crashed")

    def members(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"uuid": self.uuid, "attempt": self.attempt, "outcome": self.outcome, "at": to_iso(self.at)}


def word_of(outcome: Outcome) -> str:
    """Return the word for what an attempt came to."""
    return _WORDS[type(outcome)]


_WORDS: Mapping[type, str] = {
    Succeeded: "succeeded",
    Failed: "failed",
    Requeued: "requeued",
    Cancelled: "cancelled",
    Crashed: "crashed",
    GivenBack: "givenBack",
}


@dataclass(frozen=True, slots=True)
class Registration:
    """What an agent says of itself.  ``None`` says nothing: what was known stays.

    ``assignments`` are those that it answers for, over HTTP without what they need.  ``ended`` and ``exceptions`` are
    those since it spoke last, of an agent that reaches the store itself.
    """

    id: str
    instance: str | None = None
    hostname: str | None = None
    version: str | None = None
    job_types: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    has: Limits = UNSAID
    limits: Limits | None = None
    usage: Mapping[str, Any] | None = None
    state: str = "running"
    assignments: tuple[Assignment, ...] | None = None
    pid: int | None = None
    presence: Presence | None = None
    superseded: int | None = None
    direct: bool = False
    #: The instance that executed itself anew as this one.
    former: str | None = None
    ended: tuple[Ended, ...] = ()
    exceptions: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to an agent: its record, whether it is new, what is wanted of it, and which attempts it has lost."""

    record: AgentRecord
    new: bool
    wanted: Wanted
    superseded: tuple[tuple[str, int], ...] = ()


class Master:
    """Everything that agents ask.  Safe to use from many threads."""

    def __init__(self, manager: Manager, statistics: Statistics, heartbeat: float) -> None:
        self.manager = manager
        self.fleet = manager.fleet
        self.orders = Orders(manager.store, manager.clock)
        self.heartbeat = heartbeat
        self.statistics = statistics
        self.attempts = Attempts(manager)
        #: When it was last written down here that an agent has spoken, on the monotonic clock.
        self._noted: dict[str, float] = {}
        self._store = manager.store
        self._clock = manager.clock

    # Agents

    def hear(self, news: Registration) -> Heard:
        """Take what an agent says of itself: it is new, it has begun anew, or it lives.

        What it says that it still has is renewed.  A changed instance has lost the rest, which goes on elsewhere at
        once.  ``AgentAlive`` if it would take the name of another that lives, or if a later one has taken its own.
        """
        earlier: AgentRecord | None = None

        def change(before: AgentRecord | None) -> AgentRecord:
            nonlocal earlier
            earlier = before
            if before is not None:
                self._refuse_twin(before, news)
            return self._merged(before, news)

        with self._store.together():
            record = self.fleet.change(news.id, change)
            for log, entries in self._accounts(news):
                self.fleet.keep(news.id, log, entries)
        assert record is not None
        superseded: tuple[tuple[str, int], ...] = ()
        if not record.direct:
            record, superseded = self._tend(record, news, earlier)
        new = earlier is None
        return Heard(record, new, self.orders.wanted(news.id), superseded)

    def _refuse_twin(self, before: AgentRecord, news: Registration) -> None:
        if news.instance in before.former:
            raise AgentAlive(f"a later process, on {before.hostname}, is the agent {news.id} now")
        if before.instance in (None, "", news.instance, news.former) or news.instance is None:
            return
        # One that speaks HTTP alone and comes again on its host has its name from there: the one before has ended.
        elsewhere = bool(news.hostname and before.hostname and news.hostname != before.hostname)
        if (before.direct or elsewhere) and self.fleet.state(before) not in ("retired", "offline"):
            raise AgentAlive(f"the agent {news.id} lives as another process, on {before.hostname}")

    @staticmethod
    def _accounts(news: Registration) -> Iterable[tuple[str, list[Mapping[str, Any]]]]:
        yield LOG_JOBS, [one.members() for one in news.ended]
        yield LOG_FAILURES, [one.members() for one in news.ended if one.failed]
        yield LOG_EXCEPTIONS, list(news.exceptions)

    def _merged(self, before: AgentRecord | None, news: Registration) -> AgentRecord:
        """Return an agent's record with what it says now."""
        now = self._clock.now()
        if before is None:
            before = AgentRecord(news.id, news.instance or "", "", "", (), now)
        begun = news.instance is not None and news.instance != before.instance
        assignments = self._ledger(before, news, begun)
        return replace(
            before,
            instance=_said(news.instance, before.instance),
            hostname=_said(news.hostname, before.hostname),
            version=_said(news.version, before.version),
            job_types=_said(news.job_types, before.job_types),
            labels=_said(news.labels, before.labels),
            limits=_said(news.limits, before.limits),
            usage=_said(news.usage, before.usage),
            pid=_said(news.pid, before.pid),
            superseded=_said(news.superseded, before.superseded),
            assignments=_said(assignments, before.assignments),
            has=Limits(_said(news.has.ram, before.has.ram), _said(news.has.cpus, before.has.cpus)),
            started_at=now if begun else before.started_at,
            presence=news.presence,
            state=news.state,
            heard_at=now,
            heartbeat=self.heartbeat,
            direct=news.direct,
            former=(*before.former, before.instance)[-_FORMER:] if begun and before.instance else before.former,
            processed=before.processed + len(news.ended),
            failures=before.failures + sum(one.failed for one in news.ended),
            exceptions=before.exceptions + len(news.exceptions),
        )

    @staticmethod
    def _ledger(before: AgentRecord, news: Registration, begun: bool) -> tuple[Assignment, ...] | None:
        if news.direct or not begun:
            return news.assignments if news.direct else None
        listed = {one.key for one in news.assignments or ()}
        return tuple(one for one in before.assignments if one.key in listed)

    def _tend(
        self, record: AgentRecord, news: Registration, earlier: AgentRecord | None
    ) -> tuple[AgentRecord, tuple[tuple[str, int], ...]]:
        """Renew what an agent that speaks HTTP still has, and let go of what it has not."""
        listed = {one.key for one in news.assignments or ()}
        had = {one.key for one in (earlier.assignments if earlier is not None else ())}
        kept = {one.key for one in record.assignments}
        held = self.manager.read_many(list({uuid for uuid, _ in listed | had}))
        gone = record.state in ("retired", "offline")
        superseded, renewed = [], set()
        for uuid, attempt in sorted(listed):
            if gone or not self._runs(held.get(uuid), attempt, record.id):
                superseded.append((uuid, attempt))
                continue
            try:
                self.manager.report(held[uuid], attempt)
                renewed.add((uuid, attempt))
            except Superseded:
                superseded.append((uuid, attempt))
        for uuid, attempt in sorted(had - kept - listed if not gone else had | listed):
            if self._runs(held.get(uuid), attempt, record.id):
                self._take_away(held[uuid], attempt, blame=not gone)
        over = {one for one in kept if gone or not self._runs(held.get(one[0]), one[1], record.id)} - renewed
        if over or renewed - kept:
            record = self._note(record.id, held, renewed - kept, over) or record
        return record, tuple(superseded) if not gone else ()

    def _take_away(self, held: Held, attempt: int, blame: bool) -> None:
        """Let a job go on elsewhere at once: its agent has lost it, or gives it back."""
        try:
            after = self.manager.lose(held) if blame else self.manager.settle(held, attempt, GivenBack())
        except (Superseded, Conflict):
            return  # it has ended in the meantime, or somebody else was faster
        self._enqueue(after)

    def _enqueue(self, held: Held) -> None:
        """Put a job that goes on elsewhere into the queue, unless it has ended so."""
        if held.record.state is State.QUEUED:
            self.manager.enqueue([held.record])

    @staticmethod
    def _runs(held: Held | None, attempt: int, id: str) -> bool:
        """Return whether an attempt is the current one, and this agent's."""
        if held is None or held.cas == 0:
            return False
        record = held.record
        return record.state is State.RUNNING and record.attempt == attempt and record.agent == id

    def _note(
        self, id: str, held: Mapping[str, Held], more: Iterable[tuple[str, int]], over: Iterable[tuple[str, int]]
    ) -> AgentRecord | None:
        """Correct the account of what an agent has."""
        added = [
            Assignment(uuid, attempt, held[uuid].record.started_at or self._clock.now(), held[uuid].record.needs)
            for uuid, attempt in more
        ]
        removed = set(over)

        def change(before: AgentRecord | None) -> AgentRecord | None:
            if before is None:
                return None
            left = [one for one in before.assignments if one.key not in removed]
            known = {one.key for one in left}
            left += [one for one in added if one.key not in known]
            return replace(before, assignments=tuple(left))

        return self.fleet.change(id, change)

    def is_due(self, id: str) -> bool:
        """Return whether it is to be written down that an agent has spoken: it was not for half a heartbeat."""
        now = self._clock.monotonic()
        if now - self._noted.get(id, float("-inf")) < self.heartbeat / 2:
            return False
        if len(self._noted) > _NOTED:
            self._noted.clear()
        self._noted[id] = now
        return True

    def note(self, id: str) -> None:
        """Write down that an agent has spoken, in whatever request."""

        def change(before: AgentRecord | None) -> AgentRecord | None:
            return None if before is None or before.direct else replace(before, heard_at=self._clock.now())

        self.fleet.change(id, change)

    def leave(self, id: str) -> None:
        """Forget an agent, and give back what it has; nothing happens if there is none."""
        record = self.fleet.get(id)
        if record is not None:
            held = self.manager.read_many([one.uuid for one in record.assignments])
            for one in record.assignments:
                if self._runs(held.get(one.uuid), one.attempt, id):
                    self._take_away(held[one.uuid], one.attempt, blame=False)
            self.fleet.remove(id)
        self.orders.forget(id)

    def complain(self, id: str, exception: Mapping[str, Any]) -> dict[str, Any]:
        """Keep an agent's own unhandled exception; ``UnknownAgent`` if there is no such agent."""
        kept = {**exception, "at": to_iso(self._clock.now())}

        def change(before: AgentRecord | None) -> AgentRecord:
            if before is None:
                raise unknown(id)
            return replace(before, exceptions=before.exceptions + 1)

        self.fleet.change(id, change)
        self.fleet.keep(id, LOG_EXCEPTIONS, [kept])
        return kept

    def acknowledge(self, id: str, number: int, state: str, message: str | None) -> Command:
        """Take what an agent made of a command."""
        return self.orders.acknowledge(id, number, state, message)

    def command(self, id: str, command: str, members: Mapping[str, Any], key: str | None = None) -> Command:
        """Give an agent a command; the same ``key`` gives it once.

        What it says of a job is written into the job's record first, so that it holds wherever the job goes on.
        ``StateConflict`` for the modification of a job that does not run there.
        """
        if command in ("cancel", "modify"):
            self._prepare(id, command, members)
        given = self.orders.give(id, command, members, key)
        self.manager.tell_agents([id], "orders")
        return given

    def _prepare(self, id: str, command: str, members: Mapping[str, Any]) -> None:
        try:
            record = self.manager.read(members["uuid"]).record
        except (UnknownJob, CorruptDocument, NewerVersion):
            return  # the agent will say that it does not run there
        here = record.state is State.RUNNING and record.agent == id
        if command == "cancel" and here:
            self.manager.mark_cancelled(record.uuid)
        elif command == "modify" and here:
            self._note_needs(self.manager.modify(record.uuid, changes_of(members)))

    def tell_modified(self, record: JobRecord, changes: Mapping[str, Any]) -> None:
        """Tell the agent of a running job that it was modified."""
        members: dict[str, Any] = {"uuid": record.uuid}
        limits = {name: changes[name] for name in ("ram", "cpus", "labels") if name in changes}
        if limits:
            members["limits"] = limits
        if "priority" in changes:
            members["priority"] = changes["priority"]
        if "not_before" in changes:
            moment = changes["not_before"]
            members["notBefore"] = None if moment is None else to_iso(moment)
        assert record.agent is not None
        key = f" modify {record.uuid} {record.revision}"  # no request can have such a key
        self.orders.give(record.agent, "modify", members, key)
        self._note_needs(record)
        self.manager.tell_agents([record.agent], "orders")

    def _note_needs(self, record: JobRecord) -> None:
        """Correct the account of an agent that speaks HTTP alone: what a job of it holds has changed."""

        def change(before: AgentRecord | None) -> AgentRecord | None:
            if before is None or before.direct:
                return None
            changed = tuple(
                replace(one, needs=record.needs) if one.uuid == record.uuid else one for one in before.assignments
            )
            return replace(before, assignments=changed) if changed != before.assignments else None

        if record.agent is not None:
            self.fleet.change(record.agent, change)

    def wanted(self, id: str) -> Wanted:
        """Return what is wanted of an agent."""
        return self.orders.wanted(id)

    # Assignments, over HTTP

    def shares_of(self, id: str, job_types: Sequence[str] | None, count: int) -> list[tuple[str, ...]]:
        """Return the tubes from which each of some requests of an agent may be served now; none while it takes nothing.

        ``job_types`` are those that its token allows.  ``UnknownAgent`` if it never registered.
        """
        record = self.fleet.get(id)
        if record is None:
            raise unknown(id)
        wanted = self.orders.wanted(id)
        if record.state != "running" or wanted.drained:
            return [()] * count
        if any(one.needs for one in record.assignments):
            record = self.verified(record)
        types = [name for name in record.job_types if job_types is None or name in job_types]
        return self.manager.shares(types, room_of(record, wanted), record.labels, count)

    def verified(self, record: AgentRecord) -> AgentRecord:
        """Return an agent's record without what it does not have any more, as the jobs' records say."""
        if record.direct or not record.assignments:
            return record
        held = self.manager.read_many([one.uuid for one in record.assignments])
        over = {one.key for one in record.assignments if not self._runs(held.get(one.uuid), one.attempt, record.id)}
        return (self._note(record.id, held, (), over) or record) if over else record

    def give_back(self, held: Held) -> None:
        """Give back what an agent was given that never heard of it."""
        record = held.record
        logger.info("taken back job=%s attempt=%d agent=%s: nobody heard", record.uuid, record.attempt, record.agent)
        after = self.manager.settle(held, record.attempt, GivenBack(started=False))
        if record.agent is not None:
            self._note(record.agent, {}, (), [(record.uuid, record.attempt)])
        self._enqueue(after)


def changes_of(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a command, or the body of a PATCH, changes in a job's record."""
    changes = dict(members.get("limits") or {})
    if "priority" in members:
        changes["priority"] = members["priority"]
    if "notBefore" in members:
        moment = members["notBefore"]
        changes["not_before"] = from_iso(moment) if moment is not None else None
    return changes


def _said(said: T | None, before: T) -> T:
    """Return what was said, or what was known before."""
    return before if said is None else said


def room_of(record: AgentRecord, wanted: Wanted) -> Limits:
    """Return what an agent still has."""
    return room_beside(record, wanted, record.assignments)


def room_beside(record: AgentRecord, wanted: Wanted, assignments: Iterable[Assignment]) -> Limits:
    """Return what an agent would still have beside some assignments."""
    return limits_of(record, wanted).less(one.needs for one in assignments)


def unknown(id: str) -> UnknownAgent:
    """Return the error for an agent that never spoke."""
    return UnknownAgent(f"there is no agent {codec.printable(id, 100)}")
