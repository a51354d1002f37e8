"""Trying jobs again that failed or were cancelled: each as a new one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from zerog import codec
from zerog.exceptions import NotRetryable, ZerogError
from zerog.manager.records import Held
from zerog.manager.submitting import Options, Submission, Submitting, check_retryable, uuid_of
from zerog.manager.waiting import PARENT_FAILED
from zerog.record import JobRecord, State
from zerog.registry import Parameters

#: Entries of a log that are looked at in one go, and at most, for jobs to be tried again.
_PAGE, _LOOKED_AT = 200, 20_000
#: Retries of retries that are looked for.
_CHAIN = 20

#: Whose keys those of retries in bulk are: no client can choose the same.
_PRINCIPAL = "zerog:retry"


class Retrying(Submitting):
    """The verb that tries many jobs again."""

    def retry_many(self, job_type: str, state: State, limit: int) -> list[tuple[str, JobRecord | ZerogError]]:
        """Try again the newest ``limit`` jobs of a type in a state; for each its UUID, and the new job or why not.

        Each is tried again once, however often this is called: those that have been are passed over.
        """
        found: list[tuple[str, Submission]] = []
        verdicts: list[tuple[str, JobRecord | ZerogError]] = []
        for held in self._candidates(job_type, state):
            try:
                found.append((held.record.uuid, self._submission(held.record)))
            except ZerogError as error:
                verdicts.append((held.record.uuid, error))
            # Those that cannot be tried again are told, and are no obstacle to those that can.
            if len(found) == limit or len(verdicts) == limit:
                break
        done = self.submit_all([submission for _, submission in found])
        for (uuid, _), one in zip(found, done, strict=True):
            verdicts.append((uuid, one if isinstance(one, ZerogError) else one.record))
        return verdicts

    def retry(self, record: JobRecord) -> JobRecord:
        """Try a failed or cancelled job again, once: as a new one, which is what a second call returns.

        ``NotRetryable`` for a job that is not over, or has succeeded.
        """
        return self.submit(self._submission(record)).record

    def successor(self, uuid: str) -> JobRecord | None:
        """Return the job that tries another one again, if ``retry`` or ``retry_many`` has made one."""
        following = self._retry_of(uuid)
        found = self.read_many([following]).get(following)
        return found.record if found is not None else None

    def tried_again(self, uuid: str) -> bool:
        """Return whether any job is there that tries another one again, or one that did, also where that is gone."""
        chain = [uuid]
        for _ in range(_CHAIN):
            chain.append(self._retry_of(chain[-1]))
        return bool(self.read_many(chain[1:]))

    def again(
        self, record: JobRecord, parameters: Parameters, key: str | None = None, parents: tuple[str, ...] = ()
    ) -> Submission:
        """Return the submission that tries a failed or cancelled job again, as a new one; else ``NotRetryable``.

        Its priority is kept, the state that it had saved is not.  It waits for ``parents``, without any for its own
        ones, as far as it must.
        """
        check_retryable(record)
        waits_for = parents or self._parents_again(record)
        written = (("parent", ",".join(sorted(waits_for))),) if waits_for else ()
        options = Options(record.priority, written=written, retried_from=record.uuid, parents=waits_for)
        return Submission(record.job_type, parameters, options, key)

    def _parents_again(self, record: JobRecord) -> tuple[str, ...]:
        """Return the parents for which a job waits that is tried again.

        Those of a job that has run had succeeded.  Of a job that was cancelled on request those that are gone cannot be
        asked any more, and may have succeeded; of one that a parent has taken along they had not.
        """
        if record.attempt or not record.parents:
            return ()
        if record.reason == PARENT_FAILED:
            return record.parents
        known = self.read_many(record.parents)
        return tuple(parent for parent in record.parents if parent in known)

    def _submission(self, record: JobRecord) -> Submission:
        if record.attempt == 0 and record.reason == PARENT_FAILED:
            raise NotRetryable("it never ran, since a parent had not succeeded: try it by itself, with another parent")
        parameters = self.registry.validate(record.job_type, codec.dumps(record.parameters))
        return replace(self.again(record, parameters, record.uuid), principal=_PRINCIPAL)

    def _candidates(self, job_type: str, state: State) -> Iterator[Held]:
        """Yield jobs of a type in a state that were not tried again in bulk yet, the newest first."""
        log = "failed" if state is State.FAILED else f"jobs.{job_type}"
        before: int | None = None
        seen: set[str] = set()
        for _ in range(_LOOKED_AT // _PAGE):
            entries = self.store.read(log, before=before, limit=_PAGE)
            if not entries:
                return
            before = entries[-1].number
            uuids = [codec.loads(entry.body)["uuid"] for entry in entries]
            held = self.read_many([uuid for uuid in dict.fromkeys(uuids) if uuid not in seen])
            seen.update(uuids)
            fitting = [one for one in held.values() if one.cas and _fits(one.record, job_type, state)]
            tried = self.read_many([self._retry_of(one.record.uuid) for one in fitting])
            yield from (one for one in fitting if self._retry_of(one.record.uuid) not in tried)

    def _retry_of(self, uuid: str) -> str:
        return uuid_of(_PRINCIPAL, uuid)


def _fits(record: JobRecord, job_type: str, state: State) -> bool:
    return record.job_type == job_type and record.state is state
