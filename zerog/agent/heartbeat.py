"""Heartbeat: what an agent says of itself, again and again, and what it hears in answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import psutil

from zerog.agent.attempt import Terms
from zerog.agent.usage import Usage
from zerog.clock import Clock
from zerog.exceptions import ZerogError
from zerog.fleet import Assignment
from zerog.master import Heard, Registration
from zerog.orders import Command, Wanted

logger = logging.getLogger(__name__)


class Superior(Protocol):
    """Whom an agent answers to: a Master in this process, or one at the other end of HTTP."""

    def hear(self, news: Registration) -> Heard:
        """Take what the agent says of itself."""

    def wanted(self, id: str) -> Wanted:
        """Return what is wanted of the agent."""

    def acknowledge(self, id: str, number: int, state: str, message: str | None) -> Command:
        """Take what the agent made of a command."""


class Heartbeat:
    """Says what there is to say: at once what has changed, at most once a second, and all of it in each heartbeat.

    ``say`` is called in the thread of the chores, ``heard`` in the loop.
    """

    def __init__(
        self, superior: Superior, registration: Registration, terms: Terms, clock: Clock, usage: Usage | None
    ) -> None:
        self._superior = superior
        self._registration = registration
        self._terms = terms
        self._clock = clock
        self._usage = usage
        self._said: object = None
        self._next = 0.0
        self._lock = threading.Lock()
        self._heard: list[Heard] = []
        #: Whether it was heard once: before, nothing may be taken.
        self.registered = False

    def say(self, state: str, superseded: int, assignments: Sequence[Assignment], own: bool = False) -> bool:
        """Say it if it is due; return whether there is something to be heard in answer.

        ``own`` says it in any case, and without looking at the machine.
        """
        now = self._clock.monotonic()
        account = self._terms.account
        news = (state, superseded, tuple(assignments))
        if not own and news == self._said and now < self._next and not account:
            return False
        usage = self._measured() if not own else None
        ended, exceptions = account.take()
        said = replace(
            self._registration,
            state=state,
            superseded=superseded,
            assignments=tuple(assignments),
            ended=ended,
            exceptions=exceptions,
            usage=usage,
        )
        try:
            heard = self._superior.hear(said)
        except ZerogError:
            account.put_back(ended, exceptions)
            raise
        self._said, self._next = news, now + (heard.record.heartbeat or 1.0)
        first, self.registered = not self.registered, True
        with self._lock:
            self._heard.append(heard)
        return first or bool(heard.wanted.pending or heard.superseded)

    def _measured(self) -> Mapping[str, Any] | None:
        """Return what is used; what cannot be measured now is not said."""
        try:
            return self._usage.measure() if self._usage is not None else None
        except (OSError, psutil.Error) as error:
            logger.info("what it uses cannot be measured: %s", error)
            return None

    def heard(self) -> list[Heard]:
        """Return what was heard since the last call."""
        if not self._heard:
            return []
        with self._lock:
            heard, self._heard = self._heard, []
        return heard
