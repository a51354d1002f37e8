"""Account: what has happened in an agent since it last said so: attempts that ended, its own unhandled exceptions."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Mapping
from typing import Any

from zerog.agent.executor import shorten
from zerog.clock import Clock, to_iso
from zerog.master import Ended, word_of
from zerog.outcome import GivenBack, Outcome

#: Exceptions that wait to be said; of more than these the last ones are.
_EXCEPTIONS = 100


class Account:
    """Written in the loop, taken in the thread of the chores."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ended: list[Ended] = []
        self._exceptions: list[Mapping[str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._ended or self._exceptions)

    def ended(self, uuid: str, attempt: int, outcome: Outcome, cancelled: bool) -> None:
        """Note how an attempt ended; what was given back goes on elsewhere, and has not ended here."""
        if isinstance(outcome, GivenBack) and not cancelled:
            return
        word = "cancelled" if cancelled else word_of(outcome)
        self._ended.append(Ended(uuid, attempt, word, self._clock.now()))

    def exception(self, error: BaseException, uuid: str | None) -> None:
        """Note an exception that nobody has foreseen."""
        text = "".join(traceback.format_exception(error))
        entry: dict[str, Any] = {
            "type": type(error).__name__,
            "message": shorten(str(error)),
            "traceback": shorten(text),
            "uuid": uuid,
            "at": to_iso(self._clock.now()),
        }
        with self._lock:
            self._exceptions = [*self._exceptions, entry][-_EXCEPTIONS:]

    def take(self) -> tuple[tuple[Ended, ...], tuple[Mapping[str, Any], ...]]:
        """Return what there is, once."""
        with self._lock:
            exceptions, self._exceptions = self._exceptions, []
        # The loop may append meanwhile: what is taken is what was there.
        count = len(self._ended)
        ended, self._ended[:count] = tuple(self._ended[:count]), []
        return ended, tuple(exceptions)

    def put_back(self, ended: tuple[Ended, ...], exceptions: tuple[Mapping[str, Any], ...]) -> None:
        """Take back what could not be said."""
        self._ended[:0] = ended
        with self._lock:
            self._exceptions = [*exceptions, *self._exceptions][-_EXCEPTIONS:]
