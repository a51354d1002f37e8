"""Where the jobs of pipelines stand: folded from the entries, as far as this process has read them.

All servers read the same entries in the same order and come to the same: what only one of them saw, the end of a job of
ZeroG, it writes down as an entry for the others.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import zerog.server

#: Pipelines of which a process remembers what it has read: more than a page of them has.
KEPT = 100
_TERMINAL = ("succeeded", "failed", "cancelled")

#: Seconds after which a job that nobody has seen never will be: its submit came to nothing.
_NEVER = 600.0
#: Keys of entries that were written once by whoever was answered: a repeat of one comes soon after it.
_ONCE, _ONCE_KEPT = "once:", 10_000


@dataclass(slots=True)
class Standing:
    """Where one job stands: its state, since when, and the number of the first entry about it.

    ``follows`` says that its state is that of a job of ZeroG, until an entry says how that has ended; ``there`` is
    false as long as nobody has seen that job: its submit may never have come to its end.  ``job_type`` is its type.
    """

    state: str
    at: float
    message: str | None
    first: int
    follows: bool = False
    there: bool = True
    job_type: str | None = None

    def seen_by(self, endpoint: zerog.server.Endpoint) -> bool:
        """Return whether there is something for whoever asks: jobs of some types may not exist for a token."""
        return self.there and (self.job_type is None or endpoint.sees(self.job_type))


@dataclass(slots=True)
class Folded:
    """All jobs of a pipeline in the order in which they came, as of the entry ``upto``."""

    jobs: dict[str, Standing] = field(default_factory=dict)
    upto: int = 0
    #: Keys under which an entry may be written once more, with the number of the first; and the numbers of repeats.
    keys: dict[str, int] = field(default_factory=dict)
    once: OrderedDict[str, int] = field(default_factory=OrderedDict)
    repeated: set[int] = field(default_factory=set)
    #: Numbers of messages that are no entries.
    strange: set[int] = field(default_factory=set)

    def shown(self, endpoint: zerog.server.Endpoint) -> Folded:
        """Return a copy with what there is to be seen by whoever asks."""
        return Folded({job: one for job, one in self.jobs.items() if one.seen_by(endpoint)}, self.upto)

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in which state."""
        return dict(sorted(Counter(one.state for one in self.jobs.values()).items()))

    def number_of(self, key: str) -> int | None:
        """Return the number of the first entry with a key, if it is known."""
        return self.once.get(key) if key.startswith(_ONCE) else self.keys.get(key)

    def add(self, number: int, key: str, at: float, value: Any) -> None:
        """Take one entry; the entries come in order.  What is none, since anybody may publish, is nobody's."""
        self.upto = number
        if not is_entry(value):
            self.strange.add(number)
            return
        if ":" in key and not self._is_first(number, key):
            return
        job = value["job"]
        known = self.jobs.get(job)
        if "ended" in value:
            first = known.first if known is not None else number
            self.jobs[job] = Standing(
                value["state"], value["ended"], value["message"], first, job_type=value.get("jobType")
            )
        elif known is None:
            follows = bool(value.get("follows"))
            self.jobs[job] = Standing(value["state"], at, value["message"], number, follows, not follows)
        elif value.get("follows"):
            known.follows = True
        elif not known.follows:  # until it has ended a job of ZeroG stands where its record says, whoever writes
            known.state, known.at, known.message = value["state"], at, value["message"]

    def _is_first(self, number: int, key: str) -> bool:
        """Remember a key; False if it was there: the same entry once more, by a job or a request that ran again."""
        keys = self.once if key.startswith(_ONCE) else self.keys
        if key in keys:
            self.repeated.add(number)
            return False
        keys[key] = number
        if len(self.once) > _ONCE_KEPT:
            self.once.popitem(last=False)
        return True


def is_entry(value: Any) -> bool:
    """Return whether a message of a pipeline's topic is an entry."""
    if not isinstance(value, dict) or not isinstance(value.get("job"), str) or not isinstance(value.get("state"), str):
        return False
    if any(not isinstance(one, (str, NoneType)) for one in (value.get("jobType"), value.get("message", 0))):
        return False
    return isinstance(value.get("ended", 0.0), (int, float))


