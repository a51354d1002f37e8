"""The queue contract: beanstalkd's verbs.

The queue is a hint, the store is the truth (A3): a queue may lose, repeat, delay and reorder anything.  Obligations of
every adapter; ``tests/contract/test_queue.py`` holds each of them to it.

* **Order**: a lower priority number is more urgent; among equals the older entry comes first.
* **A reservation is a promise with a deadline**: not touched for its TTR, an entry becomes ready again.  ``close``
  gives back everything that this connection reserved.  Only the connection that reserved an entry may touch, release,
  bury or delete it; when the promise is gone these raise ``ReservationLost``.
* **Waiting is not polling**: a waiting connection learns of an entry at once.
* **Every call has a deadline**, a number of seconds given at construction, also on a half-open connection.  After any
  doubt (a timeout, a torn reply) the connection is thrown away and remade by the next call: what it held is lost, and
  its ``Reservation`` objects raise ``ReservationLost``.
* **No foreign exception leaves an adapter**: only ``QueueUnavailable`` and ``ReservationLost``.
* **One thread** uses a connection.  ``another`` makes a further one, for the same thread.

Delays and times are in seconds; an adapter may round a delay up to whole seconds, never down.
"""

from __future__ import annotations

import enum
import math
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from zerog.exceptions import QueueError


class Pending(enum.Enum):
    """The type of ``PENDING``: ``take`` has nothing to say yet."""

    PENDING = enum.auto()


PENDING = Pending.PENDING


@dataclass(frozen=True, slots=True)
class Put:
    """One entry to be put into a tube."""

    tube: str
    body: bytes
    priority: int = 1000
    delay: float = 0.0
    ttr: float = 30.0


@dataclass(frozen=True, slots=True)
class TubeStats:
    """How many entries of a tube are in which state."""

    ready: int = 0
    reserved: int = 0
    delayed: int = 0
    buried: int = 0

    def plus(self, other: TubeStats) -> TubeStats:
        """Return the counts of two tubes together."""
        return TubeStats(
            self.ready + other.ready,
            self.reserved + other.reserved,
            self.delayed + other.delayed,
            self.buried + other.buried,
        )


class Reservation(ABC):
    """An entry that this connection holds until its deadline.  ``body`` is what was put, ``tube`` where."""

    body: bytes

    @abstractmethod
    def touch(self) -> None:
        """Begin the TTR anew."""

    @abstractmethod
    def release(self, delay: float = 0.0, priority: int | None = None) -> None:
        """Give the entry back, ready after ``delay``, with another priority or with the one that it has."""

    @abstractmethod
    def bury(self) -> None:
        """Put the entry aside, where only ``kick`` brings it back."""

    @abstractmethod
    def delete(self) -> None:
        """Remove the entry."""

    @abstractmethod
    def where(self) -> tuple[str, int]:
        """Return the tube in which the entry lies, and its priority."""


class Queue(ABC):
    """One connection to a queue.  The module's docstring states the obligations."""

    #: Whether it may be asked while a job runs: what comes can be given back for nothing.
    asks_ahead = True

    @abstractmethod
    def put_all(self, puts: Sequence[Put]) -> list[QueueError | None]:
        """Put many entries in one go; for each ``None``, or why it may not be in the queue."""

    def put(self, put: Put) -> None:
        """Put one entry."""
        error = self.put_all([put])[0]
        if error is not None:
            raise error

    @abstractmethod
    def ask(self, tubes: Sequence[str], done: Reservation | None = None, wait: bool = True) -> None:
        """Ask for one entry of any of the tubes, deleting the entry ``done`` on the way; ``take`` has the answer.

        Between ``ask`` and an answer other than ``PENDING`` nothing else may be asked of this connection, unless
        ``wait`` is false: then the answer is what is ready now, ``None`` included, and other entries that this
        connection holds may be touched, released, buried or deleted before it is taken.  A deletion that finds nothing
        is normal.
        """

    def together(self) -> AbstractContextManager[object]:
        """Return a block in which the questions of connections made by ``another`` share what a commit costs.

        When its end raises ``QueueUnavailable`` none of them was answered.
        """
        return nullcontext()

    @abstractmethod
    def take(self) -> Reservation | Pending | None:
        """Return, without waiting, what was asked for: an entry, ``PENDING``, or ``None`` if it must be asked again."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor that is readable when ``take`` may have something to say; ``ask`` can change it."""

    @abstractmethod
    def look_within(self) -> float:
        """Return after how many seconds ``take`` must be called even if the descriptor stays silent."""

    def reserve(self, tubes: Sequence[str], timeout: float) -> Reservation | None:
        """Wait up to ``timeout`` seconds for an entry; ``None`` when none came.  Blocks."""
        end = time.monotonic() + timeout
        self.ask(tubes)
        while True:
            answer = self.take()
            if isinstance(answer, Reservation):
                return answer
            left = end - time.monotonic()
            if left <= 0:
                self.withdraw()
                return None
            if answer is None:
                self.ask(tubes)
            poll = select.poll()
            poll.register(self.fileno(), select.POLLIN)
            poll.poll(math.ceil(1000 * max(0.0, min(left, self.look_within()))))

    @abstractmethod
    def withdraw(self) -> None:
        """Stop asking.  An entry that was on its way is given back, at the latest after its TTR; this never raises."""

    @abstractmethod
    def kick(self, tube: str, count: int) -> int:
        """Make up to ``count`` buried (or, if there are none, delayed) entries ready; returns how many."""

    @abstractmethod
    def stats(self, tube: str) -> TubeStats:
        """Return how many entries of a tube are in which state."""

    @abstractmethod
    def peek(self, tube: str) -> bytes | None:
        """Return what the most urgent ready entry of a tube holds, without taking it; None if there is none."""

    @abstractmethod
    def identity(self) -> str:
        """Return a text that changes when the queue may have forgotten its entries.  Also the probe: it must answer."""

    @abstractmethod
    def another(self) -> Queue:
        """Return a further connection to the same queue, for the same thread."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is reserved.  May be called twice; the next call opens the connection anew."""

    def warnings(self) -> Iterable[str]:
        """Return what a daemon should say at its start about how safe this queue's settings are."""
        return ()
