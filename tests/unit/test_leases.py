"""LeaseWatch and the sweep, with a clock of the test's own."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

import zerog
from zerog import codec
from zerog.clock import Clock
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import StoreUnavailable, Superseded
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, Drop, GiveBack, Manager, Submission
from zerog.outcome import Failed, GivenBack, Outcome, Succeeded
from zerog.queue.sqlite import SQLiteQueue
from zerog.record import JobRecord, Lease, State
from zerog.registry import Parameters, Registry
from zerog.sweep import Sweep


class Hands(Clock):
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


def running(sequence: int = 0, attempt: int = 1, claim: str = "claim") -> JobRecord:
    return JobRecord(
        "u", "noop", 1, {}, 0.0, 0.0, state=State.RUNNING, attempt=attempt, lease=Lease("agent", claim, sequence, 0.0)
    )


def watched(clock: Hands, watch: LeaseWatch, seconds: float, record: JobRecord) -> bool:
    """Look often enough for ``seconds`` and return whether the lease has lapsed then."""
    lapsed = False
    for _ in range(int(seconds * 10)):
        clock.time += 0.1
        watch.heard()
        lapsed = watch.lapsed(record)
    return lapsed


def test_a_lease_that_stands_still_for_a_whole_lease_has_lapsed() -> None:
    clock = Hands()
    watch = LeaseWatch(clock, 3.0)
    watch.heard()
    assert not watch.lapsed(running())
    assert not watched(clock, watch, 2.8, running())
    assert watched(clock, watch, 0.4, running())


def test_a_lease_that_moves_does_not_lapse() -> None:
    clock = Hands()
    watch = LeaseWatch(clock, 3.0)
    for sequence in range(10):
        assert not watched(clock, watch, 2.0, running(sequence))
    assert watch.moves("u") == 9


def test_the_same_numbers_under_another_claim_are_another_lease() -> None:
    """A job that was removed can be made again by its key, under the same UUID."""
    clock = Hands()
    watch = LeaseWatch(clock, 3.0)
    assert not watched(clock, watch, 2.8, running())
    assert not watched(clock, watch, 2.8, running(claim="another"))
    assert watched(clock, watch, 0.4, running(claim="another"))


def test_time_in_which_the_store_was_silent_does_not_count() -> None:
    clock = Hands()
    watch = LeaseWatch(clock, 3.0)
    watched(clock, watch, 1.0, running())
    watch.silence()
    clock.time += 100
    assert not watched(clock, watch, 1.5, running())
    assert watched(clock, watch, 1.0, running())


def test_a_process_that_slept_does_not_judge_by_its_own_sleep() -> None:
    clock = Hands()
    watch = LeaseWatch(clock, 3.0)
    watched(clock, watch, 0.5, running())
    clock.time += 1000
    watch.heard()
    assert not watch.lapsed(running())


# The sweep


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A Manager over the embedded adapters, with a clock moved by hand."""
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=0.1)
    made = Manager(store, lambda: SQLiteQueue(tmp_path / "queue.db", tmp_path / "run"), _registry(), Hands(), lease=3.0)
    yield made
    made.close_queue()
    store.close()


def _registry() -> Registry:
    from workers.examples.jobs import Noop

    return Registry([Noop])


def submit(manager: Manager, count: int) -> list[str]:
    return [manager.submit(Submission("noop", Parameters({}))).record.uuid for _ in range(count)]


def later(manager: Manager, seconds: float) -> None:
    assert isinstance(manager.clock, Hands)
    manager.clock.time += seconds


def ready(manager: Manager) -> int:
    return manager.queue_stats("noop").ready


def lose_entries(manager: Manager, count: int) -> None:
    """Let the queue forget entries whose jobs are still due."""
    for entry in range(count):
        found = manager.queue.reserve([manager.tube("noop")], 1)
        assert found is not None, entry
        found.delete()


def test_a_walk_puts_what_the_queue_forgot_and_does_not_double_it(manager: Manager) -> None:
    submit(manager, 7)
    lose_entries(manager, 7)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    later(manager, 2)
    for _ in range(3):
        sweep.walk()
        assert ready(manager) == 7


def test_what_is_claimed_during_a_walk_is_no_reason_to_put_again(manager: Manager) -> None:
    submit(manager, 10)
    later(manager, 2)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    manager_read = manager.read_many

    def read_and_lose_entries(uuids):  # type: ignore[no-untyped-def]
        held = manager_read(uuids)
        lose_entries(manager, 3)
        return held

    manager.read_many = read_and_lose_entries  # type: ignore[method-assign]
    sweep.walk()
    assert ready(manager) == 7


