"""Documents of an application over every store: compare-and-set, and writes that may have been made before."""

from __future__ import annotations

import pytest

from zerog.datastore.base import Datastore
from zerog.documents import OwnDocuments
from zerog.exceptions import AlreadyExists, Conflict, NotFound, StoreAmbiguous

pytestmark = pytest.mark.requirement("S3", "S18")


def test_a_document_is_changed_by_who_has_seen_it(store: Datastore) -> None:
    documents = OwnDocuments(store, "workers.processing")
    first = documents.insert("a", {"x": [1, None, "é"]})
    assert documents.get("a") == ({"x": [1, None, "é"]}, first)
    with pytest.raises(AlreadyExists):
        documents.insert("a", 2)
    second = documents.replace("a", None, first)
    with pytest.raises(Conflict):
        documents.replace("a", 3, first)
    with pytest.raises(Conflict):
        documents.remove("a", first)
    assert documents.get("a") == (None, second)
    documents.remove("a", second)
    for call in (lambda: documents.get("a"), lambda: documents.remove("a"), lambda: documents.replace("a", 1, second)):
        with pytest.raises(NotFound):
            call()


def test_an_application_sees_its_own_alone(store: Datastore) -> None:
    OwnDocuments(store, "one").insert("a", 1)
    with pytest.raises(NotFound):
        OwnDocuments(store, "other").get("a")


def test_a_write_that_was_made_before_is_not_made_again(store: Datastore) -> None:
    documents = OwnDocuments(store, "one")
    first = documents.insert("a", 1, "w1")
    assert documents.insert("a", 1, "w1") == first
    second = documents.replace("a", 2, first, "w2")
    assert documents.replace("a", 2, first, "w2") == second
    documents.replace("a", 3, second)
    with pytest.raises(Conflict):
        documents.replace("a", 2, first, "w2")


class Doubtful:
    """A store that does what it is told and says that it does not know."""

    def __init__(self, store: Datastore) -> None:
        self._store = store

    def get(self, key: str) -> object:
        return self._store.get(key)

    def insert(self, key: str, body: bytes) -> int:
        self._store.insert(key, body)
        raise StoreAmbiguous(key)

    def replace(self, key: str, body: bytes, cas: int) -> int:
        self._store.replace(key, body, cas)
        raise StoreAmbiguous(key)

    def remove(self, key: str, cas: int | None = None) -> None:
        self._store.remove(key, cas)
        raise StoreAmbiguous(key)


def test_what_is_in_doubt_is_read_again(store: Datastore) -> None:
    documents = OwnDocuments(Doubtful(store), "one")  # type: ignore[arg-type]
    first = documents.insert("a", 1)
    assert documents.get("a") == (1, first)
    second = documents.replace("a", 2, first)
    assert documents.get("a") == (2, second)
    documents.remove("a", second)
    with pytest.raises(NotFound):
        documents.get("a")


@pytest.mark.parametrize("key", ["", "a/b", "a b", "é", "x" * 101])
def test_what_is_no_key_is_refused(store: Datastore, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        OwnDocuments(store, "one").insert(key, 1)


@pytest.mark.parametrize("value", [float("nan"), object(), "x" * 600_000])
def test_what_is_no_document_is_refused_and_leaves_nothing(store: Datastore, value: object) -> None:
    documents = OwnDocuments(store, "one")
    with pytest.raises((ValueError, TypeError)):
        documents.insert("a", value)
    with pytest.raises(NotFound):
        documents.get("a")
