"""Reading records and writing them under their guard (R4): what every group of the Manager's verbs stands on."""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from zerog import codec, failpoints
from zerog.clock import Clock, to_iso
from zerog.consumer import FINISHED
from zerog.consumers import Consumers
from zerog.datastore.base import Datastore
from zerog.exceptions import (
    AlreadyExists,
    Conflict,
    CorruptDocument,
    NewerVersion,
    NotFound,
    QueueError,
    QueueUnavailable,
    StoreAmbiguous,
    StoreUnavailable,
    Superseded,
    UnknownJob,
)
from zerog.fleet import Fleet
from zerog.needs import NOTHING, Needs
from zerog.queue.base import Put, Queue, TubeStats
from zerog.record import JobRecord, State, from_document, to_document
from zerog.registry import Registry
from zerog.topics import Topics

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often a write is tried against others before the store counts as too busy.
CONFLICTS = 50

#: Key of the document that is written to see whether the store takes writes.
_PROOF = "writable"

#: Seconds after which an end that was to be written counts as never written.
_RELEASE_WITHIN = 60.0

#: Losses in doubt that a process remembers.
_DOUBTFUL = 10_000


@dataclass(frozen=True, slots=True)
class Held:
    """A record as it was read or written last; ``cas`` names that very version of its document."""

    record: JobRecord
    cas: int


