"""The endpoints that tell agents what to do, and hear what became of it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from zerog import views
from zerog.clock import to_iso
from zerog.exceptions import (
    CorruptDocument,
    IdempotencyKeyReused,
    InvalidParameters,
    RequestError,
    StateConflict,
    StoreUnavailable,
    TooBusy,
    UnknownJob,
    UnknownResource,
    ZerogError,
)
from zerog.fleet import SPEAKING, AgentRecord
from zerog.needs import LABEL, MAX_LABELS, is_cpus
from zerog.orders import Command, Wanted
from zerog.server.agents import Body, LimitsBody, Line, Moment, OfAgent, Uuid, check_sees_all, fault
from zerog.server.endpoint import NO_SUCH_JOB, WAIT, Answer, Endpoint, Parameter, ranged
from zerog.server.run import KEY, YEAR, hidden
from zerog.server.watcher import Waiters

#: Commands that one answer has.
_PAGE = 1000

_NUMBER = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)

#: Command → the members that it must have, and those that it may have.
_MEMBERS: dict[str, tuple[set[str], set[str]]] = {
    **{name: (set(), set()) for name in ("drain", "resume", "retire", "restart")},
    "cancel": ({"uuid"}, set()),
    "setLimits": ({"limits"}, set()),
    "modify": ({"uuid"}, {"priority", "notBefore", "limits"}),
}


class NeedsBody(LimitsBody):
    """What a job asks of an agent."""

    labels: Annotated[list[Line], Field(max_length=MAX_LABELS)] | None = None


class CommandBody(Body):
    """A command to an agent, and what belongs to it."""

    command: Literal["drain", "resume", "retire", "restart", "cancel", "setLimits", "modify"]
    uuid: Uuid | None = None
    limits: NeedsBody | None = None
    priority: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    notBefore: Moment | None = None

    def members(self) -> dict[str, Any]:
        """Return what belongs to the command, as it is kept; ``InvalidParameters`` for what does not."""
        must, may = _MEMBERS[self.command]
        own = {"uuid", "limits", "priority", "notBefore"} & self.model_fields_set
        faults = [fault(f"/{name}", "it is required", "missing") for name in sorted(must - own)]
        faults += [fault(f"/{name}", f"it does not belong to {self.command}") for name in sorted(own - must - may)]
        if self.command == "modify" and not own - must:
            faults.append(fault("", "it must have priority, notBefore or limits", "missing"))
        faults += self._limit_faults()
        if faults:
            raise InvalidParameters(faults)
        found: dict[str, Any] = {}
        if self.uuid is not None:
            found["uuid"] = self.uuid.lower()
        if self.limits is not None:
            found["limits"] = self.limits.model_dump(mode="json", exclude_unset=True)
        if self.priority is not None:
            found["priority"] = self.priority
        if "notBefore" in own:
            found["notBefore"] = None if self.notBefore is None else to_iso(self.notBefore)
        return found

    def _limit_faults(self) -> list[dict[str, Any]]:
        faults = []
        for name in ("priority", "limits", "uuid"):
            if name in self.model_fields_set and getattr(self, name) is None:
                faults.append(fault(f"/{name}", "it cannot be null", "type"))
        if self.notBefore is not None and self.notBefore > time.time() + YEAR:
            faults.append(fault("/notBefore", "it must be at most a year ahead", "range"))
        if self.limits is None:
            return faults
        if self.command == "modify":
            said = {name: getattr(self.limits, name) for name in self.limits.model_fields_set}
            faults += [fault(f"/limits/{name}", "it cannot be null", "type") for name in said if said[name] is None]
            for place, label in enumerate(self.limits.labels or ()):
                if not LABEL.fullmatch(label):
                    faults.append(fault(f"/limits/labels/{place}", f"it must match {LABEL.pattern}"))
        if self.limits.cpus is not None and not is_cpus(self.limits.cpus):
            faults.append(fault("/limits/cpus", "cores are given to a thousandth"))
        if self.command == "setLimits" and "labels" in self.limits.model_fields_set:
            faults.append(fault("/limits/labels", "there is no such parameter", "unknown_field"))
        return faults


class ManyBody(CommandBody):
    """A command to the agents of a host, or with a label."""

    hostname: Annotated[Line, Field(min_length=1)] | None = None
    label: Annotated[str, Field(pattern=f"^(?:{LABEL.pattern})$")] | None = None


class AckBody(Body):
    """What an agent made of a command."""

    state: Literal["applied", "refused"]
    message: Annotated[str, Field(max_length=1000)] | None = None


class Bell(Waiters[int, Wanted, None]):
    """Those who wait for orders of an agent, and know its command with the greatest number so far."""

    EVERY = 0.1

    def tell(self, key: str, known: int, seen: Wanted | None, future: asyncio.Future[None]) -> None:
        """Answer if there is a later command."""
        if seen is not None and seen.last > known:
            future.set_result(None)

    def let_go(self, known: int, future: asyncio.Future[None]) -> None:
        """Answer that it is time to look."""
        future.set_result(None)

    def ring(self, id: str) -> None:
        """Wake whoever waits for orders of an agent."""
        self._let_go_all(id)

    async def wait(self, id: str, after: int, timeout: float) -> None:
        """Wait until an agent has a command with a greater number than ``after``, or for ``timeout`` seconds."""
        if self._ended:
            return
        with suppress(TimeoutError):
            await self._wait(id, after, timeout)


class AgentCommands(OfAgent):
    """The commands that an agent was given."""

    name = "commands"
    url = "/agents/{id}/commands"
    role: ClassVar = {"GET": ("agent", "read"), "POST": "operate"}
    parameters: ClassVar = {
        "GET": (
            Parameter("after", ranged("after", 0, 2**53 - 1), {"type": "integer", "minimum": 0, "default": 0},
                      "only commands with greater numbers", 0),
        ),
        "POST": CommandBody,
    }  # fmt: skip
    headers: ClassVar = {"GET": (WAIT,), "POST": (KEY,)}
    responses = {
        "GET": {200: ("the commands, in order; with Prefer: wait when there is one", "Commands")},
        "POST": {202: ("the agent will hear it", "Command")},
    }
    problems: ClassVar = {"POST": (StateConflict, TooBusy, IdempotencyKeyReused, UnknownJob)}

    async def get(self) -> Answer:
        """Show the commands after a number, at once or as soon as there is one."""
        after, wait = self.request.query["after"], self.preferred_wait()
        if self.request.principal is None or self.request.principal.may("agent"):
            await self.note()
        id = self.record.id
        wanted, found = await self.off_loop(self._page, after)
        headers = {}
        if wait is not None:
            headers["Preference-Applied"] = f"wait={wait}"
            if not found:
                await self.as_asked(self.services.bell.wait(id, after, wait))
                wanted, found = await self.off_loop(self._page, after)
        items = [views.command(id, one) for one in found]
        said = {"last": wanted.last, "drained": wanted.drained}
        return Answer({"items": items, **said, "next": None, "href": self.request.uri}, 200, headers, "commands")

    def _page(self, after: int) -> tuple[Wanted, list[Command]]:
        wanted, found = self.services.master.orders.page(self.record.id, after, _PAGE)
        return wanted, _shown(self, found)

    async def post(self, parameters: CommandBody) -> Answer:
        """Give the agent a command: it is done once, in the order of the numbers."""
        members = parameters.members()
        key = self.idempotency_key()
        view = await self.off_loop(give, self, self.record, parameters.command, members, key)
        self.services.bell.ring(self.record.id)
        return Answer(view, 202, {"Location": view["href"]}, "command")


def give(
    endpoint: Endpoint, agent: AgentRecord, command: str, members: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """Give an agent a command, and see that it hears of it."""
    if endpoint.limited:
        _check_may_tell(endpoint, agent, members)
    given = endpoint.services.master.command(agent.id, command, members, key)
    endpoint.services.reserver.poke(agent.id)
    return views.command(agent.id, given)


def _check_may_tell(endpoint: Endpoint, agent: AgentRecord, members: dict[str, Any]) -> None:
    """Refuse what a limited token would tell of a job that does not exist for it, or to an agent that serves others."""
    if "uuid" in members:
        if hidden(endpoint, [members["uuid"]]):
            raise UnknownJob(NO_SUCH_JOB)
    else:
        check_sees_all(endpoint, agent)


def _shown(endpoint: Endpoint, commands: Sequence[Command]) -> list[Command]:
    """Return the commands that whoever asks may see: not those about jobs that do not exist for it."""
    if not endpoint.limited:
        return list(commands)
    unseen = set(hidden(endpoint, [one.members["uuid"] for one in commands if "uuid" in one.members]))
    return [one for one in commands if one.members.get("uuid") not in unseen]


class ManyCommands(Endpoint):
    """Commands to several agents."""

    name = "command many"
    url = "/agents/commands"
    parameters: ClassVar = {"POST": ManyBody}
    headers: ClassVar = {"POST": (KEY,)}
    responses = {"POST": {202: ("the commands that were given, and the agents that can take none now", "ManyCommands")}}
    problems: ClassVar = {"POST": (StateConflict, TooBusy, IdempotencyKeyReused, UnknownJob)}

    async def post(self, parameters: ManyBody) -> Answer:
        """Give a command to all agents of a host, or with a label, that have not said goodbye."""
        members = parameters.members()
        if parameters.hostname is None and parameters.label is None:
            raise InvalidParameters([fault("", "it must have hostname, or label, or both", "missing")])
        key = self.idempotency_key()
        items, refused = await self.off_loop(self._give_all, parameters, members, key)
        for one in items:
            self.services.bell.ring(str(one["href"]).split("/")[2])
        return Answer({"items": items, "refused": refused, "next": None, "href": self.url}, 202, page="commands")

    def _give_all(
        self, body: ManyBody, members: dict[str, Any], key: str | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Give each its command; what one cannot take is its own affair, unless no other can either."""
        found = [
            one
            for one in self.manager.fleet.all()
            if one.state in SPEAKING
            and body.hostname in (None, one.hostname)
            and (body.label is None or body.label in one.labels)
        ]
        items: list[dict[str, Any]] = []
        refusals: list[tuple[AgentRecord, ZerogError]] = []
        for one in found:
            try:
                items.append(give(self, one, body.command, members, key))
            except (RequestError, CorruptDocument, StoreUnavailable) as error:
                refusals.append((one, error))
        if refusals and not items:
            raise refusals[0][1]
        return items, [
            {
                "agent": {"href": views.agent_href(one.id)},
                "status": error.status,
                "code": error.code,
                "detail": error.detail,
            }
            for one, error in refusals
        ]


