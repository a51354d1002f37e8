"""Statistics: what all processes of all hosts have counted, together.

Each process keeps one document with everything that it has counted so far, and writes it anew when there is more: a
write that was done twice, or of which nobody knows whether it was done, changes nothing.  An index names the processes
and holds what those have counted that are gone; the counts of one move there in the very compare-and-set that takes
its name away, so that they are never there twice and never missing.

Counts are trees: dictionaries whose leaves are numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import secrets
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Document, Documents
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    CorruptDocument,
    DatastoreError,
    NotFound,
    StoreAmbiguous,
    StoreUnavailable,
)
from zerog.fleet import Presence

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

_INDEX = "statistics"
#: Seconds between two looks whether there is more to be written, and between two signs of life without it.
_FLUSH, _ALIVE = 0.5, 60.0
#: Seconds without a sign of life after which nobody goes by what a process says of now.
_STALE = 3 * _ALIVE
#: Seconds without a sign of life after which a process counts as gone, if nothing shows that it has ended; after such
#: an end, seconds until its last write must have arrived.
_SILENT, _SETTLED = 3600.0, 5.0
#: Seconds between two looks for processes that are gone.
_TIDY = 30.0
#: How often an index that others change too is tried.
_TRIES = 50
#: Upper bounds of the durations of attempts, in seconds.
BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)


@dataclass(frozen=True, slots=True)
class Totals:
    """What all processes together have counted since a time, and what those that live say of now."""

    counts: Tree
    gauges: Tree
    since: float


@dataclass(slots=True)
class _Index:
    """The document that all share: which processes there are, and what those have counted that are gone.

    ``epoch`` names this very index: a store of statistics may forget everything.
    """

    epoch: str
    since: str
    base: Tree
    processes: dict[str, Tree]
    cas: int | None = None

    def document(self) -> bytes:
        """Write it as JSON."""
        members = {"epoch": self.epoch, "since": self.since, "base": self.base, "processes": self.processes}
        return codec.dumps(members)


class Statistics:
    """What this process counts, and the thread that shares it.  Counting is safe from any thread and never waits.

    ``documents`` is where it is shared, of the kind ``kind``; without any, nothing is.  ``name`` must never have been
    used before; ``presence`` is the file that the process holds locked while it lives.
    """

    def __init__(
        self,
        documents: Documents | None,
        clock: Clock,
        name: str,
        kind: str = "datastore",
        presence: Presence | None = None,
    ) -> None:
        self.kind = kind
        self._documents = documents
        self._clock = clock
        self._name, self._generation = name, 0
        self._presence = presence
        self._lock = threading.Lock()
        self._counts: Tree = {}
        self._gauges: Tree = {}
        #: What tokens have spent in the current minute, here and, when it was shared last, in all other processes.
        self._rates: Tree = {}
        self._others: Tree = {}
        self._changed = True
        self._begun = to_iso(clock.now())
        self._share = _Share()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="statistics", daemon=True)

    # Counting

    def count_request(self, endpoint: str, status: int, seconds: float, failed: bool) -> None:
        """Count one answered request; ``failed`` says that something unexpected was raised."""
        with self._lock:
            _add(self._counts, 1, "requests", endpoint, str(status))
            _add(self._counts, seconds, "seconds", endpoint)
            if failed:
                _add(self._counts, 1, "exceptions", endpoint)
            self._changed = True

    def add(self, name: str, amount: int = 1) -> None:
        """Count something that has no labels."""
        with self._lock:
            _add(self._counts, amount, name)
            self._changed = True

    def observe(self, job_type: str, seconds: float) -> None:
        """Count one attempt that took so long."""
        with self._lock:
            _add(self._counts, 1, "attemptSeconds", job_type, "buckets", str(bisect_left(BUCKETS, seconds)))
            _add(self._counts, seconds, "attemptSeconds", job_type, "sum")
            self._changed = True

    def gauge(self, name: str, value: float) -> None:
        """Say what something is now."""
        with self._lock:
            if self._gauges.get(name) != value:
                self._gauges[name] = value
                self._changed = True

    def spend(self, token: str, minute: int) -> int:
        """Count a request of a token in a minute; returns how many all processes have counted of it, as is known."""
        with self._lock:
            if self._rates.get("minute") != minute:
                self._rates = {"minute": minute, "counts": {}}
            counts = self._rates["counts"]
            counts[token] = counts.get(token, 0) + 1
            self._changed = True
            others = self._others["counts"] if self._others.get("minute") == minute else {}
            return int(counts[token] + others.get(token, 0))

    # Sharing

    def start(self) -> None:
        """Begin to share what is counted."""
        if self._documents is not None:
            self._thread.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Share the rest and end; waits at most so long.  May be called twice, and without a start."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        tidy_at = self._clock.monotonic() + _TIDY
        said = ""
        while True:
            last = self._end.wait(_FLUSH)
            try:
                self.flush()
                if last:
                    self._leave()
                elif self._clock.monotonic() >= tidy_at:
                    tidy_at = self._clock.monotonic() + _TIDY
                    self._tidy()
                said = ""
            except DatastoreError as error:
                if str(error) != said:
                    logger.warning("statistics are not shared: %s", error)
                said = str(error)
            if last:
                return

    def flush(self) -> None:
        """Write down what was counted since the last time; raises when the store is away, and then nothing is lost."""
        now = self._clock.monotonic()
        with self._lock:
            if not self._changed and now - self._share.at < _ALIVE:
                return
            self._changed = False
            counts, gauges, rates = copy.deepcopy(self._counts), dict(self._gauges), copy.deepcopy(self._rates)
            taken = to_iso(self._clock.now())
        try:
            self._join()
            document = {"counts": minus(counts, self._share.moved), "gauges": gauges, "at": to_iso(self._clock.now())}
            if rates:
                document["rates"] = rates
            self._write(codec.dumps(document))
            if rates:
                self._learn(rates["minute"])
        except DatastoreError:
            with self._lock:
                self._changed = True
            raise
        self._share.written, self._share.at, self._share.at_time = counts, now, taken

    def _learn(self, minute: int) -> None:
        """Learn what tokens have spent at other processes in a minute."""
        assert self._documents is not None
        index = self._read_index()
        names = [name for name in index.processes if name != self._own] if index is not None else []
        spent: Tree = {}
        for document in self._documents.get_many([self._key(name) for name in names]).values():
            with suppress(CorruptDocument, KeyError):
                rates = codec.loads(document.body)["rates"]
                if rates["minute"] == minute:
                    spent = plus(spent, rates["counts"])
        with self._lock:
            self._others = {"minute": minute, "counts": spent}

    def _join(self) -> None:
        """See to it that the index names this process."""
        index = self._read_index()
        share = self._share
        forgotten = False
        if index is not None and self._own in index.processes and index.epoch == share.epoch:
            return
        if index is not None and share.epoch == index.epoch:
            # Somebody took it for gone: what was written is among what those have counted that are.
            self._generation += 1
            share.moved, share.cas = share.written, None
        elif share.epoch:
            # The store has forgotten everything, also what processes counted that are gone: it begins anew with what
            # was counted since the last write.
            share.moved, share.cas, self._begun = share.written, None, share.at_time or self._begun
            forgotten = True
        presence = dataclasses.asdict(self._presence) if self._presence is not None else None
        entry = {"presence": presence, "at": to_iso(self._clock.now()), **({"forgotten": True} if forgotten else {})}

        def join(index: _Index) -> None:
            index.processes[self._own] = entry
            if forgotten:
                # Of what this process counted before nothing is left: nobody may say that all is counted since then.
                index.since = max(index.since, self._begun)
            elif not index.base and not any(one.get("forgotten") for one in index.processes.values()):
                index.since = min(index.since, self._begun)

        share.epoch = self._change_index(join).epoch

    def _write(self, body: bytes) -> None:
        """Write the document of this process, which nobody else writes."""
        assert self._documents is not None
        share, key = self._share, self._key(self._own)
        for _ in range(_TRIES):
            try:
                if share.cas is None:
                    share.cas = self._documents.get(key).cas
                share.cas = self._documents.replace(key, body, share.cas)
                return
            except Conflict:
                share.cas = None  # a write of which nobody knew has arrived
            except NotFound:
                with suppress(AlreadyExists):
                    share.cas = self._documents.insert(key, body)
                    return
            except StoreAmbiguous:
                share.cas = None
                raise
        raise StoreUnavailable("the statistics of this process are written by somebody else")

    def _leave(self) -> None:
        """Move what this process has counted to what those have that are gone."""
        self._move(self._own)

    def _tidy(self) -> None:
        """Move what those processes have counted that are certainly gone, or were silent for very long."""
        index = self._read_index()
        for name, entry in list(index.processes.items() if index is not None else ()):
            if name != self._own and self._is_gone(name, entry):
                logger.info("statistics of a process that is gone are taken over name=%s", name)
                self._move(name)

    def _is_gone(self, name: str, entry: Tree) -> bool:
        at = from_iso(entry["at"])
        with suppress(NotFound, CorruptDocument, KeyError):
            assert self._documents is not None
            at = from_iso(codec.loads(self._documents.get(self._key(name)).body)["at"])
        silent = self._clock.now() - at
        presence = Presence(**entry["presence"]) if entry["presence"] else None
        return silent > _SILENT or (silent > _SETTLED and presence is not None and presence.ended())

    def _move(self, name: str) -> None:
        assert self._documents is not None
        key = self._key(name)
        counts: Tree = {}
        with suppress(NotFound, CorruptDocument, KeyError):
            counts = codec.loads(self._documents.get(key).body)["counts"]

        def move(index: _Index) -> None:
            if index.processes.pop(name, None) is not None:
                index.base = plus(index.base, counts)

        self._change_index(move)
        with suppress(NotFound):
            self._documents.remove(key)

    # Reading

    def read(self) -> Totals:
        """Return what all have counted; ``StoreUnavailable`` if that cannot be known now."""
        if self._documents is None:
            raise StoreUnavailable("statistics are off")
        index = self._read_index()
        for _ in range(_TRIES):
            if index is None:
                return Totals({}, {}, self._clock.now())
            found = self._documents.get_many([self._key(name) for name in index.processes])
            seen, index = index, self._read_index()
            # Otherwise a process may have gone in between, and be counted twice or not at all.
            if index is not None and index.cas == seen.cas:
                return _sum(index, found.values(), self._clock.now())
        raise StoreUnavailable("too many processes change the index of the statistics")

    # The index

    @property
    def _own(self) -> str:
        return f"{self._name}.{self._generation}" if self._generation else self._name

    def _key(self, name: str) -> str:
        return f"{_INDEX}:{name}"

    def _read_index(self) -> _Index | None:
        assert self._documents is not None
        try:
            document = self._documents.get(_INDEX)
        except NotFound:
            return None
        return _index(document.body, document.cas)

    def _change_index(self, change: Callable[[_Index], None]) -> _Index:
        """Change the index in place; ``change`` may find its work done."""
        assert self._documents is not None
        index = _Index("", "", {}, {})

        def changed(body: bytes | None) -> bytes:
            nonlocal index
            index = _index(body) if body is not None else _Index(secrets.token_hex(8), self._begun, {}, {})
            change(index)
            return index.document()

        self._documents.change(_INDEX, changed)
        return index


def _index(body: bytes, cas: int | None = None) -> _Index:
    try:
        return _Index(**codec.loads(body), cas=cas)
    except (CorruptDocument, TypeError) as error:
        raise StoreUnavailable(f"the index of the statistics cannot be read: {error}") from error


@dataclass(slots=True)
class _Share:
    """What the thread that shares knows of its last write."""

    epoch: str = ""
    written: Tree = field(default_factory=dict)
    #: What of the counts is among those of processes that are gone.
    moved: Tree = field(default_factory=dict)
    cas: int | None = None
    #: When it was, monotonic and as a time.
    at: float = 0.0
    at_time: str = ""


def _sum(index: _Index, documents: Iterable[Document], now: float) -> Totals:
    counts, gauges = index.base, Tree()
    for document in documents:
        with suppress(CorruptDocument, KeyError):
            members = codec.loads(document.body)
            counts = plus(counts, members["counts"])
            if now - from_iso(members["at"]) < _STALE:  # what is now is said by those that live
                gauges = plus(gauges, members["gauges"])
    return Totals(counts, gauges, from_iso(index.since))


def plus(left: Mapping[str, Any], right: Mapping[str, Any]) -> Tree:
    """Return the sum of two trees."""
    total = dict(left)
    for name, value in right.items():
        if isinstance(value, Mapping):
            total[name] = plus(total.get(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value
    return total


def minus(left: Mapping[str, Any], right: Mapping[str, Any]) -> Tree:
    """Return the difference of two trees, of which the second has nothing that the first has not; without zeros."""
    rest: Tree = {}
    for name, value in left.items():
        left_over = minus(value, right.get(name, {})) if isinstance(value, Mapping) else value - right.get(name, 0)
        if left_over:
            rest[name] = left_over
    return rest


def _add(tree: Tree, amount: float, *names: str) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = tree.get(names[-1], 0) + amount
