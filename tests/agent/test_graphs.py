"""Graphs of jobs on real processes, whose agents are killed."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.deployment import TERMINAL, Deployment, deployed

GRAPHS = 25 if os.environ.get("TESTS_FULL") else 2

Node = tuple[str, list[int], bool]


@pytest.mark.requirement("M9")
@pytest.mark.parametrize("store", ["sqlite", "couchbase"])
def test_graphs_of_jobs_hold_while_agents_are_killed(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    """Random graphs on real processes, an agent killed every second: each child after its parents, nothing else runs."""
    choice = random.Random(11)
    queue = request.getfixturevalue("beanstalkd") if store == "couchbase" else None
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    pair = ("couchbase", "beanstalkd") if store == "couchbase" else ("sqlite", "sqlite")
    with deployed(tmp_path, *pair, beanstalkd=queue, couchbase=couchbase, slots="2") as zerog:
        zerog.start_agent()
        graphs = [graph_of(zerog, choice, tmp_path / f"ledger-{number}") for number in range(GRAPHS)]
        for _ in range(4 * GRAPHS):
            zerog.restart_agent()
            if all(zerog.job(uuid)["state"] in TERMINAL for nodes in graphs for uuid, _, _ in nodes):
                break
            time.sleep(0.5)  # between two kills
        for nodes in graphs:
            for uuid, _, _ in nodes:
                zerog.wait(uuid, 60)
        for number, nodes in enumerate(graphs):
            check_graph(zerog, nodes, (tmp_path / f"ledger-{number}").read_text().splitlines())


def graph_of(zerog: Deployment, choice: random.Random, ledger: Path) -> list[Node]:
    """Submit a random graph; for each job its UUID, the places of its parents, and whether it is to succeed."""
    ledger.touch()
    nodes: list[Node] = []
    for number in range(choice.randint(4, 9)):
        parents = choice.sample(range(number), choice.randint(0, min(3, number)))
        good = choice.random() < 0.85
        query = "&".join(f"parent={nodes[parent][0]}" for parent in parents)
        parameters = {"path": str(ledger), "seconds": round(choice.uniform(0, 0.4), 2), "fails": not good}
        uuid = zerog.submit(f"node?{query}", parameters)
        nodes.append((uuid, parents, good))
    return nodes


def check_graph(zerog: Deployment, nodes: list[Node], ledger: list[str]) -> None:
    reached: list[bool] = []
    for uuid, parents, good in nodes:
        record = zerog.job(uuid)
        can_run = all(reached[parent] for parent in parents)
        reached.append(can_run and good)
        starts = [at for at, line in enumerate(ledger) if line == f"start {uuid}"]
        if not can_run:
            assert (record["state"], record["reason"], starts) == ("cancelled", "parent_failed", [])
            continue
        assert record["state"] == ("succeeded" if good else "failed")
        ends = [ledger.index(f"end {nodes[parent][0]}") for parent in parents]
        assert starts and all(end < starts[0] for end in ends), "each after its parents"
