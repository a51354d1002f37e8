"""ConsumerRecord: where a consumer stands and who runs it; Consumers: all of them in the store.

One document for each consumer holds the lease and the positions, so that one compare-and-set guards both: whoever has
lost the lease cannot move a position.  The lease is taken under a random token; the process that handles messages
writes under the token too.  A lease is free when its holder gave it up, is certainly gone (R7), or when nothing in the
document moved for a whole lease on the own monotonic clock.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from zerog import codec
from zerog.clock import Clock, to_iso
from zerog.consumer import Consumer
from zerog.datastore.base import Datastore
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    CorruptDocument,
    NewerVersion,
    NotFound,
    Problem,
    StateConflict,
    StoreAmbiguous,
    StoreUnavailable,
    UnknownConsumer,
)
from zerog.fleet import Presence
from zerog.sweeper import Candidate

logger = logging.getLogger(__name__)

_SCHEMA = 1

#: The document that names all consumers.
_ALL = "consumers"

#: Messages that may be put aside at once; then the others wait.
MAX_ASIDE = 1000

#: How often a document is tried that others change too.
_TRIES = 50


class LeaseLost(Exception):
    """The consumer is somebody else's by now."""


@dataclass(frozen=True, slots=True)
class Aside:
    """A message that is to be handled later: its number, when (seconds since 1970), and how often it was tried."""

    number: int
    due: float
    tries: int


@dataclass(frozen=True, slots=True)
class ConsumerRecord:
    """Where a consumer stands.

    ``positions`` are the numbers up to which each topic was handled, but for the messages ``aside``.  ``crashes``
    counts how often the process died over one message: topic, number, count.  Times are seconds since 1970.
    """

    name: str
    application: str = ""
    topics: tuple[str, ...] = ()
    holder: str = ""
    token: str = ""
    sequence: int = 0
    presence: Presence | None = None
    positions: Mapping[str, int] = field(default_factory=dict)
    aside: Mapping[str, tuple[Aside, ...]] = field(default_factory=dict)
    crashes: tuple[str, int, int] | None = None
    handled: int = 0
    dead: int = 0
    last_error: str | None = None
    updated_at: float = 0.0

    def evolve(self, **changes: Any) -> ConsumerRecord:
        """Return the same record with ``changes``."""
        return dataclasses.replace(self, **changes)

    def upto(self, topic: str) -> int:
        """Return the number up to which a topic needs this consumer no more."""
        waiting = [one.number for one in self.aside.get(topic, ())]
        return min([self.positions.get(topic, 0), *(number - 1 for number in waiting)])


def to_body(record: ConsumerRecord) -> bytes:
    """Write a record as the JSON document that the store keeps."""
    members = {
        "schema": _SCHEMA,
        "name": record.name,
        "application": record.application,
        "topics": list(record.topics),
        "holder": record.holder,
        "token": record.token,
        "sequence": record.sequence,
        "presence": dataclasses.asdict(record.presence) if record.presence is not None else None,
        "positions": dict(record.positions),
        "aside": {topic: [[a.number, a.due, a.tries] for a in some] for topic, some in record.aside.items() if some},
        "crashes": list(record.crashes) if record.crashes is not None else None,
        "handled": record.handled,
        "dead": record.dead,
        "lastError": record.last_error,
        "updatedAt": record.updated_at,
    }
    return codec.dumps(members)


