"""Judge: what may happen to a record, looked at in every committed write, and what must have happened at the end.

It knows nothing of how the Manager works: it sees the bodies before and after, on whose behalf a write was made, and
what was told to whom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.machine.memory import Change, MemoryDatastore
from zerog import codec
from zerog.datastore.blobs import read_blob
from zerog.exceptions import NotFound
from zerog.manager import Manager
from zerog.outcome import Result
from zerog.record import TRANSITIONS, JobRecord, State, from_document
from zerog.registry import Registry

#: Seconds by which two readings of a time may differ that went through a document.
_ROUNDED = 0.002

_STEPS = {(before, after) for (before, _), after in TRANSITIONS.items()} | {
    (State.WAITING, State.WAITING),
    (State.QUEUED, State.QUEUED),
}


@dataclass(frozen=True, slots=True)
class Token:
    """On whose behalf a record is written: an attempt, known by its number and the claim that began it."""

    uuid: str
    attempt: int
    claim: str


@dataclass(frozen=True, slots=True)
class Context:
    """Which process made a write, and for which attempt, if for one."""

    manager: Manager
    token: Token | None


@dataclass(slots=True)
class Life:
    """What the judge keeps of a job beside its record."""

    #: The moment, true time, at which its lease moved last.
    moved: float = 0.0
    #: The claims of its executions, and how many of these were free: given back, or before a requeue.
    started: set[str] = field(default_factory=set)
    free: int = 0
    ends: int = 0
    #: What the execution came to that its record names.
    data: str | None = None


class Judge:
    """Collects ``violations`` of what ZeroG promises.  ``time`` gives the true seconds, ``lease`` is in seconds."""

    def __init__(self, registry: Registry, time: Callable[[], float], lease: float) -> None:
        self.violations: list[str] = []
        self.acknowledged: dict[str, str] = {}
        self.records: dict[str, JobRecord] = {}
        self.ended = 0
        self._registry = registry
        self._time = time
        self._lease = lease
        self._lives: dict[str, Life] = {}
        #: The data that each execution came to, by claim, and the claims whose execution was given back or goes on.
        self._data: dict[str, str] = {}
        self._spends_nothing: set[str] = set()
        self._cancels: set[str] = set()
        self._claims: set[Token] = set()
        self.store = MemoryDatastore()

    def expect(self, held: bool, what: str, uuid: str) -> None:
        """Note a violation unless ``held``."""
        if not held:
            self.violations.append(f"{what}: {uuid} {self.records.get(uuid)}")

    # What is told

    def acknowledge(self, record: JobRecord) -> None:
        """Hear that a client was told of a job."""
        self.acknowledged[record.uuid] = record.job_type
        self.expect(record.uuid in self.records, "I1 acknowledged and not stored", record.uuid)

    def cancelled(self, record: JobRecord, had_ended: bool) -> None:
        """Hear what the client of a cancel was told."""
        now = self.records[record.uuid]
        self.expect(now.terminal if had_ended else now.cancel_requested, "R11 a cancel that left nothing", record.uuid)
        if not had_ended:
            self._cancels.add(record.uuid)

    def start(self, token: Token) -> None:
        """Hear that the code of a job begins to run."""
        self.expect(token in self._claims, "started without its claim", token.uuid)
        life, record = self._lives.get(token.uuid), self.records.get(token.uuid)
        if life is None or record is None:
            return  # removed since, while its agent slept
        self.expect(token.claim not in life.started, "one attempt was started twice", token.uuid)
        life.started.add(token.claim)
        paid = record.errors + record.crashes + record.losses + 1
        self.expect(len(life.started) - life.free <= paid, "I4 started more often than it has paid for", token.uuid)

    def say(self, token: Token, data: str | None = None, spends_nothing: bool = False) -> None:
        """Hear what an execution came to: its ``data``, or that it ends without blame."""
        if data is not None:
            self._data[token.claim] = data
        if spends_nothing:
            self._spends_nothing.add(token.claim)

    # What is written

    def written(self, change: Change) -> None:
        """Look at one committed write."""
        if not change.key.startswith("job:") or change.before == change.after:
            return
        context: Context = change.context
        uuid = change.key.removeprefix("job:")
        if change.after is None:
            self._removed(uuid, context)
            return
        before = from_document(change.before) if change.before is not None else None
        self.records[uuid] = after = from_document(change.after)
        if before is None:
            self._inserted(after)
            return
        self._changed(before, after, context)

    def _inserted(self, record: JobRecord) -> None:
        self._lives[record.uuid] = Life()
        self.expect(record.state in (State.QUEUED, State.WAITING), "a job begins in the middle", record.uuid)
        self._numbered(record)
        if record.retried_from is None:
            twins = [one for one in self.records.values() if one.parameters == record.parameters]
            first = [one for one in twins if one.retried_from is None]
            self.expect(len(first) == 1, "I5 two jobs for one key", record.uuid)

    def _numbered(self, record: JobRecord) -> None:
        entries = self.store.read("jobs", after=record.number - 1, limit=1)
        right = [codec.loads(entry.body)["uuid"] for entry in entries if entry.number == record.number]
        self.expect(right == [record.uuid], "R1 a record without its entry in the log", record.uuid)

    def _removed(self, uuid: str, context: Context) -> None:
        record = self.records.pop(uuid)
        self._lives.pop(uuid)
        self.acknowledged.pop(uuid, None)
        self._cancels.discard(uuid)
        old = (record.finished_at or 0.0) + context.manager.retention <= context.manager.clock.now() + _ROUNDED
        if not (record.terminal and old):
            self.violations.append(f"I1 removed before its time: {record}")
        waiting = [one.uuid for one in self.records.values() if one.state is State.WAITING and uuid in one.parents]
        for child in waiting:
            self.expect(False, "R18 a parent was removed whose child waits", child)

    def _changed(self, before: JobRecord, after: JobRecord, context: Context) -> None:
        uuid = after.uuid
        self.expect(not before.terminal, f"I3 a terminal record changed from {before}", uuid)
        self.expect((before.state, after.state) in _STEPS, f"no step leads here from {before.state}", uuid)
        self.expect(before.attempt <= after.attempt <= before.attempt + 1, "I4 attempts grow one by one", uuid)
        self.expect(after.cancel_requested or not before.cancel_requested, "R11 a cancel was forgotten", uuid)
        self._fenced(before, after, context)
        self._within_limits(after)
        if before.number != after.number:
            self._numbered(after)
        if after.attempt != before.attempt:
            self._claimed(before, after, context)
        elif before.state is State.RUNNING:
            self._left(before, after, context) if after.state is not State.RUNNING else self._went_on(before, after)
        elif before.state is State.WAITING and after.state is not State.WAITING:
            self._decided(after)
        if after.terminal:
            self._ended(before, after)

    def _fenced(self, before: JobRecord, after: JobRecord, context: Context) -> None:
        """I6: who writes for an attempt writes to that attempt; the rest is nobody's but the claim's and the sweep's."""
        token = context.token
        if token is None:
            self.expect(after.state is not State.SUCCEEDED, "I6 succeeded on nobody's behalf", after.uuid)
            return
        held = before.lease is not None and before.lease.claim == token.claim
        current = before.state is State.RUNNING and before.attempt == token.attempt and held
        self.expect(current, f"I6 a stale write for {token} onto {before}", after.uuid)

    def _within_limits(self, record: JobRecord) -> None:
        policy = self._registry.policy(record.job_type)
        for name in ("errors", "crashes", "losses"):
            spent, limit = getattr(record, name), getattr(policy, f"max_{name}")
            within = spent <= limit if record.terminal else spent < limit
            self.expect(within, f"I4 too many {name}", record.uuid)

    def _claimed(self, before: JobRecord, after: JobRecord, context: Context) -> None:
        manager, uuid = context.manager, after.uuid
        self.expect(before.state is State.QUEUED and after.state is State.RUNNING, "claimed from the side", uuid)
        self.expect(not before.cancel_requested, "R11 claimed after a cancel", uuid)
        self.expect(before.due(manager.clock.now() + _ROUNDED), "R3 claimed before it was due", uuid)
        self.expect(after.job_type not in manager.paused, "claimed by who knew of its pause", uuid)
        self.expect(after.lease is not None, "claimed without a lease", uuid)
        if after.lease is not None:
            self._claims.add(Token(uuid, after.attempt, after.lease.claim))
        self._lives[uuid].moved = self._time()

    def _went_on(self, before: JobRecord, after: JobRecord) -> None:
        if before.lease == after.lease:
            return
        moved = before.lease is not None and after.lease is not None
        if before.lease is not None and after.lease is not None:
            moved = (after.lease.claim, after.lease.sequence) == (before.lease.claim, before.lease.sequence + 1)
        self.expect(moved, f"R6 a lease changed hands: {before.lease}", after.uuid)
        self.expect(after.completeness >= before.completeness, "completeness went back", after.uuid)
        self._lives[after.uuid].moved = self._time()

    def _left(self, before: JobRecord, after: JobRecord, context: Context) -> None:
        """Look at how an attempt ended: by its agent, or because its lease stood still for a whole lease."""
        uuid = after.uuid
        claim = before.lease.claim if before.lease is not None else ""
        self.expect(after.lease is None, "R6 a lease outlived its attempt", uuid)
        if before.cancel_requested:
            stopped = after.state in (State.CANCELLED, State.SUCCEEDED)
            self.expect(stopped, "R11 a cancelled job went another way", uuid)
        if context.token is None:
            silent = self._time() - self._lives[uuid].moved
            self.expect(silent >= self._lease, f"R6 taken from an attempt that was silent for {silent} s", uuid)
            self.expect(after.losses == before.losses + 1 or after.state is State.CANCELLED, "I4 a free loss", uuid)
        elif after.state is State.QUEUED:
            self._again(before, after, claim)

    def _again(self, before: JobRecord, after: JobRecord, claim: str) -> None:
        spent = [getattr(after, name) - getattr(before, name) for name in ("errors", "crashes", "losses")]
        life = self._lives[after.uuid]
        free = claim in self._spends_nothing or claim not in life.started
        right = sorted(spent) == [0, 0, 1] or (free and sum(spent) <= 0)
        self.expect(right, f"I4 goes again having spent {spent}", after.uuid)
        if sum(spent) < 0:
            life.free = len(life.started)
        elif sum(spent) == 0:
            life.free += claim in life.started

    def _decided(self, after: JobRecord) -> None:
        states = [self.records[uuid].state if uuid in self.records else None for uuid in after.parents]
        if after.state is State.QUEUED:
            self.expect(all(state is State.SUCCEEDED for state in states), "R8 released too early", after.uuid)
        elif after.reason == "parent_failed":
            hopeless = any(state in (State.FAILED, State.CANCELLED, None) for state in states)
            self.expect(hopeless, "R8 cancelled for no parent", after.uuid)

    def _ended(self, before: JobRecord, after: JobRecord) -> None:
        self.ended += 1
        self._lives[after.uuid].ends += 1
        self.expect(self._lives[after.uuid].ends == 1, "I2 two results", after.uuid)
        logs = ("finished", "failed") if after.state is State.FAILED else ("finished",)
        for log in logs:
            entries = [codec.loads(entry.body) for entry in self.store.read(log, limit=1000)]
            there = any((one["uuid"], one["attempt"]) == (after.uuid, after.attempt) for one in entries)
            self.expect(there, f"R15 an end that the log {log} does not know", after.uuid)
        if after.state is State.SUCCEEDED:
            claim = before.lease.claim if before.lease is not None else ""
            self._lives[after.uuid].data = self._data.get(claim)
            self._has_its_data(after)

    def _has_its_data(self, record: JobRecord) -> None:
        data = self._read_data(record.result) if record.result is not None else None
        right = data == self._lives[record.uuid].data
        self.expect(right, f"I6 the data of another attempt: {data}", record.uuid)

    def _read_data(self, result: Result) -> str:
        if result.inline is not None:
            return result.inline
        try:
            return b"".join(read_blob(self.store, result.blob or "", 0, result.size)).decode()
        except NotFound:
            return "missing"

    # The end

    def adjourn(self) -> None:
        """Look at what must hold at any time, whatever is under way."""
        for uuid in self.acknowledged:
            self.expect(uuid in self.records, "I1 an acknowledged job is gone", uuid)

    def close(self) -> None:
        """Look at what must hold once everything has come to rest."""
        self.adjourn()
        for uuid, record in self.records.items():
            self.expect(record.terminal, "I1 a job that never ends", uuid)
            if record.state is State.SUCCEEDED:
                self._has_its_data(record)
            if uuid in self._cancels:
                self.expect(record.state is not State.FAILED, "R11 cancelled and failed", uuid)
