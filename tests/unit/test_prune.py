"""Pruning (R18): what is old goes, with all that belongs to it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import zerog
from tests.unit.test_leases import Hands, later
from workers.examples.jobs import Noop
from zerog import codec, failpoints
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.documents import OwnDocuments
from zerog.exceptions import BadJobType, NotFound, StateConflict, Superseded
from zerog.fleet import LOG_JOBS, AgentRecord
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, Held, Manager, Options, Submission
from zerog.outcome import Failed, Result, Succeeded
from zerog.queue.sqlite import SQLiteQueue
from zerog.registry import Parameters, Registry

DAY = 86_400.0


class Brief(zerog.Job):
    """A type that is kept for an hour."""

    job_type = "brief"
    retention = 3600
    own_documents = ("step:{uuid}", "{uuid}.note")

    def run(self, context: zerog.Context) -> None:
        return None


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A Manager whose jobs are kept for ten days."""
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=0.5)
    clock = Hands()
    registry = Registry([Noop, Brief])
    made = Manager(
        store, lambda: SQLiteQueue(tmp_path / "queue.db", tmp_path / "run"), registry, clock, retention=10 * DAY
    )
    yield made
    made.close_queue()
    store.close()


def done(manager: Manager, job_type: str = "noop", good: bool = True, size: int = 100, **options: object) -> str:
    """Return a job that has ended, with output, events and a dead letter if it failed."""
    options = Options(**options)  # type: ignore[assignment,arg-type]
    uuid = manager.submit(Submission(job_type, Parameters({}), options)).record.uuid  # type: ignore[arg-type]
    verdict = manager.claim(uuid, "agent", uuid, LeaseWatch(manager.clock, 30.0))
    assert isinstance(verdict, Claimed)
    blob = manager.open_output(uuid, 1)
    blob.write(b"x" * size)
    blob.close()
    manager.append_events(uuid, {"attempt": 1, "batch": 1, "entries": []})
    result = Result("text/plain", size, blob=blob.blob)
    manager.settle(verdict.held, 1, Succeeded(result) if good else Failed("no", final=True))
    return uuid


def prune(manager: Manager, job_type: str | None = None, older_than: float | None = None) -> int:
    removed, after = 0, 0
    while True:
        pruned = manager.prune(after, job_type, older_than)
        removed += pruned.jobs
        if pruned.position is None:
            tidied: int | None = 0
            while tidied is not None:
                tidied = manager.tidy(tidied)
            forgotten: int | None = 0
            while forgotten is not None:
                forgotten = manager.forget_agents(forgotten)
            manager.trim()
            return removed
        after = pruned.position


def traces(manager: Manager) -> int:
    """Return how many rows of the store speak of jobs."""
    store = manager.store
    assert isinstance(store, SQLiteDatastore)
    tables = ["chunks", *(f"entries{table}" for table in range(16))]
    count = sum(store._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)
    empty = sum(
        store._connection.execute(f"SELECT count(*) FROM entries{table} WHERE body IS NULL").fetchone()[0]
        for table in range(16)
    )
    documents = store._connection.execute("SELECT count(*) FROM documents WHERE key LIKE '%:job:%'").fetchone()[0]
    return int(count - empty + documents)


def test_what_is_older_than_its_retention_goes_without_a_trace(manager: Manager) -> None:
    for good in (True, False):
        done(manager, good=good)
    brief = done(manager, "brief")
    later(manager, 9 * DAY)
    kept = done(manager)
    assert prune(manager) == 1
    with pytest.raises(NotFound):
        manager.store.get(manager.key(brief))
    later(manager, 2 * DAY)
    assert prune(manager) == 2
    assert [record.uuid for record in manager.page().items] == [kept]
    assert manager.store.read("failed", after=0) == []
    assert b"".join(manager.open_data(manager.get(kept).result, 0, 100)) == b"x" * 100  # type: ignore[arg-type]
    later(manager, 20 * DAY)
    assert prune(manager) == 1
    assert traces(manager) == 0


def test_documents_that_belong_to_a_job_go_with_it_and_no_others(manager: Manager) -> None:
    documents = OwnDocuments(manager.store, "")
    uuid, other = done(manager, "brief"), done(manager)
    for key in (f"step:{uuid}", f"{uuid}.note", f"step:{other}", f"other:{uuid}"):
        documents.insert(key, key)
    documents.remove(f"{uuid}.note")  # one that is not there is no fault
    later(manager, DAY)
    assert prune(manager) == 1
    with pytest.raises(NotFound):
        documents.get(f"step:{uuid}")
    assert [documents.get(key)[0] for key in (f"step:{other}", f"other:{uuid}")] == [f"step:{other}", f"other:{uuid}"]