def test_entries_on_their_way_are_not_missing(manager: Manager) -> None:
    """An agent that asks ahead holds entries whose records are still queued."""
    submit(manager, 50)
    held = [manager.queue.reserve([manager.tube("noop")], 1) for _ in range(4)]
    later(manager, 2)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    for _ in range(3):
        sweep.walk()
        assert ready(manager) == 46
    assert all(held)


def test_a_few_missing_entries_do_not_double_a_backlog(manager: Manager) -> None:
    submit(manager, 100)
    lose_entries(manager, 3)
    later(manager, 2)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    for _ in range(9):
        sweep.walk()
        assert ready(manager) == 100
    for _ in range(40):  # also by what has waited for long, which is put again whatever the counts say
        sweep.walk()
    assert ready(manager) <= 120 + 20


def test_a_job_that_stays_due_is_put_again_whatever_the_counts_say(manager: Manager) -> None:
    (lost,) = submit(manager, 1)
    lose_entries(manager, 1)
    later(manager, 2)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    for _ in range(10):
        # Entries of other jobs keep the tube looking full.
        submit(manager, 1)
        sweep.walk()
        later(manager, 0.1)
    bodies = set()
    while (entry := manager.queue.reserve([manager.tube("noop")], 0.1)) is not None:
        bodies.add(entry.body.decode())
        entry.delete()
    assert lost in bodies