class Records:
    """The collaborators of a Manager, and the only two ways to a record: ``read`` and a write that checks.

    ``open_queue`` makes a queue connection; the Manager keeps one for each thread.  ``lease`` and ``retention`` are in
    seconds.
    """

    def __init__(
        self,
        store: Datastore,
        open_queue: Callable[[], Queue],
        registry: Registry,
        clock: Clock,
        service: str = "zerog",
        lease: float = 30.0,
        uniform: Callable[[float, float], float] = random.uniform,
        retention: float = 30 * 86_400.0,
    ) -> None:
        self.store = store
        self.registry = registry
        self.clock = clock
        self.service = service
        self.lease = lease
        self.retention = retention
        self.fleet = Fleet(store, clock)
        self._uniform = uniform
        self.open_queue = open_queue
        self._local = threading.local()
        #: True after the queue did not answer: puts are left to the sweep until a probe succeeds.
        self.queue_away = False
        #: The job types that were paused when this process looked last.
        self.paused: frozenset[str] = frozenset()
        #: What the jobs of each type need, beside what the type says, as of the last look.
        self.needs_in_use: Mapping[str, tuple[Needs, ...]] = {}
        #: Called when that has changed, in whatever thread found out.
        self.on_needs: Callable[[], None] = nothing
        #: Jobs whose ends this process has written, or tried to, and whose children may be released then.
        #: Each with the moment, on the monotonic clock, until which that is tried.
        self.ended_parents: deque[tuple[str, float]] = deque()
        #: Records that were lost, or not: the store did not say, or not that the error was left.
        self.doubtful: deque[JobRecord] = deque(maxlen=_DOUBTFUL)
        #: Whether jobs have ended of which their consumers were not told yet.
        self.ends_untold = False
        self.topics = Topics(store, clock, self.wake)
        self.consumers = Consumers(store, clock)

    # Names in the store and the queue

    def tube(self, job_type: str, needs: Needs = NOTHING) -> str:
        """Return the tube of the jobs of a type that need the same."""
        tube = f"{self.service}.{job_type}"
        return f"{tube}.{needs.digest()}" if needs else tube

    def agent_tube(self, agent: str) -> str:
        """Return the tube in which an agent hears what it is to do at once."""
        return f"{self.service}.agent.{agent}"

    def consumer_tube(self, consumer: str) -> str:
        """Return the tube in which a consumer hears that there is something in one of its topics."""
        return f"{self.service}.topic.{consumer}"

    @staticmethod
    def key(uuid: str) -> str:
        """Return the key of a record."""
        return f"job:{uuid}"

    @staticmethod
    def events_log(uuid: str) -> str:
        """Return the log that keeps what a job said."""
        return f"events.{uuid}"

    @staticmethod
    def blob_name(uuid: str, attempt: int) -> str:
        """Return the name under which an attempt's output is kept."""
        return f"data.{uuid}.{attempt}"

    def side_by_side(
        self, steps: Sequence[Callable[[], T]], then: Callable[[], Sequence[Callable[[], T]]] = lambda: ()
    ) -> list[T]:
        """Do some steps, and those that ``then`` says afterwards, in one commit; for each its result."""
        with self.store.together():
            done = [step() for step in steps]
            return done + [step() for step in then()]

    # Reading

    def read(self, uuid: str) -> Held:
        """Return a record; ``UnknownJob``, ``CorruptDocument`` or ``NewerVersion`` if that is not possible."""
        try:
            document = self.store.get(self.key(uuid))
        except NotFound as error:
            raise UnknownJob(f"there is no job {uuid}") from error
        return Held(from_document(document.body), document.cas)

    def read_many(self, uuids: Sequence[str]) -> dict[str, Held]:
        """Return those of the records that exist; a damaged one as ``shown_damaged`` makes it, with cas 0."""
        documents = self.store.get_many([self.key(uuid) for uuid in uuids])
        found = {}
        for uuid in uuids:
            document = documents.get(self.key(uuid))
            if document is None:
                continue
            try:
                found[uuid] = Held(from_document(document.body), document.cas)
            except (CorruptDocument, NewerVersion) as error:
                found[uuid] = Held(shown_damaged(uuid, document.body, error), 0)
        return found

    def lost(self, record: JobRecord) -> bool:
        """Return whether a record runs under an agent that is certainly gone (R7): nobody need wait for its lease."""
        if record.state is not State.RUNNING or record.lease is None:
            return False
        return self.fleet.gone(record.agent or record.lease.agent, record.lease.agent)

    def prove_writable(self) -> None:
        """Return if the store takes writes now; ``StoreUnavailable`` otherwise.

        The document is the same for all processes: that another was faster (``Conflict``) says as much.
        """
        body = codec.dumps({"at": to_iso(self.clock.now())})
        try:
            self.store.replace(_PROOF, body, self.store.get(_PROOF).cas)
        except NotFound:
            with suppress(AlreadyExists):
                self.store.insert(_PROOF, body)
        except Conflict:
            return

    # Writing

    def write(self, held: Held, record: JobRecord) -> Held:
        """Replace the very version ``held``; ``updatedAt`` moves only if something that clients watch did."""
        if visible(record) != visible(held.record):
            record = record.evolve(updated_at=self.clock.now())
        if record.terminal and self.registry.follows_ends:
            self.ends_untold = True
        if record.children and record.terminal:
            self.ended_parents.append((record.uuid, self.clock.monotonic() + _RELEASE_WITHIN))
        cas = self.store.replace(self.key(record.uuid), to_document(record), held.cas)
        return Held(record, cas)

    def guarded(
        self, held: Held, attempt: int, change: Callable[[JobRecord], JobRecord], point: str = "run.renew_ambiguous"
    ) -> Held:
        """Change a running record on behalf of its attempt, and of no other (R4).

        The version that is replaced is the one that was checked.  On a conflict, or when it is unknown whether the
        write happened, the record is read and checked again before ``change`` is applied again.
        """
        # Also the claim: after a prune the same key makes a job with the same UUID, whose attempts count from one.
        claim = claim_of(held.record)
        for _ in range(CONFLICTS):
            check_attempt(held.record, attempt, claim)
            changed = change(held.record)
            try:
                return self._write_at(point, held, changed)
            except (Conflict, NotFound):
                held = self._read_again(held.record.uuid, attempt)
            except StoreAmbiguous:
                held = self._read_again(held.record.uuid, attempt)
                if same_content(held.record, changed):
                    return held
        raise too_busy(held.record.uuid)

    def confirm(self, held: Held, attempt: int) -> None:
        """Return if an attempt is still the current one, or has written its end itself; else ``Superseded`` (R12)."""
        record, claim = self._read_again(held.record.uuid, attempt).record, claim_of(held.record)
        if claim is None or record.settled_by != claim:
            check_attempt(record, attempt, claim)

    def _read_again(self, uuid: str, attempt: int) -> Held:
        """Read the record of an attempt; ``Superseded`` if it was removed meanwhile, as only ended jobs are."""
        try:
            return self.read(uuid)
        except UnknownJob as error:
            raise Superseded(f"attempt {attempt} of job {uuid} is over: the job was removed") from error

    def _write_at(self, point: str, held: Held, record: JobRecord) -> Held:
        return failpoints.ambiguous(point, lambda: self.write(held, record), StoreAmbiguous)

    # The queue

    @property
    def queue(self) -> Queue:
        """This thread's connection to the queue."""
        queue: Queue | None = getattr(self._local, "queue", None)
        if queue is None:
            queue = self._local.queue = self.open_queue()
        return queue

    def enqueue(self, records: Iterable[JobRecord]) -> bool:
        """Put the UUIDs of queued records into their tubes; False if that is left to the sweep."""
        return self.put_all([self.put_of(record) for record in records])

    def put_of(self, record: JobRecord) -> Put:
        """Return the queue's entry of a queued record."""
        now = self.clock.now()
        delay = max(0.0, (record.not_before or now) - now)
        return Put(self.tube(record.job_type, record.needs), record.uuid.encode(), record.priority, delay, self.lease)

    def put_all(self, puts: Sequence[Put]) -> bool:
        """Put entries; False if the queue is away and they are left to the sweep."""
        if not puts or self.queue_away:
            return not puts
        errors = [error for error in self._put(puts) if error is not None]
        if errors:
            self.say_queue_away(errors[0], len(errors))
        return not errors

    def tell_agents(self, agents: Iterable[str], look: str) -> None:
        """Make agents look at once at a job's record, or at the ``pauses``: they would do so within a second anyway."""
        body = codec.dumps({"look": look})
        living = [agent for agent in agents if self.fleet.hears_queue(agent)]
        if living and not self.queue_away:
            self._put([Put(self.agent_tube(agent), body, ttr=self.lease) for agent in living])

    def wake(self, topic: str) -> None:
        """Make the consumers of a topic look at once: they would do so within a second anyway."""
        for name in self.registry.followers(topic):
            if self.queue_away:
                return
            tube = self.consumer_tube(name)
            try:
                if not self.queue.stats(tube).ready:  # one is enough, also when nobody has come for it
                    self.queue.put(Put(tube, b"look", ttr=self.lease))
            except QueueError as error:
                self.say_queue_away(error)

    def tell_of_ends(self) -> None:
        """Wake those that follow the ends of jobs, if there were any."""
        if self.ends_untold:
            self.ends_untold = False
            self.wake(FINISHED)

    def say_queue_away(self, error: QueueError, entries: int = 0) -> None:
        """Leave puts to the sweep until the queue answers a probe; ``entries`` are those that were to be put now."""
        if entries or not self.queue_away:
            logger.warning("queue away, %d entries are left to the sweep: %s", entries, error)
        self.queue_away = True

    def _put(self, puts: Sequence[Put]) -> list[QueueError | None]:
        try:
            return self.queue.put_all(puts)
        except QueueError as error:
            return [error] * len(puts)

    def probe_queue(self) -> str | None:
        """Ask the queue for a sign of life on this thread's connection: its identity; None while it is away."""
        try:
            identity = self.queue.identity()
        except QueueUnavailable as error:
            self.say_queue_away(error)
            return None
        if self.queue_away:
            self.queue_away = False
            logger.info("queue back")
        return identity

    def queue_stats(self, job_type: str) -> TubeStats:
        """Return how many entries a job type has in the queue, by state, whatever they need."""
        found = [self.queue.stats(tube) for tube in self.tubes_of(job_type)]
        return functools.reduce(TubeStats.plus, found)

    def tubes_of(self, job_type: str) -> list[str]:
        """Return the tubes of a job type: one for what needs nothing, and one for each of the needs in use."""
        return [self.tube(job_type), *(self.tube(job_type, one) for one in self.needs_of(job_type))]

    def needs_of(self, job_type: str) -> tuple[Needs, ...]:
        """Return what jobs of a type need, as far as this process knows: its type, and what was looked up."""
        own = self.registry.policy(job_type).needs
        known = self.needs_in_use.get(job_type, ())
        return known if not own or own in known else (own, *known)

    def next_in_queue(self, job_type: str) -> str | None:
        """Return the UUID of the job of a type that an agent would get now; None if none is ready."""
        for tube in self.tubes_of(job_type):
            body = self.queue.peek(tube)
            if body is not None:
                return body.decode("ascii", "replace")
        return None

    def close_queue(self) -> None:
        """Close this thread's connection to the queue."""
        queue: Queue | None = getattr(self._local, "queue", None)
        if queue is not None:
            queue.close()


