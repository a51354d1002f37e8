"""The embedded queue: beanstalkd's semantics in one SQLite file of its own, with relaxed sync (a queue may lose).

A waiting connection is woken by a datagram: each owns a UNIX socket in a directory beside the locks (``run_dir``), and
whoever makes an entry ready sends one message to each of them.  A look once a second is the fallback.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from zerog.clock import Clock
from zerog.exceptions import QueueError, QueueUnavailable, ReservationLost
from zerog.fleet import LOCKED, Lock, is_unlocked
from zerog.queue.base import PENDING, Pending, Put, Queue, Reservation, TubeStats

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY AUTOINCREMENT, tube TEXT NOT NULL, body BLOB NOT NULL,
  priority INTEGER NOT NULL, ttr REAL NOT NULL, state TEXT NOT NULL, due REAL, holder TEXT);
CREATE INDEX IF NOT EXISTS ready ON entries (tube, priority, id) WHERE state = 'ready';
CREATE INDEX IF NOT EXISTS timed ON entries (due, tube, state) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS buried ON entries (tube) WHERE state = 'buried';
CREATE TABLE IF NOT EXISTS identity (text TEXT NOT NULL);
"""

#: An entry that a connection still holds: its id, the holder, now.
_HELD = "WHERE id = ? AND holder = ? AND state = 'reserved' AND due > ?"

_COUNTS = """
SELECT 'ready', count(*) FROM entries WHERE state = 'ready' AND tube = :tube UNION ALL
SELECT 'buried', count(*) FROM entries WHERE state = 'buried' AND tube = :tube UNION ALL
SELECT state, count(*) FROM entries WHERE due IS NOT NULL AND tube = :tube GROUP BY state
"""

#: The most urgent ready entry of a tube; a statement asks for this many tubes at most.
_FIRST = (
    "SELECT * FROM (SELECT priority, id, body, ttr FROM entries WHERE state = 'ready' AND tube = ? "
    "ORDER BY priority, id LIMIT 1)"
)
_TUBES = 100

#: Seconds between two looks of a waiting connection that hears no notice.
_FALLBACK = 1.0
#: Seconds after which it is checked again whether the file is still the one that was opened.
_RECHECK = 0.5


