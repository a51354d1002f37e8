"""The stores that the contracts are held against."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine.memory import MemoryDatastore
from tests.services import CouchbaseServer, Memcached
from zerog.datastore.base import Datastore, Documents
from zerog.datastore.couchbase import CouchbaseDatastore
from zerog.datastore.faulty import FaultyDatastore
from zerog.datastore.memcached import MemcachedDocuments
from zerog.datastore.sqlite import SQLiteDatastore

STORES = ["sqlite", "couchbase", "faulty", "memory"]


def couchbase_store(server: CouchbaseServer, service: str, deadline: float = 5.0) -> CouchbaseDatastore:
    address = f"couchbase://127.0.0.1:{server.kv_port}"
    return CouchbaseDatastore(address, "tester", "password", server.bucket, service=service, deadline=deadline)


@pytest.fixture(scope="session")
def memcached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Memcached]:
    """A memcached, shared by the tests, which use services of their own in it."""
    server = Memcached(tmp_path_factory.mktemp("memcached")).start()
    yield server
    server.stop()


def opened(kind: str, request: pytest.FixtureRequest, folder: Path) -> Datastore:
    """Return an empty store: a file, a service in the shared test server, one that may fail, or that of the state
    machine."""
    if kind == "memory":
        return MemoryDatastore()
    if kind == "sqlite":
        return SQLiteDatastore(folder / "zerog.db", "test", deadline=3.0)
    if kind == "faulty":
        return FaultyDatastore(SQLiteDatastore(folder / "zerog.db", "test", deadline=3.0), folder / "faults")
    return couchbase_store(request.getfixturevalue("couchbase"), f"t{secrets.token_hex(6)}")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Datastore]:
    """An empty datastore."""
    made = opened(request.param, request, tmp_path)
    yield made
    made.close()


@pytest.fixture(params=[*STORES, "memcached"])
def documents(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Documents]:
    """An empty store of documents: every datastore is one too."""
    made: Documents
    if request.param == "memcached":
        server = request.getfixturevalue("memcached")
        made = MemcachedDocuments(server.address, f"t{secrets.token_hex(6)}", deadline=1.0)
    else:
        made = opened(request.param, request, tmp_path)
    yield made
    made.close()
