"""A datastore and a queue in memory that keep the whole of their contracts, and tell what they have written.

The contract suites hold them to it, as they do the real adapters.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from zerog.clock import Clock
from zerog.datastore.base import Datastore, Document, Entry
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    NotFound,
    QueueError,
    ReservationLost,
    StoreUnavailable,
)
from zerog.queue.base import PENDING, Pending, Put, Queue, Reservation, TubeStats


@dataclass(slots=True)
class _Log:
    last: int = 0
    entries: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class _Content:
    documents: dict[str, Document] = field(default_factory=dict)
    logs: dict[str, _Log] = field(default_factory=dict)
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def copy(self) -> _Content:
        logs = {name: _Log(log.last, dict(log.entries)) for name, log in self.logs.items()}
        return _Content(dict(self.documents), logs, dict(self.chunks))


@dataclass(frozen=True, slots=True)
class Change:
    """One committed write of a document: its bodies before and after, ``None`` for none, and the ``context`` then."""

    key: str
    before: bytes | None
    after: bytes | None
    context: Any


class MemoryDatastore(Datastore):
    """Documents, logs and blobs in memory.

    ``shares_commits`` says whether ``together`` makes one commit, as in SQLite, or none, as in Couchbase.  ``written``
    hears of each change of a document once it is committed; ``context`` is what the changes made now carry.
    """

    def __init__(self, shares_commits: bool = True, written: Callable[[Change], None] = lambda change: None) -> None:
        self.shares_commits = shares_commits
        self.context: Any = None
        self._written = written
        self._lock = threading.RLock()
        self._content = _Content()
        self._saved: _Content | None = None
        self._changes: list[Change] = []
        self._cas = itertools.count(1)
        self._closed = False

    # Documents

    def get(self, key: str) -> Document:
        with self._open():
            document = self._content.documents.get(key)
        if document is None:
            raise NotFound(key)
        return document

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        with self._open():
            found = {key: self._content.documents.get(key) for key in keys}
        return {key: document for key, document in found.items() if document is not None}

    def insert(self, key: str, body: bytes) -> int:
        with self._open():
            if key in self._content.documents:
                raise AlreadyExists(key)
            return self._write(key, None, body)

    def replace(self, key: str, body: bytes, cas: int) -> int:
        with self._open():
            before = self.get(key)
            if before.cas != cas:
                raise Conflict(key)
            return self._write(key, before.body, body)

    def remove(self, key: str, cas: int | None = None) -> None:
        with self._open():
            before = self.get(key)
            if cas not in (None, before.cas):
                raise Conflict(key)
            del self._content.documents[key]
            self._tell(Change(key, before.body, None, self.context))

    def _write(self, key: str, before: bytes | None, after: bytes) -> int:
        cas = next(self._cas)
        self._content.documents[key] = Document(after, cas)
        self._tell(Change(key, before, after, self.context))
        return cas

    def _tell(self, change: Change) -> None:
        if self._saved is None:
            self._written(change)
        else:
            self._changes.append(change)

    # Commits

    @contextmanager
    def _open(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the datastore is closed")
            yield

    def together(self) -> AbstractContextManager[None]:
        return self._block() if self.shares_commits and self._saved is None else nullcontext()

    @contextmanager
    def _block(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        except BaseException:
            self.end(keep=False)
            raise
        self.end(keep=True)

    def begin(self) -> None:
        """Begin a block that is kept or undone as a whole."""
        self._lock.acquire()
        self._saved = self._content.copy()

    def end(self, keep: bool) -> None:
        """End the block."""
        assert self._saved is not None
        if not keep:
            self._content = self._saved
            self._changes.clear()
        self._saved = None
        changes, self._changes = self._changes, []
        self._lock.release()
        for change in changes:
            self._written(change)

    # Logs

    def append(self, log: str, body: bytes) -> int:
        with self._open():
            kept = self._content.logs.setdefault(log, _Log())
            kept.last += 1
            kept.entries[kept.last] = body
            return kept.last

    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        with self._open():
            entries = [Entry(number, body) for number, body in self._entries(log).items()]
        if after is not None:
            return [entry for entry in entries if entry.number > after][:limit]
        return [entry for entry in reversed(entries) if before is None or entry.number < before][:limit]

    def amend(self, log: str, number: int, body: bytes | None) -> None:
        with self._open():
            entries = self._entries(log)
            if number in entries and body is not None:
                entries[number] = body
            elif body is None:
                entries.pop(number, None)

    def trim(self, log: str, upto: int) -> None:
        with self._open():
            entries = self._entries(log)
            for number in [number for number in entries if number <= upto]:
                del entries[number]

    def remove_log(self, log: str) -> None:
        with self._open():
            self._content.logs.pop(log, None)

    def _entries(self, log: str) -> dict[int, bytes]:
        return self._content.logs[log].entries if log in self._content.logs else {}

    # Blobs

    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        with self._open():
            self._content.chunks[blob, index] = data

    def get_chunk(self, blob: str, index: int) -> bytes:
        with self._open():
            if (blob, index) not in self._content.chunks:
                raise NotFound(f"chunk {index} of {blob}")
            return self._content.chunks[blob, index]

    def remove_blob(self, blob: str) -> None:
        with self._open():
            for name in [name for name in self._content.chunks if name[0] == blob]:
                del self._content.chunks[name]

    def probe(self) -> None:
        with self._open():
            return

    def close(self) -> None:
        self._closed = True


@dataclass(slots=True)
class _Held:
    """An entry of a tube; ``due`` is when it becomes ready by itself, ``holder`` the reservation that it is in."""

    put: Put
    priority: int
    state: str = "ready"
    due: float | None = None
    holder: int | None = None


class MemoryBroker:
    """The queue itself, to which connections are made.  ``clock`` measures delays and TTRs by its monotonic time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.lock = threading.RLock()
        self.entries: dict[int, _Held] = {}
        self.identity = 1
        self.numbers = itertools.count(1)
        self.waiting: list[MemoryQueue] = []

    def connect(self) -> MemoryQueue:
        """Return a new connection."""
        return MemoryQueue(self)

    def put(self, put: Put) -> None:
        """Add an entry."""
        with self.lock:
            entry = _Held(put, put.priority)
            self.entries[next(self.numbers)] = entry
            if put.delay > 0:
                entry.state, entry.due = "delayed", self.clock.monotonic() + put.delay
        self.notify()

    def notify(self) -> None:
        """Wake the connections that wait."""
        for queue in self.waiting:
            queue.wake()

    def ripen(self) -> None:
        """Make ready what is due, the promises that were not kept included."""
        now = self.clock.monotonic()
        for entry in self.entries.values():
            if entry.due is not None and entry.due <= now:
                entry.state, entry.due, entry.holder = "ready", None, None

    def wipe(self, forget_identity: bool) -> None:
        """Forget all entries, as a restart without a binlog does; then the identity changes."""
        self.entries.clear()
        self.identity += forget_identity

    def lose(self, place: int) -> None:
        """Forget one entry."""
        if self.entries:
            del self.entries[list(self.entries)[place % len(self.entries)]]

    def double(self, place: int) -> None:
        """Have one entry twice; the other one is ready."""
        if self.entries:
            entry = copy.copy(list(self.entries.values())[place % len(self.entries)])
            entry.state, entry.due, entry.holder = "ready", None, None
            self.entries[next(self.numbers)] = entry


