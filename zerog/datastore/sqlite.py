"""The embedded datastore: one SQLite file in WAL mode with ``synchronous=FULL``.

One connection a thread.  Checkpoints of the write-ahead log run in a thread of their own, because one inside a request
is what makes the slowest requests slow.  They also let the log begin anew: a commit that overwrites blocks which the
file has already costs a third less than one that makes it longer.
"""

from __future__ import annotations

import errno
import resource
import secrets
import sqlite3
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from zerog.datastore.base import Datastore, Document, Entry
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    DatastoreError,
    NotFound,
    StoreAmbiguous,
    StoreFull,
    StoreUnavailable,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, cas INTEGER NOT NULL,
  body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (id INTEGER PRIMARY KEY, blob TEXT NOT NULL, position INTEGER NOT NULL,
  data BLOB NOT NULL, UNIQUE (blob, position));
"""

#: Logs are spread over so many tables: where a log is the last in its table an append touches one page, elsewhere it
#: moves its neighbours' entries about.
_TABLES = 16
_LOGS = "".join(
    f"CREATE TABLE IF NOT EXISTS entries{table} (log TEXT NOT NULL, number INTEGER NOT NULL, body BLOB, "
    "PRIMARY KEY (log, number)) WITHOUT ROWID;"
    for table in range(_TABLES)
)

_LAST = "SELECT coalesce(max(number), 0) FROM {} WHERE log = ?"
_Row = tuple[str, int, bytes]
#: Rows of one insert.
_ROWS = 64
#: Statements that a connection keeps prepared: those of all tables.
_STATEMENTS = 256

#: Writes of this process after which it makes a checkpoint, and the seconds after which it looks how many there were.
_CHECKPOINT_WRITES = 300
_CHECKPOINT_SECONDS = 0.5
#: Frames that may be left over when the log is to begin anew: those that came in the meantime.
_CHECKPOINT_REST = 1000
_CHECKPOINT_PASSES = 5
#: Milliseconds for which a checkpoint may hold up writers while it waits for readers to leave the log, and the seconds
#: until the next try when they did not.
_RESTART_WAIT, _RESTART_PAUSE = 20, 5.0
#: Seconds of waiting for another thread that are taken off the wait for other processes.
_NOTICED = 0.1
#: Bytes that the log keeps on the disk when it begins anew.
_LOG_BYTES = 64 * 1024 * 1024
_VARIABLES = 500
#: Errors of SQLite after which nothing was written, and the bytes that are tried to learn whether there was no room.
_NOT_WRITTEN = (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
_ROOM = 65536

#: Pages that are given back to the disk in one write, and how often in a row.
_VACUUM_PAGES, _VACUUM_STEPS = 500, 1000
_INCREMENTAL = 2


def _table(log: str) -> str:
    return f"entries{zlib.adler32(log.encode()) % _TABLES}"


def _spread_old_entries(connection: sqlite3.Connection) -> None:
    """Move the entries of a file that was made when all logs shared one table."""
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'entries'"
    if connection.execute(query).fetchone() is None:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute(query).fetchone() is not None:  # no other process was faster
            for (name,) in connection.execute("SELECT DISTINCT log FROM entries").fetchall():
                table = _table(name.partition(":")[2])
                connection.execute(f"INSERT INTO {table} SELECT log, number, body FROM entries WHERE log = ?", (name,))
            connection.execute("DROP TABLE entries")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _parts(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    """Yield rows in parts whose lengths are powers of two: few statements, and few different ones to prepare."""
    start = 0
    while start < len(rows):
        count = min(_ROWS, 1 << ((len(rows) - start).bit_length() - 1))
        yield rows[start : start + count]
        start += count


def _without_room(path: Path) -> bool:
    """Return whether the system has no room for this file: of some full disks SQLite says only that a write failed."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if limit != resource.RLIM_INFINITY:
            return max(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) + _ROOM > limit
        with tempfile.TemporaryFile(dir=path.parent, buffering=0) as trial:
            trial.write(bytes(_ROOM))
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return False


