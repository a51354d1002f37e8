"""Client: what a server can do, as methods that return models."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zerog.client.api import Api, error_of
from zerog.client.models import Job, Model
from zerog.exceptions import ZerogError


class Client:
    """Talks to one server, or to any number of them behind one address.

    ``url`` defaults to ``ZEROG_SERVER``, else to this machine's port 8888; ``token`` to ``ZEROG_TOKEN``; ``ca`` is a
    PEM file with the certificates that are trusted instead of the system's.  What finds no server, or is answered with
    429 or 502 to 504, is sent again for up to ``patience`` seconds, and happens once all the same.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, ca: str | None = None, patience: float = 60.0
    ) -> None:
        self.api = Api(url, token, ca, patience)

    def run(self, job_type: str, /, **parameters: Any) -> Job:
        """Submit a job; its parameters are the keywords."""
        return self.submit(job_type, parameters)

    def submit(
        self,
        job_type: str,
        parameters: Mapping[str, Any],
        *,
        parents: Sequence[Job | str] = (),
        delay: float | None = None,
        not_before: str | None = None,
        priority: int | None = None,
        key: str | None = None,
    ) -> Job:
        """Submit a job; the same ``key`` submits it once.

        ``parents`` are jobs, or their UUIDs, that must have succeeded before; ``delay`` is in seconds, ``not_before`` a
        time as in RFC 3339; a lower ``priority`` is more urgent.
        """
        named = [one.uuid if isinstance(one, Job) else one for one in parents]
        view = self.api.submit(
            job_type, parameters, key, delay=delay, not_before=not_before, priority=priority, parents=named
        )
        return Job(self.api, view)

    def batch(
        self, job_type: str, items: Sequence[Mapping[str, Any]], key: str | None = None
    ) -> list[Job | ZerogError]:
        """Submit up to 1,000 jobs, which may name each other as parents; for each the job, or why it was refused.

        An item has ``parameters``, and may have ``name``, ``parents`` (names and UUIDs), ``delay``, ``notBefore`` and
        ``priority``.
        """
        verdicts = self.api.batch(job_type, items, key or str(uuids.uuid4()))
        return [Job(self.api, one) if one["status"] == 202 else error_of(one) for one in verdicts]

    def job(self, uuid: str) -> Job:
        """Return a job; ``UnknownJob`` if there is none."""
        job = Job(self.api, {"href": f"/jobs/{uuid}", **self.api.job(uuid)})
        job._whole = True
        return job

    def jobs(self, type: str | None = None, state: str | None = None, limit: int | None = 50) -> Iterator[Job]:
        """Yield up to ``limit`` jobs, newest first; None for all."""
        return (Job(self.api, one) for one in self.api.jobs(type, state, limit))

    def types(self) -> list[Model]:
        """Return the job types."""
        return [Model(self.api, one) for one in self.api.types()]

    def type(self, job_type: str) -> Model:
        """Return one job type."""
        return Model(self.api, self.api.type(job_type))

    def pause(self, job_type: str, message: str | None = None) -> Model:
        """Hold back the queued jobs of a type; returns the type."""
        return Model(self.api, self.api.pause(job_type, message))

    def resume(self, job_type: str) -> Model:
        """Let the jobs of a type run again; returns the type."""
        return Model(self.api, self.api.resume(job_type))

    def retry_many(self, job_type: str, state: str = "failed", limit: int = 100) -> list[Model]:
        """Try the newest jobs of a type that failed, or were cancelled, again, each once; a verdict for each."""
        return [Model(self.api, one) for one in self.api.retry_many(job_type, state, limit)]

    def prune(self, older_than: float, job_type: str | None = None) -> int:
        """Remove the jobs that ended more than ``older_than`` seconds ago; returns how many."""
        return self.api.prune(older_than, job_type)

    def status(self) -> Model:
        """Return what the service does: processes, statistics, queue, agents."""
        return Model(self.api, self.api.json("/view_status"))