def test_a_lapsed_job_goes_back_to_the_queue_once_and_its_attempt_is_refused(manager: Manager) -> None:
    (uuid,) = submit(manager, 1)
    verdict = manager.claim(uuid, "dead", "claim", LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    sweep.walk()
    for _ in range(40):
        later(manager, 0.1)
        sweep.look()
    record = manager.get(uuid)
    assert (record.state, record.losses, record.attempt) == (State.QUEUED, 1, 1)
    assert ready(manager) == 2  # the old entry and the new one: R3 makes that harmless
    with pytest.raises(Superseded):
        manager.report(verdict.held, 1, 0.5)
    assert [entry["reason"] for entry in manager.events(uuid).items] == ["lost"]


@pytest.mark.requirement("Z14")
@pytest.mark.parametrize(
    ("outcome", "cancelled"), [(Succeeded(), False), (Succeeded(), True), (GivenBack(started=True), False)]
)
def test_the_end_of_an_attempt_that_was_lost_is_refused_though_nobody_runs_the_job(
    manager: Manager, outcome: Outcome, cancelled: bool
) -> None:
    """What the sweep wrote is not taken for the attempt's own end."""
    (uuid,) = submit(manager, 1)
    verdict = manager.claim(uuid, "slow", "mine", LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    if cancelled:
        manager.cancel(uuid)
    after = manager.lose(manager.read(uuid))
    assert after.record.state is (State.CANCELLED if cancelled else State.QUEUED)
    for _ in range(2):
        with pytest.raises(Superseded):
            manager.settle(verdict.held, 1, outcome)
        with pytest.raises(Superseded):
            manager.confirm(verdict.held, 1)
    assert manager.read(uuid) == after


@pytest.mark.parametrize("outcome", [Succeeded(), GivenBack(started=True), Failed("x", "job_failed")])
def test_an_end_that_was_written_though_nobody_said_so_is_known_again(manager: Manager, outcome: Outcome) -> None:
    (uuid,) = submit(manager, 1)
    verdict = manager.claim(uuid, "agent", "mine", LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    written = manager.settle(verdict.held, 1, outcome)
    later(manager, 1)
    manager.confirm(verdict.held, 1)
    assert manager.settle(verdict.held, 1, outcome).cas == written.cas


@pytest.mark.parametrize(("counters", "reason"), [({"crashes": 3}, "crashed"), ({"losses": 10}, "lost")])
def test_a_job_that_wore_out_its_workers_is_not_run_again(
    manager: Manager, counters: dict[str, int], reason: str
) -> None:
    """R9, at the claim: the limit may have been lowered since the counter reached it."""
    worn, fine = submit(manager, 2)
    held = manager.read(worn)
    manager.write(held, held.record.evolve(**counters))
    watch = LeaseWatch(manager.clock, 3.0)
    assert isinstance(manager.claim(worn, "agent", "claim", watch), Drop)
    record = manager.get(worn)
    assert (record.state, record.result_code, record.reason, record.attempt) == (State.FAILED, 500, reason, 0)
    assert [codec.loads(entry.body)["uuid"] for entry in manager.store.read("failed", after=0)] == [worn]
    assert isinstance(manager.claim(fine, "agent", "claim", watch), Claimed)


def test_time_in_which_nobody_could_write_does_not_count(manager: Manager) -> None:
    (uuid,) = submit(manager, 1)
    assert isinstance(manager.claim(uuid, "agent", "claim", LeaseWatch(manager.clock, 3.0)), Claimed)
    sweep = Sweep(manager, LeaseWatch(manager.clock, 3.0))
    sweep.walk()
    store = manager.store
    assert isinstance(store, SQLiteDatastore)
    lock = sqlite3.connect(store.path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    failures = 0
    for _ in range(8):  # eight leases, looked at as often as the chores look
        for _ in range(6):
            later(manager, 0.5)
            try:
                sweep.look()
            except StoreUnavailable:
                failures += 1
    lock.execute("ROLLBACK")
    lock.close()
    assert failures > 0
    assert manager.get(uuid).state is State.RUNNING
    for _ in range(5):
        later(manager, 0.5)
        sweep.look()
    assert manager.get(uuid).state is State.RUNNING, "the agent must have a whole lease to renew it again"
    for _ in range(4):
        later(manager, 0.5)
        sweep.look()
    assert manager.get(uuid).state is State.QUEUED


def test_a_claim_takes_nothing_over_while_nobody_could_write(manager: Manager) -> None:
    """An agent that only reads sees a lease stand still that its holder cannot renew."""
    (uuid,) = submit(manager, 1)
    verdict = manager.claim(uuid, "agent", "mine", LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    store = manager.store
    assert isinstance(store, SQLiteDatastore)
    lock = sqlite3.connect(store.path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    watch = LeaseWatch(manager.clock, 3.0)
    refused = 0
    for _ in range(20):
        later(manager, 0.5)
        try:
            assert isinstance(manager.claim(uuid, "other", "theirs", watch), GiveBack)
        except StoreUnavailable:
            refused += 1
    lock.execute("ROLLBACK")
    lock.close()
    assert refused > 0, "a lease that seems to have lapsed is doubted by a write"
    assert isinstance(manager.claim(uuid, "other", "theirs", watch), GiveBack), "its holder gets the time to renew it"
    later(manager, 0.5)
    manager.report(verdict.held, 1)
    for _ in range(7):  # it dies here: a lease and a third later another has the job
        later(manager, 0.5)
        assert isinstance(manager.claim(uuid, "other", "theirs", watch), GiveBack)
    answers = []
    for _ in range(4):
        later(manager, 0.5)
        answers.append(manager.claim(uuid, "other", "theirs", watch))
    assert isinstance(answers[-1], Claimed)


def test_who_does_not_know_a_type_does_not_run_again_what_must_not_be(manager: Manager, tmp_path: Path) -> None:
    class Once(zerog.Job):
        job_type = "once"
        rerun_after_crash = False

        def run(self, context: zerog.Context) -> None:
            return None

    knows = Manager(
        manager.store, lambda: SQLiteQueue(tmp_path / "queue.db", tmp_path / "run"), Registry([Once]), manager.clock
    )
    uuid = knows.submit(Submission("once", Parameters({}))).record.uuid
    assert isinstance(knows.claim(uuid, "agent", "mine", LeaseWatch(manager.clock, 3.0)), Claimed)
    knows.close_queue()
    assert manager.lose(manager.read(uuid)).record.reason == "outcome_unknown"


def test_a_second_entry_of_a_running_job_is_given_back_then_dropped(manager: Manager) -> None:
    (uuid,) = submit(manager, 1)
    watch = LeaseWatch(manager.clock, 3.0)
    verdict = manager.claim(uuid, "agent", "mine", watch)
    assert isinstance(verdict, Claimed)
    assert manager.claim(uuid, "agent", "mine", watch) == verdict, "the same claim again is the same answer"
    held = verdict.held
    other = LeaseWatch(manager.clock, 3.0)
    answers = []
    for _ in range(5):
        answers.append(type(manager.claim(uuid, "other", "theirs", other)))
        held = manager.report(held, 1)
    assert answers[:3] == [GiveBack] * 3
    assert answers[-1] is not GiveBack
