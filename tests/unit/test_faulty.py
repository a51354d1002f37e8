"""The datastore that fails on request does fail, in every way that ``zerog chaos`` counts on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from zerog.datastore.faulty import Faults, FaultyDatastore
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.exceptions import Conflict, NotFound, StoreAmbiguous, StoreUnavailable

pytestmark = pytest.mark.requirement("Z12")


class Site:
    """A store that fails, the same store without faults, and the file that tells what is to fail."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "faults"
        self.whole = SQLiteDatastore(folder / "zerog.db")

    def failing(self, rate: float = 0.0, conflicts: float = 0.0, away: bool = False) -> FaultyDatastore:
        Faults(rate, conflicts, away).write(self.path)
        return FaultyDatastore(self.whole, self.path)

    def log(self) -> list[str]:
        return Path(f"{self.path}.log").read_text().split()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.whole.close()


def test_of_the_writes_in_doubt_some_have_happened_and_some_have_not(site: Site) -> None:
    store = site.failing(rate=1)
    happened = 0
    for number in range(20):
        with pytest.raises(StoreAmbiguous):
            store.insert(f"key:{number}", b"{}")
        happened += len(site.whole.get_many([f"key:{number}"]))
    assert 0 < happened < 20
    assert site.log() == ["insert"] * 20


def test_a_block_in_doubt_happened_whole_or_not_at_all(site: Site) -> None:
    store = site.failing(rate=1)
    found = []
    for number in range(20):
        with pytest.raises(StoreAmbiguous):
            with store.together():
                store.insert(f"a:{number}", b"{}")
                store.insert(f"b:{number}", b"{}")
        found.append(len(site.whole.get_many([f"a:{number}", f"b:{number}"])))
    assert set(found) == {0, 2}


def test_a_store_that_is_away_does_nothing(site: Site) -> None:
    store = site.failing(away=True)
    with pytest.raises(StoreUnavailable):
        store.insert("key", b"{}")
    with pytest.raises(StoreUnavailable):
        store.get("key")
    with pytest.raises(NotFound):
        site.whole.get("key")


def test_before_a_write_another_writer_may_have_come(site: Site) -> None:
    store = site.failing(conflicts=1)
    cas = site.whole.insert("key", b'{"a":1}')
    with pytest.raises(Conflict):
        store.replace("key", b'{"a":2}', cas)
    document = site.whole.get("key")
    assert (document.body, document.cas) == (b'{"a":1}', cas + 1), "it wrote what was there, and nothing else"
