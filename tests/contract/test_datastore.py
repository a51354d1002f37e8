"""One suite for every datastore: the contract of ``zerog.datastore.base``."""

from __future__ import annotations

import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.conftest import couchbase_store
from tests.services import CouchbaseServer
from zerog.datastore.base import Datastore, Entry
from zerog.datastore.blobs import CHUNK, BlobWriter, read_blob
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import AlreadyExists, DatastoreError, NotFound, StoreUnavailable

pytestmark = pytest.mark.requirement("Z1", "Z6")


def test_insert_all_answers_for_each_document(store: Datastore) -> None:
    store.insert("b", b"{}")
    done = store.insert_all({"a": b'{"x":1}', "b": b'{"x":2}', "c": b'{"x":3}'})
    assert isinstance(done["b"], AlreadyExists)
    assert store.get("a").cas == done["a"]
    assert store.get("b").body == b"{}"
    assert store.get("c").body == b'{"x":3}'


# Logs


def test_appends_are_numbered_from_one_without_gaps(store: Datastore) -> None:
    assert [store.append("jobs", b'{"n":%d}' % n) for n in range(3)] == [1, 2, 3]
    assert store.append("other", b"{}") == 1


def test_a_log_is_read_in_both_directions(store: Datastore) -> None:
    for number in range(1, 8):
        store.append("jobs", b'{"n":%d}' % number)
    assert [entry.number for entry in store.read("jobs", after=0)] == [1, 2, 3, 4, 5, 6, 7]
    assert [entry.number for entry in store.read("jobs", after=5)] == [6, 7]
    assert [entry.number for entry in store.read("jobs", after=2, limit=2)] == [3, 4]
    assert [entry.number for entry in store.read("jobs", limit=3)] == [7, 6, 5]
    assert [entry.number for entry in store.read("jobs", before=4)] == [3, 2, 1]
    assert store.read("jobs", after=7) == []
    assert store.read("empty") == []
    assert store.read("jobs", after=3, limit=1) == [Entry(4, b'{"n":4}')]


def test_append_all_numbers_each_log_by_itself(store: Datastore) -> None:
    store.append("a", b"{}")
    assert store.append_all([("a", b"{}"), ("b", b"{}"), ("a", b'{"last":1}')]) == [2, 1, 3]
    assert store.read("a", limit=1) == [Entry(3, b'{"last":1}')]


def test_concurrent_appends_get_different_numbers_and_all_are_read(store: Datastore) -> None:
    numbers: list[int] = []

    def write(writer: int) -> None:
        for n in range(25):
            numbers.append(store.append("jobs", b'{"w":%d,"n":%d}' % (writer, n)))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.read("jobs", after=0, limit=1000)  # a reader at the same time, which may seal what is slow
    assert len(set(numbers)) == 100
    assert [entry.number for entry in store.read("jobs", after=0, limit=1000)] == sorted(numbers)


def test_an_amended_entry_keeps_its_place_and_a_removed_one_is_skipped(store: Datastore) -> None:
    for number in range(1, 5):
        store.append("jobs", b'{"n":%d}' % number)
    store.amend("jobs", 2, b'{"n":"two"}')
    store.amend("jobs", 3, None)
    store.amend("jobs", 3, b'{"n":"back"}')
    store.amend("jobs", 99, None)
    assert store.read("jobs", after=0) == [Entry(1, b'{"n":1}'), Entry(2, b'{"n":"two"}'), Entry(4, b'{"n":4}')]


def test_a_log_that_is_removed_begins_anew_and_touches_no_other(store: Datastore) -> None:
    for log in ("events.a", "events.b"):
        for number in range(3):
            store.append(log, b'{"n":%d}' % number)
    store.trim("events.a", 1)
    store.remove_log("events.a")
    store.remove_log("events.never")
    assert store.read("events.a", after=0) == []
    assert [entry.number for entry in store.read("events.b", after=0)] == [1, 2, 3]
    assert store.append("events.a", b'{"n":9}') == 1
    assert store.read("events.a", after=0)[0].body == b'{"n":9}'


def test_removed_entries_leave_the_others_and_the_numbers(store: Datastore) -> None:
    for number in range(4):
        store.append("jobs", b'{"n":%d}' % number)
    for number in (1, 3, 4, 4, 9):
        store.amend("jobs", number, None)
    assert [entry.number for entry in store.read("jobs", after=0)] == [2]
    assert store.append("jobs", b'{"n":5}') == 5


def test_a_trimmed_log_never_gives_a_number_twice(store: Datastore) -> None:
    for _ in range(3):
        store.append("jobs", b"{}")
    store.trim("jobs", 2)
    assert [entry.number for entry in store.read("jobs", after=0)] == [3]
    store.trim("jobs", 10)
    assert store.read("jobs", after=0) == []
    assert store.read("jobs") == []
    assert store.append("jobs", b'{"n":4}') == 4
    assert store.read("jobs", after=0) == [Entry(4, b'{"n":4}')]


