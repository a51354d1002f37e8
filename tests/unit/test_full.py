"""A store without room: it says so, nothing is half done, and it goes on when there is room again."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services import wait_until
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import NotFound, StoreFull


def fill(store: SQLiteDatastore) -> None:
    """Let the file grow no more, and use up what it has."""
    store._connection.execute("PRAGMA max_page_count = 1")  # the least that is possible is what it has
    with pytest.raises(StoreFull) as refused:
        for number in range(1000):
            store.insert(f"filler:{number}", b"x" * 4000)
    assert (refused.value.status, refused.value.code) == (507, "store_full")


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_store_refuses_and_keeps_what_it_has(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    store.insert("kept", b"{}")
    fill(store)
    with pytest.raises(StoreFull):
        with store.together():
            store.append("jobs", b"{}")
            store.insert("half", b"x" * 8000)
    assert store.get("kept").body == b"{}"
    with pytest.raises(NotFound):
        store.get("half")
    assert store.read("jobs", after=0) == [], "what shares a commit happens all or not at all"
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.insert("half", b"x" * 8000)
    assert store.append("jobs", b"{}") == 1
    store.close()


def test_a_full_store_can_be_emptied(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    for number in range(5):
        store.insert(f"early:{number}", b"x" * 4000)
    fill(store)
    for number in range(5):
        store.remove(f"early:{number}")
    wait_until(lambda: store.insert("again", b"x" * 4000), 5, "the freed pages are used again")
    store.close()


def test_a_full_store_is_read_by_who_comes_now(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    store.insert("kept", b"{}")
    size = (tmp_path / "zerog.db").stat().st_size
    with limited(size):
        other = SQLiteDatastore(tmp_path / "zerog.db")
        assert other.get("kept").body == b"{}"
        other.close()
    store.close()


def test_a_file_that_may_not_grow_is_a_full_store(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    store.insert("kept", b"{}")
    with limited((tmp_path / "zerog.db-wal").stat().st_size + 4096):
        with pytest.raises(StoreFull):
            store.insert("large", b"x" * 100_000)
        with pytest.raises(StoreFull):
            with store.together():
                store.insert("large", b"x" * 100_000)
        assert store.get("kept").body == b"{}"
    store.insert("large", b"x" * 100_000)
    store.close()