class Standings:
    """What this process has read of pipelines.  Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folded: OrderedDict[str, tuple[threading.Lock, Folded]] = OrderedDict()
        self._names = _Names()

    def names(self, endpoint: zerog.server.Endpoint, after: int, limit: int) -> list[tuple[str, int]]:
        """Return names of pipelines in the order in which they came, with their numbers."""
        return self._names.page(endpoint, after, limit)

    def announce(self, endpoint: zerog.server.Endpoint, pipeline: str) -> None:
        """See to it that the list of pipelines has this one."""
        self._names.announce(endpoint, pipeline)

    def read(self, endpoint: zerog.server.Endpoint, pipeline: str) -> Folded:
        """Return where all jobs of a pipeline stand now."""
        with self._read(endpoint, pipeline) as folded:
            self._follow(endpoint, pipeline, folded)
            return folded.shown(endpoint)

    def first_of(self, endpoint: zerog.server.Endpoint, pipeline: str, job: str) -> int:
        """Return the number of the first entry about a job."""
        with self._read(endpoint, pipeline) as folded:
            return folded.jobs[job].first

    def number_of(self, endpoint: zerog.server.Endpoint, pipeline: str, key: str) -> int | None:
        """Return the number of the first entry with a key, if there is one."""
        with self._read(endpoint, pipeline) as folded:
            return folded.number_of(key)

    def entries(self, endpoint: zerog.server.Endpoint, pipeline: str, after: int) -> Iterator[Any]:
        """Yield the entries of a pipeline with greater numbers than ``after``, in order, each once, as far as they are
        about jobs that whoever asks may see."""
        with self._read(endpoint, pipeline) as folded:
            self._follow(endpoint, pipeline, folded)
            repeated, upto = frozenset(folded.repeated | folded.strange), folded.upto
            hidden = {job for job, one in folded.jobs.items() if not one.seen_by(endpoint)}
        for message in endpoint.topics.read_all(topic(pipeline), after):
            if message.number > upto:
                return
            if message.number not in repeated and message.value["job"] not in hidden:
                yield message

    @contextmanager
    def _read(self, endpoint: zerog.server.Endpoint, pipeline: str) -> Iterator[Folded]:
        name = f"{endpoint.manager.service}/{pipeline}"
        with self._lock:
            lock, folded = self._folded.setdefault(name, (threading.Lock(), Folded()))
            self._folded.move_to_end(name)
            while len(self._folded) > KEPT:
                self._folded.popitem(last=False)
        with lock:
            for message in endpoint.topics.read_all(topic(pipeline), folded.upto):
                folded.add(message.number, message.key, message.at, message.value)
            yield folded

    def _follow(self, endpoint: zerog.server.Endpoint, pipeline: str, folded: Folded) -> None:
        """Take over the states of the jobs of ZeroG that have not ended; what has ended is written down."""
        open_ones = [job for job, one in folded.jobs.items() if one.follows]
        for start in range(0, len(open_ones), 500):
            part = open_ones[start : start + 500]
            found = endpoint.manager.get_many(part)
            for job in part:
                self._follow_one(endpoint, pipeline, job, folded.jobs[job], found.get(job))

    @staticmethod
    def _follow_one(
        endpoint: zerog.server.Endpoint, pipeline: str, job: str, standing: Standing, record: Any | None
    ) -> None:
        if record is None:
            # Not stored yet, or never; or removed before anybody looked, and then nobody knows how it ended.
            standing.there = False
            if endpoint.services.clock.now() - standing.at > _NEVER:
                standing.follows = False
            return
        standing.state, standing.at, standing.message = str(record.state), record.updated_at, record.message
        standing.there, standing.job_type = True, record.job_type
        if record.state in _TERMINAL:
            value = {
                "job": job,
                "state": standing.state,
                "message": standing.message,
                "ended": standing.at,
                "jobType": record.job_type,
            }
            endpoint.topics.publish(topic(pipeline), value, f"ended:{job}")


class _Names:
    """The list of pipelines, as far as this process has read it."""

    _TOPIC = "pipelines"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Service → the names with their numbers, the numbers alone, and how far it was read.
        self._read: dict[str, tuple[dict[str, int], list[int], list[int]]] = {}

    def page(self, endpoint: zerog.server.Endpoint, after: int, limit: int) -> list[tuple[str, int]]:
        """Return up to ``limit`` names with numbers greater than ``after``, in order."""
        with self._lock:
            names, numbers = self._fold(endpoint)
            start = bisect_right(numbers, after)
            wanted: Sequence[str] = list(names)[start : start + limit]
            return [(name, names[name]) for name in wanted]

    def announce(self, endpoint: zerog.server.Endpoint, pipeline: str) -> None:
        """Add a name unless it is there."""
        with self._lock:
            known = self._read.get(endpoint.manager.service)
            if known is not None and pipeline in known[0]:
                return
            if pipeline not in self._fold(endpoint)[0]:
                endpoint.topics.publish(self._TOPIC, pipeline, pipeline)

    def _fold(self, endpoint: zerog.server.Endpoint) -> tuple[dict[str, int], list[int]]:
        names, numbers, upto = self._read.setdefault(endpoint.manager.service, ({}, [], [0]))
        for message in endpoint.topics.read_all(self._TOPIC, upto[0]):
            upto[0] = message.number
            if isinstance(message.value, str) and message.value not in names:
                names[message.value] = message.number
                numbers.append(message.number)
        return names, numbers


def topic(pipeline: str) -> str:
    """Return the topic that holds the entries of a pipeline."""
    return f"pipeline.{pipeline}"
