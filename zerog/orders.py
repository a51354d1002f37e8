"""Orders: the commands that agents were given, numbered, and what is wanted of an agent for good.

One document for each agent holds the number of the last command, those that it has not acknowledged, whether it is to
take jobs at all, and the limits that were set from outside: so a command and its number are one write, without a gap.
What was acknowledged moves to a document of its own. ::

    pending ──the agent did it──▶ applied
       └──────it could not──────▶ refused
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Datastore
from zerog.exceptions import (
    AlreadyExists,
    CorruptDocument,
    IdempotencyKeyReused,
    NotFound,
    StateConflict,
    TooBusy,
    UnknownResource,
)
from zerog.needs import UNSAID, Limits

#: The commands, and whether each leaves something behind: what is wanted of the agent from then on.
COMMANDS = ("drain", "resume", "retire", "restart", "cancel", "setLimits", "modify")

PENDING, APPLIED, REFUSED = "pending", "applied", "refused"

#: Commands that may wait for one agent, and those that are kept when it has acknowledged them.
_WAITING, _KEPT = 1000, 1000
#: Keys of requests that are remembered, with the commands that they made.
_KEYS = 100


@dataclass(frozen=True, slots=True)
class Command:
    """One command to one agent."""

    number: int
    command: str
    members: Mapping[str, Any]
    at: float
    state: str = PENDING
    message: str | None = None

    def document(self) -> dict[str, Any]:
        """Return the command as the JSON that is kept."""
        return {
            "number": self.number,
            "command": self.command,
            "members": dict(self.members),
            "at": to_iso(self.at),
            "state": self.state,
            "message": self.message,
        }

    @classmethod
    def read(cls, members: Mapping[str, Any]) -> Command:
        """Read what ``document`` gave."""
        return cls(
            int(members["number"]),
            members["command"],
            members["members"],
            from_iso(members["at"]),
            members["state"],
            members["message"],
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of an agent, and the commands that it has not acknowledged."""

    last: int = 0
    pending: tuple[Command, ...] = ()
    #: Whether it is to take no jobs until it is told to resume.
    drained: bool = False
    limits: Limits = UNSAID
    #: Key of a request → the number of the command that it made, and what tells that from another.
    keys: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def document(self) -> bytes:
        """Write it as the JSON that the store keeps."""
        return codec.dumps(
            {
                "schema": 1,
                "last": self.last,
                "pending": [one.document() for one in self.pending],
                "drained": self.drained,
                "limits": self.limits.members(),
                "keys": dict(self.keys),
            }
        )

    @classmethod
    def read(cls, body: bytes | None) -> Wanted:
        """Read what ``document`` wrote; nothing is wanted where there is none."""
        if body is None:
            return cls()
        members = codec.loads(body)
        try:
            return cls(
                int(members["last"]),
                tuple(Command.read(one) for one in members["pending"]),
                bool(members["drained"]),
                Limits.read(members["limits"]),
                {key: (int(number), said) for key, (number, said) in members["keys"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptDocument(f"no orders of an agent: {error}") from error

    def with_command(self, command: str, members: Mapping[str, Any], at: float, key: str | None) -> Wanted:
        """Return what is wanted after one more command."""
        made = Command(self.last + 1, command, members, at)
        drained, limits = self.drained, self.limits
        match command:
            case "drain" | "resume":
                drained = command == "drain"
            case "setLimits":
                limits = Limits(**{**limits.members(), **members["limits"]})
        said = (made.number, _digest(command, members))
        keys = self.keys if key is None else dict([*self.keys.items(), (key, said)][-_KEYS:])
        return replace(self, last=made.number, pending=(*self.pending, made), drained=drained, limits=limits, keys=keys)


class Orders:
    """The orders of all agents.  Safe to use from many threads."""

    def __init__(self, store: Datastore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def wanted(self, id: str) -> Wanted:
        """Return what is wanted of an agent."""
        try:
            return Wanted.read(self._store.get(key_of(id)).body)
        except NotFound:
            return Wanted()

    def wanted_of(self, ids: list[str]) -> dict[str, Wanted]:
        """Return what is wanted of many agents, by id."""
        found = self._store.get_many([key_of(id) for id in ids])
        return {id: Wanted.read(found[key_of(id)].body if key_of(id) in found else None) for id in ids}

    def give(self, id: str, command: str, members: Mapping[str, Any], key: str | None = None) -> Command:
        """Give an agent a command; the same ``key`` gives it once.  ``TooBusy`` if too many wait already."""
        number = 0

        def change(body: bytes | None) -> bytes | None:
            nonlocal number
            wanted = Wanted.read(body)
            if key is not None and key in wanted.keys:
                number, before = wanted.keys[key]
                if before != _digest(command, members):
                    raise IdempotencyKeyReused("this Idempotency-Key was used for another command")
                return None
            if len(wanted.pending) >= _WAITING:
                raise TooBusy(f"{_WAITING} commands wait for the agent {id} already")
            after = wanted.with_command(command, members, self._clock.now(), key)
            number = after.last
            return after.document()

        self._store.change(key_of(id), change)
        return self.get(id, number)

    def get(self, id: str, number: int) -> Command:
        """Return a command; ``UnknownResource`` if there is none of this number."""
        for one in self.wanted(id).pending:
            if one.number == number:
                return one
        try:
            return Command.read(codec.loads(self._store.get(f"{key_of(id)}:{number}").body))
        except NotFound as error:
            raise UnknownResource(f"the agent has no command {number}") from error

    def page(self, id: str, after: int, limit: int) -> tuple[Wanted, list[Command]]:
        """Return what is wanted, and commands with greater numbers than ``after``, the oldest first."""
        wanted = self.wanted(id)
        pending = {one.number: one for one in wanted.pending if one.number > after}
        kept = set(range(max(after, wanted.last - _KEPT) + 1, wanted.last + 1)) - set(pending)
        numbers = sorted({*pending, *kept})[:limit]
        documents = self._store.get_many([f"{key_of(id)}:{number}" for number in numbers if number in kept])
        found = []
        for number in numbers:
            document = documents.get(f"{key_of(id)}:{number}")
            if number in pending:
                found.append(pending[number])
            elif document is not None:
                found.append(Command.read(codec.loads(document.body)))
        return wanted, found

    def acknowledge(self, id: str, number: int, state: str, message: str | None) -> Command:
        """Write what an agent made of a command; the same once more changes nothing, another is ``StateConflict``."""
        command = self.get(id, number)
        if command.state != PENDING:
            if command.state != state:
                raise StateConflict(f"the command {number} was {command.state}", state=command.state)
            return command
        done = replace(command, state=state, message=message)
        try:
            self._store.insert(f"{key_of(id)}:{number}", codec.dumps(done.document()))
        except AlreadyExists:
            done = self._written_before(id, done)

        def change(body: bytes | None) -> bytes | None:
            wanted = Wanted.read(body)
            left = tuple(one for one in wanted.pending if one.number != number)
            return replace(wanted, pending=left).document() if len(left) < len(wanted.pending) else None

        self._store.change(key_of(id), change)
        self._quietly_remove(f"{key_of(id)}:{number - _KEPT}")
        if done.state != state:
            raise StateConflict(f"the command {number} was {done.state}", state=done.state)
        return done

    def _written_before(self, id: str, done: Command) -> Command:
        """Return what was written of a command that still waits: by whoever was faster, or did not come to the end.

        What an agent of this id left behind that was forgotten is another command's, and is overwritten.
        """
        key = f"{key_of(id)}:{done.number}"
        kept = Command.read(codec.loads(self._store.get(key).body))
        if (kept.command, kept.at) == (done.command, from_iso(to_iso(done.at))):
            return kept
        self._store.change(key, lambda _: codec.dumps(done.document()))
        return done

    def forget(self, id: str) -> None:
        """Remove all orders of an agent, also those that cannot be read."""
        try:
            last = self.wanted(id).last
        except CorruptDocument:
            last = 0
        for number in range(max(1, last - _KEPT - _WAITING), last + 1):
            self._quietly_remove(f"{key_of(id)}:{number}")
        self._quietly_remove(key_of(id))

    def _quietly_remove(self, key: str) -> None:
        try:
            self._store.remove(key)
        except NotFound:
            return


def _digest(command: str, members: Mapping[str, Any]) -> str:
    """Return a text that is another for another command."""
    return hashlib.blake2b(codec.canonical([command, members]), digest_size=6).hexdigest()


def key_of(id: str) -> str:
    """Return the key of an agent's orders."""
    return f"orders:{id}"
