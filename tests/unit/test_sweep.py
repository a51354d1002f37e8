"""The sweep at scale: who sweeps, the mark, the share of a walk, and children that wait."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machine.memory import MemoryBroker, MemoryDatastore
from tests.services import Beanstalkd, wait_until
from tests.unit.test_leases import Hands, later, lose_entries, ready, submit
from workers.examples.jobs import Noop
from zerog import codec
from zerog.datastore.base import Document
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import StoreAmbiguous, StoreUnavailable, UnknownParent
from zerog.fleet import Lock
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, GiveBack, Manager, Options, Submission
from zerog.outcome import Failed, Succeeded
from zerog.queue.beanstalkd import BeanstalkdQueue
from zerog.queue.sqlite import SQLiteQueue
from zerog.record import SCHEMA, State
from zerog.registry import Parameters, Registry
from zerog.sweep import Sweep, read_ranges, write_ranges
from zerog.sweeper import Candidate, SweeperLease


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A Manager over the embedded adapters, with a clock moved by hand."""
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=0.1)
    registry = Registry([Noop])
    made = Manager(store, lambda: SQLiteQueue(tmp_path / "queue.db", tmp_path / "run"), registry, Hands(), lease=3.0)
    yield made
    made.close_queue()
    store.close()


def sweep_of(manager: Manager) -> Sweep:
    return Sweep(manager, LeaseWatch(manager.clock, 3.0))


def watch_reads(manager: Manager) -> list[str]:
    """Return a list to which the UUID of each record that is read is added."""
    seen: list[str] = []
    read_many = manager.read_many

    def watched(uuids):  # type: ignore[no-untyped-def]
        seen.extend(uuids)
        return read_many(uuids)

    manager.read_many = watched  # type: ignore[method-assign]
    return seen


