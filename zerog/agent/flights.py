"""Flights: what an agent's slots say on its way to a master, while the loop goes on.

A step of a slot says what it wants to say without sending it; what several slots say goes as one flight, in a thread
of its own.  Until it has landed these slots take no other step, and everything else about them goes on: limits,
cancels, what their children say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from zerog.agent.attempt import Attempt
from zerog.agent.slot import Slot
from zerog.exceptions import StoreUnavailable, ZerogError
from zerog.fleet import Assignment
from zerog.remote import Flight, Remote

#: Flights at a time: while one waits for a master the next one gathers what the other slots say.
_AT_ONCE = 1

#: Seconds for which what one slot says waits for others at most, and those that a job may take to be waited for.
_HOLD, _SHORT = 0.003, 0.005
#: Jobs that are at hand at most while short ones run, and seconds after which those that nobody has begun go back.
_AT_HAND, _STALE = 16, 0.05
#: Seconds between two turns at least: while no further flight can begin, and while one waits for others.
_IN_FLIGHT, _MOMENT = 0.02, 0.001

Followup = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Passenger:
    """A slot, the attempt that it speaks for, and what is to be done when that is known."""

    slot: Slot
    attempt: Attempt | None
    followup: Followup


class Flights:
    """``begin`` and ``land`` are called in the loop; ``landed`` wakes it."""

    def __init__(self, remote: Remote, landed: Callable[[], None]) -> None:
        self._remote = remote
        self._landed = landed
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="flights")
        self._under_way = 0
        self._held_since: float | None = None
        self._arrived: deque[tuple[list[_Passenger], Exception | None]] = deque()

    def at_hand(self) -> list[Assignment]:
        """Return what the agent was given and no slot has begun."""
        now = self._remote.clock.now()
        return [Assignment(one["uuid"], one["attempt"], now) for one in list(self._remote.ready)]

    @property
    def takes(self) -> bool:
        """Whether the agent takes further jobs."""
        return self._remote.takes

    @takes.setter
    def takes(self, takes: bool) -> None:
        self._remote.takes = takes

    @property
    def stale_at(self) -> float:
        """When what is at hand is to go back, on the monotonic clock; a job takes longer than those before it."""
        return self._remote.ready_at + _STALE if self._remote.ready else float("inf")

    def tidy(self, now: float) -> None:
        """Give back what is at hand and was not begun: others may begin it."""
        if now >= self.stale_at:
            self._remote.plenty = False
            self._remote.return_ready()

    def let_go(self, slots: Sequence[Slot]) -> list[Slot]:
        """Let what has ended leave its slot where something at hand can go on in it; returns what has left.

        Otherwise the children would do nothing while the ends of short jobs are on their way.
        """
        free = len(self._remote.ready) if self.takes else 0
        return [slot.let_go() for slot in [slot for slot in slots if slot.may_let_go][:free]]

    def least(self) -> float:
        """Return the seconds after which the loop turns at the earliest if nothing happens."""
        if self.full:
            return _IN_FLIGHT
        return _MOMENT if self._held_since is not None else 0.0

    def holds(self, slots: Sequence[Slot], all_of_them: Sequence[Slot], now: float) -> bool:
        """Return whether what some slots want to say waits a moment for what others will say soon.

        A request costs as much for one as for many: short jobs that end one after another go together.
        """
        says = [slot for slot in slots if not slot.claims]
        if not says or self.full:
            self._held_since = None
            return False
        if len(says) >= len(all_of_them):
            self._held_since = None
            return False
        soon = any(slot.says_soon(now, _SHORT) or (slot.idle and self._remote.ready) for slot in all_of_them)
        if not soon or (self._held_since is not None and now - self._held_since >= _HOLD):
            self._held_since = None
            return False
        self._held_since = self._held_since if self._held_since is not None else now
        return True

    @property
    def full(self) -> bool:
        """Whether no further flight can begin now."""
        return self._under_way >= _AT_ONCE

    def begin(
        self,
        slots: Sequence[Slot],
        all_of_them: Sequence[Slot],
        step: Callable[[Slot], Followup],
        follow: Callable[[Slot, Followup], None],
    ) -> None:
        """Let slots take a step; what they say goes together, if there is a way free for it."""
        flight, passengers = Flight(), []
        for slot in slots:
            if self.full and not slot.claims:
                continue  # it goes with the next one
            followup, said = self._remote.gather(lambda slot=slot: step(slot))  # type: ignore[misc]
            if said is None:
                follow(slot, followup)
                continue
            flight.add(said)
            slot.in_flight = True
            passengers.append(_Passenger(slot, slot.attempt, followup))
        if passengers:
            flight.want = self._want([one.slot for one in passengers], all_of_them)
            self._under_way += 1
            self._pool.submit(self._fly, flight, passengers)

    def _want(self, flying: Sequence[Slot], all_of_them: Sequence[Slot]) -> int:
        """Return how many jobs are wanted: one for each slot that is free then, and some at hand where all are short
        and there is plenty."""
        ends = [slot for slot in flying if slot.ends]
        free = sum(slot in flying if slot.ends else slot.idle for slot in all_of_them)
        short = self._remote.plenty and all(slot.last_run < _SHORT for slot in ends)
        at_hand = min(_AT_HAND, 2 * len(ends)) if short else 0
        return max(0, free + at_hand - len(self._remote.ready)) if ends else 0

    def _fly(self, flight: Flight, passengers: list[_Passenger]) -> None:
        error: Exception | None = None
        try:
            self._remote.send(flight)
        except Exception as caught:  # told in the loop, where somebody answers for it
            error = caught
        self._arrived.append((passengers, error))
        self._landed()

    def land(self, follow: Callable[[Slot, Followup], None]) -> StoreUnavailable | None:
        """Do what waited for the flights that have landed; returns what kept one from being heard, if anything."""
        lost: StoreUnavailable | None = None
        while self._arrived:
            passengers, error = self._arrived.popleft()
            self._under_way -= 1
            for one in passengers:
                one.slot.in_flight = False
                if one.slot.attempt is not one.attempt:
                    continue  # it was taken from the slot meanwhile
                if error is None:
                    follow(one.slot, one.followup)
                elif not isinstance(error, StoreUnavailable):
                    follow(one.slot, _raises(error))
            if isinstance(error, StoreUnavailable):
                lost = error
        return lost

    def close(self) -> None:
        """Wait for no further flight."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _raises(error: Exception) -> Followup:
    """Return what raises an error where the slot's own steps would have."""

    def followup() -> None:
        if isinstance(error, ZerogError):
            raise error
        raise RuntimeError("what was to be said could not be sent") from error

    return followup
