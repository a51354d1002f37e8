"""The Couchbase datastore: key-value operations only, through the official SDK.

Documents are plain JSON.  A log is a counter and one document an entry, so a number can be taken and not yet, or never,
written: a reader that meets such a gap waits a moment and then seals it with a tombstone; a writer that finds its
number sealed appends again.  Every entry carries an id that its writer made, which tells after an ambiguous answer
whose entry it is.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from couchbase.auth import PasswordAuthenticator
from couchbase.cluster import Cluster
from couchbase.durability import Durability, ServerDurability
from couchbase.exceptions import (
    AmbiguousTimeoutException,
    AuthenticationException,
    CASMismatchException,
    CouchbaseException,
    DocumentExistsException,
    DocumentNotFoundException,
    RequestCanceledException,
    UnAmbiguousTimeoutException,
)
from couchbase.options import (
    ClusterOptions,
    ClusterTimeoutOptions,
    DeltaValue,
    GetMultiOptions,
    GetOptions,
    IncrementOptions,
    InsertMultiOptions,
    InsertOptions,
    RemoveOptions,
    ReplaceOptions,
    SignedInt64,
    UpsertOptions,
)
from couchbase.transcoder import RawBinaryTranscoder, RawJSONTranscoder, Transcoder

from zerog import codec, failpoints
from zerog.datastore.base import Datastore, Document, Entry
from zerog.exceptions import (
    AlreadyExists,
    BadSetting,
    Conflict,
    DatastoreError,
    NotFound,
    StoreAmbiguous,
    StoreUnavailable,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

_DURABILITIES: Mapping[str, Durability | None] = {
    "none": None,
    "majority": Durability.MAJORITY,
    "majorityAndPersistActive": Durability.MAJORITY_AND_PERSIST_TO_ACTIVE,
    "persistToMajority": Durability.PERSIST_TO_MAJORITY,
}

#: Seconds that a reader gives a writer between its number and its entry, and between two looks.
_GAP_SECONDS = 0.1
_GAP_STEP = 0.005
#: Seconds after a failed connect in which calls fail at once instead of each waiting for the deadline.
_RECONNECT_AFTER = 0.5
#: How often an entry is appended anew because a reader had sealed its number, or the answer was ambiguous.
_TRIES = 5
#: Keys of one multi-operation.
_MANY = 500


class _Digits(Transcoder):  # type: ignore[misc]
    """Reads a counter, whatever flags the server gave it: servers differ in that."""

    def encode_value(self, value: Any) -> Any:
        raise NotImplementedError("counters are written by increments")

    def decode_value(self, value: bytes, flags: int) -> int:
        return int(value.strip())


_JSON = RawJSONTranscoder()
_DIGITS = _Digits()
_BINARY = RawBinaryTranscoder()
_TOMBSTONE = b'{"sealed":true}'


class CouchbaseDatastore(Datastore):
    """Documents, logs and blobs in one bucket.

    ``address`` is ``couchbase://host`` or ``couchbases://host``; ``collection`` is (scope, collection) or ``None`` for
    the default one; ``deadline`` bounds every operation, in seconds; ``durability`` is a key of the SDK's levels.
    """

    def __init__(
        self,
        address: str,
        user: str,
        password: str,
        bucket: str,
        collection: tuple[str, str] | None = None,
        service: str = "zerog",
        deadline: float = 5.0,
        durability: str = "none",
    ) -> None:
        if durability not in _DURABILITIES:
            raise BadSetting(f"durability is {durability!r}; it must be one of {', '.join(_DURABILITIES)}")
        self._address = address
        self._user, self._password = user, password
        self._bucket, self._collection_name = bucket, collection
        self._prefix = f"{service}:"
        self._deadline = deadline
        level = _DURABILITIES[durability]
        self._durable: dict[str, Any] = {} if level is None else {"durability": ServerDurability(level)}
        self._lock = threading.Lock()
        self._cluster: Any = None
        self._opened: Any = None
        self._failed_at: float | None = None
        self._closed = False

    # Documents

    def get(self, key: str) -> Document:
        with self._errors(key, writes=False):
            found = self._collection.get(self._key(key), GetOptions(transcoder=_JSON))
            return Document(bytes(found.value), found.cas)

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        found = self._get_multi([self._key(key) for key in keys])
        skip = len(self._prefix)
        return {key[skip:]: document for key, document in found.items()}

    def insert(self, key: str, body: bytes) -> int:
        with self._errors(key):
            options = InsertOptions(transcoder=_JSON, **self._durable)
            return int(self._collection.insert(self._key(key), body, options).cas)

    def insert_all(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        done: dict[str, int | DatastoreError] = {}
        keys = list(documents)
        for start in range(0, len(keys), _MANY):
            part = keys[start : start + _MANY]
            done.update(self._insert_some({key: documents[key] for key in part}))
        return done

    def _insert_some(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        try:
            with self._errors("insert"):
                options = InsertMultiOptions(transcoder=_JSON, return_exceptions=True, **self._durable)
                answer = self._collection.insert_multi(
                    {self._key(key): body for key, body in documents.items()}, options
                )
        except DatastoreError as error:
            return dict.fromkeys(documents, error)
        done: dict[str, int | DatastoreError] = {}
        for key in documents:
            failed = answer.exceptions.get(self._key(key))
            done[key] = _translated(failed, key, True) if failed else int(answer.results[self._key(key)].cas)
        return done

    def replace(self, key: str, body: bytes, cas: int) -> int:
        with self._errors(key):
            options = ReplaceOptions(cas=cas, transcoder=_JSON, **self._durable)
            return int(self._collection.replace(self._key(key), body, options).cas)

    def remove(self, key: str, cas: int | None = None) -> None:
        given = {} if cas is None else {"cas": cas}
        with self._errors(key):
            self._collection.remove(self._key(key), RemoveOptions(**given, **self._durable))

    # Logs

    def append(self, log: str, body: bytes) -> int:
        identity = secrets.token_hex(8)
        document = b'{"id":"%s","value":%s}' % (identity.encode(), body)
        for _ in range(_TRIES):
            number = self._next_number(log)
            failpoints.hit("log.after_number")
            if self._write_entry(self._entry_key(log, number), document, identity):
                return number
        raise StoreAmbiguous(f"the entry could not be appended to {log}")

    def append_all(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        """Take one run of numbers for each log, then write all entries side by side."""
        numbers = self._numbers(entries)
        failpoints.hit("log.after_number")
        documents: dict[str, tuple[int, bytes, str]] = {}
        done: list[int | DatastoreError] = [StoreUnavailable("not appended")] * len(entries)
        for index, (log, body) in enumerate(entries):
            number = numbers[index]
            if isinstance(number, DatastoreError):
                done[index] = number
                continue
            identity = secrets.token_hex(8)
            key = self._entry_key(log, number)
            documents[key] = (index, b'{"id":"%s","value":%s}' % (identity.encode(), body), identity)
            done[index] = number
        written = self.insert_all({key: document for key, (_, document, _) in documents.items()})
        for key, result in written.items():
            if isinstance(result, DatastoreError):
                index, document, identity = documents[key]
                done[index] = self._again(entries[index], key, document, identity, numbers[index])
        return done

    def _again(
        self, entry: tuple[str, bytes], key: str, document: bytes, identity: str, number: int | DatastoreError
    ) -> int | DatastoreError:
        """Make sure of an entry whose write did not simply succeed."""
        try:
            if self._write_entry(key, document, identity):
                return number
            return self.append(*entry)
        except DatastoreError as error:
            return error

    def _numbers(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        counts: dict[str, int] = {}
        for log, _ in entries:
            counts[log] = counts.get(log, 0) + 1
        following: dict[str, int | DatastoreError] = {}
        for log, count in counts.items():
            try:
                following[log] = self._next_number(log, count) - count + 1
            except DatastoreError as error:
                following[log] = error
        numbers: list[int | DatastoreError] = []
        for log, _ in entries:
            number = following[log]
            numbers.append(number)
            if isinstance(number, int):
                following[log] = number + 1
        return numbers

    def _next_number(self, log: str, count: int = 1) -> int:
        """Take ``count`` numbers and return the last; after an ambiguous answer others are taken, and a gap is left."""
        options = {"initial": SignedInt64(count), "delta": DeltaValue(count), **self._durable}
        for left in reversed(range(_TRIES)):
            try:
                with self._errors(log):
                    answer = self._collection.binary().increment(self._counter_key(log), IncrementOptions(**options))
                    return int(answer.content)
            except StoreAmbiguous:
                if not left:
                    raise
        raise AssertionError("not reached")

    def _write_entry(self, key: str, document: bytes, identity: str) -> bool:
        """Insert an entry; False if a reader had sealed its number.  Never in doubt about whose entry is there."""
        for left in reversed(range(_TRIES)):
            try:
                self.insert(key, document)
                return True
            except AlreadyExists:
                return self._identity_of(key) == identity
            except StoreAmbiguous:
                with suppress(NotFound):
                    return self._identity_of(key) == identity
                if not left:
                    raise
        return False

    def _identity_of(self, key: str) -> str | None:
        found: str | None = codec.loads(self.get(key).body).get("id")
        return found

    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        first, last = self._bounds(log)
        entries: list[Entry] = []
        if after is not None:
            position = max(after + 1, first)
            while position <= last and len(entries) < limit:
                stop = min(last, position + _MANY - 1, position + limit - len(entries) - 1)
                entries += self._read_numbers(log, range(position, stop + 1))
                position = stop + 1
        else:
            position = min(last, before - 1) if before is not None else last
            while position >= first and len(entries) < limit:
                stop = max(first, position - _MANY + 1, position - limit + len(entries) + 1)
                entries += self._read_numbers(log, range(position, stop - 1, -1))
                position = stop - 1
        return entries[:limit]

    def _read_numbers(self, log: str, numbers: range) -> list[Entry]:
        keys = {self._key(self._entry_key(log, number)): number for number in numbers}
        found = self._get_multi(list(keys))
        missing = [key for key in keys if key not in found]
        if missing:
            found.update(self._fill_gaps(missing))
        entries = []
        for key, number in keys.items():
            value = codec.loads(found[key].body).get("value") if key in found else None
            if value is not None:
                entries.append(Entry(number, codec.dumps(value)))
        return entries

    def _fill_gaps(self, missing: list[str]) -> dict[str, Document]:
        """Wait a moment for the writers of these entries, then seal what is still missing."""
        found: dict[str, Document] = {}
        end = time.monotonic() + _GAP_SECONDS
        while missing and time.monotonic() < end:
            time.sleep(_GAP_STEP)
            found.update(self._get_multi(missing))
            missing = [key for key in missing if key not in found]
        skip = len(self._prefix)
        for key in missing:
            try:
                self.insert(key[skip:], _TOMBSTONE)
            except AlreadyExists:
                found[key] = self.get(key[skip:])
        return found

    def _bounds(self, log: str) -> tuple[int, int]:
        """Return the first number that was not trimmed and the last that was taken."""
        with self._errors(log, writes=False):
            try:
                last = int(self._collection.get(self._counter_key(log), GetOptions(transcoder=_DIGITS)).value)
            except DocumentNotFoundException:
                return 1, 0
        try:
            first = int(codec.loads(self.get(self._first_key(log)).body)["first"])
        except NotFound:
            first = 1
        return first, last

    def amend(self, log: str, number: int, body: bytes | None) -> None:
        key = self._entry_key(log, number)
        for _ in range(_TRIES):
            try:
                document = self.get(key)
                entry = codec.loads(document.body)
                if entry.get("sealed"):
                    return
                changed = _TOMBSTONE if body is None else b'{"id":"%s","value":%s}' % (entry["id"].encode(), body)
                self.replace(key, changed, document.cas)
                return
            except NotFound:
                return
            except (Conflict, StoreAmbiguous):
                continue  # amending twice is amending once
        raise StoreAmbiguous(f"entry {number} of {log} could not be changed")

    def trim(self, log: str, upto: int) -> None:
        first, last = self._bounds(log)
        upto = min(upto, last)
        if upto < first:
            return
        with self._errors(log):
            mark = codec.dumps({"first": upto + 1})
            self._collection.upsert(
                self._key(self._first_key(log)), mark, UpsertOptions(transcoder=_JSON, **self._durable)
            )
        for number in range(first, upto + 1):
            with suppress(NotFound):
                self.remove(self._entry_key(log, number))

    def remove_log(self, log: str) -> None:
        first, last = self._bounds(log)
        for number in range(first, last + 1):
            with suppress(NotFound):
                self.remove(self._entry_key(log, number))
        for key in (self._first_key(log), self._counter_key(log)[len(self._prefix) :]):
            with suppress(NotFound):
                self.remove(key)

    # Blobs

    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        with self._errors(blob):
            options = UpsertOptions(transcoder=_BINARY, **self._durable)
            self._collection.upsert(self._chunk_key(blob, index), data, options)

    def get_chunk(self, blob: str, index: int) -> bytes:
        with self._errors(f"chunk {index} of {blob}", writes=False):
            return bytes(self._collection.get(self._chunk_key(blob, index), GetOptions(transcoder=_BINARY)).value)

    def remove_blob(self, blob: str) -> None:
        skip = len(self._prefix)
        index = 0
        while True:
            try:
                self.remove(self._chunk_key(blob, index)[skip:])
            except NotFound:
                return
            index += 1

    # Keys

    def _key(self, key: str) -> str:
        return self._prefix + key

    def _counter_key(self, log: str) -> str:
        return f"{self._prefix}log:{log}:last"

    @staticmethod
    def _first_key(log: str) -> str:
        return f"log:{log}:first"

    @staticmethod
    def _entry_key(log: str, number: int) -> str:
        return f"log:{log}:{number}"

    def _chunk_key(self, blob: str, index: int) -> str:
        return f"{self._prefix}blob:{blob}:{index}"

    def _get_multi(self, keys: Sequence[str]) -> dict[str, Document]:
        found: dict[str, Document] = {}
        for start in range(0, len(keys), _MANY):
            part = list(dict.fromkeys(keys[start : start + _MANY]))
            with self._errors("get", writes=False):
                options = GetMultiOptions(transcoder=_JSON, return_exceptions=True)
                answer = self._collection.get_multi(part, options)
            for key, error in answer.exceptions.items():
                if not isinstance(error, DocumentNotFoundException):
                    raise _translated(error, key, False)
            for key, result in answer.results.items():
                found[key] = Document(bytes(result.value), result.cas)
        return found

    # The connection

    def probe(self) -> None:
        with suppress(NotFound):
            self.get("probe")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            cluster, self._cluster, self._opened = self._cluster, None, None
        if cluster is not None:
            cluster.close()

    def warnings(self) -> Iterable[str]:
        if not self._durable:
            yield (
                "Couchbase durability is off: a write that was acknowledged can be lost with a node; "
                "set durability = majority on a bucket with replicas"
            )

    @property
    def _collection(self) -> Any:
        opened = self._opened
        if opened is None:
            with self._lock:
                if self._opened is None:
                    self._opened = self._connect()
                opened = self._opened
        return opened

    def _connect(self) -> Any:
        if self._closed:
            raise StoreUnavailable("the datastore is closed")
        if self._failed_at is not None and time.monotonic() - self._failed_at < _RECONNECT_AFTER:
            raise StoreUnavailable(f"Couchbase at {self._address} did not answer a moment ago")
        wait = timedelta(seconds=self._deadline)
        options = ClusterOptions(
            PasswordAuthenticator(self._user, self._password),
            timeout_options=ClusterTimeoutOptions(
                kv_timeout=wait, kv_durable_timeout=wait, bootstrap_timeout=wait, connect_timeout=wait
            ),
            enable_tracing=False,
            enable_metrics=False,
        )
        try:
            # A cluster object whose first connect failed is spent, so each try makes its own.
            cluster = Cluster(self._address, options)
            bucket = cluster.bucket(self._bucket)
        except Exception:
            self._failed_at = time.monotonic()
            raise
        self._failed_at = None
        self._cluster = cluster
        if self._collection_name is None:
            return bucket.default_collection()
        scope, name = self._collection_name
        return bucket.scope(scope).collection(name)

    @contextmanager
    def _errors(self, what: str, writes: bool = True) -> Iterator[None]:
        try:
            yield
        except CouchbaseException as error:
            raise _translated(error, what, writes) from error.with_traceback(None)
        except RuntimeError as error:
            raise StoreUnavailable(f"Couchbase: {_text(error)}") from error


def _translated(error: Exception, what: str, writes: bool) -> DatastoreError:
    """Return our error for one of the SDK's."""
    for kinds, make in _TRANSLATIONS:
        if isinstance(error, kinds):
            return make(f"{what}: {_text(error)}")
    return (StoreAmbiguous if writes else StoreUnavailable)(f"{what}: {_text(error)}")


def _text(error: BaseException) -> str:
    """Return what an error of the SDK is, guarded: writing it down can itself raise, and its context names keys."""
    try:
        message = getattr(error, "message", None) or ""
    except Exception:
        message = ""
    return f"{type(error).__name__} {str(message)[:200]}".strip()


_TRANSLATIONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Callable[[str], DatastoreError]], ...] = (
    (DocumentNotFoundException, NotFound),
    (DocumentExistsException, AlreadyExists),
    (CASMismatchException, Conflict),
    (AmbiguousTimeoutException, StoreAmbiguous),
    ((UnAmbiguousTimeoutException, AuthenticationException), StoreUnavailable),
    (RequestCanceledException, StoreAmbiguous),
)
