"""LeaseWatch: which leases stand still.

A lease is lapsed when its (attempt, claim, sequence) did not move for a whole lease, measured on this process's own
monotonic clock and counting only time in which the store could be read and written: a store that can only be read, as
an SQLite file that somebody has locked, lets nobody renew.  The time written in the lease is for
display: nobody's wall clock decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zerog.clock import Clock
from zerog.record import JobRecord, State


@dataclass(slots=True)
class _Seen:
    attempt: int
    claim: str
    sequence: int
    readable: float  # how long the store had been readable, in all, when this lease was first seen so
    moves: int = 0
    looks: int = 1
    doubted: bool = False


class LeaseWatch:
    """What one thread of this process has seen of others' leases.

    ``lease`` is in seconds.  Call ``heard`` after each read of the store that was answered, at least every
    ``lease / 4`` while something is watched: longer gaps are counted as that much only, so that a process which
    itself was stopped does not judge the others by its own sleep.  Call ``silence`` when a read or a write was not
    answered, and see to it that something is written every ``lease / 3`` while something is watched.
    """

    def __init__(self, clock: Clock, lease: float) -> None:
        self.lease = lease
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._readable = 0.0
        self._last: float | None = None

    @property
    def watched(self) -> list[str]:
        """The UUIDs of the running jobs that are being watched."""
        return list(self._seen)

    def heard(self) -> None:
        """Say that the store was just read."""
        now = self._clock.monotonic()
        if self._last is not None:
            self._readable += min(now - self._last, self.lease / 4)
        self._last = now

    def silence(self) -> None:
        """Say that the store could not be read or written: the time until the next ``heard`` does not count."""
        self._last = None

    def lapsed(self, record: JobRecord) -> bool:
        """Look at a record just read and return whether it runs under a lease that has stood still too long."""
        if record.state is not State.RUNNING or record.lease is None:
            self._seen.pop(record.uuid, None)
            return False
        seen = self._seen.get(record.uuid)
        # Also the claim: after a prune the same key makes a job with the same UUID, whose attempts count from one.
        now = (record.attempt, record.lease.claim, record.lease.sequence)
        if seen is None or (seen.attempt, seen.claim, seen.sequence) != now:
            moves, looks = (seen.moves + 1, seen.looks + 1) if seen is not None else (0, 1)
            self._seen[record.uuid] = _Seen(*now, self._readable, moves, looks)
            return False
        seen.looks += 1
        return self._readable - seen.readable >= self.lease

    def lapsed_for_sure(self, record: JobRecord, prove: Callable[[], None]) -> bool:
        """Do as ``lapsed`` does for who writes nothing between its looks.

        It cannot know whether the store took writes meanwhile, so ``prove`` is called, which raises if it does not,
        and whoever holds the lease gets a third of it more to renew it.
        """
        if not self.lapsed(record):
            return False
        prove()
        seen = self._seen[record.uuid]
        if not seen.doubted:
            seen.doubted = True
            seen.readable = self._readable - self.lease * 2 / 3
            return False
        return True

    def moves(self, uuid: str) -> int:
        """Return how often the lease of this job was seen to move since it is watched."""
        seen = self._seen.get(uuid)
        return seen.moves if seen is not None else 0

    def looks(self, uuid: str) -> int:
        """Return how often this job was looked at since it is watched."""
        seen = self._seen.get(uuid)
        return seen.looks if seen is not None else 0

    def forget(self, uuid: str) -> None:
        """Stop watching a job."""
        self._seen.pop(uuid, None)