class _Errors:
    """A block in which SQLite's errors become ours.  A class and no generator: this is entered for every statement."""

    __slots__ = ("_name", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = path.name

    def refused(self, error: sqlite3.OperationalError, committing: bool) -> StoreUnavailable:
        """Return what an error means for the statement that met it, or for the commit."""
        code = error.sqlite_errorcode
        if code == sqlite3.SQLITE_FULL or (code in _NOT_WRITTEN and _without_room(self._path)):
            return StoreFull(f"{self._name}: {error}")
        if committing and code & 0xFF == sqlite3.SQLITE_IOERR:
            return StoreAmbiguous(f"{self._name}: the commit failed: {error}")
        return StoreUnavailable(f"{self._name}: {error}")

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, sqlite3.Error) or isinstance(error, sqlite3.IntegrityError):
            return
        if isinstance(error, sqlite3.OperationalError):
            raise self.refused(error, committing=False) from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise StoreUnavailable(f"the datastore is closed: {error}") from error
        raise DatastoreError(f"{self._name}: {error}") from error


class _Write:
    """A block with one write, which is its own transaction outside ``together``."""

    __slots__ = ("_store",)

    def __init__(self, store: SQLiteDatastore) -> None:
        self._store = store

    def __enter__(self) -> None:
        if not self._store.in_together:
            self._store.lock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._store.in_together:
            self._store.unlock()
            if isinstance(error, sqlite3.OperationalError):
                raise self._store.errors.refused(error, committing=True) from error  # it was its own commit
        self._store.errors.__exit__(kind, error, trace)


class _Together:
    """A transaction as a block."""

    __slots__ = ("_store",)

    def __init__(self, store: SQLiteDatastore) -> None:
        self._store = store

    def __enter__(self) -> None:
        self._store.begin()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._store.end(keep=kind is None)