@pytest.mark.parametrize("keys", ["step:{uuid}", ("step",), ("step/{uuid}",), ("x" * 65 + "{uuid}",), (1,)])
def test_documents_of_a_job_that_cannot_be_named_are_refused(keys: object) -> None:
    with pytest.raises(BadJobType, match=r"own_documents is .*; it must be a tuple of keys of documents with \{uuid\}"):
        Registry([type("Named", (Brief,), {"job_type": "named", "own_documents": keys})])


def test_who_does_not_know_a_type_leaves_its_jobs_to_those_who_do(manager: Manager, tmp_path: Path) -> None:
    """It knows neither for how long they are kept nor what belongs to them; by hand they can go all the same."""
    documents = OwnDocuments(manager.store, "")
    uuid, removed = done(manager, "brief"), done(manager, "brief")
    documents.insert(f"step:{uuid}", 1)
    later(manager, 20 * DAY)
    other = Manager(
        manager.store, lambda: SQLiteQueue(tmp_path / "other.db", tmp_path / "run"), Registry([Noop]), manager.clock,
        retention=10 * DAY,
    )  # fmt: skip
    assert prune(other) == 0
    assert documents.get(f"step:{uuid}")[0] == 1
    assert prune(manager) == 2
    assert removed not in manager.read_many([removed])
    with pytest.raises(NotFound):
        documents.get(f"step:{uuid}")
    done(manager, "brief")
    assert prune(other, older_than=0) == 1
    other.close_queue()


