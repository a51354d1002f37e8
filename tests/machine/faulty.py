"""A store and a queue of which some calls go wrong: refused, in doubt, too late, in the middle of a death.

Faults are drawn ahead: ``Faults.arm`` says that the n-th next call of a kind is struck.  What a struck call may do is
what the contracts allow: inside a block that shares one commit a call fails as a whole, and only the commit is in doubt.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TypeVar

from tests.machine.memory import MemoryDatastore, MemoryQueue
from zerog.datastore.base import Datastore, Document, Entry
from zerog.exceptions import DatastoreError, QueueError, QueueUnavailable, StoreAmbiguous, StoreUnavailable
from zerog.queue.base import Pending, Put, Queue, Reservation, TubeStats

T = TypeVar("T")


class Blow(enum.Enum):
    """What happens to a call that is struck."""

    REFUSED = enum.auto()  # it did not happen, and says so
    NOT_APPLIED = enum.auto()  # it did not happen, and nobody knows
    APPLIED = enum.auto()  # it happened, and nobody knows
    TOUCHED = enum.auto()  # another writer is faster: the document's version changes, its content does not
    MEANWHILE = enum.auto()  # another process does something first
    KILLED_BEFORE = enum.auto()  # the calling process is killed
    KILLED_AFTER = enum.auto()


#: Kinds of calls, by which faults find them.
READ, INSERT, REPLACE, APPEND, OTHER, COMMIT = "read", "insert", "replace", "append", "other", "commit"
PUT, ASK, ENTRY, STATS = "put", "ask", "entry", "stats"
KINDS = (READ, INSERT, REPLACE, APPEND, OTHER, COMMIT, PUT, ASK, ENTRY, STATS)


class Killed(BaseException):
    """The calling process ends here, as by SIGKILL: nobody may catch this but the world."""


@dataclass(slots=True)
class _Armed:
    kind: str
    calls: int
    blow: Blow
    times: int


class Faults:
    """The faults that are to come.  ``meanwhile`` lets another process do something in the middle of a call."""

    def __init__(self) -> None:
        self._armed: list[_Armed] = []
        self._busy = False
        #: Whether the store is in the middle of a transaction: then nobody else can do anything with it.
        self.in_block = False
        self.struck: list[tuple[str, Blow]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def arm(self, kind: str, nth: int, blow: Blow, times: int = 1) -> None:
        """Let the ``nth`` next call of a kind, and those after it up to ``times``, be struck."""
        self._armed.append(_Armed(kind, nth, blow, times))

    def disarm(self) -> None:
        """Let everything go well from now on."""
        self._armed.clear()

    def next(self, kind: str) -> Blow | None:
        """Count a call and return what strikes it."""
        if self._busy:
            return None
        struck = None
        for armed in [armed for armed in self._armed if armed.kind == kind]:
            armed.calls -= 1
            if armed.calls <= 0 and struck is None:
                struck = armed.blow
                armed.times -= 1
                if armed.times == 0:
                    self._armed.remove(armed)
        if struck is not None:
            self.struck.append((kind, struck))
        return struck

    def interlude(self) -> None:
        """Let another process do something, undisturbed."""
        if self.in_block:
            return
        self._busy = True
        try:
            self.meanwhile()
        finally:
            self._busy = False


class FaultyDatastore(Datastore):
    """The calls of a ``MemoryDatastore``, some of them struck."""

    def __init__(self, inner: MemoryDatastore, faults: Faults) -> None:
        self.inner = inner
        self.shares_commits = inner.shares_commits
        self._faults = faults

    @property
    def _in_block(self) -> bool:
        return self._faults.in_block

    def _call(self, kind: str, call: Callable[[], T], key: str | None = None) -> T:
        blow = self._faults.next(kind)
        match blow:
            case None:
                return call()
            case Blow.KILLED_BEFORE:
                raise Killed
            case Blow.KILLED_AFTER:
                call()
                raise Killed
            case Blow.MEANWHILE:
                self._faults.interlude()
                return call()
            case Blow.TOUCHED:
                self._touch(key)
                return call()
            case Blow.APPLIED | Blow.NOT_APPLIED if kind != READ and not self._in_block:
                if blow is Blow.APPLIED:
                    with suppress(DatastoreError):
                        call()
                raise StoreAmbiguous(f"{kind}: no answer")
        raise StoreUnavailable(f"{kind}: refused")

    def _touch(self, key: str | None) -> None:
        if key is None or self._in_block:
            return
        with suppress(DatastoreError):
            document = self.inner.get(key)
            self.inner.replace(key, document.body, document.cas)

    # Documents

    def get(self, key: str) -> Document:
        return self._call(READ, lambda: self.inner.get(key))

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        return self._call(READ, lambda: self.inner.get_many(keys))

    def insert(self, key: str, body: bytes) -> int:
        return self._call(INSERT, lambda: self.inner.insert(key, body))

    def replace(self, key: str, body: bytes, cas: int) -> int:
        return self._call(REPLACE, lambda: self.inner.replace(key, body, cas), key)

    def remove(self, key: str, cas: int | None = None) -> None:
        self._call(OTHER, lambda: self.inner.remove(key, cas))

    def insert_all(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        if not self.shares_commits:
            return super().insert_all(documents)
        with self.together():
            return self._call(INSERT, lambda: self.inner.insert_all(documents))

    # Commits

    def together(self) -> AbstractContextManager[None]:
        return self._block() if self.shares_commits and not self._in_block else nullcontext()

    @contextmanager
    def _block(self) -> Iterator[None]:
        self._faults.in_block = True
        self.inner.begin()
        try:
            yield
        except BaseException:
            self._faults.in_block = False
            self.inner.end(keep=False)
            raise
        self._faults.in_block = False
        self._commit(self._faults.next(COMMIT))

    def _commit(self, blow: Blow | None) -> None:
        self.inner.end(keep=blow not in (Blow.REFUSED, Blow.NOT_APPLIED, Blow.KILLED_BEFORE))
        if blow is Blow.REFUSED:
            raise StoreUnavailable("the commit was refused")
        if blow in (Blow.APPLIED, Blow.NOT_APPLIED):
            raise StoreAmbiguous("the commit has no answer")
        if blow in (Blow.KILLED_BEFORE, Blow.KILLED_AFTER):
            raise Killed

    # Logs

    def append(self, log: str, body: bytes) -> int:
        return self._call(APPEND, lambda: self.inner.append(log, body))

    def append_all(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        if not self.shares_commits:
            return super().append_all(entries)
        with self.together():
            return self._call(APPEND, lambda: self.inner.append_all(entries))

    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        return self._call(READ, lambda: self.inner.read(log, after, before, limit))

    def amend(self, log: str, number: int, body: bytes | None) -> None:
        self._call(OTHER, lambda: self.inner.amend(log, number, body))

    def trim(self, log: str, upto: int) -> None:
        self._call(OTHER, lambda: self.inner.trim(log, upto))

    def remove_log(self, log: str) -> None:
        self._call(OTHER, lambda: self.inner.remove_log(log))

    # Blobs

    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        self._call(OTHER, lambda: self.inner.put_chunk(blob, index, data))

    def get_chunk(self, blob: str, index: int) -> bytes:
        return self._call(READ, lambda: self.inner.get_chunk(blob, index))

    def remove_blob(self, blob: str) -> None:
        self._call(OTHER, lambda: self.inner.remove_blob(blob))

    def probe(self) -> None:
        self._call(READ, self.inner.probe)

    def close(self) -> None:
        return


class FaultyQueue(Queue):
    """The calls of a ``MemoryQueue``, some of them struck; after one the connection has lost what it held."""

    def __init__(self, inner: MemoryQueue, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def struck(self, kind: str, call: Callable[[], T]) -> T:
        """Make a call of this connection, unless it is struck."""
        blow = self._faults.next(kind)
        match blow:
            case None | Blow.TOUCHED:
                return call()
            case Blow.MEANWHILE:
                self._faults.interlude()
                return call()
            case Blow.KILLED_BEFORE:
                raise Killed
            case Blow.APPLIED | Blow.KILLED_AFTER:
                with suppress(QueueError):
                    call()
        if blow is Blow.KILLED_AFTER:
            raise Killed
        self._inner.close()
        raise QueueUnavailable(f"{kind}: no answer")

    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        try:
            return self.struck(PUT, lambda: self._inner.put_all(puts))
        except QueueUnavailable as error:
            return [error] * len(puts)

    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        inner = done.inner if isinstance(done, FaultyReservation) else None
        self.struck(ASK, lambda: self._inner.ask(tubes, inner, wait))

    def take(self) -> Reservation | Pending | None:
        answer = self.struck(ASK, self._inner.take)
        return FaultyReservation(answer.body, answer, self) if isinstance(answer, Reservation) else answer

    def withdraw(self) -> None:
        self._inner.withdraw()

    def kick(self, tube: str, count: int) -> int:
        return self.struck(ENTRY, lambda: self._inner.kick(tube, count))

    def stats(self, tube: str) -> TubeStats:
        return self.struck(STATS, lambda: self._inner.stats(tube))

    def peek(self, tube: str) -> bytes | None:
        return self.struck(STATS, lambda: self._inner.peek(tube))

    def identity(self) -> str:
        return self.struck(STATS, self._inner.identity)

    def another(self) -> FaultyQueue:
        return FaultyQueue(self._inner.another(), self._faults)

    def close(self) -> None:
        self._inner.close()

    def fileno(self) -> int:
        return self._inner.fileno()

    def look_within(self) -> float:
        return self._inner.look_within()


@dataclass(frozen=True, slots=True)
class FaultyReservation(Reservation):
    """An entry held by a ``FaultyQueue``."""

    body: bytes
    inner: Reservation
    _queue: FaultyQueue

    def touch(self) -> None:
        self._queue.struck(ENTRY, self.inner.touch)

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        self._queue.struck(ENTRY, lambda: self.inner.release(delay, priority))

    def bury(self) -> None:
        self._queue.struck(ENTRY, self.inner.bury)

    def delete(self) -> None:
        self._queue.struck(ENTRY, self.inner.delete)

    def where(self) -> tuple[str, int]:
        return self._queue.struck(ENTRY, self.inner.where)
