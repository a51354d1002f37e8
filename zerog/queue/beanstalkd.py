"""The beanstalkd queue, through greenstalk.

greenstalk has no timeouts and blocks in ``readline``; here its replies come through a buffer of ours, so that a reply
can be looked for without waiting and every wait has a deadline.  After any doubt the connection is thrown away.
"""

from __future__ import annotations

import ipaddress
import math
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import greenstalk

from zerog.exceptions import QueueError, QueueUnavailable, ReservationLost
from zerog.queue.base import PENDING, Pending, Put, Queue, Reservation, TubeStats

#: Seconds after which a waiting reserve is asked anew, which also shows whether the server is still there.
_RESERVE_SECONDS = 20
_RESERVE_WAITING = b"reserve-with-timeout %d\r\n" % _RESERVE_SECONDS
_RESERVE_READY = b"reserve-with-timeout 0\r\n"
_MAX_DELAY = 2**32 - 1
_READ = 65536
#: Commands written before their replies are read; more could fill both sockets' buffers with nobody reading.
_PIPELINE = 500


class _Replies:
    """Reads a socket like a file, with a deadline, and can say whether a whole line is there."""

    def __init__(self, end: socket.socket, deadline: float) -> None:
        self._socket = end
        self._deadline = deadline
        self._buffer = bytearray()

    def readline(self) -> bytes:
        """Return a line; ``TimeoutError`` if it does not come in time."""
        until = time.monotonic() + self._deadline
        while (end := self._buffer.find(b"\n")) < 0:
            self._wait(until)
        return self._cut(end + 1)

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes; ``TimeoutError`` if they do not come in time."""
        until = time.monotonic() + self._deadline
        while len(self._buffer) < size:
            self._wait(until)
        return self._cut(size)

    def fill(self) -> None:
        """Take what is there without waiting."""
        try:
            # Past the socket object, which would wait for its timeout; the descriptor itself never blocks.
            data = os.read(self._socket.fileno(), _READ)
        except BlockingIOError:
            return
        self._take(data)

    def lines(self) -> int:
        """Return how many whole lines are there."""
        return self._buffer.count(b"\r\n")

    def peek(self, size: int) -> bytes:
        """Return the first bytes without taking them."""
        return bytes(self._buffer[:size])

    def __len__(self) -> int:
        return len(self._buffer)

    def close(self) -> None:
        """Do nothing: the socket is closed by its owner."""

    def _wait(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0 or not _readable(self._socket, left):
            raise TimeoutError("no reply in time")
        self._take(self._socket.recv(_READ))

    def _take(self, data: bytes) -> None:
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def _cut(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data


def _readable(end: socket.socket, seconds: float) -> bool:
    """Wait until a socket is readable; with poll, since select knows no descriptors above 1,023."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))


class _Client(greenstalk.Client):  # type: ignore[misc]
    """greenstalk's client over ``_Replies``, and commands whose replies are read later."""

    def __init__(self, end: socket.socket, deadline: float) -> None:
        super().__init__(end, encoding=None)
        reader: Any = self._reader
        reader.close()
        self.replies = _Replies(end, deadline)
        self._reader: Any = self.replies
        self._sock.settimeout(deadline)

    def write(self, commands: bytes) -> None:
        """Send commands without reading a reply."""
        self._sock.sendall(commands)

    def reply(self, expected: bytes) -> list[bytes]:
        """Read one reply; raises as greenstalk does."""
        line = self.replies.readline()
        status, *values = line.split() or [b""]
        if status == expected:
            return values
        raise greenstalk.ERROR_RESPONSES.get(status, greenstalk.UnknownResponseError)(*_arguments(status, values))

    def ended(self) -> bool:
        """Return whether the server has closed the connection.  Only asked while no reply is due: whatever else comes
        then is doubtful too."""
        return len(self.replies) > 0 or _readable(self._sock, 0)

    def fileno(self) -> int:
        """Return the descriptor of the connection."""
        return int(self._sock.fileno())


