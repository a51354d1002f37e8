"""Standing: the standing orders of an agent: what it was told and does, each command once and in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from zerog.agent.errands import Errands
from zerog.agent.heartbeat import Superior
from zerog.exceptions import StateConflict, Superseded, UnknownResource
from zerog.needs import Limits
from zerog.orders import APPLIED, REFUSED, Command, Wanted

logger = logging.getLogger(__name__)

_NOT_HERE = "the job does not run here"


class Doer(Protocol):
    """What commands do to an agent."""

    def finish(self) -> None:
        """Drain, and end; however often it is said."""

    def cancel(self, uuid: str) -> bool:
        """Cancel a job; False if it does not run here."""

    def modify(self, uuid: str, limits: Mapping[str, Any]) -> bool:
        """Count a job by other needs; False if it does not run here."""


class Standing:
    """What an agent knows of its orders.  Belongs to the loop."""

    def __init__(self, superior: Superior, agent: str, errands: Errands) -> None:
        self._superior = superior
        self._agent = agent
        self._errands = errands
        #: What was asked and is not answered: what is wanted, and whether the last command's end was heard.
        self._asking: Future[Wanted] | None = None
        self._saying: Future[Command] | None = None
        self._wanted = Wanted()
        self._done = 0
        self._look = False
        #: The command that is being done, and what it came to, until that was heard.
        self._current: tuple[Command, str, str | None] | None = None
        #: What is to be done at the end: retire or restart.
        self.then: str | None = None

    @property
    def drained(self) -> bool:
        """Whether it is to take no jobs."""
        return self._wanted.drained

    @property
    def limits(self) -> Limits:
        """The limits that were set from outside."""
        return self._wanted.limits

    def look(self) -> None:
        """Look at the orders at the next turn: somebody says that there is something."""
        self._look = True

    def take(self, wanted: Wanted, anew: bool = False) -> None:
        """Take what is wanted, from the answer to a heartbeat; an older answer may come after a newer one.

        ``anew`` says that the agent was not known: its commands are counted from one again.
        """
        if anew:
            self._done, self._current, self._saying = 0, None, None
        if anew or wanted.last >= self._wanted.last:
            self._wanted = wanted

    def obey(self, doer: Doer) -> bool:
        """Do what is new, one after the other, each when what became of the one before was heard.

        Returns whether there was something.  Raises what an outage of the store raises; then call it again later.
        """
        before = self._done
        self._ask()
        while True:
            if self._current is None:
                command = next((one for one in self._wanted.pending if one.number > self._done), None)
                if command is None:
                    break
                self._current = (command, *self._outcome(command, doer))
                logger.info("command %d: %s: %s", command.number, command.command, self._current[2] or self._current[1])
            command, state, message = self._current
            # What it came to is not found out twice, however often it must be said.
            if not self._is_heard(command.number, state, message):
                break
            self._current, self._done = None, command.number
            if command.command in ("retire", "restart") and state == APPLIED:
                self.then = command.command
                doer.finish()
                break
        return self._done != before

    def _ask(self) -> None:
        """Ask what is wanted if somebody said that there is something, and take the answer when it is there."""
        if self._look and self._asking is None:
            self._look = False
            self._asking = self._errands(partial(self._superior.wanted, self._agent))
        if self._asking is not None and self._asking.done():
            asking, self._asking = self._asking, None
            try:
                self.take(asking.result())
            except Exception:
                self._look = True
                raise

    def _is_heard(self, number: int, state: str, message: str | None) -> bool:
        """Say what a command came to; return whether it was heard."""
        if self._saying is None:
            self._saying = self._errands(partial(self._superior.acknowledge, self._agent, number, state, message))
        if not self._saying.done():
            return False
        saying, self._saying = self._saying, None
        try:
            saying.result()
        except (UnknownResource, StateConflict, Superseded) as error:
            logger.info("command %d is nobody's any more: %s", number, error)
        return True

    def close(self) -> None:
        """Wait for no answer any more."""
        self._errands.close()

    @staticmethod
    def _outcome(command: Command, doer: Doer) -> tuple[str, str | None]:
        """Do what a command says beside what is wanted for good."""
        members: dict[str, Any] = dict(command.members)
        match command.command:
            case "cancel":
                here = doer.cancel(members["uuid"])
            case "modify":
                here = doer.modify(members["uuid"], members.get("limits") or {})
            case _:
                here = True
        return (APPLIED, None) if here else (REFUSED, _NOT_HERE)
