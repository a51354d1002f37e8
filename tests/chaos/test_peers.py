"""The comparison with other systems is not blind: its judge finds what is lost, stuck, failed and run twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.peers.contenders import Contender
from tests.chaos.peers.systems import work
from tests.chaos.peers.trial import Result
from tests.chaos.peers.verdict import Answer, Verdict, judge
from zerog.chaos import ledger
from zerog.chaos.ledger import Execution

KILLED = 10.0


def ran(name: str, started: float, ended: float | None, pid: int = 1) -> Execution:
    return Execution(name, 1, started, pid, 0, ended)


def verdict(executions: list[Execution], held: set[str] | None = None, failed: set[str] | None = None) -> Verdict:
    names = {one.uuid for one in executions} | (held or set()) | (failed or set())
    return judge(names, executions, Answer(frozenset(held or ()), frozenset(failed or ())), KILLED)


@pytest.mark.requirement("Z12")
def test_what_neither_ended_nor_is_held_is_lost() -> None:
    found = verdict([ran("done", 1, 2), ran("lost", 9, None), ran("held", 9, None)], {"held", "waiting"}, {"said"})
    assert (found.jobs, found.done, found.lost, found.failed, found.stuck) == (5, 1, 1, 1, 2)
    assert (found.interrupted, found.recoveries) == (2, ())


@pytest.mark.requirement("Z12")
def test_what_came_back_is_timed_from_the_kill_to_its_first_start_after_it() -> None:
    executions = [ran("a", 9, None), ran("b", 9, None), ran("b", 11, 12, 2), ran("a", 12, 13, 2), ran("a", 20, 21, 2)]
    found = verdict(executions)
    assert found.recoveries == (1.0, 2.0)
    assert (found.done, found.lost, found.stuck) == (2, 0, 0)
    assert (found.started_twice, found.finished_twice) == (2, 1)


@pytest.mark.requirement("Z12")
def test_what_runs_at_the_verdict_is_not_lost_and_what_ended_is_done_whatever_the_system_says() -> None:
    found = verdict([ran("running", 9, None), ran("running", 12, None, 2), ran("done", 1, 2)], {"done"}, {"done"})
    assert (found.done, found.stuck, found.lost, found.failed) == (1, 1, 0, 0)


@pytest.mark.requirement("Z12")
def test_a_row_counts_what_was_stuck_at_the_verdict_and_what_came_of_it_later() -> None:
    early = verdict([ran("a", 9, None)], {"a"})
    late = verdict([ran("a", 9, None), ran("a", 112.5, 113, 2)])
    row = Result(Contender("zerog", "slow"), early, late, 103.0).row()
    assert row[2:] == ("0", "0", "0", "1", "1", "0", "102.5 / 102.5 s (1 of 1)", "103 s: 1 done")


@pytest.mark.requirement("Z12")
def test_a_job_that_runs_twice_in_one_process_leaves_two_entries(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    work.run(str(path), "a", 0)
    work.run(str(path), "a", 0)
    assert [(one.uuid, one.ended is not None) for one in ledger.read(path)] == [("a", True), ("a", True)]