# Blobs


def test_a_blob_is_read_by_ranges(store: Datastore) -> None:
    data = os.urandom(CHUNK * 2 + 1000)
    writer = BlobWriter(store, "data.1")
    for start in range(0, len(data), 100_001):
        writer.write(data[start : start + 100_001])
    writer.close()
    assert writer.size == len(data)
    for start, stop in ((0, len(data)), (5, 10), (CHUNK - 3, CHUNK + 3), (CHUNK * 2, len(data)), (7, 7)):
        assert b"".join(read_blob(store, "data.1", start, stop)) == data[start:stop]


def test_a_chunk_is_overwritten_and_a_removed_blob_is_gone(store: Datastore) -> None:
    store.put_chunk("data.1", 0, b"old")
    store.put_chunk("data.1", 0, b"\x00new\xff")
    store.put_chunk("data.1", 1, b"second")
    assert store.get_chunk("data.1", 0) == b"\x00new\xff"
    store.remove_blob("data.1")
    store.remove_blob("data.1")
    for index in (0, 1):
        with pytest.raises(NotFound):
            store.get_chunk("data.1", index)


# The whole


def test_what_is_written_together_is_there_after_the_block(store: Datastore) -> None:
    with store.together():
        cas = store.insert("job:1", b"{}")
        number = store.append("jobs", b"{}")
        cas = store.replace("job:1", b'{"a":1}', cas)
    assert store.get("job:1").body == b'{"a":1}'
    assert store.get("job:1").cas == cas
    assert [entry.number for entry in store.read("jobs", after=0)] == [number]


def test_an_error_inside_together_can_be_handled_there(store: Datastore) -> None:
    store.insert("taken", b"{}")
    with store.together():
        store.insert("a", b"{}")
        with pytest.raises(AlreadyExists):
            store.insert("taken", b"{}")
        store.insert("b", b"{}")
    assert set(store.get_many(["a", "b"])) == {"a", "b"}


def test_a_closed_store_says_so_and_closes_twice(store: Datastore) -> None:
    store.insert("a", b"{}")
    store.close()
    store.close()
    with pytest.raises(DatastoreError):
        store.get("a")


# SQLite alone