def end(manager: Manager, uuid: str, good: bool = True) -> None:
    verdict = manager.claim(uuid, "agent", uuid, LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    outcome = Succeeded() if good else Failed("no", final=True)
    manager.settle(verdict.held, verdict.held.record.attempt, outcome)


# Who sweeps


def lease_of(manager: Manager, name: str, patience: float = 3.0, **more: object) -> SweeperLease:
    return SweeperLease(manager.store, manager.clock, Candidate(name, **more), patience)  # type: ignore[arg-type]


def test_one_sweeps_until_it_is_silent_for_too_long(manager: Manager) -> None:
    first, second = lease_of(manager, "first"), lease_of(manager, "second")
    assert first.hold() and not second.hold()
    for _ in range(4):
        later(manager, 2.0)
        assert first.hold() and not second.hold()
    for _ in range(2):
        later(manager, 1.6)
        held = second.hold()
    assert held
    assert not first.hold(), "it finds out at its next try"


def test_who_gives_up_leaves_no_wait(manager: Manager) -> None:
    first, second = lease_of(manager, "first"), lease_of(manager, "second")
    assert first.hold() and not second.hold()
    first.give_up()
    assert second.hold()


def test_a_sweeper_that_is_gone_is_followed_at_once(manager: Manager, tmp_path: Path) -> None:
    lock = Lock(tmp_path / "run", "first")
    first, second = lease_of(manager, "first", presence=lock.presence), lease_of(manager, "second")
    assert first.hold() and not second.hold()
    copy = os.dup(lock._descriptor)
    fcntl.flock(copy, fcntl.LOCK_UN)
    os.close(copy)
    assert second.hold()
    lock.close()


def test_who_knows_newer_records_sweeps_in_place_of_who_does_not(manager: Manager) -> None:
    old, new = lease_of(manager, "old"), lease_of(manager, "new")
    assert old.hold()
    document = manager.store.get("sweeper")
    members = {**codec.loads(document.body), "schema": SCHEMA - 1}
    manager.store.replace("sweeper", codec.dumps(members), document.cas)
    assert new.hold()


def test_a_lease_that_cannot_be_read_is_taken(manager: Manager) -> None:
    manager.store.insert("sweeper", b'{"holder": 1')
    assert lease_of(manager, "first").hold()


# The mark


@given(st.sets(st.integers(1, 400)))
def test_ranges_are_read_as_they_were_written(numbers: set[int]) -> None:
    text = write_ranges(sorted(numbers))
    assert [number for part in read_ranges(text) for number in part] == sorted(numbers)


def test_the_next_sweeper_begins_where_the_last_one_was(manager: Manager) -> None:
    old = submit(manager, 1)
    for uuid in submit(manager, 300):
        end(manager, uuid)
    new = submit(manager, 2)
    sweep_of(manager).walk()
    mark = codec.loads(manager.store.get("sweep-mark").body)
    assert (mark["last"], mark["open"]) == (303, "1 301+2"), "an old job pins nothing"
    later(manager, 2)
    lose_entries(manager, ready(manager))
    seen = watch_reads(manager)
    following = sweep_of(manager)
    following.walk()
    assert len(seen) == 6, "three are looked at, and read again before they are put"
    assert ready(manager) == 3
    assert sorted(one.uuid for one in following._open.values()) == sorted(old + new)


def test_a_mark_that_cannot_be_read_costs_a_whole_walk_and_no_job(manager: Manager) -> None:
    submit(manager, 3)
    sweep_of(manager).walk()
    manager.store.replace("sweep-mark", b'{"last": "x"}', manager.store.get("sweep-mark").cas)
    lose_entries(manager, 3)
    later(manager, 2)
    sweep_of(manager).walk()
    assert ready(manager) == 3


def test_an_entry_without_a_record_is_dropped_after_ten_minutes(manager: Manager) -> None:
    manager.store.append("jobs", codec.dumps({"uuid": "00000000-0000-0000-0000-000000000000"}))
    sweep = sweep_of(manager)
    sweep.walk()
    later(manager, 590)
    sweep.walk()
    assert len(sweep._open) == 1
    later(manager, 20)
    sweep.walk()
    assert len(sweep._open) == 0
    assert codec.loads(manager.store.get("sweep-mark").body)["open"] == ""


def test_a_number_that_a_job_is_about_to_get_is_not_dropped(manager: Manager) -> None:
    """R1: a server that was slow appends again, and a walk may come between that and its write."""
    (uuid,) = submit(manager, 1)
    manager.store.append("jobs", codec.dumps({"uuid": uuid}))
    sweep = sweep_of(manager)
    sweep.walk()
    held = manager.read(uuid)
    manager.write(held, held.record.evolve(number=2))
    sweep.walk()
    assert list(sweep._open) == [2]
    assert codec.loads(manager.store.get("sweep-mark").body)["open"] == "2"


# The share


def test_a_walk_at_rest_looks_at_a_share_and_ten_at_all(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerog.sweep._AT_LEAST", 10)
    submit(manager, 200)
    sweep = sweep_of(manager)
    sweep.walk()
    later(manager, 2)
    seen = watch_reads(manager)
    sweep.walk()
    assert len(seen) == 20
    for _ in range(9):
        sweep.walk()
    assert len(set(seen)) == 200
    assert len(seen) <= 220, "and those that are put again after ten walks"


def test_running_jobs_are_looked_at_in_every_walk(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerog.sweep._AT_LEAST", 10)
    uuids = submit(manager, 100)
    verdict = manager.claim(uuids[50], "agent", "claim", LeaseWatch(manager.clock, 3.0))
    assert isinstance(verdict, Claimed)
    sweep = sweep_of(manager)
    sweep.walk()
    seen = watch_reads(manager)
    for _ in range(3):
        sweep.walk()
    assert seen.count(uuids[50]) >= 3


def test_a_tube_that_lost_entries_is_whole_after_one_walk(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerog.sweep._AT_LEAST", 10)
    submit(manager, 200)
    sweep = sweep_of(manager)
    sweep.walk()
    later(manager, 2)
    lose_entries(manager, 150)
    sweep.walk()
    assert ready(manager) == 200


def test_another_queue_is_filled_by_one_walk(manager: Manager, tmp_path: Path) -> None:
    submit(manager, 30)
    sweep = sweep_of(manager)
    sweep.walk()
    later(manager, 2)
    assert sweep.same_queue()
    manager.close_queue()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"queue.db{suffix}").unlink(missing_ok=True)
    later(manager, 2)

    wait_until(lambda: not sweep.same_queue(), 10, "the file is looked at again")
    sweep.walk()
    assert ready(manager) == 30


@pytest.mark.requirement("Z14")
def test_leases_lapse_and_children_are_decided_also_while_the_queue_is_away(tmp_path: Path) -> None:
    beanstalkd = Beanstalkd(tmp_path / "b").start()
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=0.1)
    clock = Hands()
    manager = Manager(store, lambda: BeanstalkdQueue(beanstalkd.address, 1.0), Registry([Noop]), clock, lease=3.0)
    try:
        (silent, parent) = submit(manager, 2)
        child = manager.submit(Submission("noop", Parameters({}), Options(parents=(parent,)))).record.uuid
        assert isinstance(manager.claim(silent, "agent", "claim", LeaseWatch(clock, 3.0)), Claimed)
        end(manager, parent)
        beanstalkd.stop()
        sweep = sweep_of(manager)
        for _ in range(12):
            sweep.walk()
            later(manager, 0.5)
        assert manager.queue_away
        assert {manager.read(uuid).record.state for uuid in (silent, child)} == {State.QUEUED}
        beanstalkd.start()
        sweep.walk()
        assert not manager.queue_away, "it fills the queue, also before the probe has seen that it is back"
        assert sorted(entries(manager, 3)) == sorted([silent, child])
    finally:
        manager.close_queue()
        store.close()
        beanstalkd.stop()


@pytest.mark.requirement("Z14", "Z17")
@pytest.mark.parametrize("readable", [True, False])
def test_a_loss_in_doubt_leaves_its_error_when_it_had_been_written(
    monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    """Whether the record can be read again at once or only in a later walk."""
    clock, store = Hands(), MemoryDatastore(shares_commits=False)
    broker = MemoryBroker(clock)
    manager = Manager(store, broker.connect, Registry([Noop]), clock, lease=3.0)
    (uuid,) = submit(manager, 1)
    assert isinstance(manager.claim(uuid, "agent", "claim", LeaseWatch(clock, 3.0)), Claimed)
    sweep = sweep_of(manager)
    for _ in range(5):
        sweep.walk()
        later(manager, 0.5)
    replace_really, get_really = store.replace, store.get

    def get_fails(key: str) -> Document:
        raise StoreUnavailable("away")

    def replace_and_raise(key: str, body: bytes, cas: int) -> int:
        replace_really(key, body, cas)
        if key != manager.key(uuid):
            return cas + 1
        if not readable:
            monkeypatch.setattr(store, "get", get_fails)
        raise StoreAmbiguous("in doubt")

    with monkeypatch.context() as patch:
        patch.setattr(store, "replace", replace_and_raise)
        with nullcontext() if readable else pytest.raises(StoreUnavailable):
            for _ in range(6):
                sweep.walk()
                later(manager, 0.5)
    monkeypatch.setattr(store, "get", get_really)
    assert manager.read(uuid).record.state is State.QUEUED
    for _ in range(2):
        manager.say_doubtful()
        sweep.walk()
    errors = manager.events(uuid, "error").items
    assert [entry["reason"] for entry in errors] == ["lost"]


# Pauses


@pytest.mark.parametrize("same", [True, False], ids=["the same sweeper", "another sweeper"])
def test_entries_of_younger_jobs_do_not_hide_what_another_queue_has_forgotten(
    manager: Manager, tmp_path: Path, same: bool
) -> None:
    old = submit(manager, 30)
    later(manager, 2)
    sweep = sweep_of(manager)
    sweep.walk()
    manager.close_queue()
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"queue.db{suffix}").unlink(missing_ok=True)
    wait_until(lambda: not sweep.same_queue(), 10, "the file is looked at again")
    young = submit(manager, 30)
    (sweep if same else sweep_of(manager)).walk()
    assert sorted(entries(manager, 61)) == sorted([*old, *young]), "all are there, and none twice"


def entries(manager: Manager, most: int) -> list[str]:
    """Take what is ready out of the queue, up to ``most`` entries."""
    found: list[str] = []
    while len(found) < most and (one := manager.queue.reserve([manager.tube("noop")], 0.5)) is not None:
        found.append(one.body.decode())
        one.delete()
    return found


# Pauses


def test_a_paused_type_is_neither_claimed_nor_put(manager: Manager) -> None:
    (uuid,) = submit(manager, 1)
    lose_entries(manager, 1)
    pause = manager.pause("noop", "me", "for a while")
    assert manager.pause("noop", "you") == pause, "the first pause stays"
    assert manager.pauses() == {"noop": replace(pause, at=manager.pauses()["noop"].at)}
    later(manager, 2)
    sweep = sweep_of(manager)
    for _ in range(12):
        sweep.walk()
    assert ready(manager) == 0
    assert isinstance(manager.claim(uuid, "agent", "claim", LeaseWatch(manager.clock, 3.0)), GiveBack)
    manager.resume("noop")
    manager.resume("noop")
    sweep.walk()
    assert ready(manager) == 1
    assert isinstance(manager.claim(uuid, "agent", "claim", LeaseWatch(manager.clock, 3.0)), Claimed)


# Children that wait


def child(manager: Manager, *parents: str) -> str:
    return manager.submit(Submission("noop", Parameters({}), Options(parents=parents))).record.uuid


def test_a_child_is_released_when_all_parents_have_succeeded(manager: Manager) -> None:
    first, second = submit(manager, 2)
    uuid = child(manager, first, second)
    assert manager.get(uuid).state is State.WAITING
    end(manager, first)
    manager.release_pending()
    assert (manager.get(uuid).state, ready(manager)) == (State.WAITING, 2)
    end(manager, second)
    manager.release_pending()
    assert (manager.get(uuid).state, ready(manager)) == (State.QUEUED, 3)
    assert not manager.ended_parents


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is gone"])
def test_a_child_and_its_children_are_cancelled_when_a_parent_cannot_succeed(manager: Manager, how: str) -> None:
    (parent,) = submit(manager, 1)
    uuid = child(manager, parent)
    grandchild = child(manager, uuid)
    if how == "fails":
        end(manager, parent, good=False)
    elif how == "is cancelled":
        manager.cancel(parent)
    else:
        manager.store.remove(manager.key(parent))
        sweep_of(manager).walk()
    for _ in range(2):
        manager.release_pending()
    for one in (uuid, grandchild):
        record = manager.get(one)
        assert (record.state, record.result_code, record.reason) == (State.CANCELLED, 410, "parent_failed")
    assert parent in (manager.get(uuid).message or "")


def test_the_sweep_releases_what_nobody_did(manager: Manager) -> None:
    (parent,) = submit(manager, 1)
    uuid = child(manager, parent)
    end(manager, parent)
    manager.ended_parents.clear()  # the process that wrote the end has died
    sweep_of(manager).walk()
    assert manager.get(uuid).state is State.QUEUED


def test_parents_that_ended_before_decide_at_once(manager: Manager) -> None:
    good, bad = submit(manager, 2)
    end(manager, good)
    end(manager, bad, good=False)
    assert manager.get(child(manager, good)).state is State.QUEUED
    record = manager.get(child(manager, good, bad))
    assert (record.state, record.result_code, record.reason) == (State.CANCELLED, 410, "parent_failed")


def test_a_damaged_parent_spoils_no_other_submit(manager: Manager) -> None:
    (bad,) = submit(manager, 1)
    document = manager.store.get(manager.key(bad))
    manager.store.replace(manager.key(bad), b'{"uuid": 1}', document.cas)
    submissions = [Submission("noop", Parameters({})), Submission("noop", Parameters({}), Options(parents=(bad,)))]
    good, orphan = manager.submit_all(submissions)
    assert good.record.state is State.QUEUED  # type: ignore[union-attr]
    assert orphan.record.reason == "parent_failed"  # type: ignore[union-attr]


def test_a_parent_that_is_gone_holds_up_no_other_release(manager: Manager) -> None:
    first, second = submit(manager, 2)
    children = [child(manager, first), child(manager, second)]
    end(manager, first)
    end(manager, second)
    manager.store.remove(manager.key(first))
    manager.release_pending()
    assert not manager.ended_parents
    assert [manager.get(uuid).state for uuid in children] == [State.CANCELLED, State.QUEUED]


def test_an_unknown_parent_stores_nothing(manager: Manager) -> None:
    with pytest.raises(UnknownParent) as refused:
        child(manager, "00000000-0000-0000-0000-000000000000")
    assert refused.value.code == refused.value.errors[0]["code"] == "unknown_parent"
    assert manager.store.read("jobs", after=0) == []
