"""The processes of the machine: a server and agents over one store and one queue, in a time of their own.

An agent here is the real ``Slot`` and the real ``Chores``, driven in the order in which ``Agent`` drives them, with
children that are no processes: the machine says what they come to.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any, cast

from tests.machine.faulty import Faults, FaultyDatastore, FaultyQueue, Killed
from tests.machine.judge import Context, Judge, Token
from tests.machine.memory import MemoryBroker, MemoryDatastore, MemoryQueue
from zerog import Context as JobContext
from zerog import Job
from zerog.agent.account import Account
from zerog.agent.attempt import Terms
from zerog.agent.process import Child
from zerog.agent.slot import Phase, Slot
from zerog.chores import Chores
from zerog.clock import Clock
from zerog.exceptions import QueueUnavailable, StoreUnavailable, Superseded, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Held, Manager
from zerog.needs import Limits
from zerog.record import JobRecord
from zerog.registry import Registry
from zerog.statistics import Statistics
from zerog.sweeper import Candidate

#: Seconds: a lease and the TTR of an entry, the time between two walks, and for how long an ended job is kept.
LEASE, SWEEP, RETENTION = 3.0, 1.0, 600.0

#: Seconds between two turns of everybody who is awake.
TICK = LEASE / 6

#: Jobs that an agent runs at once.
SLOTS = 2


class Plain(Job):
    """A job with small limits."""

    job_type = "plain"
    max_errors = 3
    max_crashes = 2
    max_losses = 3

    tag: str

    def run(self, context: JobContext) -> None:
        """Nobody runs it: the machine says what it came to."""


class Once(Plain):
    """A job that is rather not run at all than twice."""

    job_type = "once"
    rerun_after_crash = False


TYPES = (Plain.job_type, Once.job_type)


class Time:
    """The true time, in seconds."""

    seconds = 1_000_000.0


class Hands(Clock):
    """The clocks of one process: a monotonic one that is right, and a wall clock that may be off."""

    def __init__(self, time: Time) -> None:
        self.off = 0.0
        self._time = time

    def now(self) -> float:
        return 1_800_000_000.0 + self._time.seconds + self.off

    def monotonic(self) -> float:
        return self._time.seconds


class World:
    """What all processes share, and which of them acts."""

    def __init__(self, shares_commits: bool) -> None:
        self.time = Time()
        self.registry = Registry([Plain, Once])
        self.judge = Judge(self.registry, lambda: self.time.seconds, LEASE)
        self.inner = self.judge.store = MemoryDatastore(shares_commits, self.judge.written)
        self.faults = Faults()
        self.store = FaultyDatastore(self.inner, self.faults)
        self.broker = MemoryBroker(Hands(self.time))
        self.server = Process(self, "server")
        self.agents = [Agent(self, f"agent-{number}") for number in (1, 2)]
        self.acting: Process | None = None
        self.died = self.superseded_before = 0

    @property
    def processes(self) -> list[Process]:
        """All processes."""
        return [self.server, *self.agents]

    @property
    def superseded(self) -> int:
        """How many attempts turned out not to be the current ones any more."""
        return self.superseded_before + sum(agent.superseded for agent in self.agents)

    def act(self, process: Process, call: Callable[[], None]) -> None:
        """Let a process do something; it may be killed in the middle, and is then started anew."""
        before, context = self.acting, self.inner.context
        self.acting, self.inner.context = process, Context(process.manager, None)
        try:
            call()
        except Killed:
            self.died += 1
            process.die()
        finally:
            self.acting, self.inner.context = before, context

    def live(self, seconds: float, asleep: Sequence[Process] = (), turn: Callable[[Agent], None] | None = None) -> None:
        """Let time pass in small steps, in each of which everybody who is not asleep does what there is to do."""
        for _ in range(round(seconds / TICK)):
            self.time.seconds += TICK
            for process in self.processes:
                if process in asleep or process is self.acting:
                    continue
                if isinstance(process, Agent):
                    self.act(process, lambda agent=process: turn(agent) if turn else agent.turn())  # type: ignore[misc]
                self.act(process, process.do_chores)


class JudgedManager(Manager):
    """The Manager, which tells the judge on whose behalf it writes."""

    world: World

    def guarded(
        self, held: Held, attempt: int, change: Callable[[JobRecord], JobRecord], point: str = "run.renew_ambiguous"
    ) -> Held:
        claim = held.record.lease.claim if held.record.lease is not None else ""
        before = self.world.inner.context
        self.world.inner.context = Context(self, Token(held.record.uuid, attempt, claim))
        try:
            return super().guarded(held, attempt, change, point)
        finally:
            self.world.inner.context = before


class Process:
    """One process: its clocks, its Manager, its chores.  ``die`` is SIGKILL and a new start."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.clock = Hands(world.time)
        self._connections: list[MemoryQueue] = []
        self.start()

    def start(self) -> None:
        """Begin with no knowledge."""
        self.manager = JudgedManager(
            self.world.store,
            self.connect,
            self.world.registry,
            self.clock,
            lease=LEASE,
            uniform=lambda low, high: high,
            retention=RETENTION,
        )
        self.manager.world = self.world
        self.chores = Chores(self.manager, SWEEP, Candidate(self.name))

    def connect(self) -> FaultyQueue:
        """Return a connection to the queue."""
        inner = self.world.broker.connect()
        self._connections.append(inner)
        return FaultyQueue(inner, self.world.faults)

    def die(self) -> None:
        """Be killed: what the queue had promised to it is free again, and it forgets everything."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self.start()

    def do_chores(self) -> None:
        """Do the chores that are due, as their thread does."""
        chores = self.chores
        for call in (
            self.manager.look_at_pauses,
            self.manager.release_pending,
            chores._keep_lease,
            chores._walk,
            chores._prune,
            chores._look,
            chores._probe,
        ):
            self._guarded(call)

    def walk(self) -> None:
        """Walk now, whoever the sweeper is: two at once must do no harm."""
        self._guarded(self.chores._sweep.walk)

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except ZerogError as error:
            if isinstance(error, StoreUnavailable):
                self.chores._sweep.watch.silence()


class FakeChild:
    """A child that does what the machine says.  Its pipe is itself."""

    ready = True

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.slot: Slot | None = None
        self.dead = False
        self.told = False
        self.jobs = 0
        self.pid = 0
        self.pipe = self

    def send(self, message: dict[str, Any]) -> None:
        """Hear what the agent says."""
        if message["t"] == "run":
            self.told = False
            self.judge.start(self.token())
        elif message["t"] == "cancel":
            self.told = True

    def token(self) -> Token:
        """Return which attempt runs here."""
        assert self.slot is not None and self.slot.attempt is not None
        record = self.slot.attempt.held.record
        return Token(record.uuid, record.attempt, record.lease.claim if record.lease is not None else "")

    def signal(self, number: signal.Signals) -> None:
        """Die."""
        self.dead = True

    def gone(self) -> bool:
        """Whether it is dead."""
        return self.dead

    def exit_text(self) -> str:
        """How it died."""
        return "was killed"

    def memory(self) -> int:
        """Its memory."""
        return 0

    def read_stream(self, name: str) -> bytes | None:
        """What it printed."""
        return None


class Agent(Process):
    """An agent with slots: ``turn`` is one turn of the loop of the real one."""

    def start(self) -> None:
        super().start()
        self.store_away = False
        self.watch = LeaseWatch(self.clock, LEASE)
        self.tubes = [self.manager.tube(name) for name in TYPES]
        terms = Terms(
            agent=self.name,
            holder=self.name,
            job_types=TYPES,
            labels=(),
            has=Limits(),
            lease=LEASE,
            grace=1.0,
            time_limit=None,
            max_jobs=1_000_000,
            max_memory=1 << 40,
            statistics=Statistics(None, self.clock, self.name),
            account=Account(self.clock),
            answered=lambda record, question: {},
        )
        self.slots = [Slot(self.manager, self.connect(), self.clock, self.watch, terms) for _ in range(SLOTS)]
        for slot in self.slots:
            slot.serve(self.tubes)
        self._held_back: frozenset[str] = frozenset()

    def turn(self) -> None:
        """Do one turn."""
        now = self.clock.monotonic()
        self._hold_back()
        self._tend_children()
        for slot in self.slots:
            self._on_queue(slot)
            slot.tick(now)
        self._store_steps(now)
        self._ask_for_work()

    def die(self) -> None:
        self.world.superseded_before += self.superseded
        super().die()

    def do_chores(self) -> None:
        super().do_chores()
        self._guarded(self._probe_store)

    def _probe_store(self) -> None:
        if self.store_away:
            self.manager.store.probe()
            self.store_away = False

    def _hold_back(self) -> None:
        if self.manager.paused != self._held_back:
            self._held_back = self.manager.paused
            closed = {self.manager.tube(name) for name in self._held_back}
            for slot in self.slots:
                slot.serve([tube for tube in self.tubes if tube not in closed])

    def _tend_children(self) -> None:
        for slot in self.slots:
            if slot.child is not None and cast(FakeChild, slot.child).dead:
                slot.on_gone()
                slot.child = None
            if slot.child is None or slot.gives_up_child:
                child = FakeChild(self.world.judge)
                child.slot = slot
                slot.adopt(cast(Child, child))

    def _on_queue(self, slot: Slot) -> None:
        try:
            slot.on_queue()
        except QueueUnavailable:
            self._queue_lost()

    def _queue_lost(self) -> None:
        self.manager.queue_away = True
        for slot in self.slots:
            slot.queue_lost()

    # The store

    def _store_steps(self, now: float) -> None:
        slots = [slot for slot in self.slots if slot.wants_store(now)]
        if self.store_away or not slots:
            return
        self._ask_ahead(slots, now)
        try:
            steps = self._steps_together(slots, now)
        except StoreUnavailable:
            self._store_lost()
            return
        for followup in steps:
            followup()
        self._ask_ahead(slots, now)
        for slot in slots:
            slot.say_ended()

    def _steps_together(self, slots: Sequence[Slot], now: float) -> list[Callable[[], None]]:
        with self.manager.store.together():
            steps = [self._step(slot, slot.step, now) for slot in slots]
            ahead = [slot for slot in slots if slot.phase is Phase.ENDING and slot.entries.looks_ahead]
            return steps + [self._step(slot, slot.step_ahead, now) for slot in ahead]

    def _step(self, slot: Slot, step: Callable[[float], Callable[[], None]], now: float) -> Callable[[], None]:
        try:
            return step(now)
        except Superseded:
            return slot.lost_token

    def _ask_ahead(self, slots: Sequence[Slot], now: float) -> None:
        asking = [slot for slot in slots if slot.wants_to_ask_ahead(now)]
        if self.manager.queue_away or not asking:
            return
        try:
            with asking[0].entries.queue.together():
                for slot in asking:
                    slot.entries.ask_ahead()
        except QueueUnavailable:
            self._queue_lost()

    def _store_lost(self) -> None:
        self.store_away = True
        self.watch.silence()

    def look(self) -> None:
        """Look at the records of what runs here: a cancel, or another attempt, may stand there."""
        running = {slot.attempt.uuid: slot for slot in self.slots if slot.attempt and slot.phase is Phase.RUNNING}
        try:
            found = self.manager.read_many(list(running))
        except StoreUnavailable:
            self._store_lost()
            return
        for uuid, slot in running.items():
            if uuid in found:
                slot.heed(found[uuid], self.clock.monotonic())

    # The queue

    def _ask_for_work(self) -> None:
        try:
            for slot in self.slots:
                if self.manager.queue_away:
                    slot.queue_lost()
                elif not self.store_away and slot.wants_to_ask():
                    slot.ask()
                    slot.on_queue()
        except QueueUnavailable:
            self._queue_lost()

    # What children say

    def running(self) -> list[Slot]:
        """Return the slots in which a job runs whose child has not said how it ends."""
        return [slot for slot in self.slots if self._runs(slot)]

    @staticmethod
    def _runs(slot: Slot) -> bool:
        if slot.phase is not Phase.RUNNING or slot.child is None or cast(FakeChild, slot.child).dead:
            return False
        return slot.attempt is not None and slot.attempt.outcome is None

    def busy(self) -> list[int]:
        """Return the places of those slots."""
        return [index for index, slot in enumerate(self.slots) if self._runs(slot)]

    def report(self, slot: Slot, completeness: float) -> None:
        """Let a child report progress, and say something."""
        events = [(self.clock.now(), "event", "said", None)]
        slot.on_message({"t": "report", "completeness": completeness, "message": "goes on", "events": events})

    def outcome(self, slot: Slot, kind: str) -> None:
        """Let a child come to its end."""
        child = cast(FakeChild, slot.child)
        token = child.token()
        if kind == "dies":
            child.dead = True
            return
        members: dict[str, Any] = {}
        data = f'"{token.uuid} {token.attempt} {token.claim}"'
        if kind == "succeeded":
            self.world.judge.say(token, data)
            members = {"kind": kind, "inline": data, "code": 200}
        elif kind == "streamed":
            self.world.judge.say(token, data)
            slot.on_message({"t": "output", "mediaType": "text/plain"})
            slot.on_message(data.encode())
            members = {"kind": "succeeded", "code": 200}
        elif kind == "requeued":
            self.world.judge.say(token, spends_nothing=True)
            members = {"kind": kind, "delay": 1.0, "state": {"attempt": token.attempt}}
        else:
            members = {
                "kind": "failed", "message": "no", "reason": "exception", "code": 500, "traceback": None,
                "final": kind == "final", "after": 0.0 if kind == "again at once" else None, "free": False,
            }  # fmt: skip
        slot.on_message(
            {
                "t": "outcome", "uuid": token.uuid, "attempt": token.attempt, "leftovers": False, "peak": 0,
                "told": child.told, **members,
            }
        )  # fmt: skip

    def give_back(self) -> None:
        """End all children without blame, as a drain does."""
        for slot in self.running():
            self.world.judge.say(cast(FakeChild, slot.child).token(), spends_nothing=True)
            slot.give_back(self.clock.monotonic(), at_once=True)

    @property
    def superseded(self) -> int:
        """How many attempts turned out not to be the current ones any more."""
        return sum(slot.superseded for slot in self.slots)
