"""The datastore contract: documents with compare-and-set, numbered append-only logs, blobs in chunks.

Obligations of every adapter; ``tests/contract/test_datastore.py`` holds each of them to it.

* **Acknowledged means kept** (A1): when a call returns, what it wrote survives the end of this process and, as far as
  the store's settings promise it, of its machine.  Inside ``together`` nothing counts as done before the block ends.
* **Compare-and-set is linearizable** (A2): of several ``replace`` calls with the same ``cas`` exactly one succeeds, the
  others raise ``Conflict``.  A ``cas`` is never used again for other content of the same key.
* **Every call has a deadline**, a number of seconds given at construction.  After it ``StoreUnavailable`` says that
  nothing happened, ``StoreAmbiguous`` that it is unknown: read again before deciding, never blindly repeat.
* **No foreign exception leaves an adapter.**  Everything else that goes wrong is a ``DatastoreError``.
* **Outages end by themselves**: once the store answers again, so does the adapter, without being made anew.
* **Logs**: numbers start at 1 and grow by one for each ``append``; they are never used again, also after ``trim``.  A
  number can be missing for a reader; it is then never filled afterwards.
* **Threads**: one object may be used by many threads.  ``together`` belongs to the thread that entered it.

Values are bytes: JSON objects for documents and log entries, anything for chunks.  Keys are at most 200 characters of
``[A-Za-z0-9._:-]``; an adapter puts the service's prefix before them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    DatastoreError,
    NotFound,
    StoreAmbiguous,
    StoreUnavailable,
)

#: How often a document that others change too is tried.
_TRIES = 50


@dataclass(frozen=True, slots=True)
class Document:
    """A stored document as it was when read; ``cas`` names this very version."""

    body: bytes
    cas: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a log."""

    number: int
    body: bytes


class Documents(ABC):
    """Documents with compare-and-set: all that statistics need of a store.  The module's docstring states the
    obligations."""

    @abstractmethod
    def get(self, key: str) -> Document:
        """Return a document; ``NotFound`` if there is none."""

    @abstractmethod
    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return those of the documents that exist, by key."""

    @abstractmethod
    def insert(self, key: str, body: bytes) -> int:
        """Write a new document and return its cas; ``AlreadyExists`` if there is one."""

    @abstractmethod
    def replace(self, key: str, body: bytes, cas: int) -> int:
        """Change the very version ``cas`` and return the new cas; ``Conflict`` or ``NotFound`` if it is not there."""

    @abstractmethod
    def remove(self, key: str, cas: int | None = None) -> None:
        """Remove a document; ``NotFound`` if there is none, ``Conflict`` if it is another version than ``cas``."""

    def change(self, key: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Write what ``change`` makes of a document, or of its absence: again while somebody else is faster.

        After an ambiguous answer it is read again before it is decided: ``change`` may find its work done.  When it
        returns ``None`` nothing is written.  ``StoreUnavailable`` if too many others write.
        """
        for _ in range(_TRIES):
            try:
                document: Document | None = self.get(key)
            except NotFound:
                document = None
            body = change(document.body if document is not None else None)
            if body is None:
                return
            try:
                if document is None:
                    self.insert(key, body)
                else:
                    self.replace(key, body, document.cas)
                return
            except (Conflict, AlreadyExists, NotFound, StoreAmbiguous):
                continue
        raise StoreUnavailable(f"{key}: it is being changed by too many at once")

    @abstractmethod
    def probe(self) -> None:
        """Return if the store answers now; raise ``StoreUnavailable`` otherwise."""

    @abstractmethod
    def close(self) -> None:
        """Give back all connections; other threads give back theirs at their next call or end.  May be called twice."""


class Datastore(Documents):
    """What ZeroG needs of a store.  The module's docstring states the obligations."""

    #: Whether calls inside ``together`` happen all or not at all.
    shares_commits = False

    def insert_all(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        """Insert independent documents side by side; for each key its cas, or what went wrong with it alone."""
        done: dict[str, int | DatastoreError] = {}
        for key, body in documents.items():
            try:
                done[key] = self.insert(key, body)
            except DatastoreError as error:
                done[key] = error
        return done

    def together(self) -> AbstractContextManager[None]:
        """Return a block whose writes share one commit at its end, where the store has such a thing.

        Nothing written inside counts as done before the block has ended.  When its end raises ``StoreUnavailable``
        none of it happened; ``StoreAmbiguous``: any of it may have.
        """
        return nullcontext()

    @abstractmethod
    def append(self, log: str, body: bytes) -> int:
        """Add an entry to a log and return its number."""

    def append_all(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        """Append independent ``(log, body)`` entries side by side; for each its number, or what went wrong with it."""
        done: list[int | DatastoreError] = []
        for log, body in entries:
            try:
                done.append(self.append(log, body))
            except DatastoreError as error:
                done.append(error)
        return done

    @abstractmethod
    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        """Return up to ``limit`` entries of a log.

        With ``after`` (0 reads from the start) in growing order those with greater numbers; otherwise in falling order
        those with smaller numbers than ``before``, or the newest.
        """

    @abstractmethod
    def amend(self, log: str, number: int, body: bytes | None) -> None:
        """Replace one entry of a log, or remove it with ``None``; nothing happens if it is not there."""

    @abstractmethod
    def trim(self, log: str, upto: int) -> None:
        """Remove the entries of a log with numbers up to and including ``upto``."""

    @abstractmethod
    def remove_log(self, log: str) -> None:
        """Remove a log altogether: its numbers begin anew.  Only for a log that nobody will append to or read again."""

    @abstractmethod
    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        """Write chunk ``index`` (from 0) of a blob; a chunk that exists is overwritten."""

    @abstractmethod
    def get_chunk(self, blob: str, index: int) -> bytes:
        """Return a chunk of a blob; ``NotFound`` if there is none."""

    @abstractmethod
    def remove_blob(self, blob: str) -> None:
        """Remove all chunks of a blob; nothing happens if there are none."""

    def give_back_space(self) -> None:
        """Give space that removed things took back to the system, where the store does not do that by itself."""
        return

    def warnings(self) -> Iterable[str]:
        """Return what a daemon should say at its start about how safe this store's settings are."""
        return ()
