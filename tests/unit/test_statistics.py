"""What processes count together: exact whatever a store does, and whichever process goes."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.services import Memcached, wait_until
from zerog.clock import Clock
from zerog.datastore.base import Documents
from zerog.datastore.faulty import Faults, FaultyDatastore
from zerog.datastore.memcached import MemcachedDocuments
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import DatastoreError, StoreUnavailable
from zerog.fleet import Lock
from zerog.statistics import Statistics, minus, plus

pytestmark = pytest.mark.requirement("G11", "M23", "M24")


class Later(Clock):
    """A clock that a test puts forward."""

    ahead = 0.0

    def now(self) -> float:
        return super().now() + self.ahead


@pytest.fixture(params=["sqlite", "memcached"])
def documents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Documents]:
    server = Memcached(tmp_path / "memcached").start() if request.param == "memcached" else None
    made: Documents
    if server is not None:
        made = MemcachedDocuments(server.address, f"t{secrets.token_hex(4)}", 1.0)
    else:
        made = SQLiteDatastore(tmp_path / "zerog.db", "test", deadline=3.0)
    yield made
    made.close()
    if server is not None:
        server.stop()


def count(statistics: Statistics, times: int = 1, status: int = 200) -> None:
    for _ in range(times):
        statistics.count_request("jobs", status, 0.5, status == 500)


def requests(statistics: Statistics) -> int:
    return int(sum(statistics.read().counts.get("requests", {}).get("jobs", {}).values()))


def test_trees_add_up_and_what_is_taken_away_is_gone() -> None:
    left, right = {"a": {"x": 1, "y": 2}, "n": 3}, {"a": {"x": 5, "z": 1}, "m": 1}
    assert plus(left, right) == {"a": {"x": 6, "y": 2, "z": 1}, "n": 3, "m": 1}
    assert minus(plus(left, right), right) == left


def test_what_processes_count_is_one_sum(documents: Documents) -> None:
    several = [Statistics(documents, Clock(), f"p{number}") for number in range(4)]

    def work(one: Statistics) -> None:
        for _ in range(10):
            count(one, 5)
            one.flush()

    threads = [threading.Thread(target=work, args=(one,)) for one in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    count(several[0], 2, 500)
    several[0].flush()
    totals = several[1].read()
    assert totals.counts["requests"]["jobs"] == {"200": 200, "500": 2}
    assert totals.counts["exceptions"]["jobs"] == 2
    assert totals.counts["seconds"]["jobs"] == pytest.approx(101)


def test_who_ends_in_order_leaves_what_it_has_counted(documents: Documents) -> None:
    one, other = Statistics(documents, Clock(), "one"), Statistics(documents, Clock(), "other")
    one.start()
    count(one, 7)
    one.gauge("leases", 2)
    wait_until(lambda: requests(other) == 7, 5)
    assert other.read().gauges == {"leases": 2}
    count(one, 3)
    one.stop()
    assert (requests(other), other.read().gauges) == (10, {})
    assert documents.get_many(["statistics:one"]) == {}, "nothing is left of it but its counts"


def test_who_was_killed_is_taken_over_once_and_the_silent_only_after_long(documents: Documents, tmp_path: Path) -> None:
    clock = Later()
    lock = Lock(tmp_path, "killed")
    killed = Statistics(documents, clock, "killed", presence=lock.presence)
    silent = Statistics(documents, clock, "silent")
    living = [Statistics(documents, clock, name) for name in ("a", "b")]
    for one in (killed, silent, *living):
        count(one, 3)
        one.flush()
    for one in living:
        one._tidy()
    assert len(documents.get_many(["statistics:killed", "statistics:silent"])) == 2, "both live"
    os.close(lock._descriptor)  # as the kernel does when it ends, however that was
    clock.ahead = 10
    for one in living:
        one._tidy()
    assert set(documents.get_many(["statistics:killed", "statistics:silent"])) == {"statistics:silent"}
    assert requests(living[0]) == 12
    clock.ahead = 4000
    for one in living:
        count(one)
        one.flush()
    for one in living:
        one._tidy()
    assert documents.get_many(["statistics:killed", "statistics:silent"]) == {}
    assert requests(living[0]) == 14


def test_who_was_silent_and_comes_back_is_counted_once(documents: Documents) -> None:
    clock = Later()
    one, other = Statistics(documents, clock, "one"), Statistics(documents, clock, "other")
    for each in (one, other):
        count(each, 5)
        each.flush()
    clock.ahead = 4000
    count(other)
    other.flush()
    other._tidy()
    assert requests(other) == 11
    for times in (2, 3):
        count(one, times)
        one.flush()
    assert requests(other) == 16


def test_after_a_store_that_forgot_there_is_all_since_the_last_write_and_it_says_so(tmp_path: Path) -> None:
    """What was before cannot be told any more: processes that are gone had a part in it."""
    server = Memcached(tmp_path).start()
    documents = MemcachedDocuments(server.address, "test", 1.0)
    try:
        clock = Later()
        one, gone = Statistics(documents, clock, "one"), Statistics(documents, clock, "gone")
        for each in (one, gone):
            count(each, 4)
            each.flush()
        clock.ahead = 60.0
        for each in (one, gone):
            count(each)
            each.flush()
        gone._leave()
        assert requests(one) == 10
        since = one.read().since
        last = clock.now()
        server.stop()
        count(one, 2)
        with pytest.raises(DatastoreError):
            one.flush()
        with pytest.raises(StoreUnavailable):
            one.read()
        server.start()
        one.flush()
        assert requests(one) == 2
        assert since + 59 < one.read().since <= last
        count(one)
        one.flush()
        assert requests(one) == 3
    finally:
        documents.close()
        server.stop()


def test_what_is_shown_since_is_never_earlier_than_what_somebody_has_lost(tmp_path: Path) -> None:
    """Two processes wrote last at different times before the store forgot: of the later one less is left."""
    server = Memcached(tmp_path).start()
    documents = MemcachedDocuments(server.address, "test", 1.0)
    try:
        clock = Later()
        early, late = Statistics(documents, clock, "early"), Statistics(documents, clock, "late")
        for each in (early, late):
            count(each)
            each.flush()
        clock.ahead = 60.0
        count(late, 5)
        late.flush()
        written = clock.now()
        server.stop()
        count(late, 2)
        count(early, 3)
        server.start()
        for each in (early, late):
            wait_until(partial(flushed, each), 10, "the store again")
        assert requests(early) == 5
        assert early.read().since >= written - 1.0
    finally:
        documents.close()
        server.stop()


def flushed(one: Statistics) -> bool:
    """Return whether what was counted could be shared."""
    try:
        one.flush()
    except DatastoreError:
        return False
    return True


def test_nothing_is_counted_twice_while_writes_are_in_doubt(tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    store = FaultyDatastore(SQLiteDatastore(tmp_path / "zerog.db", "test", deadline=3.0), faults)
    several = [Statistics(store, Clock(), f"p{number}") for number in range(3)]
    Faults(rate=0.3, conflicts=0.3).write(faults)
    failed = 0
    for _ in range(40):
        for one in several:
            count(one)
            try:
                one.flush()
            except DatastoreError:
                failed += 1
    assert failed > 5
    Faults().write(faults)
    wait_until(lambda: store._now() == Faults(), 5)
    for one in several:
        one.flush()
    assert requests(several[0]) == 120
    Faults(rate=0.3, conflicts=0.3).write(faults)
    wait_until(lambda: store._now() != Faults(), 5)
    for _ in range(50):
        try:
            several[2]._leave()
            break
        except DatastoreError:
            continue
    Faults().write(faults)
    wait_until(lambda: store._now() == Faults(), 5)
    assert requests(several[0]) == 120
    store.close()


def test_off_is_off() -> None:
    off = Statistics(None, Clock(), "off", "off")
    count(off)
    off.start()
    off.stop()
    with pytest.raises(StoreUnavailable):
        off.read()
