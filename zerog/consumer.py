"""Consumer, what a developer writes to follow topics, and Topic, how long the messages of one are kept.

Both stand in an application's module ``jobs``::

    READINGS = zerog.Topic("readings", retention=7 * 86_400)

    class Alarm(zerog.Consumer):
        name = "alarm"
        topics = ("readings",)

        def handle(self, entry: zerog.Entry) -> None:
            if entry.value["celsius"] > 90:
                self.publish("alarms", entry.value, key=entry.key)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zerog.exceptions import BadConsumer

if TYPE_CHECKING:
    from zerog.asked import Documents
    from zerog.manager import Manager
    from zerog.record import JobRecord
    from zerog.topics import Message, Topics

#: What a consumer's name may be: it becomes the name of a tube and a part of a URL.
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,99}", re.ASCII)

#: What a topic's name may be.
TOPIC = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)

#: The topic in which ZeroG itself says that jobs have ended: ``{uuid, jobType, state, attempt, at}``.
FINISHED = "finished"


def is_topic(name: object) -> bool:
    """Return whether a topic can have this name."""
    return isinstance(name, str) and TOPIC.fullmatch(name) is not None and name not in (".", "..")


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic whose messages go when they are older than ``retention`` seconds and every named consumer is past them.

    Topics that no application declares are kept whole.
    """

    name: str
    retention: float

    def __post_init__(self) -> None:
        if not is_topic(self.name) or self.name == FINISHED:
            raise BadConsumer(f"a topic's name is {TOPIC.pattern}, and not {FINISHED}: {self.name!r}")
        if isinstance(self.retention, bool) or not 1 <= self.retention <= 100 * 31_536_000:
            raise BadConsumer(f"the retention of the topic {self.name} must be seconds, at least 1")


@dataclass(frozen=True, slots=True)
class Entry:
    """One message as a consumer gets it: its topic, its number there, when it was published (seconds since 1970), the
    key that its writer gave it, and its JSON."""

    topic: str
    number: int
    at: float
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Services:
    """What a consumer stands on; made by the process that runs it."""

    manager: Manager
    topics: Topics
    documents: Documents
    settings: Any


class Consumer:
    """Follows topics: every message is handled at least once, in the order of its topic, by one process at a time.

    ``handle`` may see a message again after a crash, so what it writes must bear that.  Whatever it raises is tried
    again, ``max_errors`` times in all; then the message goes to the topic ``dead_letters`` as ``{topic, number, value,
    error}``, and the next one has its turn.  ``zerog.Fail`` sends it there at once; ``zerog.Retry(after=…)`` puts it
    aside for so many seconds, and the others go on.  While the store is away everything waits.
    """

    #: Its name, under which its position is kept.
    name: ClassVar[str] = ""
    #: The topics that it follows, from their first message on; ``finished`` are the ends of jobs.
    topics: ClassVar[tuple[str, ...]] = ()
    #: Whether agents run it, in a child of its own; otherwise ``zerog consumer NAME`` does, and ``zerog up``.
    in_agents: ClassVar[bool] = True
    #: How often ``handle`` may raise for one message, and how often its process may die.
    max_errors: ClassVar[int] = 3
    max_crashes: ClassVar[int] = 3
    #: Seconds that ``handle`` may take for one message; then its process is ended, which counts as a crash.
    time_limit: ClassVar[float] = 300.0
    #: Seconds between two calls of ``chore``, by the process that has the consumer; None for none.
    chore_every: ClassVar[float | None] = None
    #: Where messages go that cannot be handled.
    dead_letters: ClassVar[str] = "dead-letters"

    def __init__(self, services: Services) -> None:
        self._services = services

    def handle(self, entry: Entry) -> None:
        """Deal with one message."""
        raise NotImplementedError

    def chore(self) -> None:
        """Do what is to be done now and then; what it raises is logged, and it is called again."""

    @property
    def manager(self) -> Manager:
        """Every operation on jobs."""
        return self._services.manager

    @property
    def documents(self) -> Documents:
        """The documents of the application that this consumer belongs to."""
        return self._services.documents

    @property
    def settings(self) -> Any:
        """The settings of the application that this consumer belongs to, or None if it has none."""
        return self._services.settings

    def publish(self, topic: str, value: Any, key: str | None = None) -> Message:
        """Add a message to a topic; readers take the first of those that have the same key."""
        return self._services.topics.publish(topic, value, key)

    def run(self, job_type: str, parameters: Mapping[str, Any], uuid: str | None = None) -> JobRecord:
        """Submit a job and return its record; under a ``uuid`` that there is already, that one's."""
        return self.manager.run(job_type, parameters, uuid=uuid)

    @classmethod
    def check_settings(cls) -> None:
        """Raise ``BadConsumer`` if the class attributes are not possible."""
        for name, right, what in (
            ("name", isinstance(cls.name, str) and NAME.fullmatch(cls.name), f"a text that matches {NAME.pattern}"),
            ("topics", _are_topics(cls.topics), "a tuple of names of topics, one at least, none of them twice"),
            ("in_agents", isinstance(cls.in_agents, bool), "True or False"),
            ("max_errors", _is_count(cls.max_errors), "an integer from 1 to 1,000"),
            ("max_crashes", _is_count(cls.max_crashes), "an integer from 1 to 1,000"),
            ("time_limit", _is_time(cls.time_limit), "seconds, more than 0"),
            ("chore_every", cls.chore_every is None or _is_time(cls.chore_every), "None, or seconds, more than 0"),
            ("dead_letters", is_topic(cls.dead_letters) and cls.dead_letters != FINISHED, "the name of a topic"),
        ):
            if not right:
                raise BadConsumer(f"{cls.__name__}.{name} is {getattr(cls, name)!r}; it must be {what}")
        if cls.dead_letters in cls.topics:
            raise BadConsumer(f"{cls.__name__} follows its own dead letters, {cls.dead_letters}: give it others")
        if cls.handle is Consumer.handle:
            raise BadConsumer(f"{cls.__name__} has no handle method")


def _are_topics(value: object) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(is_topic, value)) and len(set(value)) == len(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 31_536_000
