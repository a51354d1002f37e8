"""Where the jobs of pipelines stand: folded from the entries, as far as this process has read them."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import zerog.server

#: Pipelines of which a process remembers what it has read.
_KEPT = 100
_TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(slots=True)
class Standing:
    """Where one job stands: its state, since when, and the number of the first entry about it.

    ``follows`` says that its state is that of a job of ZeroG, until that has ended; ``there`` is false as long as
    nobody has seen that job: its submit may never have come to its end.  ``job_type`` is the type of that job.
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
    #: Keys under which a job may write once more, and the numbers of what was written so.
    keys: set[str] = field(default_factory=set)
    repeated: set[int] = field(default_factory=set)

    def shown(self, endpoint: zerog.server.Endpoint) -> Folded:
        """Return a copy with what there is to be seen by whoever asks."""
        return Folded({job: one for job, one in self.jobs.items() if one.seen_by(endpoint)}, self.upto)

    def counts(self) -> dict[str, int]:
        """Return how many jobs are in which state."""
        return dict(sorted(Counter(one.state for one in self.jobs.values()).items()))


class Standings:
    """What this process has read of pipelines.  Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folded: OrderedDict[str, tuple[threading.Lock, Folded]] = OrderedDict()
        self._announced: set[str] = set()

    def announced(self, pipeline: str) -> bool:
        """Return whether the list of pipelines is known to have this one."""
        return pipeline in self._announced

    def announce(self, pipeline: str) -> None:
        """Remember that the list of pipelines has this one."""
        self._announced.add(pipeline)

    def read(self, endpoint: zerog.server.Endpoint, pipeline: str) -> Folded:
        """Return where all jobs of a pipeline stand now."""
        with self._read(endpoint, pipeline) as folded:
            self._follow(endpoint, folded)
            return folded.shown(endpoint)

    def first_of(self, endpoint: zerog.server.Endpoint, pipeline: str, job: str) -> int:
        """Return the number of the first entry about a job."""
        with self._read(endpoint, pipeline) as folded:
            return folded.jobs[job].first

    def entries(self, endpoint: zerog.server.Endpoint, pipeline: str, after: int) -> Iterator[Any]:
        """Yield the entries of a pipeline with greater numbers than ``after``, in order, each once, as far as they are
        about jobs that whoever asks may see."""
        with self._read(endpoint, pipeline) as folded:
            self._follow(endpoint, folded)
            repeated, upto = frozenset(folded.repeated), folded.upto
            hidden = {job for job, one in folded.jobs.items() if one.there and not one.seen_by(endpoint)}
        for message in endpoint.topics.read_all(f"pipeline.{pipeline}", after):
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
            while len(self._folded) > _KEPT:
                self._folded.popitem(last=False)
        with lock:
            for message in endpoint.topics.read_all(f"pipeline.{pipeline}", folded.upto):
                self._fold(folded, message.number, message.key, message.at, message.value)
            yield folded

    def _fold(self, folded: Folded, number: int, key: str, at: float, value: dict[str, Any]) -> None:
        folded.upto = number
        if key in folded.keys:
            folded.repeated.add(number)  # the same entry once more, by a job or a submit that ran again
            return
        if ":" in key:
            folded.keys.add(key)
        known = folded.jobs.get(value["job"])
        first = known.first if known is not None else number
        follows = bool(value.get("follows"))
        if follows and known is not None:
            known.follows = True
            return
        job_type = known.job_type if known is not None else None
        folded.jobs[value["job"]] = Standing(
            value["state"], at, value["message"], first, follows, not follows, job_type
        )

    def _follow(self, endpoint: zerog.server.Endpoint, folded: Folded) -> None:
        """Take over the states of the jobs of ZeroG that have not ended; an entry without a job is passed over."""
        open_ones = [job for job, one in folded.jobs.items() if one.follows]
        for start in range(0, len(open_ones), 500):
            part = open_ones[start : start + 500]
            found = endpoint.manager.get_many(part)
            for job in part:
                record = found.get(job)
                if record is not None:
                    ended = record.state in _TERMINAL
                    first = folded.jobs[job].first
                    state, at = str(record.state), record.updated_at
                    folded.jobs[job] = Standing(state, at, record.message, first, not ended, True, record.job_type)
