"""Topics: logs of an application's own, written by its endpoints and its jobs, read by position.

A message has a number in its topic, a time, and a key: what is published again under the same key is the same message,
and readers take the first.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zerog import codec
from zerog.clock import Clock, from_iso, to_iso
from zerog.datastore.base import Datastore
from zerog.exceptions import StoreAmbiguous

_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)

#: Bytes of JSON that a message may have.
MAX_MESSAGE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its place, when it was published (seconds since 1970), its key, and its JSON."""

    number: int
    at: float
    key: str
    value: Any


class Topics:
    """The topics in the store.  Safe to use from many threads."""

    def __init__(self, store: Datastore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def publish(self, topic: str, value: Any, key: str | None = None) -> Message:
        """Add a message and return it; ``ValueError`` for a bad name, and for what is no JSON or too large.

        After an ambiguous answer of the store it is published once more, under the same key; whoever still gets
        ``StoreAmbiguous`` may do so too.
        """
        now = self._clock.now()
        key = key if key is not None else secrets.token_hex(8)
        kept = codec.plain(value, MAX_MESSAGE, "a message")
        body = codec.dumps({"at": to_iso(now), "key": key, "value": kept})
        try:
            number = self._store.append(_log(topic), body)
        except StoreAmbiguous:
            number = self._store.append(_log(topic), body)
        return Message(number, now, key, value)

    def read(self, topic: str, after: int = 0, limit: int = 100) -> list[Message]:
        """Return up to ``limit`` messages with numbers greater than ``after``, in order."""
        return [_message(entry) for entry in self._store.read(_log(topic), after=after, limit=limit)]

    def read_all(self, topic: str, after: int = 0) -> Iterator[Message]:
        """Yield all messages with numbers greater than ``after``, in order, a page at a time."""
        while messages := self.read(topic, after, 500):
            yield from messages
            after = messages[-1].number


def is_topic(name: str) -> bool:
    """Return whether a topic can have this name."""
    return _NAME.fullmatch(name) is not None and name not in (".", "..")


def _log(topic: str) -> str:
    if not _NAME.fullmatch(topic):
        raise ValueError(f"a topic's name is {_NAME.pattern}")
    return f"topic.{topic}"


def _message(entry: Any) -> Message:
    members = codec.loads(entry.body)
    return Message(entry.number, from_iso(members["at"]), members["key"], members["value"])
