"""Random graphs of jobs that wait for each other, with failures, crashes, kills and a queue that forgets: every child
runs only after all its parents have succeeded, and exactly those run that can be reached."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from tests.machine.crew import LEASE, TICK, Agent, World
from tests.machine.faulty import COMMIT, KINDS, REPLACE, Blow
from zerog.exceptions import StoreUnavailable
from zerog.manager import Options, Submission
from zerog.record import JobRecord, State
from zerog.registry import Parameters

pytestmark = pytest.mark.requirement("M9")

GRAPHS = 1000 if os.environ.get("TESTS_FULL") else 60
#: Seconds of the world within which a graph has come to its end.
_AT_MOST = 400.0
_BLOWS = [blow for blow in Blow if blow is not Blow.MEANWHILE]


@dataclass
class Node:
    """A job of a graph: what it is to come to, and what it waits for."""

    kind: str
    parents: list[int]
    uuid: str = ""
    crashes: int = 0
    started: bool = False
    #: Whether all its parents had succeeded when it began.
    ready: bool = True


@dataclass
class Graph:
    """One graph in a world of its own."""

    seed: int
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.world = World(shares_commits=self.random.random() < 0.5)
        for number in range(self.random.randint(3, 10)):
            kind = self.random.choices(("succeeds", "fails"), (0.85, 0.15))[0]
            count = self.random.randint(0, min(3, number))
            parents = self.random.sample(range(number), count)
            self.nodes.append(Node(kind, parents, crashes=int(self.random.random() < 0.2)))

    def run(self) -> None:
        """Submit it, injure whatever happens, and let it come to its end."""
        kills = 2
        for node in self.nodes:
            self._submit(node)
            for _ in range(self.random.randint(0, 2)):
                self.world.live(TICK, turn=self.play)
        spent = 0.0
        while not self._over() and spent < _AT_MOST:
            kills -= self._injure(kills)
            self.world.live(LEASE, turn=self.play)
            spent += LEASE
            if spent > _AT_MOST / 4:
                self.world.faults.disarm()  # now everything must come to its end
        self.world.judge.adjourn()

    def _submit(self, node: Node) -> None:
        parents = tuple(self.nodes[parent].uuid for parent in node.parents)
        submission = Submission("plain", Parameters({"tag": str(id(node))}), Options(parents=parents), f"{id(node)}")
        node.uuid = submission.uuid
        stored: list[JobRecord] = []

        def call() -> None:
            with suppress(StoreUnavailable):
                stored.append(self.world.server.manager.submit(submission).record)
                self.world.judge.acknowledge(stored[0])

        for _ in range(50):
            if self.random.random() < 0.3:
                self._strike()
            self.world.act(self.world.server, call)
            if stored:
                return
            self.world.faults.disarm()
        raise AssertionError("a submit was never acknowledged")

    def _strike(self) -> None:
        kind = self.random.choice((*KINDS, REPLACE, REPLACE, COMMIT))
        self.world.faults.arm(kind, self.random.randint(1, 4), self.random.choice(_BLOWS), 1)

    def _injure(self, kills: int) -> int:
        """Do one thing that may go wrong; returns how many agents were killed, which spends what jobs may lose."""
        what = self.random.randint(0, 5)
        if what == 0 and kills:
            self.random.choice(self.world.agents).die()
            return 1
        if what == 1:
            self.world.broker.wipe(forget_identity=True)
        elif what == 2:
            self.world.broker.double(self.random.randint(0, 7))
        elif what == 3:
            self.world.server.die()
        elif what == 4 and kills:
            self._strike()
        return 0

    def play(self, agent: Agent) -> None:
        """Do a turn of an agent whose children come to what the graph says."""
        agent.look()
        for slot in agent.running():
            assert slot.attempt is not None
            node = next(one for one in self.nodes if one.uuid == slot.attempt.uuid)
            self._see_start(node)
            if node.crashes:
                node.crashes -= 1
                agent.outcome(slot, "dies")
            else:
                agent.outcome(slot, "succeeded" if node.kind == "succeeds" else "final")
        agent.turn()

    def _see_start(self, node: Node) -> None:
        node.started = True
        states = [self.world.judge.records[self.nodes[parent].uuid].state for parent in node.parents]
        node.ready = node.ready and all(state is State.SUCCEEDED for state in states)

    def _over(self) -> bool:
        return all(
            node.uuid in self.world.judge.records and self.world.judge.records[node.uuid].terminal
            for node in self.nodes
        )

    def check(self) -> None:
        """See to it that exactly what should have run has run."""
        reached: list[bool] = []
        for number, node in enumerate(self.nodes):
            record = self.world.judge.records[node.uuid]
            can_run = all(reached[parent] for parent in node.parents)
            reached.append(can_run and node.kind == "succeeds")
            place = f"graph {self.seed}, job {number}: {record.state} {record.reason} {record.message}"
            if not can_run:
                assert (record.state, record.reason, node.started) == (State.CANCELLED, "parent_failed", False), place
                continue
            assert node.started and node.ready, place
            assert record.state is (State.SUCCEEDED if node.kind == "succeeds" else State.FAILED), place
        assert not self.world.judge.violations, "\n".join(self.world.judge.violations)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_every_child_runs_after_its_parents_and_exactly_the_reachable_ones_run() -> None:
    injured = cancelled = 0
    for seed in range(GRAPHS):
        graph = Graph(seed)
        graph.run()
        graph.check()
        injured += graph.world.died > 0
        cancelled += any(one.state is State.CANCELLED for one in graph.world.judge.records.values())
    assert injured > GRAPHS / 10 and cancelled > GRAPHS / 10, "the graphs were injured, and had jobs that cannot run"
