"""Entries: what one slot holds of the queue.

There are three at most: that of the slot's job, the next one, asked for ahead, and the last one, whose job has ended
and which is to be deleted (R5: the record first, the entry second).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from zerog import failpoints
from zerog.clock import Clock
from zerog.exceptions import QueueUnavailable, ReservationLost
from zerog.queue.base import PENDING, Queue, Reservation

logger = logging.getLogger(__name__)

_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

#: Seconds after which the entry of an ended job is deleted even if there was no question that took it along.
_DELETE_WITHIN = 0.05

#: Seconds for which the entry that came ahead is kept behind a job that takes longer than expected.
_KEEP = 0.005

#: Seconds after which it is looked again whether a question is answered whose answer is to be given back.
_LOOK_AGAIN = 0.02

#: How often an entry without a record is given back before it is deleted, and of how many of them that is known.
_MISSING_LOOKS, _MISSING_KEPT = 3, 1000


class Strays:
    """Entries without a record, which are given back a few times before they are deleted: the record may come yet."""

    def __init__(self) -> None:
        self._looks: dict[str, int] = {}

    def is_over(self, uuid: str) -> bool:
        """Count one more look at an entry; returns whether it was looked at often enough."""
        looks = self._looks.get(uuid, 0) + 1
        if looks > _MISSING_LOOKS:
            self.found(uuid)
            return True
        if len(self._looks) >= _MISSING_KEPT:
            self._looks.clear()  # others have seen to them; the rest is looked at a few times more
        self._looks[uuid] = looks
        return False

    def found(self, uuid: str) -> None:
        """Forget an entry: it has a record, or is deleted."""
        self._looks.pop(uuid, None)


class Entries:
    """The entries of one slot.  ``on_away`` is told when the queue turns out to be away."""

    def __init__(
        self, queue: Queue, clock: Clock, tubes: Sequence[str], on_away: Callable[[QueueUnavailable], None]
    ) -> None:
        self.queue = queue
        #: The tubes that are served now: those of paused types are not.
        self.tubes = tuple(tubes)
        self.current: Reservation | None = None
        self.ahead: Reservation | None = None
        #: A question was asked ahead and is not answered yet; it was asked during this job.
        self.asked_ahead = False
        self.asked_early = False
        #: When what came ahead is given back, and when the last job's entry is deleted by itself; monotonic.
        self.keep_until = float("inf")
        self.delete_at = float("inf")
        self._done: Reservation | None = None
        self._clock = clock
        self._on_away = on_away

    # Asking

    def ask(self) -> None:
        """Ask for the next entry, deleting the last one on the way."""
        self.queue.ask(self.tubes, self._take_done())

    def ask_now(self) -> None:
        """Ask for what is ready now, and no more, deleting the last one on the way."""
        self.queue.ask(self.tubes, self._take_done(), wait=False)

    def ask_ahead(self) -> None:
        """Ask for what is ready now, before the end of the last job is written: its claim can share that commit."""
        self.asked_ahead = self.asked_early = True
        self.keep_until = self._clock.monotonic() + _KEEP
        self.queue.ask(self.tubes, self._take_done(), wait=False)

    @property
    def looks_ahead(self) -> bool:
        """Whether there is something ahead, or may be soon."""
        return self.asked_ahead or self.ahead is not None

    def take(self) -> bool:
        """Take the answer to ``ask``; False while there is none.  An entry that names a job becomes ``current``."""
        answer = self.queue.take()
        if answer is PENDING:
            return False
        self.asked_ahead = False
        if isinstance(answer, Reservation) and self._is_job(answer):
            self.current = answer
        return True

    def take_ahead(self) -> bool:
        """Take the answer to ``ask_ahead`` if it is there; whether an entry that names a job is ``ahead`` since."""
        if not self.asked_ahead:
            return False
        answer = self.queue.take()
        if answer is PENDING:
            return False
        self.asked_ahead = False
        if isinstance(answer, Reservation) and self._is_job(answer):
            self.ahead = answer
            return True
        return False

    def give_ahead_back(self) -> None:
        """Let others have what came ahead."""
        waiting, self.ahead = self.ahead, None
        self.asked_early = False
        if waiting is not None:
            self._quietly(waiting.release)

    def take_ahead_quietly(self) -> bool:
        """Do as ``take_ahead`` does; an answer that cannot be had is none."""
        came = []
        self._quietly(lambda: came.append(self.take_ahead()))
        return any(came)

    def keep_ahead(self, now: float) -> None:
        """Look again in a moment: what was asked ahead cannot be given back yet."""
        self.keep_until = now + _LOOK_AGAIN

    def no_answer(self, error: QueueUnavailable) -> None:
        """Expect no answer to what was asked ahead: the queue is away."""
        self.asked_ahead = False
        self._on_away(error)

    def withdraw(self) -> None:
        """Take back what was asked: a reserve that is still out there would answer in the middle of a later job."""
        self.queue.withdraw()
        self.asked_ahead = False

    def _is_job(self, reservation: Reservation) -> bool:
        """Return whether an entry names a job; R14: another is not ours to run, and not ours to throw away."""
        if _UUID.fullmatch(reservation.body):
            failpoints.hit("run.after_reserve")
            return True
        logger.warning("buried an entry that is no job id: %d bytes", len(reservation.body))
        self._quietly(reservation.bury)
        return False

    # Letting go

    def take_up(self, reservation: Reservation) -> None:
        """Let the entry that was claimed be the current one: it may have come ahead."""
        self.current, self.ahead = reservation, None

    def _go_on(self) -> None:
        """Be done with the current entry, and go on with the one ahead."""
        self.current, self.ahead = self.ahead, None

    def give_back(self, delay: float, priority: int | None, point: str | None = None) -> None:
        """Put the current entry back into the queue and go on; ``delay`` in seconds."""
        reservation = self.current

        def release() -> None:
            if point is not None:
                failpoints.hit(point, QueueUnavailable)
            assert reservation is not None
            reservation.release(delay, priority)

        if reservation is not None:
            self._quietly(release)
        self._go_on()

    def drop(self) -> None:
        """Delete the current entry, with the next question or soon by itself, and go on."""
        self.delete_done()
        self._done = self.current
        self.delete_at = self._clock.monotonic() + _DELETE_WITHIN
        self._go_on()

    def delete_done(self) -> None:
        """Delete the entry of the last job now, if nothing has taken it along yet."""
        done = self._take_done()
        if done is not None:
            self._quietly(done.delete)

    def touch(self) -> None:
        """Keep the current entry reserved."""
        reservation = self.current

        def touch() -> None:
            failpoints.hit("run.touch_lost", ReservationLost)
            assert reservation is not None
            reservation.touch()

        if reservation is not None:
            self._quietly(touch)

    def _take_done(self) -> Reservation | None:
        done, self._done = self._done, None
        self.delete_at = float("inf")
        return done

    def _quietly(self, call: Callable[[], None]) -> None:
        """Do something to an entry.  If the queue is away or the entry is not ours any more, that is no failure of the
        job: the record is written, and R3 and the sweep make the queue fit it."""
        try:
            call()
        except ReservationLost:
            logger.debug("an entry is no longer ours")
        except QueueUnavailable as error:
            self._on_away(error)
