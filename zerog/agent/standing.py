"""Standing: the standing orders of an agent: what it was told and does, each command once and in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from zerog.agent.heartbeat import Superior
from zerog.exceptions import StateConflict, Superseded, UnknownResource
from zerog.needs import Limits
from zerog.orders import APPLIED, REFUSED, Command, Wanted

logger = logging.getLogger(__name__)

_NOT_HERE = "the job does not run here"


class Doer(Protocol):
    """What commands do to an agent."""

    def stop(self) -> None:
        """Drain, and end."""

    def cancel(self, uuid: str) -> bool:
        """Cancel a job; False if it does not run here."""

    def modify(self, uuid: str, limits: Mapping[str, Any]) -> bool:
        """Count a job by other needs; False if it does not run here."""


class Standing:
    """What an agent knows of its orders.  Belongs to the loop."""

    def __init__(self, superior: Superior, agent: str) -> None:
        self._superior = superior
        self._agent = agent
        self._wanted = Wanted()
        self._done = 0
        self._look = False
        #: The number of the last command that was done, and what it came to.
        self._made: tuple[int, str, str | None] | None = None
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
            self._done, self._made = 0, None
        if anew or wanted.last >= self._wanted.last:
            self._wanted = wanted

    def obey(self, doer: Doer) -> bool:
        """Do what is new, one after the other, and say so; raises what an outage of the store raises.

        Returns whether there was something.
        """
        before = self._done
        if self._look:
            self.take(self._superior.wanted(self._agent))
            self._look = False
        for command in self._wanted.pending:
            if command.number <= self._done:
                continue
            if self._made is None or self._made[0] != command.number:
                self._made = (command.number, *self._outcome(command, doer))
                logger.info("command %d: %s: %s", command.number, command.command, self._made[2] or self._made[1])
            _, state, message = self._made  # what it came to is not found out twice, however often it must be said
            try:
                self._superior.acknowledge(self._agent, command.number, state, message)
            except (UnknownResource, StateConflict, Superseded) as error:
                logger.info("command %d is nobody's any more: %s", command.number, error)
            self._done = command.number
            if command.command in ("retire", "restart") and state == APPLIED:
                self.then = command.command
                doer.stop()
                break
        return self._done != before

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