def test_sqlite_rolls_back_what_was_together_when_the_block_fails(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    with pytest.raises(RuntimeError), store.together():
        store.insert("a", b"{}")
        raise RuntimeError("the caller's")
    with pytest.raises(NotFound):
        store.get("a")
    store.insert("a", b"{}")
    store.close()


def test_sqlite_waits_for_a_lock_no_longer_than_its_deadline(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=0.3)
    store.insert("a", b"{}")
    other = sqlite3.connect(tmp_path / "zerog.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.insert("b", b"{}")
    with pytest.raises(StoreUnavailable), store.together():
        store.insert("c", b"{}")
    assert time.monotonic() - start < 2
    assert store.get("a").body == b"{}"
    other.execute("ROLLBACK")
    store.insert("b", b"{}")
    other.close()
    store.close()


def test_sqlite_waits_for_threads_and_for_processes_no_longer_than_its_deadline_together(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db", deadline=1.0)
    store.insert("a", b"{}")
    other = sqlite3.connect(tmp_path / "zerog.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    def insert(number: int) -> float:
        start = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.insert(f"thread-{number}", b"{}")
        return time.monotonic() - start

    with ThreadPoolExecutor(6) as pool:
        waits = list(pool.map(insert, range(6)))
        later = list(pool.map(insert, range(1)))  # in a thread that had waited less than a deadline
        assert 0.9 < max(waits) < 1.6
        assert 0.9 < later[0] < 1.6, "the next wait is a whole one again"
        other.execute("ROLLBACK")
        list(pool.map(lambda number: store.insert(f"after-{number}", b"{}"), range(6)))
    other.close()
    store.close()


def test_the_write_ahead_log_of_sqlite_begins_anew_under_steady_writing(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    cas = store.insert("job:x", b"{}")
    sizes = [0]
    end = time.monotonic() + 30  # a busy machine may need a second try, which comes after five seconds
    while time.monotonic() < end:
        for _ in range(150):
            with store.together():
                cas = store.replace("job:x", b'"%s"' % (b"x" * 3000), cas)
        sizes.append((tmp_path / "zerog.db-wal").stat().st_size)
        if sizes[-1] == sizes[-2]:
            break  # 150 commits of at least one frame of 4 KiB went over old ones
    assert sizes[-1] == sizes[-2], sizes
    assert store.get("job:x").cas == cas
    store.close()


OTHER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], timeout=0.01, isolation_level=None)
print("ready", flush=True)
tried = entered = 0
until = time.monotonic() + 2
while time.monotonic() < until:
    tried += 1
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        entered += 1
    except sqlite3.OperationalError:
        pass
print(tried, entered, flush=True)
"""


def test_no_other_process_writes_while_one_does_whatever_its_checkpoints_do(tmp_path: Path) -> None:
    """Closing any descriptor of a file that SQLite has open lets go of all locks that the process has on it."""
    store = SQLiteDatastore(tmp_path / "zerog.db")
    for number in range(700):  # so that the thread of the checkpoints has something to do
        store.insert(f"job:{number}", b"{}")
    with store.together():
        store.insert("job:last", b"{}")
        arguments = [sys.executable, "-c", OTHER, str(tmp_path / "zerog.db")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    tried, entered = map(int, done.stdout.split()[1:])
    assert tried > 20
    assert entered == 0
    assert store.get("job:last").body == b"{}"
    store.close()


def test_a_file_with_all_logs_in_one_table_is_read(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "zerog.db") as old:
        old.execute(
            "CREATE TABLE entries (log TEXT NOT NULL, number INTEGER NOT NULL, body BLOB, "
            "PRIMARY KEY (log, number)) WITHOUT ROWID"
        )
        rows = [("zerog:jobs", 1, b"1"), ("zerog:jobs", 2, None), ("zerog:jobs", 3, b"3"), ("zerog:events.x", 1, b"e")]
        old.executemany("INSERT INTO entries VALUES (?, ?, ?)", rows)
    old.close()
    store = SQLiteDatastore(tmp_path / "zerog.db")
    assert store.read("jobs", after=0) == [Entry(1, b"1"), Entry(3, b"3")]
    assert store.read("events.x", after=0) == [Entry(1, b"e")]
    assert store.append("jobs", b"4") == 4
    store.close()


def test_a_reader_that_stays_in_the_log_stops_no_writer_of_sqlite(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    cas = store.insert("job:x", b"{}")
    with sqlite3.connect(tmp_path / "zerog.db", isolation_level=None) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM documents").fetchone()
        slowest = 0.0
        for _ in range(3000):
            start = time.monotonic()
            with store.together():
                cas = store.replace("job:x", b'"%s"' % (b"x" * 3000), cas)
            slowest = max(slowest, time.monotonic() - start)
        reader.execute("ROLLBACK")
    assert slowest < 1.0  # of the five that a writer would wait for a lock
    store.close()


def test_sqlite_keeps_everything_over_a_close(tmp_path: Path) -> None:
    first = SQLiteDatastore(tmp_path / "zerog.db")
    cas = first.insert("a", b'{"n":1}')
    first.append("jobs", b"{}")
    first.close()
    second = SQLiteDatastore(tmp_path / "zerog.db")
    assert second.get("a").cas == cas
    assert second.append("jobs", b"{}") == 2
    second.close()


def test_sqlite_syncs_every_commit_and_keeps_services_apart(tmp_path: Path) -> None:
    one, two = SQLiteDatastore(tmp_path / "zerog.db", "one"), SQLiteDatastore(tmp_path / "zerog.db", "two")
    one.insert("a", b"{}")
    with pytest.raises(NotFound):
        two.get("a")
    connection = one._connection
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    one.close()
    two.close()


# Couchbase alone


def test_couchbase_seals_a_number_that_was_taken_and_never_written(couchbase: CouchbaseServer) -> None:
    store = couchbase_store(couchbase, f"t{secrets.token_hex(6)}")
    store.append("jobs", b"{}")
    taken = store._next_number("jobs")
    store.append("jobs", b"{}")
    assert [entry.number for entry in store.read("jobs", after=0)] == [1, 3]
    # The writer that comes late finds its number sealed and must take another.
    assert store._write_entry(store._entry_key("jobs", taken), b'{"id":"late","value":{}}', "late") is False
    store.close()


def test_couchbase_fails_in_time_when_the_server_stalls_and_recovers(tmp_path: Path) -> None:
    server = CouchbaseServer(tmp_path / "own").start()
    store = couchbase_store(server, "test", deadline=1.0)
    try:
        cas = store.insert("a", b"{}")
        server.signal(signal.SIGSTOP)
        for call in (lambda: store.get("a"), lambda: store.replace("a", b"{}", cas), lambda: store.append("l", b"{}")):
            start = time.monotonic()
            with pytest.raises(StoreUnavailable):
                call()
            assert time.monotonic() - start < 8
        server.signal(signal.SIGCONT)
        end = time.monotonic() + 10
        while True:
            try:
                store.probe()
                break
            except StoreUnavailable:
                assert time.monotonic() < end, "it did not recover"
        assert store.get("a").body == b"{}"
    finally:
        store.close()
        server.stop()


def test_couchbase_says_that_nothing_listens_and_connects_later(tmp_path: Path) -> None:
    server = CouchbaseServer(tmp_path / "own").start()
    server.stop()
    store = couchbase_store(server, "test", deadline=1.0)
    with pytest.raises(StoreUnavailable):
        store.get("a")
    start = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.get("a")
    assert time.monotonic() - start < 0.9, "the second call waited again"
    store.close()