class MemoryQueue(Queue):
    """One connection to a ``MemoryBroker``."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._holds: set[int] = set()
        self._tubes: tuple[str, ...] | None = None
        self._answer: Reservation | None = None
        self._descriptor: int | None = None

    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        for put in puts:
            self._broker.put(put)
        return [None] * len(puts)

    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        if done is not None:
            with suppress(ReservationLost):
                done.delete()
        if wait:
            self._tubes = tuple(tubes)
        else:
            self._answer = self._reserve(tubes)

    def take(self) -> Reservation | Pending | None:
        if self._tubes is None:
            answer, self._answer = self._answer, None
            return answer
        if self._descriptor is not None:
            with suppress(BlockingIOError):
                os.eventfd_read(self._descriptor)
        found = self._reserve(self._tubes)
        if found is None:
            return PENDING
        self._tubes = None
        return found

    def _reserve(self, tubes: Sequence[str]) -> MemoryReservation | None:
        with self._broker.lock:
            self._broker.ripen()
            ready = [
                (entry.priority, number)
                for number, entry in self._broker.entries.items()
                if entry.state == "ready" and entry.put.tube in tubes
            ]
            if not ready:
                return None
            _, number = min(ready)
            entry, holder = self._broker.entries[number], next(self._broker.numbers)
            entry.state, entry.holder = "reserved", holder
            entry.due = self._broker.clock.monotonic() + entry.put.ttr
        self._holds.add(holder)
        return MemoryReservation(entry.put.body, self._broker, number, holder)

    def withdraw(self) -> None:
        self._tubes = None
        answer, self._answer = self._answer, None
        if answer is not None:
            with suppress(ReservationLost):
                answer.release()

    def kick(self, tube: str, count: int) -> int:
        with self._broker.lock:
            entries = [entry for entry in self._broker.entries.values() if entry.put.tube == tube]
            buried = [entry for entry in entries if entry.state == "buried"]
            kicked = (buried or [entry for entry in entries if entry.state == "delayed"])[:count]
            for entry in kicked:
                entry.state, entry.due = "ready", None
        self._broker.notify()
        return len(kicked)

    def stats(self, tube: str) -> TubeStats:
        with self._broker.lock:
            self._broker.ripen()
            states = [entry.state for entry in self._broker.entries.values() if entry.put.tube == tube]
        return TubeStats(*(states.count(state) for state in ("ready", "reserved", "delayed", "buried")))

    def peek(self, tube: str) -> bytes | None:
        with self._broker.lock:
            self._broker.ripen()
            ready = [one for one in self._broker.entries.items() if one[1].state == "ready" and one[1].put.tube == tube]
        return min(ready, key=lambda one: (one[1].put.priority, one[0]))[1].put.body if ready else None

    def identity(self) -> str:
        return str(self._broker.identity)

    def another(self) -> MemoryQueue:
        return self._broker.connect()

    def close(self) -> None:
        self._tubes = self._answer = None
        with self._broker.lock:
            for entry in self._broker.entries.values():
                if entry.holder in self._holds:
                    entry.state, entry.due, entry.holder = "ready", None, None
        self._holds.clear()
        if self._descriptor is not None:
            self._broker.waiting.remove(self)
            os.close(self._descriptor)
            self._descriptor = None
        self._broker.notify()

    # Waiting

    def fileno(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._broker.waiting.append(self)
        return self._descriptor

    def wake(self) -> None:
        """Make the descriptor readable."""
        if self._descriptor is not None:
            os.eventfd_write(self._descriptor, 1)

    def look_within(self) -> float:
        with self._broker.lock:
            dues = [entry.due for entry in self._broker.entries.values() if entry.due is not None]
        return max(0.0, min(dues, default=float("inf")) - self._broker.clock.monotonic()) if dues else 1.0


@dataclass(frozen=True, slots=True)
class MemoryReservation(Reservation):
    """An entry held by a connection to a ``MemoryBroker``."""

    body: bytes
    _broker: MemoryBroker
    _number: int
    _holder: int

    def touch(self) -> None:
        entry = self._entry()
        entry.due = self._broker.clock.monotonic() + entry.put.ttr

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        entry = self._entry()
        if priority is not None:
            entry.priority = priority
        entry.holder = None
        entry.state = "delayed" if delay > 0 else "ready"
        entry.due = self._broker.clock.monotonic() + delay if delay > 0 else None
        self._broker.notify()

    def bury(self) -> None:
        entry = self._entry()
        entry.state, entry.due, entry.holder = "buried", None, None

    def delete(self) -> None:
        self._entry()
        del self._broker.entries[self._number]

    def where(self) -> tuple[str, int]:
        entry = self._entry()
        return entry.put.tube, entry.priority

    def _entry(self) -> _Held:
        with self._broker.lock:
            self._broker.ripen()
            entry = self._broker.entries.get(self._number)
            if entry is None or entry.holder != self._holder:
                raise ReservationLost(f"entry {self._number}")
            return entry