def test_dead_letters_are_tidied_a_page_at_a_time(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zerog.manager.pruning._PAGE", 4)
    for _ in range(10):
        done(manager, good=False)
    later(manager, 11 * DAY)
    position: int | None = 0
    while position is not None:
        position = manager.prune(position).position
    places = [0]
    while (place := manager.tidy(places[-1])) is not None:
        places.append(place)
        assert len(manager.store.read("failed", after=0, limit=20)) == 10 - place
    assert places == [0, 4, 8]
    assert manager.store.read("failed", after=0) == []


def test_what_has_not_ended_is_never_removed(manager: Manager) -> None:
    uuid = manager.submit(Submission("brief", Parameters({}))).record.uuid
    later(manager, 100 * DAY)
    assert prune(manager) == 0
    assert prune(manager, older_than=0) == 0
    assert manager.get(uuid).uuid == uuid


def test_a_parent_stays_while_a_child_waits(manager: Manager) -> None:
    other = manager.submit(Submission("noop", Parameters({}))).record.uuid
    parent = manager.submit(Submission("brief", Parameters({}))).record.uuid
    child = manager.submit(Submission("noop", Parameters({}), Options(parents=(parent, other)))).record.uuid
    verdict = manager.claim(parent, "agent", "claim", LeaseWatch(manager.clock, 30.0))
    assert isinstance(verdict, Claimed)
    manager.settle(verdict.held, 1, Succeeded())
    later(manager, DAY)
    assert prune(manager) == 0
    manager.cancel(child)
    later(manager, DAY)
    assert prune(manager) == 1
    assert manager.get(child).reason == "cancelled"


def test_a_parent_that_had_ended_before_its_child_came_stays_too(manager: Manager) -> None:
    parent = done(manager, "brief")
    other = manager.submit(Submission("noop", Parameters({}))).record.uuid
    child = manager.submit(Submission("noop", Parameters({}), Options(parents=(parent, other)))).record.uuid
    later(manager, DAY)
    assert prune(manager) == prune(manager, older_than=0) == 0
    verdict = manager.claim(other, "agent", "claim", LeaseWatch(manager.clock, 30.0))
    assert isinstance(verdict, Claimed)
    manager.settle(verdict.held, 1, Succeeded())
    manager.release_pending()
    assert manager.get(child).state == "queued"


def test_dead_letters_go_with_their_jobs_wherever_they_stand(manager: Manager) -> None:
    for _ in range(210):
        done(manager, good=False, size=1)
    for _ in range(5):
        done(manager, "brief", good=False, size=1)
    later(manager, DAY)
    assert prune(manager) == 5
    assert len(manager.store.read("failed", after=0, limit=500)) == 210


def test_by_hand_a_type_and_an_age_are_named(manager: Manager) -> None:
    done(manager)
    brief = done(manager, "brief")
    later(manager, 100)
    assert prune(manager, "noop", 200) == 0
    assert prune(manager, "noop", 50) == 1
    assert manager.get(brief).uuid == brief


def test_what_a_crash_left_half_removed_goes_later(manager: Manager) -> None:
    done(manager)
    later(manager, 11 * DAY)
    failpoints.arm("prune.mid=raise@1")
    try:
        with pytest.raises(failpoints.FailpointHit):
            prune(manager)
    finally:
        failpoints.arm("")
    assert prune(manager) == 1
    assert traces(manager) == 0


def test_numbers_are_never_given_again(manager: Manager) -> None:
    last = manager.get(done(manager)).number
    prune(manager, older_than=0)
    assert manager.get(done(manager)).number == last + 1


def test_freed_pages_go_back_to_the_disk(manager: Manager, tmp_path: Path) -> None:
    for _ in range(10):
        done(manager, size=2_000_000)
    store = manager.store
    assert isinstance(store, SQLiteDatastore)
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    full = (tmp_path / "zerog.db").stat().st_size
    assert full > 20_000_000
    later(manager, 11 * DAY)
    assert prune(manager) == 10
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    assert (tmp_path / "zerog.db").stat().st_size < full / 20
    assert list(store.warnings()) == []


def asleep(manager: Manager, submission: Submission) -> Held:
    """Return the attempt of an agent that sleeps while its job is lost, taken over, ended and removed."""
    uuid = manager.submit(submission).record.uuid
    watch = LeaseWatch(manager.clock, 30.0)
    sleeping = manager.claim(uuid, "sleeper", "first", watch)
    manager.lose(manager.read(uuid))
    following = manager.claim(uuid, "agent", "second", watch)
    assert isinstance(sleeping, Claimed) and isinstance(following, Claimed)
    manager.settle(following.held, 2, Succeeded())
    later(manager, 11 * DAY)
    assert manager.prune().jobs == 1
    return sleeping.held


@pytest.mark.parametrize("again", [False, True])
def test_a_prune_that_slept_removes_nothing_that_came_since(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Another prune was faster, and the same key has made the next job, under the same UUID."""
    submission = Submission("noop", Parameters({}), key="k")
    uuid = manager.submit(submission).record.uuid
    verdict = manager.claim(uuid, "agent", "first", LeaseWatch(manager.clock, 30.0))
    assert isinstance(verdict, Claimed)
    manager.settle(verdict.held, 1, Succeeded())
    later(manager, 11 * DAY)
    old = manager.read_many([uuid])
    assert manager.prune().jobs == 1
    if again:
        manager.submit(submission)
    assert manager._remove_job(old[uuid]) is not again, "what is gone may leave the log of ends, what is there may not"
    assert (uuid in manager.read_many([uuid])) is again


def test_an_attempt_whose_job_was_removed_is_superseded(manager: Manager) -> None:
    held = asleep(manager, Submission("noop", Parameters({})))
    with pytest.raises(Superseded):
        manager.report(held, 1, 0.5)
    with pytest.raises(Superseded):
        manager.settle(held, 1, Succeeded())


def test_an_attempt_of_a_removed_job_writes_nothing_to_the_next_one_of_its_key(manager: Manager) -> None:
    """The UUID is the same, and its attempts count from one again."""
    submission = Submission("noop", Parameters({}), key="k")
    held = asleep(manager, submission)
    again = manager.submit(submission).record
    assert again.uuid == held.record.uuid
    verdict = manager.claim(again.uuid, "agent", "third", LeaseWatch(manager.clock, 30.0))
    assert isinstance(verdict, Claimed)
    with pytest.raises(Superseded):
        manager.report(held, 1, 0.5)
    with pytest.raises(Superseded):
        manager.settle(held, 1, Succeeded())
    assert manager.read(again.uuid) == verdict.held
    manager.settle(verdict.held, 1, Succeeded())
    with pytest.raises(Superseded):
        manager.settle(held, 1, Succeeded())


def spoke(manager: Manager, id: str) -> None:
    """Let an agent say that it lives, and give it an order."""

    def change(before: AgentRecord | None) -> AgentRecord:
        now = manager.clock.now()
        return replace(before or AgentRecord(id, "first", "host", "1", ("noop",), now), heard_at=now)

    manager.fleet.change(id, change)
    manager.fleet.keep(id, LOG_JOBS, [{"uuid": "u", "attempt": 1, "outcome": "succeeded", "at": "then"}])


@pytest.mark.requirement("M17", "M20")
def test_agents_that_are_long_gone_are_forgotten_with_all_that_was_kept_of_them(manager: Manager) -> None:
    fleet, orders = manager.fleet, manager.orders
    for number in range(130):  # more than a page
        spoke(manager, f"old-{number}")
        number_of_order = orders.give(f"old-{number}", "drain", {}).number
    orders.acknowledge("old-1", number_of_order, "applied", None)
    later(manager, 9 * DAY)
    spoke(manager, "old-7")
    spoke(manager, "young")
    prune(manager)
    assert len(list(fleet.newest())) == 131, "they were heard nine days ago, and are kept for ten"
    later(manager, 2 * DAY)
    prune(manager)
    assert [one.id for one in fleet.newest()] == ["young", "old-7"]
    assert fleet.get("old-1") is None
    assert fleet.kept("old-1", LOG_JOBS, None, 10)[0] == []
    assert orders.page("old-1", 0, 10)[1] == []
    assert orders.page("old-7", 0, 10)[1] != []
    entries = manager.store.read("agents", after=0)
    assert [codec.loads(one.body)["agent"] for one in entries] == ["old-7", "young"], "nothing is left of the others"


@pytest.mark.requirement("M17")
def test_an_agent_that_was_forgotten_and_came_again_is_listed_once(manager: Manager) -> None:
    spoke(manager, "a")
    manager.fleet.remove("a")
    spoke(manager, "a")
    prune(manager)
    assert len(manager.store.read("agents", after=0)) == 1
    assert [one.id for one in manager.fleet.newest()] == ["a"]


def test_an_agent_whose_entry_is_there_before_its_record_is_not_lost(manager: Manager) -> None:
    manager.store.append("agents", codec.dumps({"agent": "never"}))
    prune(manager)
    later(manager, 700)
    prune(manager)
    assert manager.store.read("agents", after=0) == [], "nobody waits for a record for so long"
    manager.store.append("agents", codec.dumps({"agent": "slow"}))
    prune(manager)
    prune(manager)
    record = AgentRecord("slow", "first", "host", "1", ("noop",), manager.clock.now(), heard_at=manager.clock.now())
    manager.store.insert("agent:slow", record.document())
    prune(manager)
    assert [one.id for one in manager.fleet.newest()] == ["slow"]


@pytest.mark.requirement("M17")
def test_an_agent_that_speaks_while_it_is_being_forgotten_stays(manager: Manager) -> None:
    spoke(manager, "a")
    later(manager, 11 * DAY)
    (gone,), _ = manager.fleet.old(10 * DAY, 0)
    spoke(manager, "a")
    manager.orders.give("a", "drain", {})
    manager.fleet.forget(gone, manager.orders.forget)
    assert [one.id for one in manager.fleet.newest()] == ["a"]
    assert manager.orders.wanted("a").drained


def test_orders_that_cannot_be_read_do_not_keep_agents_from_being_forgotten(manager: Manager) -> None:
    for id in ("a", "b"):
        spoke(manager, id)
    manager.store.insert("orders:a", b"no document")
    later(manager, 11 * DAY)
    prune(manager)
    assert list(manager.fleet.newest()) == []
    with pytest.raises(NotFound):
        manager.store.get("orders:a")


@pytest.mark.requirement("M25")
def test_commands_that_are_acknowledged_out_of_order_hide_no_later_one(manager: Manager) -> None:
    orders = manager.orders
    for _ in range(30):
        orders.give("a", "resume", {})
    for number in range(2, 31):
        orders.acknowledge("a", number, "applied", None)
    late = orders.give("a", "drain", {}).number
    assert [one.number for one in orders.page("a", 0, 3)[1]] == [1, 2, 3]
    assert [one.number for one in orders.page("a", 29, 3)[1]] == [30, late]
    with pytest.raises(StateConflict):
        orders.acknowledge("a", 2, "refused", None)


@pytest.mark.requirement("M25")
def test_what_a_forgotten_agent_left_of_its_commands_is_not_taken_for_those_of_the_next(manager: Manager) -> None:
    orders = manager.orders
    orders.give("a", "drain", {})
    orders.acknowledge("a", 1, "refused", "no")
    manager.store.remove("orders:a")  # the rest of it could not be removed
    later(manager, 1)
    orders.give("a", "resume", {})
    assert orders.acknowledge("a", 1, "applied", None).command == "resume"
    assert orders.get("a", 1).state == "applied"