def _arguments(status: bytes, values: list[bytes]) -> tuple[Any, ...]:
    return (values,) if status in greenstalk.ERROR_RESPONSES else (status, values)


class _Errors:
    """A block in which foreign errors become ours, and after which nothing doubtful is used again.

    A class and no generator: it is entered for every command.
    """

    __slots__ = ("_queue",)

    def __init__(self, queue: BeanstalkdQueue) -> None:
        self._queue = queue

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, greenstalk.Error, AssertionError, ValueError, IndexError)):
            raise self._queue.doubt(error) from error


class BeanstalkdQueue(Queue):
    """One connection to beanstalkd.  ``address`` is (host, port) or the path of a UNIX socket."""

    def __init__(self, address: tuple[str, int] | str, deadline: float = 5.0) -> None:
        self._address = address
        self._deadline = deadline
        self._client: _Client | None = None
        self._using: str | None = None
        self._watching: frozenset[str] = frozenset()
        self._errors = _Errors(self)
        self._asked_until: float | None = None
        self._deleting = False
        self._waiting = False
        #: The answer to an ``ask`` that another command had to read first.
        self._answer: Reservation | None = None

    def another(self) -> Queue:
        return BeanstalkdQueue(self._address, self._deadline)

    # Putting

    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        results: list[QueueError | None] = []
        for start in range(0, len(puts), _PIPELINE):
            results += self._put_some(puts[start : start + _PIPELINE])
        return results

    def _put_some(self, puts: Sequence[Put]) -> list[QueueError | None]:
        results: list[QueueError | None] = []
        try:
            with self._errors:
                client = self._connected()
                client.write(self._put_commands(puts))
                for expected, put in self._expected:
                    error = self._put_reply(client, expected)
                    if put:
                        results.append(error)
        except QueueUnavailable as error:
            self._using = None
            return results + [error] * (len(puts) - len(results))
        return results

    def _put_commands(self, puts: Sequence[Put]) -> bytes:
        """Return the puts of one go, with a ``use`` wherever the tube changes."""
        commands = bytearray()
        self._expected: list[tuple[bytes, bool]] = []
        for put in puts:
            if put.tube != self._using:
                self._using = put.tube
                commands += b"use %b\r\n" % _tube(put.tube)
                self._expected.append((b"USING", False))
            commands += b"put %d %d %d %d\r\n%b\r\n" % (
                _priority(put.priority), _delay(put.delay), max(1, _delay(put.ttr)), len(put.body), put.body,
            )  # fmt: skip
            self._expected.append((b"INSERTED", True))
        return bytes(commands)

    @staticmethod
    def _put_reply(client: _Client, expected: bytes) -> QueueError | None:
        try:
            client.reply(expected)
        except (greenstalk.BuriedError, greenstalk.DrainingError, greenstalk.JobTooBigError,
                greenstalk.OutOfMemoryError, greenstalk.InternalError) as error:  # fmt: skip
            return QueueUnavailable(f"beanstalkd refuses the entry: {type(error).__name__}")
        return None

    # Reserving

    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        with self._errors:
            client = self._connected()
            self._watch(client, frozenset(tubes))
            command = _RESERVE_WAITING if wait else _RESERVE_READY
            self._deleting = isinstance(done, BeanstalkdReservation) and done.client is client
            if self._deleting:
                assert isinstance(done, BeanstalkdReservation)
                command = b"delete %d\r\n" % done.identity + command
            client.write(command)
            self._waiting = wait
            self._asked_until = time.monotonic() + (_RESERVE_SECONDS if wait else 0) + self._deadline

    def _watch(self, client: _Client, tubes: frozenset[str]) -> None:
        if tubes == self._watching:
            return
        for tube in sorted(tubes - self._watching):
            _tube(tube)
            client.watch(tube)
        for tube in sorted((self._watching or frozenset({"default"})) - tubes):
            client.ignore(tube)
        self._watching = tubes

    def take(self) -> Reservation | Pending | None:
        if self._asked_until is None:
            answer, self._answer = self._answer, None
            return answer
        with self._errors:
            client = self._client
            if client is None:
                raise QueueUnavailable("the connection to beanstalkd was lost")
            client.replies.fill()
            if not self._reply_complete(client.replies):
                if time.monotonic() > self._asked_until:
                    raise TimeoutError("no reply in time")
                return PENDING
            return self._read_reply(client)

    def _reply_complete(self, replies: _Replies) -> bool:
        """Return whether the reply to the reserve is there as a whole, behind that to a delete."""
        needed = 1 + self._deleting
        if replies.lines() < needed:
            return False
        lines = replies.peek(4096).split(b"\r\n")
        line = lines[needed - 1]
        if not line.startswith(b"RESERVED "):
            return True
        length = sum(len(one) + 2 for one in lines[:needed]) + int(line.split()[2]) + 2
        return len(replies) >= length

    def _read_reply(self, client: _Client) -> Reservation | None:
        if self._deleting:
            self._deleting = False
            with suppress(greenstalk.NotFoundError):
                client.reply(b"DELETED")
        self._asked_until = None
        try:
            identity, size = client.reply(b"RESERVED")
        except (greenstalk.TimedOutError, greenstalk.DeadlineSoonError):
            return None
        body = client.replies.read(int(size) + 2)[:-2]
        return BeanstalkdReservation(body, self, client, int(identity))

    def fileno(self) -> int:
        if self._client is None:
            raise QueueUnavailable("there is no connection to beanstalkd")
        return self._client.fileno()

    def look_within(self) -> float:
        if self._asked_until is None:
            return 0.0
        return max(0.0, self._asked_until - time.monotonic())

    def withdraw(self) -> None:
        # A reserve cannot be taken back; the server gives back what it may be handing out.
        if self._asked_until is not None or self._answer is not None:
            self._drop()

    # The other verbs

    def command(self, client: object, text: bytes, expected: bytes) -> None:
        """Send a command on an entry that ``client`` reserved; ``ReservationLost`` if it is not held any more."""
        with self._errors:
            connected = self._holding(client)
            try:
                connected.write(text)
                connected.reply(expected)
            except greenstalk.NotFoundError:
                raise ReservationLost("the entry is no longer reserved by this connection") from None

    def where(self, client: object, identity: int) -> tuple[str, int]:
        """Return the tube and the priority of an entry that ``client`` reserved."""
        with self._errors:
            connected = self._holding(client)
            try:
                found = connected.stats_job(identity)
                return str(found["tube"]), int(found["pri"])
            except greenstalk.NotFoundError:
                raise ReservationLost("the entry is no longer there") from None

    def _holding(self, client: object) -> _Client:
        """Return the client if it still is the one that holds the entry, with nothing unread before its next reply."""
        # First by itself: to connect anew only to say so could take long.
        if client is not self._client or client is not (connected := self._connected()):
            raise ReservationLost("the connection that held the entry is gone")
        if self._asked_until is not None and not self._waiting:
            self._answer = self._read_reply(connected)
        return connected

    def kick(self, tube: str, count: int) -> int:
        with self._errors:
            client = self._connected()
            self._using = tube
            _tube(tube)
            client.use(tube)
            return int(client.kick(min(max(count, 0), 2**31)))

    def stats(self, tube: str) -> TubeStats:
        _tube(tube)
        with self._errors:
            client = self._connected()
            try:
                found = client.stats_tube(tube)
            except greenstalk.NotFoundError:
                return TubeStats()
        return TubeStats(
            found["current-jobs-ready"],
            found["current-jobs-reserved"],
            found["current-jobs-delayed"],
            found["current-jobs-buried"],
        )

    def peek(self, tube: str) -> bytes | None:
        _tube(tube)
        with self._errors:
            client = self._connected()
            self._using = tube
            client.use(tube)
            try:
                return bytes(client.peek_ready().body)
            except greenstalk.NotFoundError:
                return None

    def identity(self) -> str:
        with self._errors:
            client = self._connected()
            return str(client.stats()["id"])

    def close(self) -> None:
        self._drop()

    def warnings(self) -> Iterable[str]:
        if isinstance(self._address, tuple) and not _is_loopback(self._address[0]):
            yield (
                f"beanstalkd at {self._address[0]} speaks to anyone who connects and without encryption: "
                "use loopback, a UNIX socket or a tunnel"
            )
        try:
            with self._errors:
                client = self._connected()
                stats = client.stats()
        except QueueUnavailable:
            return
        if stats["binlog-current-index"] == 0:
            yield "beanstalkd runs without a binlog (-b): its restart empties the queue, and the sweep fills it again"
        elif not self._syncs(int(stats["pid"])):
            yield "beanstalkd does not sync each put (-f0), or runs elsewhere: a crash of its host may lose entries"

    @staticmethod
    def _syncs(pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            return False
        return b"beanstalkd" in arguments[0] and (
            b"-f0" in arguments or (b"-f" in arguments and arguments[arguments.index(b"-f") + 1] == b"0")
        )

    # Connections

    def _connected(self) -> _Client:
        """Return the client, connected; to be called inside ``self._errors``.

        A connection that the server has closed since its last use says nothing of the server now: it may have been
        restarted, and each of a process's many connections would tell of that one restart again, each at its own time.
        """
        if self._client is not None and self._asked_until is None and self._client.ended():
            self._drop()
        if self._client is None:
            self._client = self._connect()
        return self._client

    def _connect(self) -> _Client:
        if isinstance(self._address, str):
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            end.settimeout(self._deadline)
            try:
                end.connect(self._address)
            except BaseException:
                end.close()
                raise
        else:
            end = socket.create_connection(self._address, self._deadline)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return _Client(end, self._deadline)

    def doubt(self, error: Exception) -> QueueUnavailable:
        """Throw the connection away after a foreign error, and return ours."""
        self._drop()
        return QueueUnavailable(f"beanstalkd at {self._shown()}: {_text(error)}")

    def _shown(self) -> str:
        return self._address if isinstance(self._address, str) else f"{self._address[0]}:{self._address[1]}"

    def _drop(self) -> None:
        client, self._client = self._client, None
        self._using, self._watching, self._asked_until, self._deleting = None, frozenset(), None, False
        self._answer = None
        if client is not None:
            client.close()


@dataclass(slots=True, eq=False)
class BeanstalkdReservation(Reservation):
    """An entry that one connection to beanstalkd reserved."""

    body: bytes
    queue: BeanstalkdQueue
    client: object
    identity: int

    def touch(self) -> None:
        self.queue.command(self.client, b"touch %d\r\n" % self.identity, b"TOUCHED")

    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        if priority is None:
            _, priority = self.where()
        text = b"release %d %d %d\r\n" % (self.identity, _priority(priority), _delay(delay))
        self.queue.command(self.client, text, b"RELEASED")

    def bury(self) -> None:
        self.queue.command(self.client, b"bury %d 1000\r\n" % self.identity, b"BURIED")

    def delete(self) -> None:
        self.queue.command(self.client, b"delete %d\r\n" % self.identity, b"DELETED")

    def where(self) -> tuple[str, int]:
        return self.queue.where(self.client, self.identity)


def _tube(name: str) -> bytes:
    """Return a tube's name as bytes; what beanstalkd would read as something else never reaches it."""
    text = name.encode("ascii", "strict")
    if not 1 <= len(text) <= 200 or not all(
        c in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._" for c in text
    ):
        raise ValueError(f"{name!r} is no tube's name")
    return text


def _priority(value: int) -> int:
    return min(max(int(value), 0), 2**32 - 1)


def _delay(value: float) -> int:
    return min(max(math.ceil(value), 0), _MAX_DELAY)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