def nothing() -> None:
    """Have nobody to tell."""


def too_busy(uuid: str) -> StoreUnavailable:
    """Return the error that ends ``CONFLICTS`` tries to change a record."""
    return StoreUnavailable(f"job {uuid} is being changed by too many at once")


def claim_of(record: JobRecord) -> str | None:
    """Return the claim that began the attempt that runs, if one does."""
    return record.lease.claim if record.lease is not None else None


def check_attempt(record: JobRecord, attempt: int, claim: str | None) -> None:
    """Raise ``Superseded`` unless ``attempt``, begun by ``claim``, is the one that may write this record."""
    mine = record.attempt == attempt and (record.lease is None or record.lease.claim == claim)
    if record.state is not State.RUNNING or not mine:
        raise Superseded(
            f"attempt {attempt} of job {record.uuid} is over: the job is {record.state} in attempt {record.attempt}",
            state=str(record.state),
        )


def visible(record: JobRecord) -> tuple[object, ...]:
    """Return what the progress view shows of a record: when it changes, so do ``updatedAt`` and the ETag."""
    return (
        record.state,
        record.cancel_requested,
        record.completeness,
        record.result_code,
        record.message,
        record.reason,
        record.attempt,
    )


def same_content(stored: JobRecord, intended: JobRecord) -> bool:
    """Return whether a stored record is what was meant to be written, but for the time of the write."""
    return to_document(stored.evolve(updated_at=0.0)) == to_document(intended.evolve(updated_at=0.0))


def shown_damaged(uuid: str, body: bytes, error: Exception) -> JobRecord:
    """Return what can be shown of a document that is no record: a failed job that says so."""
    newer = isinstance(error, NewerVersion)
    try:
        members = codec.loads(body)
    except CorruptDocument:
        members = {}
    members = members if isinstance(members, dict) else {}
    job_type, number = members.get("jobType"), members.get("number")
    return JobRecord(
        uuid=uuid,
        job_type=job_type if isinstance(job_type, str) else "unknown",
        number=number if isinstance(number, int) else 0,
        parameters={},
        created_at=0.0,
        updated_at=0.0,
        state=State.QUEUED if newer else State.FAILED,
        result_code=-1 if newer else 500,
        reason="newer_version" if newer else "corrupt_document",
        message=codec.printable(str(error), 200),
    )