class SQLiteDatastore(Datastore):
    """Documents, logs and blobs in one SQLite file.

    ``deadline`` bounds, in seconds, how long a call waits for other threads and other processes together; it cannot
    bound a stalled disk.
    """

    shares_commits = True

    def __init__(self, path: str | Path, service: str = "zerog", deadline: float = 5.0) -> None:
        self.path = Path(path)
        self._prefix = f"{service}:"
        self._deadline = deadline
        self._local = threading.local()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._checkpointer: threading.Thread | None = None
        self.errors = _Errors(self.path)
        self._write = _Write(self)
        #: Who writes holds it: threads of one process wait for each other here, where the next is woken at once, and
        #: not in SQLite, which looks again after growing pauses.
        self._writer = threading.Lock()
        self._writes = 0
        self._restart_after = 0.0
        self._look = threading.Event()

    # Documents

    def get(self, key: str) -> Document:
        with self.errors:
            row = self._connection.execute(
                "SELECT body, cas FROM documents WHERE key = ?", (self._prefix + key,)
            ).fetchone()
        if row is None:
            raise NotFound(key)
        return Document(row[0], row[1])

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        found: dict[str, Document] = {}
        skip = len(self._prefix)
        with self.errors:
            for start in range(0, len(keys), _VARIABLES):
                part = [self._prefix + key for key in keys[start : start + _VARIABLES]]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, body, cas FROM documents WHERE key IN ({marks})"
                for key, body, cas in self._connection.execute(query, part):
                    found[key[skip:]] = Document(body, cas)
        return found

    def insert(self, key: str, body: bytes) -> int:
        # A random start keeps a cas of a removed document from fitting its successor.
        cas = secrets.randbits(60)
        try:
            with self._write:
                self._insert("INSERT INTO documents (key, cas, body) VALUES ", [(self._prefix + key, cas, body)])
        except sqlite3.IntegrityError as error:
            raise AlreadyExists(key) from error
        return cas

    def insert_all(self, documents: Mapping[str, bytes]) -> dict[str, int | DatastoreError]:
        rows = [(self._prefix + key, secrets.randbits(60), body) for key, body in documents.items()]
        done: dict[str, int | DatastoreError] = {}
        with self.together(), self.errors:
            for part in _parts(rows):
                # Without "or ignore" SQLite keeps a journal of the statement, at three times the cost.
                inserted = self._insert("INSERT OR IGNORE INTO documents (key, cas, body) VALUES ", part)
                mine = None if inserted == len(part) else self._written(part)
                for key, cas, _ in part:
                    name = key[len(self._prefix) :]
                    done[name] = cas if mine is None or (key, cas) in mine else AlreadyExists(name)
        return done

    def _insert(self, statement: str, rows: Sequence[_Row]) -> int:
        """Insert rows with one statement, since each lets go of the interpreter and then waits for it; how many."""
        marks = ",".join(["(?, ?, ?)"] * len(rows))
        return self._connection.execute(statement + marks, [value for row in rows for value in row]).rowcount

    def _written(self, rows: Sequence[_Row]) -> set[tuple[str, int]]:
        """Return key and cas of the documents with the keys of these rows."""
        marks = ",".join("?" * len(rows))
        query = f"SELECT key, cas FROM documents WHERE key IN ({marks})"
        return set(self._connection.execute(query, [key for key, _, _ in rows]))

    def replace(self, key: str, body: bytes, cas: int) -> int:
        with self._write:
            done = self._connection.execute(
                "UPDATE documents SET body = ?, cas = cas + 1 WHERE key = ? AND cas = ?",
                (body, self._prefix + key, cas),
            )
        if done.rowcount == 1:
            return cas + 1
        self.get(key)  # raises NotFound
        raise Conflict(key)

    def remove(self, key: str, cas: int | None = None) -> None:
        with self._write:
            done = self._connection.execute(
                "DELETE FROM documents WHERE key = ?1 AND cas = ifnull(?2, cas)", (self._prefix + key, cas)
            )
        if done.rowcount == 0:
            self.get(key)  # raises NotFound
            raise Conflict(key)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext() if self.in_together else _Together(self)

    @property
    def in_together(self) -> bool:
        """Whether this thread is inside a transaction."""
        return getattr(self._local, "together", False)

    def begin(self) -> None:
        """Begin a transaction of this thread."""
        self.lock()
        try:
            with self.errors:
                self._connection.execute("BEGIN IMMEDIATE")
        except BaseException:
            self.unlock()
            raise
        self._local.together = True

    def end(self, keep: bool) -> None:
        """End the transaction of this thread; what it wrote is kept or undone."""
        self._local.together = False
        try:
            if keep:
                self._commit()
            else:
                self._roll_back()
        finally:
            self.unlock()

    def lock(self) -> None:
        """Become the one thread of this process that writes."""
        if self._writer.acquire(blocking=False):
            return
        start = time.monotonic()
        with self.errors:
            connection = self._connection  # before the lock: nothing may fail between it and the block
        if not self._writer.acquire(timeout=self._deadline):
            raise StoreUnavailable(f"{self.path.name}: another thread has been writing for {self._deadline:g} s")
        waited = time.monotonic() - start
        if waited > _NOTICED:
            self._impatient(connection, max(0.0, self._deadline - waited))

    def unlock(self) -> None:
        """Let the next thread write."""
        impatient: sqlite3.Connection | None = getattr(self._local, "impatient", None)
        if impatient is not None:
            self._impatient(impatient, None)
        self._writes += 1
        if self._writes % _CHECKPOINT_WRITES == 0:
            self._look.set()
        self._writer.release()

    def _impatient(self, connection: sqlite3.Connection, seconds: float | None) -> None:
        """Let SQLite wait for other processes as long as this, or, with ``None``, as long as ever.  Never raises."""
        self._local.impatient = connection if seconds is not None else None
        patience = self._deadline if seconds is None else seconds
        with suppress(sqlite3.Error):  # it was closed: the next one waits as long as ever
            connection.execute(f"PRAGMA busy_timeout={int(1000 * patience)}")

    # Logs

    def append(self, log: str, body: bytes) -> int:
        name = self._prefix + log
        with self._write:
            row = self._connection.execute(
                f"INSERT INTO {_table(log)} (log, number, body) SELECT ?, coalesce(max(number), 0) + 1, ? "
                f"FROM {_table(log)} WHERE log = ? RETURNING number",
                (name, body, name),
            ).fetchone()
        return int(row[0])

    def append_all(self, entries: Sequence[tuple[str, bytes]]) -> list[int | DatastoreError]:
        last: dict[str, int] = {}
        rows: dict[str, list[tuple[str, int, bytes]]] = {}
        numbers: list[int | DatastoreError] = []
        with self.together(), self.errors:
            connection = self._connection
            for log, body in entries:
                name = self._prefix + log
                if name not in last:
                    last[name] = connection.execute(_LAST.format(_table(log)), (name,)).fetchone()[0]
                    rows[log] = []
                last[name] += 1
                rows[log].append((name, last[name], body))
                numbers.append(last[name])
            for log, values in rows.items():
                for part in _parts(values):
                    self._insert(f"INSERT OR FAIL INTO {_table(log)} (log, number, body) VALUES ", part)
        return numbers

    def read(self, log: str, after: int | None = None, before: int | None = None, limit: int = 100) -> list[Entry]:
        name = self._prefix + log
        if after is not None:
            query, mark = "number > ? ORDER BY number", after
        else:
            query, mark = "number < ? ORDER BY number DESC", before if before is not None else 2**62
        with self.errors:
            rows = self._connection.execute(
                f"SELECT number, body FROM {_table(log)} WHERE log = ? AND body IS NOT NULL AND {query} LIMIT ?",
                (name, mark, limit),
            ).fetchall()
        return [Entry(number, body) for number, body in rows]

    def amend(self, log: str, number: int, body: bytes | None) -> None:
        if body is None:
            # The last row stays, empty: its number must never be given out again.
            with self._write:
                self._connection.execute(
                    f"DELETE FROM {_table(log)} WHERE log = ?1 AND number = ?2 AND number < "
                    f"(SELECT max(number) FROM {_table(log)} WHERE log = ?1)",
                    (self._prefix + log, number),
                )
        with self._write:
            self._connection.execute(
                f"UPDATE {_table(log)} SET body = ? WHERE log = ? AND number = ? AND body IS NOT NULL",
                (body, self._prefix + log, number),
            )

    def trim(self, log: str, upto: int) -> None:
        name = self._prefix + log
        with self.together(), self.errors:
            self._connection.execute(
                f"UPDATE {_table(log)} SET body = NULL WHERE log = ? AND number <= ?", (name, upto)
            )
            self._connection.execute(
                f"DELETE FROM {_table(log)} WHERE log = ? AND number <= ? AND number < "
                f"(SELECT max(number) FROM {_table(log)} WHERE log = ?)",
                (name, upto, name),
            )

    def remove_log(self, log: str) -> None:
        with self._write:
            self._connection.execute(f"DELETE FROM {_table(log)} WHERE log = ?", (self._prefix + log,))

    # Blobs

    def put_chunk(self, blob: str, index: int, data: bytes) -> None:
        with self._write:
            self._connection.execute(
                "INSERT OR REPLACE INTO chunks (blob, position, data) VALUES (?, ?, ?)",
                (self._prefix + blob, index, data),
            )

    def get_chunk(self, blob: str, index: int) -> bytes:
        with self.errors:
            row = self._connection.execute(
                "SELECT data FROM chunks WHERE blob = ? AND position = ?", (self._prefix + blob, index)
            ).fetchone()
        if row is None:
            raise NotFound(f"chunk {index} of {blob}")
        return bytes(row[0])

    def remove_blob(self, blob: str) -> None:
        with self._write:
            self._connection.execute("DELETE FROM chunks WHERE blob = ?", (self._prefix + blob,))

    def give_back_space(self) -> None:
        for _ in range(_VACUUM_STEPS):
            with self._write:
                # A statement gives back one page each time it is stepped, and this module steps it once.
                self._connection.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
            with self.errors:
                (left,) = self._connection.execute("PRAGMA freelist_count").fetchone()
            if not left:
                return

    # Connections

    def warnings(self) -> Iterable[str]:
        with self.errors:
            (mode,) = self._connection.execute("PRAGMA auto_vacuum").fetchone()
        if mode != _INCREMENTAL:
            yield (
                f"{self.path} was made by a version before 0.2: the space of what is pruned is used again and not "
                "given back to the disk; stop ZeroG and run: sqlite3 FILE 'PRAGMA auto_vacuum=INCREMENTAL; VACUUM'"
            )

    def probe(self) -> None:
        with self.errors:
            self._connection.execute("SELECT 1 FROM documents LIMIT 1").fetchone()

    def close(self) -> None:
        self._closed.set()
        self._look.set()
        checkpointer = self._checkpointer
        if checkpointer is not None and checkpointer is not threading.current_thread():
            checkpointer.join(self._deadline)
        self._drop_connection()

    def _drop_connection(self) -> None:
        """Close the connection of this thread.  Those of others are theirs to close: one may be in the middle of a
        call, and to close a connection under a running statement ends the process."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        self._local.connection = None
        if connection is not None:
            connection.close()

    @property
    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if self._closed.is_set():
            self._drop_connection()
            raise StoreUnavailable("the datastore is closed")
        if connection is None:
            connection = self._open()
            self._local.connection = connection
        return connection

    def _open(self) -> sqlite3.Connection:
        if self._closed.is_set():
            raise StoreUnavailable("the datastore is closed")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"{self.path.parent}: {error.strerror}") from error
        with self._lock:
            connection = self._prepare_in_time()
            if self._checkpointer is None:
                self._checkpointer = threading.Thread(target=self._checkpoints, name="checkpoints", daemon=True)
                self._checkpointer.start()
        return connection

    def _prepare_in_time(self) -> sqlite3.Connection:
        """Open the file; a new one is locked for a moment by whoever makes it, and SQLite does not wait for that."""
        end = time.monotonic() + self._deadline
        while True:
            try:
                return self._prepare()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _prepare(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=self._deadline,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=_STATEMENTS,
        )
        try:
            if connection.execute("PRAGMA page_count").fetchone() == (0,):
                # Before the first table, else it means nothing: freed pages can be given back to the disk.  In a file
                # that has pages it would be a write, and a full disk could not even be read.
                connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA wal_autocheckpoint=0")
            connection.execute("PRAGMA cache_size=-8192")
            connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
            connection.executescript(_SCHEMA + _LOGS)
            _spread_old_entries(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _commit(self) -> None:
        try:
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            if isinstance(error, sqlite3.OperationalError):
                raise self.errors.refused(error, committing=True) from error
            raise StoreAmbiguous(f"the commit failed: {error}") from error

    def _roll_back(self) -> None:
        connection = self._connection
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            # The transaction ends with its connection; the next call opens another.
            self._local.connection = None
            connection.close()

    def _checkpoints(self) -> None:
        """Move the write-ahead log into the file from time to time; the body of a thread.

        Nothing here opens a file of the database beside SQLite: closing any descriptor of one lets go of all locks
        that this process has on it (https://www.sqlite.org/howtocorrupt.html, 2.2).
        """
        done = 0
        while not self._closed.is_set():
            self._look.wait(_CHECKPOINT_SECONDS)
            self._look.clear()
            writes = self._writes
            if writes - done < _CHECKPOINT_WRITES or self._closed.is_set():
                continue
            try:
                self._checkpoint()
                done = writes
            except (sqlite3.Error, DatastoreError):
                # The file is away or busy: the log grows on and the next look tries again.
                continue

    def _checkpoint(self) -> None:
        """Move what is there while others write, then hold them for the rest, so that the log begins anew."""
        connection = self._connection
        connection.execute(f"PRAGMA busy_timeout={_RESTART_WAIT}")
        for _ in range(_CHECKPOINT_PASSES):  # each has less to move: what came during the one before
            _, frames, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if moved >= frames - _CHECKPOINT_REST:
                break
        if moved < frames - _CHECKPOINT_REST or time.monotonic() < self._restart_after:
            return  # somebody reads an old state: to hold up writers would gain nothing
        with self._write:
            connection.execute(f"PRAGMA busy_timeout={_RESTART_WAIT}")  # to wait for this block may have changed it
            busy, _, _ = connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        if busy:
            self._restart_after = time.monotonic() + _RESTART_PAUSE