class AgentCommand(OfAgent):
    """One command to an agent, and what became of it."""

    name = "command"
    url = "/agents/{id}/commands/{number}"
    role: ClassVar = {"GET": ("agent", "read"), "POST": "agent"}
    parameters: ClassVar = {"POST": AckBody}
    responses = {
        "GET": {200: ("the command and its state", "Command")},
        "POST": {200: ("it is noted; the same once more changes nothing", "Command")},
    }
    problems: ClassVar = {"GET": (UnknownResource,), "POST": (UnknownResource, StateConflict)}

    def _number(self) -> int:
        text = self.request.path["number"]
        if not _NUMBER.fullmatch(text):
            raise UnknownResource("the agent has no such command")
        return int(text)

    async def get(self) -> Answer:
        """Show the command."""
        found = await self.off_loop(self._found, self._number())
        return Answer(views.command(self.record.id, found), page="command")

    def _found(self, number: int) -> Command:
        found = self.services.master.orders.get(self.record.id, number)
        if not _shown(self, [found]):
            raise UnknownResource("the agent has no such command")
        return found

    async def post(self, parameters: AckBody) -> Answer:
        """Say that the command was applied, or refused, and why."""
        check_sees_all(self, self.record)
        acknowledge = self.services.master.acknowledge
        done = await self.off_loop(acknowledge, self.record.id, self._number(), parameters.state, parameters.message)
        return Answer(views.command(self.record.id, done), page="command")
