"""A datastore that fails as it is told, around one that does not: for ``zerog chaos`` and for tests.

``ZEROG_STORE_FAULTS`` names a file that holds what is to happen now, as JSON, looked at again twenty times a second::

    {"rate": 0.05, "conflicts": 0.05, "away": false}

``rate`` is the share of calls that fail: a write is done or not and then ``StoreAmbiguous`` is raised, a read raises
``StoreUnavailable``.  Before the share ``conflicts`` of all ``replace`` calls another writer touches the document.
While ``away`` every call raises ``StoreUnavailable``.  Without the file nothing happens.  Each failure adds one line,
the name of the call, to the file of the same name with ``.log`` behind it.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from zerog import codec
from zerog.datastore.base import Datastore, Document, Entry
from zerog.exceptions import DatastoreError, StoreAmbiguous, StoreUnavailable

T = TypeVar("T")

VARIABLE = "ZEROG_STORE_FAULTS"

#: Seconds between two looks at the file, and for which a failing call keeps its caller waiting at most.
_LOOK, _WAIT = 0.05, 0.05


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens now: shares from 0 to 1."""

    rate: float = 0.0
    conflicts: float = 0.0
    away: bool = False

    def write(self, path: Path) -> None:
        """Let every store that looks at this file fail so."""
        text = codec.dumps({"rate": self.rate, "conflicts": self.conflicts, "away": self.away})
        fresh = path.with_suffix(".new")
        fresh.write_bytes(text)
        fresh.replace(path)


class _Undo(Exception):
    """Ends a block so that the store undoes it."""


class FaultyDatastore(Datastore):
    """``store`` with the faults that the file ``path`` asks for."""

    def __init__(self, store: Datastore, path: Path) -> None:
        self.shares_commits = store.shares_commits
        self._store = store
        self._path = path
        self._faults = Faults()
        self._look_at = 0.0
        self._local = threading.local()

    # Failing

    def _now(self) -> Faults:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK
            with suppress(FileNotFoundError):
                self._faults = Faults(**codec.loads(self._path.read_bytes()))
        return self._faults

    def _note(self, call: str) -> None:
        descriptor = os.open(f"{self._path}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{call}\n".encode())
        finally:
            os.close(descriptor)

    def _fails(self, call: str) -> bool:
        """Return whether a call fails now, having waited as for an answer; raises while the store is away."""
        faults = self._now()
        if not faults.away and random.random() >= faults.rate:
            return False
        self._note(call)
        time.sleep(random.uniform(0, _WAIT))
        if faults.away:
            raise StoreUnavailable(f"{call}: the store was told to be away")
        return True

    def _read(self, call: str, read: Callable[[], T]) -> T:
        if self._fails(call):
            raise StoreUnavailable(f"{call}: was told to fail")
        return read()

    def _write(self, call: str, write: Callable[[], T]) -> T:
        # What is written in a block that shares a commit is in doubt at its end and not before.
        if not self._in_together and self._fails(call):
            if random.random() < 0.5:
                write()
            raise StoreAmbiguous(f"{call}: was told to leave it open")
        return write()

    @property
    def _in_together(self) -> bool:
        return getattr(self._local, "together", False)

    def together(self) -> AbstractContextManager[None]:
        return self._together() if self.shares_commits and not self._in_together else self._store.together()

    @contextmanager
    def _together(self) -> Iterator[None]:
        doubtful = self._fails("together")
        undone = doubtful and random.random() < 0.5
        with suppress(_Undo), self._store.together():
            self._local.together = True
            try:
                yield
            finally:
                self._local.together = False
            if undone:
                raise _Undo
        if doubtful:
            raise StoreAmbiguous("together: was told to leave it open")

    # Documents

    def get(self, key: str) -> Document:
        return self._read("get", lambda: self._store.get(key))

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        return self._read("get_many", lambda: self._store.get_many(keys))

    def insert(self, key: str, body: bytes) -> int:
        return self._write("insert", lambda: self._store.insert(key, body))

    def insert_all(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        if self.shares_commits:
            return self._write("insert_all", lambda: self._store.insert_all(documents))
        return super().insert_all(documents)  # each of them is in doubt alone

    def replace(self, key: str, body: bytes, cas: int) -> int:
        if random.random() < self._now().conflicts:
            self._touch(key)
        return self._write("replace", lambda: self._store.replace(key, body, cas))

    def _touch(self, key: str) -> None:
        """Be the other writer that was a moment faster."""
        with suppress(DatastoreError):
            document = self._store.get(key)
            self._store.replace(key, document.body, document.cas)
            self._note("conflict")

    def remove(self, key: str, cas: int | None = None) -> None:
        self._write("remove", lambda: self._store.remove(key, cas))

    # Logs

    def append(self, log: str, body: bytes) -> int:
        return self._write("append", lambda: self._store.append(log, body))

    def append_all(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        if self.shares_commits:
            return self._write("append_all", lambda: self._store.append_all(entries))
        return super().append_all(entries)

    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        return self._read("read", lambda: self._store.read(log, after, before, limit))

    def amend(self, log: str, number: int, body: bytes | None) -> None:
        self._write("amend", lambda: self._store.amend(log, number, body))

    def trim(self, log: str, upto: int) -> None:
        self._write("trim", lambda: self._store.trim(log, upto))

    def remove_log(self, log: str) -> None:
        self._write("remove_log", lambda: self._store.remove_log(log))

    # Blobs

    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        self._write("put_chunk", lambda: self._store.put_chunk(blob, index, data))

    def get_chunk(self, blob: str, index: int) -> bytes:
        return self._read("get_chunk", lambda: self._store.get_chunk(blob, index))

    def remove_blob(self, blob: str) -> None:
        self._write("remove_blob", lambda: self._store.remove_blob(blob))

    # The whole

    def probe(self) -> None:
        self._read("probe", self._store.probe)

    def close(self) -> None:
        self._store.close()

    def give_back_space(self) -> None:
        self._write("give_back_space", self._store.give_back_space)

    def warnings(self) -> Iterable[str]:
        return (*self._store.warnings(), f"{VARIABLE} is set: the datastore fails when it is told to")