class _File:
    """The SQLite connection that the queue connections of one thread share, and the notices beside it."""

    def __init__(self, path: Path, run_dir: Path, deadline: float, clock: Clock) -> None:
        self.path = path
        self.clock = clock
        self.deadline = deadline
        # One directory for each queue file: two services may share a run_dir.
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        self.notices = run_dir / f"queue-{name}"
        self._connection: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._checked = 0.0
        #: Names what this process holds; the lock of that name shows that it lives.
        self.token = secrets.token_hex(8)
        self.connections = 0
        self._lock: Lock | None = None
        self._holding: set[str] = set()
        self._dead: list[Path] = []
        self._looked = 0.0
        self.transaction = _Transaction(self)

    def __enter__(self) -> None:
        """Begin a block in which foreign errors become ours."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (sqlite3.Error, OSError)):
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                self.close()
            raise QueueUnavailable(f"{self.path.name}: {error}") from error

    def connection(self) -> sqlite3.Connection:
        if self._connection is not None and self._moved():
            self.close()
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def hold(self, connection: str) -> None:
        """Hold the lock that shows that this process lives: before a connection reserves anything."""
        self._holding.add(connection)
        if self._lock is None:
            with self:
                self._lock = Lock(self.notices, self.token)

    def let_go(self, connection: str) -> None:
        """Let go of the lock if no other connection holds anything."""
        self._holding.discard(connection)
        if not self._holding and self._lock is not None:
            self._lock.close()
            self._lock = None

    def somebody_died(self) -> bool:
        """Return whether there is the lock of a process that is gone; looked for once a second."""
        if time.monotonic() - self._looked >= _FALLBACK:
            self._looked = time.monotonic()
            locks = self.notices.glob(f"*{LOCKED}")
            self._dead = [path for path in locks if path.stem != self.token and is_unlocked(path)]
        return bool(self._dead)

    def free_those_of_the_dead(self, connection: sqlite3.Connection) -> None:
        """Make ready what processes hold that are gone; ``forget_the_dead`` once that is committed."""
        if self.somebody_died():
            for path in self._dead:
                connection.execute(
                    "UPDATE entries SET state = 'ready', due = NULL, holder = NULL "
                    "WHERE due IS NOT NULL AND holder LIKE ? || ':%'",
                    (path.stem,),
                )

    def forget_the_dead(self) -> None:
        """Remove the locks of those whose entries have been freed."""
        for path in self._dead:
            path.unlink(missing_ok=True)
        self._dead = []

    def notice_directory(self) -> int:
        self.notices.mkdir(parents=True, exist_ok=True)
        return os.open(self.notices, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _moved(self) -> bool:
        now = time.monotonic()
        if now - self._checked < _RECHECK:
            return False
        self._checked = now
        try:
            state = self.path.stat()
        except OSError:
            return True
        return (state.st_dev, state.st_ino) != self._inode

    def _open(self) -> sqlite3.Connection:
        try:
            return self._open_in_time()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            # Damaged: the store is the truth, so an empty queue is better than none.  The sweep fills it again.
            self.path.replace(self.path.with_name(self.path.name + ".damaged"))
            for ending in ("-wal", "-shm"):
                self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
            return self._open_file()

    def _open_in_time(self) -> sqlite3.Connection:
        """Open the file; a new one is locked for a moment by whoever makes it, and SQLite does not wait for that."""
        end = time.monotonic() + self.deadline
        while True:
            try:
                return self._open_file()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _open_file(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=self.deadline, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.executescript(_SCHEMA)
            connection.execute(
                "INSERT INTO identity SELECT ? WHERE NOT EXISTS (SELECT 1 FROM identity)", (secrets.token_hex(8),)
            )
            state = self.path.stat()
        except BaseException:
            connection.close()
            raise
        self._inode = (state.st_dev, state.st_ino)
        self._checked = time.monotonic()
        return connection


class _Transaction:
    """A transaction on the file as a block, which gets the connection; one inside another is part of it."""

    __slots__ = ("_connection", "_depth", "_file")

    def __init__(self, file: _File) -> None:
        self._file = file
        self._connection: sqlite3.Connection | None = None
        self._depth = 0

    def __enter__(self) -> sqlite3.Connection:
        if self._depth == 0:
            with self._file:
                self._connection = self._file.connection()
                self._connection.execute("BEGIN IMMEDIATE")
        self._depth += 1
        assert self._connection is not None
        return self._connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if error is not None:
            self._roll_back()
            self._file.__exit__(kind, error, trace)
            return
        if self._depth == 0:
            self._commit()

    def _commit(self) -> None:
        assert self._connection is not None
        with self._file:
            try:
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


class SQLiteQueue(Queue):
    """One connection to the queue in an SQLite file.  ``deadline`` bounds how long a call waits for a lock."""

    def __init__(
        self,
        path: str | Path,
        run_dir: str | Path,
        deadline: float = 5.0,
        clock: Clock | None = None,
        file: _File | None = None,
    ) -> None:
        self._file = file if file is not None else _File(Path(path), Path(run_dir), deadline, clock or Clock())
        self._clock = self._file.clock
        self._file.connections += 1
        self._holder = f"{self._file.token}:{self._file.connections}"
        self._socket: socket.socket | None = None
        self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._tubes: tuple[str, ...] | None = None
        self._done: int | None = None
        self._answer: Reservation | None = None
        self._look_at = 0.0

    def another(self) -> Queue:
        return SQLiteQueue(self._file.path, self._file.notices.parent, self._file.deadline, file=self._file)

    # Putting

    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        now = self._clock.now()
        rows = [
            (
                p.tube,
                p.body,
                p.priority,
                p.ttr,
                "delayed" if p.delay > 0 else "ready",
                now + p.delay if p.delay > 0 else None,
            )
            for p in puts
        ]
        try:
            with self._file.transaction as connection:
                connection.executemany(
                    "INSERT INTO entries (tube, body, priority, ttr, state, due) VALUES (?, ?, ?, ?, ?, ?)", rows
                )
        except QueueUnavailable as error:
            return [error] * len(puts)
        self._notify()
        return [None] * len(puts)

    # Reserving

    def together(self) -> AbstractContextManager[object]:
        return self._file.transaction

    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        self._done = done.identity if isinstance(done, SQLiteReservation) else None
        self._look_at = 0.0
        if wait:
            self._listen()
            self._tubes = tuple(tubes)
        else:
            self._answer = self._reserve(tuple(tubes))

    def take(self) -> Reservation | Pending | None:
        if self._tubes is None:
            answer, self._answer = self._answer, None
            return answer
        self._drain_notices()
        # Without the lock that writers need: mostly there is nothing.
        found = self._reserve(self._tubes) if self._anything(self._tubes) else None
        if found is None:
            self._delete_done()
            return PENDING
        self._tubes = None
        return found

    def withdraw(self) -> None:
        self._tubes = None
        answer, self._answer = self._answer, None
        # What the queue does not take now it repairs itself: entries come back after their TTR.
        with suppress(QueueError):
            self._delete_done()
        if answer is not None:
            with suppress(QueueError):
                answer.release()

    def fileno(self) -> int:
        return self._listen().fileno()

    def look_within(self) -> float:
        return max(0.0, self._look_at - time.monotonic())

    def _reserve(self, tubes: tuple[str, ...]) -> SQLiteReservation | None:
        now = self._clock.now()
        self._file.hold(self._holder)
        with self._file.transaction as connection:
            self._file.free_those_of_the_dead(connection)
            self._ripen(connection, now)
            if self._done is not None:
                connection.execute(f"DELETE FROM entries {_HELD}", (self._done, self._holder, now))
            best = self._most_urgent(connection, tubes)
            if best is not None:
                _, identity, body, ttr = best
                connection.execute(
                    "UPDATE entries SET state = 'reserved', due = ?, holder = ? WHERE id = ?",
                    (now + ttr, self._holder, identity),
                )
        self._file.forget_the_dead()
        self._done = None
        return None if best is None else SQLiteReservation(body, self, identity)

    @staticmethod
    def _most_urgent(connection: sqlite3.Connection, tubes: tuple[str, ...]) -> tuple[int, int, bytes, float] | None:
        """Return priority, id, body and TTR of the entry that is to be reserved next."""
        found: list[tuple[int, int, bytes, float]] = []
        for start in range(0, len(tubes), _TUBES):
            part = tubes[start : start + _TUBES]
            found += connection.execute(" UNION ALL ".join([_FIRST] * len(part)), part)
        return min(found, default=None)

    def _delete_done(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            with suppress(ReservationLost):
                self.change(done, "DELETE FROM entries")

    def _anything(self, tubes: tuple[str, ...]) -> bool:
        """Look without taking the write lock, and set when to look again."""
        now = self._clock.now()
        self._look_at = time.monotonic() + _FALLBACK
        with self._file:
            connection = self._file.connection()
            row = connection.execute("SELECT min(due) FROM entries WHERE due IS NOT NULL").fetchone()
            if row[0] is not None:
                if row[0] <= now:
                    return True
                self._look_at = min(self._look_at, time.monotonic() + row[0] - now)
            return self._most_urgent(connection, tubes) is not None or self._file.somebody_died()

    @staticmethod
    def _ripen(connection: sqlite3.Connection, now: float) -> None:
        connection.execute(
            "UPDATE entries SET state = 'ready', due = NULL, holder = NULL WHERE due IS NOT NULL AND due <= ?", (now,)
        )

    # The other verbs

    def change(self, identity: int, statement: str, *values: object) -> None:
        """Run a statement on an entry that this connection holds; ``ReservationLost`` if it does not."""
        with self._file.transaction as connection:
            done = connection.execute(
                f"{statement} {_HELD}",
                (*values, identity, self._holder, self._clock.now()),
            )
        if done.rowcount == 0:
            raise ReservationLost(f"entry {identity}")

    def extend(self, identity: int) -> None:
        """Begin the TTR of a held entry anew."""
        self.change(identity, "UPDATE entries SET due = ttr + ?", self._clock.now())

    def give_back(self, identity: int, delay: float, priority: int | None) -> None:
        """Make a held entry ready again after ``delay``."""
        state, due = ("delayed", self._clock.now() + delay) if delay > 0 else ("ready", None)
        self.change(
            identity,
            "UPDATE entries SET state = ?, due = ?, priority = coalesce(?, priority), holder = NULL",
            state,
            due,
            priority,
        )
        self._notify()

    def where(self, identity: int) -> tuple[str, int]:
        """Return the tube and the priority of an entry."""
        with self._file.transaction as connection:
            row = connection.execute("SELECT tube, priority FROM entries WHERE id = ?", (identity,)).fetchone()
        if row is None:
            raise ReservationLost("the entry is no longer there")
        return str(row[0]), int(row[1])

    def kick(self, tube: str, count: int) -> int:
        with self._file.transaction as connection:
            for state in ("buried", "delayed"):
                done = connection.execute(
                    "UPDATE entries SET state = 'ready', due = NULL WHERE id IN (SELECT id FROM entries "
                    "WHERE tube = ? AND state = ? ORDER BY id LIMIT ?)",
                    (tube, state, count),
                ).rowcount
                if done:
                    break
        self._notify()
        return done

    def stats(self, tube: str) -> TubeStats:
        with self._file.transaction as connection:
            self._ripen(connection, self._clock.now())
            rows = connection.execute(_COUNTS, {"tube": tube}).fetchall()
        return TubeStats(**dict(rows))

    def peek(self, tube: str) -> bytes | None:
        with self._file.transaction as connection:
            self._ripen(connection, self._clock.now())
            row = connection.execute(_FIRST, (tube,)).fetchone()
        return None if row is None else bytes(row[2])

    def identity(self) -> str:
        with self._file:
            return str(self._file.connection().execute("SELECT text FROM identity").fetchone()[0])

    def close(self) -> None:
        self._tubes = None
        with suppress(QueueUnavailable):
            self._delete_done()
        with suppress(QueueUnavailable), self._file.transaction as connection:
            freed = connection.execute(
                "UPDATE entries SET state = 'ready', due = NULL, holder = NULL WHERE due IS NOT NULL AND holder = ?",
                (self._holder,),
            ).rowcount
            if freed:
                self._notify()
        self._file.let_go(self._holder)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            (self._file.notices / self._name).unlink(missing_ok=True)

    # Notices

    def _listen(self) -> socket.socket:
        if self._socket is None:
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            with self._file:
                directory = self._file.notice_directory()
                try:
                    # Through the descriptor, since the path of a socket is limited to 107 bytes.
                    listener.bind(f"/proc/self/fd/{directory}/{self._name}")
                except BaseException:
                    listener.close()
                    raise
                finally:
                    os.close(directory)
            self._socket = listener
        return self._socket

    def _drain_notices(self) -> None:
        if self._socket is None:
            return
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(16)

    def _notify(self) -> None:
        try:
            directory = self._file.notice_directory()
        except OSError:
            return  # nobody can listen there either; the look once a second finds the entry
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                for name in os.listdir(directory):
                    if not name.endswith(LOCKED):
                        self._send(sender, directory, name)
        except OSError:
            return  # no descriptor is free: likewise
        finally:
            os.close(directory)

    def _send(self, sender: socket.socket, directory: int, name: str) -> None:
        try:
            sender.sendto(b"1", f"/proc/self/fd/{directory}/{name}")
        except (ConnectionRefusedError, FileNotFoundError):
            # Its owner is gone.
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
        except OSError:
            return  # its buffer is full: it has enough to wake up from


@dataclass(slots=True)
class SQLiteReservation(Reservation):
    """An entry held by a connection to the SQLite queue."""

    body: bytes
    _queue: SQLiteQueue
    identity: int

    def touch(self) -> None:
        self._queue.extend(self.identity)

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        self._queue.give_back(self.identity, delay, priority)

    def bury(self) -> None:
        self._queue.change(self.identity, "UPDATE entries SET state = 'buried', due = NULL, holder = NULL")

    def delete(self) -> None:
        self._queue.change(self.identity, "DELETE FROM entries")

    def where(self) -> tuple[str, int]:
        return self._queue.where(self.identity)
