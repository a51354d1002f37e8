"""The real Manager, slots, chores and sweep, driven at random over a store and a queue of which any call may go wrong.

A server and two agents share one store and one queue.  Any of them can be killed in the middle of any call, sleep past
its leases and go on with what it knew, or have a wrong clock; the queue can forget, repeat and lie.  A judge looks at
every committed write.  At the end the faults stop, and everything must come to its end.

Each weakened variant of the code must be found out: a machine that cannot fail proves nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.machine import weak
from tests.machine.crew import LEASE, RETENTION, TICK, TYPES, Agent, World
from tests.machine.faulty import COMMIT, KINDS, REPLACE, Blow
from zerog.exceptions import StoreUnavailable, UnknownJob, UnknownParent
from zerog.manager import Options, Submission
from zerog.queue.base import Put
from zerog.record import JobRecord, State
from zerog.registry import Parameters

#: Jobs of one run at most: more of them make the same faults rarer.
JOBS = 8

#: Seconds within which everything must have ended once nothing goes wrong any more.
REST = 150.0

#: ``bin/test --full``: some thousand runs, and the steps to what is found are made few.
FULL = bool(os.environ.get("TESTS_FULL"))

#: What a child can come to; the ways that spend something are taken more often, so that limits are reached.
OUTCOMES = ("succeeded", "streamed", "failed", "failed", "again at once", "final", "requeued", "dies", "dies")

places = st.integers(0, 7)
delays = st.sampled_from([0.0, 0.0, 5.0])
processes = st.integers(0, 2)
agents = st.integers(0, 1)


@dataclass(frozen=True, slots=True)
class Hit:
    """A fault that is drawn ahead: the ``nth`` next call of a kind is struck, and maybe those after it.

    What happens in the middle of a call, where that is the blow, is that one process sleeps and the others live on for
    ``ticks``; at none a job is cancelled instead, at ten nobody does anything for so long that readers of the log give
    an entry up.
    """

    kind: str
    nth: int
    blow: Blow
    times: int
    place: int
    ticks: int


hits = st.none() | st.builds(
    Hit,
    st.sampled_from((*KINDS, REPLACE, REPLACE, COMMIT)),
    st.integers(1, 4),
    st.sampled_from(Blow),
    st.sampled_from([1, 1, 1, 2, 60]),
    processes,
    st.integers(0, 10),
)


class Machine(RuleBasedStateMachine):
    """Everything that can happen.  ``places`` choose among what there is, modulo its number."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(shares_commits=True)
        self.submissions: list[Submission] = []

    @initialize(
        shares_commits=st.booleans(), jobs=st.integers(0, 5), job_type=st.sampled_from(TYPES), turns=st.integers(0, 2)
    )
    def begin(self, shares_commits: bool, jobs: int, job_type: str, turns: int) -> None:
        self.world = World(shares_commits)
        for _ in range(jobs):
            self._submit(job_type, keyed=True)
        for agent in self.world.agents * turns:
            self.world.act(agent, agent.turn)

    # Clients

    @precondition(lambda self: len(self.submissions) < JOBS)
    @rule(
        hit=hits,
        keyed=st.booleans(),
        job_type=st.sampled_from(TYPES),
        parents=st.lists(places, max_size=2),
        delay=delays,
    )
    def submit(self, hit: Hit | None, keyed: bool, job_type: str, parents: list[int], delay: float) -> None:
        records = list(self.world.judge.records)
        chosen = tuple(dict.fromkeys(records[place % len(records)] for place in parents if records))
        self._arm(hit)
        self._submit(job_type, keyed, Options(parents=chosen, not_before=self._in(delay)))

    def _in(self, delay: float) -> float | None:
        return self.world.server.clock.now() + delay if delay else None

    def _submit(self, job_type: str, keyed: bool, options: Options | None = None) -> None:
        tag = str(len(self.submissions))
        key = tag if keyed else None
        self.submissions.append(Submission(job_type, Parameters({"tag": tag}), options or Options(), key))
        self._send(self.submissions[-1])

    @precondition(lambda self: any(one.key is not None for one in self.submissions))
    @rule(hit=hits, place=places)
    def submit_again(self, hit: Hit | None, place: int) -> None:
        """A client that had no answer, or lost it, repeats its request."""
        keyed = [one for one in self.submissions if one.key is not None]
        self._arm(hit)
        self._send(keyed[place % len(keyed)])

    def _send(self, submission: Submission) -> None:
        server = self.world.server

        def call() -> None:
            with suppress(StoreUnavailable, UnknownParent):
                self.world.judge.acknowledge(server.manager.submit(submission).record)

        self.world.act(server, call)

    @precondition(lambda self: self.world.judge.records)
    @rule(hit=hits, place=places)
    def cancel(self, hit: Hit | None, place: int) -> None:
        self._arm(hit)
        self._cancel_one(place)

    def _cancel_one(self, place: int) -> None:
        records = list(self.world.judge.records)
        server = self.world.server

        def call() -> None:
            with suppress(StoreUnavailable, UnknownJob):
                held, had_ended = server.manager.cancel(records[place % len(records)])
                self.world.judge.cancelled(held.record, had_ended)

        self.world.act(server, call)

    @precondition(lambda self: any(one.terminal for one in self.world.judge.records.values()))
    @rule(place=places, keyed=st.booleans(), many=st.booleans())
    def retry(self, place: int, keyed: bool, many: bool) -> None:
        """A user tries ended jobs again: as new ones."""
        ended = [one for one in self.world.judge.records.values() if one.terminal]
        record = ended[place % len(ended)]
        if len(self.world.judge.records) >= 2 * JOBS or record.state is State.SUCCEEDED:
            return
        if many:
            self.world.act(self.world.server, lambda: self._retry_many(record))
        else:
            key = f"again {record.uuid}" if keyed else None
            self._send(self.world.server.manager.again(record, Parameters(record.parameters), key))

    def _retry_many(self, record: JobRecord) -> None:
        with suppress(StoreUnavailable):
            for _, done in self.world.server.manager.retry_many(record.job_type, record.state, 2):
                if isinstance(done, JobRecord):
                    self.world.judge.acknowledge(done)

    # Processes

    @rule(hit=hits, place=agents, looks=st.booleans(), turns=st.integers(1, 2))
    def turn(self, hit: Hit | None, place: int, looks: bool, turns: int) -> None:
        agent = self.world.agents[place]
        self._arm(hit)
        if looks:
            self.world.act(agent, agent.look)
        for _ in range(turns):
            self.world.act(agent, agent.turn)

    @rule(hit=hits, place=processes, walks=st.booleans())
    def chores(self, hit: Hit | None, place: int, walks: bool) -> None:
        """Do the chores that are due, or walk whoever the sweeper is."""
        process = self.world.processes[place]
        self._arm(hit)
        self.world.act(process, process.walk if walks else process.do_chores)

    @precondition(lambda self: self._running())
    @rule(place=places, completeness=st.sampled_from([0.1, 0.5, 0.9]), kept=st.booleans())
    def report(self, place: int, completeness: float, kept: bool) -> None:
        """A child says how far it is, and may keep its state; its agent writes that down when it next may."""
        agent, index = self._running()[place % len(self._running())]
        agent.report(agent.slots[index], completeness)
        if kept:
            agent.slots[index].on_message({"t": "checkpoint", "number": 1, "state": '{"at": 1}'})

    @precondition(lambda self: self._running())
    @rule(hit=hits, place=places, kind=st.sampled_from(OUTCOMES), turns=st.integers(0, 2))
    def outcome(self, hit: Hit | None, place: int, kind: str, turns: int) -> None:
        """A child comes to its end; its agent may hear of it at once, or much later."""
        agent, index = self._running()[place % len(self._running())]
        agent.outcome(agent.slots[index], kind)
        self._arm(hit)
        for _ in range(turns):
            self.world.act(agent, agent.turn)

    @precondition(lambda self: self._running())
    @rule(place=places, drain=st.booleans())
    def stop(self, place: int, drain: bool) -> None:
        """An agent gives back what it runs, or is killed."""
        agent, _ = self._running()[place % len(self._running())]
        agent.give_back() if drain else agent.die()

    # Time

    @rule(hit=hits, ticks=st.integers(1, 12), asleep=st.sets(processes, max_size=2))
    def live(self, hit: Hit | None, ticks: int, asleep: set[int]) -> None:
        """Time passes for those who are awake; who sleeps goes on later with what it knew."""
        self._arm(hit)
        self.world.live(ticks * TICK, [self.world.processes[place] for place in sorted(asleep)])

    @precondition(lambda self: self._running())
    @rule(place=places, hit=hits, ended=st.sampled_from([None, *OUTCOMES]), removed=st.booleans())
    def outlive(self, place: int, hit: Hit | None, ended: str | None, removed: bool) -> None:
        """An agent with a job sleeps for longer than its lease, others go on, and it wakes up with what it knew.

        Others may even have ended its job, which was ``removed`` in the end, and made again by its key.
        """
        agent, index = self._running()[place % len(self._running())]
        self.world.live(8 * TICK, [agent])
        if removed:
            self._remove_and_repeat(agent)
        if ended is not None and index in agent.busy():
            agent.outcome(agent.slots[index], ended)
        self._arm(hit)
        self.world.act(agent, agent.turn)

    def _remove_and_repeat(self, asleep: Agent) -> None:
        self.world.live(8 * TICK, [asleep], turn=finish)
        self.world.time.seconds += RETENTION
        self.world.live(8 * TICK, [asleep])
        for submission in self.submissions:
            if submission.key is not None:
                self._send(submission)
        self.world.live(2 * TICK, [asleep])

    @rule(seconds=st.sampled_from([1.1, LEASE, 2 * LEASE, 70.0, RETENTION + 10]))
    def jump(self, seconds: float) -> None:
        """Nobody does anything for a while."""
        self.world.time.seconds += seconds

    # What else may be wrong

    @rule(what=st.integers(0, 7), place=places, job_type=st.sampled_from(TYPES), flag=st.booleans())
    def nuisance(self, what: int, place: int, job_type: str, flag: bool) -> None:
        """The queue forgets, repeats or holds garbage; a clock goes wrong; a type is paused or resumed."""
        world = self.world
        match what:
            case 0:
                world.broker.wipe(forget_identity=flag)
            case 1 | 2:
                (world.broker.double if flag else world.broker.lose)(place)
            case 3:
                body = b"garbage\xff" if flag else b"00000000-0000-0000-0000-000000000000"
                world.broker.put(Put(world.server.manager.tube(job_type), body, 1000, 0.0, LEASE))
            case 4 | 5:
                world.processes[place % 3].clock.off = (0.0, -3600.0, -5.0, 200.0)[place // 2]
            case _:
                world.act(world.server, lambda: self._pause(job_type, flag))

    def _pause(self, job_type: str, pause: bool) -> None:
        manager = self.world.server.manager
        with suppress(StoreUnavailable):
            manager.pause(job_type, "somebody") if pause else manager.resume(job_type)

    # Faults

    def _arm(self, hit: Hit | None) -> None:
        if hit is None:
            return
        once = hit.blow in (Blow.MEANWHILE, Blow.KILLED_BEFORE, Blow.KILLED_AFTER)
        self.world.faults.arm(hit.kind, hit.nth, hit.blow, 1 if once else hit.times)
        if hit.blow is Blow.MEANWHILE:
            self.world.faults.meanwhile = lambda: self._meanwhile(hit.place, hit.ticks)

    def _meanwhile(self, place: int, ticks: int) -> None:
        if ticks == 0 and self.world.judge.records and self.world.acting is not self.world.server:
            self._cancel_one(place)
        elif ticks == 10:
            self.world.time.seconds += 700.0
        self.world.live(ticks * TICK, [self.world.processes[place]])

    # What must hold

    @invariant()
    def nothing_is_broken(self) -> None:
        self.world.judge.adjourn()
        assert not self.world.judge.violations, "\n".join(self.world.judge.violations)

    def teardown(self) -> None:
        """Let nothing go wrong any more: then every job ends, and in time."""
        self.world.faults.disarm()
        for process in self.world.processes:
            process.clock.off = 0.0
        for name in TYPES:
            self._pause(name, False)
        self.world.time.seconds += 3700.0
        for _ in range(round(REST / LEASE)):
            if all(one.terminal for one in self.world.judge.records.values()):
                break
            self.world.live(LEASE, turn=finish)
        self.world.judge.close()
        for name, count in (("killed", self.world.died), ("superseded", self.world.superseded)):
            event(f"{name}: {min(count, 3)}")
        assert not self.world.judge.violations, "\n".join(self.world.judge.violations)

    # What there is

    def _running(self) -> list[tuple[Agent, int]]:
        """Return where jobs run that have not said how they end."""
        return [(agent, index) for agent in self.world.agents for index in agent.busy()]


class Calm(Machine):
    """Agents that are killed, and nothing else: the queue keeps its entries, and no sweep is needed."""

    submit = cancel = retry = live = outlive = jump = nuisance = None  # type: ignore[assignment]

    def _arm(self, hit: Hit | None) -> None:
        return

    @rule(ticks=st.integers(1, 12))
    def go_on(self, ticks: int) -> None:
        self.world.live(ticks * TICK)


def finish(agent: Agent) -> None:
    """Do a turn of an agent whose children all succeed."""
    agent.look()
    for slot in agent.running():
        agent.outcome(slot, "succeeded")
    agent.turn()


def run(machine: type[Machine], examples: int, shrink: bool = False) -> None:
    """Run a machine; what it finds is raised, made small first if ``shrink``."""
    how = settings(
        max_examples=examples,
        stateful_step_count=40,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        # Each step is dear on purpose: a whole world moves.
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Say nothing of the faults: to write down ten thousand warnings takes longer than to have them."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.requirement("Z12", "Z13", "Z14")
def test_nothing_is_lost_and_nothing_is_done_twice_whatever_goes_wrong() -> None:
    run(Machine, 3000 if FULL else 60, shrink=FULL)


#: Variants of the code, and what the judge must say of them.
VARIANTS = [
    (weak.no_attempt_in_the_guard, "I6 a stale write"),
    (weak.no_claim_in_the_guard, "I6 a stale write"),
    (weak.applied_again, "I3|I4|I6|R11"),
    (weak.no_compare, "I3|I4|I6|R11|no step"),
    (weak.no_sweep, "I1 a job that never ends"),
    (weak.no_key, "I5 two jobs"),
    (weak.impatient, "R6 taken"),
    (weak.no_entry_in_logs, "R15"),
    (weak.cancel_forgotten, "R11"),
    # Found after some twenty examples, or after some hundred.
    *([(weak.claim_believed, "started without its claim")] if FULL else []),
]


@pytest.mark.parametrize(("weaken", "found"), VARIANTS)
def test_a_weakened_variant_is_found_out(weaken: weak.Weaken, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch)
    with pytest.raises(AssertionError, match=found):
        run(Machine, 3000 if FULL else 400)


def test_an_entry_that_goes_before_the_record_loses_a_job_where_nobody_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    weak.no_sweep(monkeypatch)
    run(Calm, 400 if FULL else 40)
    weak.entry_before_record(monkeypatch)
    with pytest.raises(AssertionError, match="I1 a job that never ends"):
        run(Calm, 40)
