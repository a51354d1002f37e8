"""Topics: logs of an application's own, written by its endpoints and its jobs, read by position.

A message has a number in its topic, a time, and a key: what is published again under the same key is the same message,
and readers take the first.  ``finished`` is a topic too, which ZeroG alone writes: the ends of jobs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.consumer import FINISHED, TOPIC, is_topic
from zerog.datastore.base import Datastore, Entry
from zerog.exceptions import CorruptDocument, StoreAmbiguous

#: Bytes of JSON that a message may have.
MAX_MESSAGE = 512 * 1024

#: Messages that are read in one go, since they may be large.
_PAGE = 50


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its place, when it was published (seconds since 1970), its key, and its JSON."""

    number: int
    at: float
    key: str
    value: Any


class Topics:
    """The topics in the store.  Safe to use from many threads.

    ``wake`` is called with the name of a topic when something was published there.
    """

    def __init__(self, store: Datastore, clock: Clock, wake: Callable[[str], None] = lambda topic: None) -> None:
        self._store = store
        self._clock = clock
        self._wake = wake

    def publish(self, topic: str, value: Any, key: str | None = None) -> Message:
        """Add a message and return it; ``ValueError`` for a bad name, and for what is no JSON or too large.

        After an ambiguous answer of the store it is published once more, under the same key; whoever still gets
        ``StoreAmbiguous`` may do so too.
        """
        if topic == FINISHED:
            raise ValueError(f"{FINISHED} is written by ZeroG alone")
        now = self._clock.now()
        key = key if key is not None else secrets.token_hex(8)
        kept = codec.plain(value, MAX_MESSAGE, "a message")
        body = codec.dumps({"at": to_iso(now), "key": key, "value": kept})
        log = log_of(topic)
        try:
            number = self._store.append(log, body)
        except StoreAmbiguous:
            number = self._store.append(log, body)
        self._wake(topic)
        return Message(number, now, key, value)

    def read(self, topic: str, after: int = 0, limit: int = 100) -> list[Message]:
        """Return up to ``limit`` messages with numbers greater than ``after``, in order."""
        return [message_of(topic, entry) for entry in self.entries(topic, after, limit)]

    def read_all(self, topic: str, after: int = 0) -> Iterator[Message]:
        """Yield all messages with numbers greater than ``after``, in order, some at a time."""
        while messages := self.read(topic, after, _PAGE):
            yield from messages
            after = messages[-1].number

    def read_within(self, topic: str, after: int, limit: int, size: int) -> list[Message]:
        """Do as ``read`` does, but stop after the message with which ``size`` bytes are reached."""
        found: list[Message] = []
        while len(found) < limit:
            page = self.entries(topic, after, min(_PAGE, limit - len(found)))
            for entry in page:
                found.append(message_of(topic, entry))
                size -= len(entry.body)
                if size <= 0:
                    return found
            if not page:
                return found
            after = page[-1].number
        return found

    def entries(self, topic: str, after: int, limit: int) -> list[Entry]:
        """Return messages as they are stored, which ``message_of`` reads."""
        return self._store.read(log_of(topic), after=after, limit=limit)

    def newest(self, topic: str) -> int:
        """Return the number of the newest message; 0 if there is none."""
        found = self._store.read(log_of(topic), limit=1)
        return found[0].number if found else 0


def log_of(topic: str) -> str:
    """Return the log that holds a topic; ``ValueError`` for a name that none can have."""
    if not is_topic(topic):
        raise ValueError(f"a topic's name is {TOPIC.pattern}")
    return topic if topic == FINISHED else f"topic.{topic}"


def message_of(topic: str, entry: Entry) -> Message:
    """Read a stored message; ``CorruptDocument`` if it is none."""
    members = codec.loads(entry.body)
    try:
        if topic == FINISHED:
            value = {
                "uuid": members["uuid"],
                "jobType": members["type"],
                "state": members["state"],
                "attempt": members["attempt"],
                "at": members["at"],
            }
            key = f"{members['uuid']}:{members['attempt']}:{members['state']}:{members['at']}"
            return Message(entry.number, from_iso(members["at"]), key, value)
        return Message(entry.number, from_iso(members["at"]), members["key"], members["value"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDocument(f"entry {entry.number} of the topic {topic} is no message: {error}") from error