def from_body(body: bytes) -> ConsumerRecord:
    """Read what ``to_body`` wrote; ``CorruptDocument`` or ``NewerVersion``."""
    members = codec.loads(body)
    try:
        if int(members["schema"]) > _SCHEMA:
            raise NewerVersion(f"the consumer {members['name']} was written by a newer version")
        crashes = members["crashes"]
        return ConsumerRecord(
            name=str(members["name"]),
            application=str(members["application"]),
            topics=tuple(members["topics"]),
            holder=str(members["holder"]),
            token=str(members["token"]),
            sequence=int(members["sequence"]),
            presence=Presence(**members["presence"]) if members["presence"] else None,
            positions={str(topic): int(number) for topic, number in members["positions"].items()},
            aside={topic: tuple(Aside(*one) for one in some) for topic, some in members["aside"].items()},
            crashes=(str(crashes[0]), int(crashes[1]), int(crashes[2])) if crashes else None,
            handled=int(members["handled"]),
            dead=int(members["dead"]),
            last_error=members["lastError"],
            updated_at=float(members["updatedAt"]),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptDocument(f"no record of a consumer: {error}") from error


class Consumers:
    """The consumers in the store.  Safe to use from many threads."""

    def __init__(self, store: Datastore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def get(self, name: str) -> ConsumerRecord:
        """Return a consumer that has ever run; ``UnknownConsumer`` if it has not."""
        return self._read(name)[0]

    def all(self) -> Sequence[ConsumerRecord]:
        """Return all consumers that have ever run and can be read, by name."""
        return [one for one in self._all().values() if one is not None]

    def _all(self) -> dict[str, ConsumerRecord | None]:
        """Return all consumers that have ever run; None for what cannot be read."""
        names = self.names()
        documents = self._store.get_many([_key(name) for name in names])
        found: dict[str, ConsumerRecord | None] = {}
        for name in names:
            try:
                if _key(name) in documents:
                    found[name] = from_body(documents[_key(name)].body)
            except (CorruptDocument, NewerVersion) as error:
                logger.warning("the consumer %s cannot be read: %s", name, error)
                found[name] = None
        return found

    def names(self) -> Sequence[str]:
        """Return the names of all consumers that have ever run."""
        try:
            return sorted(codec.loads(self._store.get(_ALL).body)["names"])
        except NotFound:
            return []

    def upto(self, topic: str, also: Iterable[str]) -> int | None:
        """Return the number up to which no consumer needs a topic any more; None if nobody follows it.

        ``also`` are consumers of it that may never have run: they need all of it.
        """
        ran = self._all()
        if None in ran.values():
            return 0  # nobody knows what it follows, and how far it is
        known = {name: one for name, one in ran.items() if one is not None}
        needed = [one.upto(topic) for one in known.values() if topic in one.topics]
        needed += [0 for name in also if name not in known or topic not in known[name].topics]
        return min(needed, default=None)

    def forget(self, name: str) -> None:
        """Forget a consumer and its positions, which retention respects no longer; ``Problem`` 409 while it runs."""
        record, cas = self._read(name)
        if record.holder:
            raise Problem(409, f"the consumer {name} runs: {record.holder} has it", StateConflict.code)
        try:
            self._store.remove(_key(name), cas)
        except Conflict as error:
            raise Problem(409, f"the consumer {name} runs", StateConflict.code) from error
        except NotFound:
            pass  # somebody else was faster
        self._name(lambda names: names - {name})

    def make(self, consumer: type[Consumer], application: str) -> None:
        """See to it that there is a record of a consumer, with the topics that it follows."""
        # Its name first: retention must know of it before it has a position.
        self.list(consumer.name)
        with suppress(AlreadyExists):
            self._store.insert(_key(consumer.name), to_body(ConsumerRecord(consumer.name, application)))

    def list(self, name: str) -> None:
        """See to it that a consumer is among all of them."""
        self._name(lambda names: names | {name})

    def change(self, name: str, change: Callable[[ConsumerRecord], ConsumerRecord]) -> ConsumerRecord:
        """Write what ``change`` makes of a record, which is read again while others are faster; return that.

        ``change`` raises what speaks against it.  ``StoreUnavailable`` if too many others write.
        """
        for _ in range(_TRIES):
            record, cas = self._read(name)
            changed = change(record).evolve(updated_at=self._clock.now())
            try:
                self._store.replace(_key(name), to_body(changed), cas)
                return changed
            except (Conflict, NotFound):
                continue
            except StoreAmbiguous:
                with suppress(UnknownConsumer):
                    if to_body(self._read(name)[0]) == to_body(changed):
                        return changed
        raise StoreUnavailable(f"the consumer {name} is being changed by too many at once")

    def _read(self, name: str) -> tuple[ConsumerRecord, int]:
        try:
            document = self._store.get(_key(name))
        except NotFound as error:
            raise UnknownConsumer(f"there is no consumer {codec.printable(name, 100)}, or it has never run") from error
        return from_body(document.body), document.cas

    def _name(self, change: Callable[[set[str]], set[str]]) -> None:
        def apply(body: bytes | None) -> bytes | None:
            names = set(codec.loads(body)["names"]) if body is not None else set()
            changed = change(names)
            return codec.dumps({"names": sorted(changed)}) if changed != names or body is None else None

        self._store.change(_ALL, apply)


class ConsumerLease:
    """One candidate's view of the lease of one consumer.  ``patience`` is the seconds for which a holder may be silent.

    Call ``hold`` several times within ``patience``; ``LeaseLost`` never leaves it.
    """

    def __init__(
        self,
        consumers: Consumers,
        consumer: type[Consumer],
        application: str,
        candidate: Candidate,
        patience: float,
        clock: Clock,
    ) -> None:
        self._consumers = consumers
        self._consumer = consumer
        self._application = application
        self._candidate = candidate
        self._patience = patience
        self._clock = clock
        self._seen: tuple[str, int] = ("", -1)
        self._since = 0.0
        #: Under what it is held, or None.
        self.token: str | None = None

    def hold(self) -> bool:
        """Renew the lease, or take it if nobody has it any more; return whether it is ours now."""
        name = self._consumer.name
        try:
            if self.token is not None:
                self._consumers.change(name, self._renewed)
                return True
            record = self._known()
            if not self._free(record):
                return False
            self._consumers.list(name)  # somebody may have forgotten it meanwhile
            token = secrets.token_hex(8)
            self._consumers.change(name, lambda now: self._taken(now, record, token))
            self.token = token
            return True
        except (LeaseLost, UnknownConsumer):
            self.token = None
            return False

    def give_up(self) -> None:
        """Let somebody else have it at once."""
        token, self.token = self.token, None
        if token is not None:
            with suppress(LeaseLost, UnknownConsumer):
                self._consumers.change(
                    self._consumer.name,
                    lambda now: under(now, token).evolve(holder="", token="", presence=None, sequence=now.sequence + 1),
                )

    def note_crash(self, topic: str, number: int, why: str) -> None:
        """Count that the process died over a message."""
        token = self.token
        if token is None:
            return

        def change(now: ConsumerRecord) -> ConsumerRecord:
            known = now.crashes if now.crashes is not None and now.crashes[:2] == (topic, number) else None
            count = (known[2] if known is not None else 0) + 1
            return under(now, token).evolve(crashes=(topic, number, count), last_error=codec.printable(why, 1000))

        with suppress(LeaseLost, UnknownConsumer):
            self._consumers.change(self._consumer.name, change)

    def _known(self) -> ConsumerRecord:
        try:
            return self._consumers.get(self._consumer.name)
        except UnknownConsumer:
            self._consumers.make(self._consumer, self._application)
            return self._consumers.get(self._consumer.name)

    def _renewed(self, now: ConsumerRecord) -> ConsumerRecord:
        assert self.token is not None
        return under(now, self.token).evolve(sequence=now.sequence + 1)

    def _taken(self, now: ConsumerRecord, judged: ConsumerRecord, token: str) -> ConsumerRecord:
        """Return the record as it is when taken; ``LeaseLost`` if it is not the one any more that was judged."""
        if (now.token, now.sequence) != (judged.token, judged.sequence):
            raise LeaseLost
        return now.evolve(
            application=self._application,
            topics=self._consumer.topics,
            holder=self._candidate.name,
            presence=self._candidate.presence,
            token=token,
            sequence=now.sequence + 1,
        )

    def _free(self, record: ConsumerRecord) -> bool:
        if not record.holder or (record.presence is not None and record.presence.ended()):
            return True
        now = self._clock.monotonic()
        if self._seen != (record.token, record.sequence):
            self._seen, self._since = (record.token, record.sequence), now
        return now - self._since > self._patience


def under(record: ConsumerRecord, token: str) -> ConsumerRecord:
    """Return a record that is held under ``token``; ``LeaseLost`` if it is not."""
    if record.token != token:
        raise LeaseLost
    return record


def view(record: ConsumerRecord, newest: Mapping[str, int]) -> dict[str, Any]:
    """Return a consumer as HTTP shows it; ``newest`` are the numbers of the newest messages of its topics."""
    topics = [
        {
            "name": topic,
            "position": record.positions.get(topic, 0),
            "newest": newest[topic],
            "behind": max(0, newest[topic] - record.positions.get(topic, 0)),
            "aside": len(record.aside.get(topic, ())),
            "href": f"/topics/{topic}",
        }
        for topic in record.topics
    ]
    return {
        "name": record.name,
        "application": record.application,
        "holder": record.holder or None,
        "topics": topics,
        "handled": record.handled,
        "deadLetters": record.dead,
        "lastError": record.last_error,
        "updatedAt": to_iso(record.updated_at) if record.updated_at else None,
        "href": f"/consumers/{record.name}",
    }


def _key(name: str) -> str:
    return f"consumer:{name}"
