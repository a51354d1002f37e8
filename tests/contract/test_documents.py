"""One suite for everything that keeps documents: that part of the contract of ``zerog.datastore.base``."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest

from tests.services import Memcached
from zerog import codec
from zerog.datastore.base import Documents
from zerog.datastore.memcached import MemcachedDocuments
from zerog.exceptions import AlreadyExists, Conflict, DatastoreError, NotFound

pytestmark = pytest.mark.requirement("Z1", "Z6", "G11")


def test_a_document_that_was_inserted_is_read(documents: Documents) -> None:
    cas = documents.insert("job:1", b'{"a":1}')
    document = documents.get("job:1")
    assert (document.body, document.cas) == (b'{"a":1}', cas)


def test_a_missing_document_is_not_found(documents: Documents) -> None:
    with pytest.raises(NotFound):
        documents.get("nothing")
    with pytest.raises(NotFound):
        documents.replace("nothing", b"{}", 1)
    with pytest.raises(NotFound):
        documents.remove("nothing")


def test_a_second_insert_is_refused_and_changes_nothing(documents: Documents) -> None:
    documents.insert("job:1", b'{"a":1}')
    with pytest.raises(AlreadyExists):
        documents.insert("job:1", b'{"a":2}')
    assert documents.get("job:1").body == b'{"a":1}'


def test_a_replace_needs_the_very_version(documents: Documents) -> None:
    first = documents.insert("job:1", b'{"a":1}')
    second = documents.replace("job:1", b'{"a":2}', first)
    with pytest.raises(Conflict):
        documents.replace("job:1", b'{"a":3}', first)
    assert documents.get("job:1").body == b'{"a":2}'
    assert documents.get("job:1").cas == second != first


def test_a_version_of_a_removed_document_fits_no_successor(documents: Documents) -> None:
    old = documents.insert("job:1", b"{}")
    documents.remove("job:1")
    documents.insert("job:1", b"{}")
    with pytest.raises(Conflict):
        documents.replace("job:1", b'{"stale":true}', old)


def test_only_the_very_version_is_removed_if_one_is_named(documents: Documents) -> None:
    first = documents.insert("job:1", b"{}")
    second = documents.replace("job:1", b'{"a":2}', first)
    with pytest.raises(Conflict):
        documents.remove("job:1", first)
    assert documents.get("job:1").cas == second
    documents.remove("job:1", second)
    with pytest.raises(NotFound):
        documents.remove("job:1", second)


def test_of_eight_racers_exactly_one_wins(documents: Documents) -> None:
    cas = documents.insert("job:1", b"{}")
    won: list[int] = []
    start = threading.Barrier(8)

    def race(racer: int) -> None:
        start.wait()
        try:
            documents.replace("job:1", b'{"racer":%d}' % racer, cas)
            won.append(racer)
        except Conflict:
            return

    threads = [threading.Thread(target=race, args=(racer,)) for racer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(won) == 1
    assert documents.get("job:1").body == b'{"racer":%d}' % won[0]


def test_get_many_returns_those_that_exist(documents: Documents) -> None:
    for number in range(1200):
        if number % 100 == 0:
            documents.insert(f"job:{number}", b'{"n":%d}' % number)
    found = documents.get_many([f"job:{number}" for number in range(1200)])
    assert {key: document.body for key, document in found.items()} == {
        f"job:{number}": b'{"n":%d}' % number for number in range(0, 1200, 100)
    }
    assert documents.get_many([]) == {}


@pytest.mark.parametrize("text", ["é ☃ 😀", "\x00\x1f", "a" * 100_000])
def test_any_text_survives(documents: Documents, text: str) -> None:
    body = codec.dumps({"text": text})
    documents.insert("job:1", body)
    assert documents.get("job:1").body == body


def test_the_probe_answers(documents: Documents) -> None:
    documents.probe()
    assert documents.get_many(["probe"]) == {}


@pytest.mark.parametrize("injury", ["stopped", "gone"])
def test_memcached_fails_in_time_and_recovers(tmp_path: Path, injury: str) -> None:
    server = Memcached(tmp_path).start()
    documents = MemcachedDocuments(server.address, "test", deadline=0.1)
    try:
        cas = documents.insert("a", b"{}")
        if injury == "stopped":
            server.signal(signal.SIGSTOP)
        else:
            server.stop()
        for call in (
            lambda: documents.get("a"), lambda: documents.get_many(["a"]), lambda: documents.insert("b", b"{}"),
            lambda: documents.replace("a", b"{}", cas), lambda: documents.remove("a"), documents.probe,
        ):  # fmt: skip
            begun = time.monotonic()
            with pytest.raises(DatastoreError):
                call()
            assert time.monotonic() - begun < 1.0
        if injury == "stopped":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        documents.probe()
        documents.insert("c", b"{}")
        assert documents.get("c").body == b"{}"
    finally:
        documents.close()
        server.stop()


def test_two_threads_share_the_connection_of_memcached(memcached: Memcached) -> None:
    documents = MemcachedDocuments(memcached.address, "threads", deadline=5.0)
    documents.insert("n", b"0")

    def count() -> None:
        for _ in range(100):
            while True:
                found = documents.get("n")
                try:
                    documents.replace("n", b"%d" % (int(found.body) + 1), found.cas)
                    break
                except Conflict:
                    continue

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert documents.get("n").body == b"200"
    documents.close()
