"""Slot: one place in an agent, with its child, its queue connection, and the job that it answers for.

What it does, in order::

    IDLE ──ask──▶ WAITING ──reservation──▶ CLAIMING ──record says running──▶ RUNNING ──outcome──▶ ENDING
      ▲          ▲                           ▲ │ not ours                                          │ record first,
      │          │                           └─┼───────── an entry came ahead ─────────────────────┤ queue entry
      │          └─────────────────────────────┼───────── asked ahead, no answer yet ──────────────┤ second (R5)
      └────────────────────────────────────────┴───────────────────────────────────────────────────┘

While a job's end is written the slot asks for what is ready next, so that the claim of that one shares the commit; the
entry of the ended job is deleted together with the next question, or soon after by itself.  After a short job it asks
while the next one runs, and gives back what it got when that one takes longer.

Nothing here waits.  Whatever needs the store happens in ``step``, which the agent calls for all slots inside one
commit; what must not happen before that commit is returned and called after it.
"""

from __future__ import annotations

import enum
import json
import logging
import secrets
import signal
from collections.abc import Callable, Sequence
from typing import Any

from zerog import failpoints
from zerog.agent.attempt import WRITE_EVERY, Attempt, Stop, Terms, read_outcome
from zerog.agent.process import Child
from zerog.clock import Clock
from zerog.datastore.blobs import CHUNK
from zerog.entries import Entries, Strays
from zerog.exceptions import QueueUnavailable, UnknownType
from zerog.job import Job
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, Drop, GiveBack, Held, Manager, Missing
from zerog.needs import Needs
from zerog.outcome import Cancelled, Crashed, Failed, GivenBack, Outcome, Result, Succeeded
from zerog.queue.base import Queue, Reservation
from zerog.record import JobRecord, State
from zerog.remote import Remote

logger = logging.getLogger(__name__)

#: Bytes of an output that wait for the store before the child has to.
_OUTPUT_WAITING = 4 * CHUNK

#: Seconds that a job may take to count as short.
_SHORT = 0.001

#: Seconds between two looks at the memory of an attempt that has a limit.
_MEMORY_EVERY = 0.1

#: Reads of captured output in one go, so that one flooding job leaves the others their turn.
_STREAM_READS = 16


def _nothing() -> None:
    """Have nothing to do after a commit."""


def _fits_always(_: Needs) -> bool:
    """Have room for everything."""
    return True


class Phase(enum.Enum):
    """Where a slot is; the module's docstring draws it."""

    IDLE = enum.auto()
    WAITING = enum.auto()
    CLAIMING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


class Slot:
    """One place in an agent.  Called by the agent's loop only."""

    def __init__(self, manager: Manager | Remote, queue: Queue, clock: Clock, watch: LeaseWatch, terms: Terms) -> None:
        self.manager = manager
        self.entries = Entries(queue, clock, (), self._say_queue_away)
        self.terms = terms
        self.phase = Phase.IDLE
        self.child: Child | None = None
        self.attempt: Attempt | None = None
        self.stop: Stop | None = None
        self.retire_child = False
        self.superseded = 0
        self._clock = clock
        self._watch = watch
        self._claim = ""
        self._strays = Strays()
        self._last_run = float("inf")
        self._ended_record: JobRecord | None = None
        #: Whether the claim of this name may be written: then only the record can say whose the job is.
        self._claim_tried = False
        self.draining = False
        #: Whether what its last step said is on its way to a master: until that is known there is no other step.
        self.in_flight = False
        #: Whether the agent has room for what a job needs, now that it is known.
        self.fits: Callable[[Needs], bool] = _fits_always

    # Waiting for work

    def wants_to_ask(self) -> bool:
        """Return whether the slot could take a job now."""
        return self.phase is Phase.IDLE and self._has_child and bool(self.entries.tubes)

    def serve(self, tubes: Sequence[str]) -> None:
        """Serve these tubes from now on."""
        if self.entries.tubes == tuple(tubes):
            return
        self.entries.tubes = tuple(tubes)
        if self.phase is Phase.WAITING and not self.entries.asked_ahead:
            self.entries.withdraw()
            self.phase = Phase.IDLE

    @property
    def _has_child(self) -> bool:
        """Whether there is a child that can take another job."""
        return self.child is not None and self.child.ready and not self.retire_child

    def ask(self) -> None:
        """Ask the queue for the next entry."""
        self.entries.ask()
        self.phase = Phase.WAITING

    def wants_to_ask_ahead(self, now: float) -> bool:
        """Return whether the end of a job is about to be written, or soon will be, and the slot could take another."""
        entries = self.entries
        if (
            not entries.queue.asks_ahead
            or entries.asked_early
            or not self._has_child
            or entries.looks_ahead
            or not entries.tubes
        ):
            return False
        return self.phase is Phase.ENDING or self.ends_soon(now)

    def _new_claim(self) -> None:
        self._claim = secrets.token_hex(8)
        self._claim_tried = False

    def _give_ahead_back(self, now: float) -> None:
        """Let others have what was asked for ahead, but for what may be claimed already."""
        if self.entries.take_ahead_quietly():
            self._new_claim()
        if self.entries.asked_ahead or self._claim_tried:
            self.entries.keep_ahead(now)
        else:
            self.entries.give_ahead_back()

    def withdraw(self, now: float) -> None:
        """Stop asking, and give back what was asked for ahead: the agent drains.  May be called again and again."""
        self.draining = True
        self.entries.delete_done()
        if self.entries.looks_ahead:
            self._give_ahead_back(now)
        if self.phase is Phase.WAITING and not self.entries.asked_ahead:
            self.entries.withdraw()
            self.phase = Phase.IDLE

    def queue_lost(self) -> None:
        """Say that the queue is away: what was asked is asked again later."""
        if self.phase is Phase.WAITING or self.entries.asked_ahead:
            self.entries.withdraw()
        if self.phase is Phase.WAITING:
            self.phase = Phase.IDLE

    def on_queue(self) -> None:
        """Take what the queue has for us."""
        if self.phase is not Phase.WAITING or not self.entries.take():
            return
        self.phase = Phase.IDLE
        if self.entries.current is not None:
            self._new_claim()
            self.phase = Phase.CLAIMING

    def ends_soon(self, now: float) -> bool:
        """Return whether what runs here is young and the last job was short: waiting for it costs little."""
        attempt = self.attempt
        return (
            self.phase is Phase.RUNNING
            and attempt is not None
            and self._last_run < _SHORT
            and now - attempt.started < _SHORT
        )

    @property
    def idle(self) -> bool:
        """Whether it could take a job now."""
        return self.phase in (Phase.IDLE, Phase.WAITING) and self._has_child

    def says_soon(self, now: float, short: float) -> bool:
        """Return whether it is about to say how a job ended that takes no longer than ``short`` seconds."""
        if self.phase is Phase.CLAIMING:
            return self._has_child
        attempt = self.attempt
        young = self.phase is Phase.RUNNING and attempt is not None and now - attempt.started < short
        return young and self._last_run < short

    @property
    def ends(self) -> bool:
        """Whether the end of its job is to be written."""
        return self.phase is Phase.ENDING

    @property
    def last_run(self) -> float:
        """How many seconds the last job ran; infinite before it."""
        return self._last_run

    @property
    def may_let_go(self) -> bool:
        """Whether the end of its job can be written without it, and its child take the next one."""
        return self.ends and self._has_child and not (self.in_flight or self.draining)

    def let_go(self) -> Slot:
        """Be free, and return a place without a child in which the job that was here ends."""
        last = Slot(self.manager, self.entries.queue, self._clock, self._watch, self.terms)
        last.phase, last.attempt, last._last_run = Phase.ENDING, self.attempt, self._last_run
        last.entries.current, self.entries.current = self.entries.current, None
        self._end_attempt()
        self.phase = Phase.IDLE
        return last

    # What needs the store

    def wants_store(self, now: float) -> bool:
        """Return whether ``step`` has something to do."""
        if self.in_flight:
            return False
        match self.phase:
            case Phase.CLAIMING:
                return self._has_child or self._claim_tried
            case Phase.ENDING:
                return True
            case Phase.RUNNING if self.token_lost:
                return False
            case Phase.RUNNING:
                assert self.attempt is not None
                attempt = self.attempt
                return bool(attempt.waiting_output or attempt.question) or attempt.report_due(now)
        return False

    @property
    def claims(self) -> bool:
        """Whether its next step takes up what came."""
        return self.phase is Phase.CLAIMING

    def step(self, now: float) -> Callable[[], None]:
        """Do one thing with the store; what is returned must be called once that is committed."""
        match self.phase:
            case Phase.CLAIMING:
                assert self.entries.current is not None
                return self._step_claim(now, self.entries.current)
            case Phase.ENDING:
                return self._step_settle()
            case _:
                return self._step_report(now)

    def step_ahead(self, now: float) -> Callable[[], None]:
        """Claim, in the commit that ends one job, the next one, if there is one and a child for it."""
        try:
            if self.entries.take_ahead():
                self._new_claim()
        except QueueUnavailable as error:
            self.entries.no_answer(error)
        if self.entries.ahead is None:
            return _nothing
        return self._step_claim(now, self.entries.ahead) if self._has_child else self._leave_it

    def _leave_it(self) -> None:
        """Give back the entry that came ahead: there is no child for it now."""
        if self.phase is Phase.CLAIMING and not self._claim_tried:
            self._give_entry_back(0.0, None)

    def _step_claim(self, now: float, reservation: Reservation) -> Callable[[], None]:
        uuid = reservation.body.decode()
        self._claim_tried = True
        verdict = self.manager.claim(uuid, self.terms.claimant, self._claim, self._watch, reservation)

        def after() -> None:
            self.entries.take_up(reservation)
            self.phase = Phase.CLAIMING
            match verdict:
                case Claimed(held=held) if self.draining or not self._has_child or not self.fits(held.record.needs):
                    self._return(held, now)
                case Claimed(held=held):
                    failpoints.hit("run.after_claim")
                    self._strays.found(uuid)
                    self._start(held, now)
                case GiveBack(delay=delay, priority=priority):
                    self._give_entry_back(delay, priority)
                case Drop():
                    self._drop_entry()
                case Missing():
                    self._missed(uuid)

        return after

    def _return(self, held: Held, now: float) -> None:
        """Give back a job that was claimed and cannot be started here: it spends nothing."""
        self.attempt = Attempt(held, Job, now, self.terms)
        self.attempt.outcome = GivenBack(started=False)
        self.phase = Phase.ENDING

    def _start(self, held: Held, now: float) -> None:
        assert self.child is not None
        record = held.record
        try:
            job = self.manager.registry.get(record.job_type)
        except UnknownType:
            job = Job  # the child will say so
        self.attempt = Attempt(held, job, now, self.terms)
        self.attempt.started = self._clock.monotonic()  # the commit before it took its time
        self.entries.asked_early = False
        self.phase = Phase.RUNNING
        self.terms.statistics.add("attempts")
        logger.debug("started job=%s type=%s attempt=%d", record.uuid, record.job_type, record.attempt)
        self.child.pipe.send(
            {
                "t": "run",
                "uuid": record.uuid,
                "attempt": record.attempt,
                "jobNumber": record.number,
                "jobType": record.job_type,
                "parameters": record.parameters,
                "state": record.job_state,
                **({"parents": list(record.parents)} if record.parents else {}),
            }
        )
        if record.cancel_requested:
            self.begin_cancel(now)

    def _step_report(self, now: float) -> Callable[[], None]:
        attempt = self.attempt
        assert attempt is not None
        self._confirm_attempt(attempt)
        waiting = len(attempt.waiting_output)
        output = attempt.stored_output() if waiting else None
        question = attempt.question
        answer = self.terms.answered(attempt.held.record, question) if question is not None else None

        def stored() -> None:
            if output is not None:
                attempt.output = output
                del attempt.waiting_output[:waiting]  # more may have come meanwhile
            if answer is not None and self.child is not None:
                attempt.question = None
                self.child.pipe.send(answer() if callable(answer) else answer)

        if not attempt.report_due(now):
            return stored
        completeness, message, checkpoint = attempt.completeness, attempt.message, attempt.checkpoint
        attempt.recorder.flush(self.manager)
        state = () if checkpoint is None else checkpoint[1:]
        held = self.manager.report(attempt.held, attempt.number, completeness, message, state)

        def after() -> None:
            stored()
            attempt.held = held
            attempt.recorder.confirm()
            # More may have come meanwhile.
            attempt.completeness = None if attempt.completeness == completeness else attempt.completeness
            attempt.message = None if attempt.message == message else attempt.message
            attempt.write_at = now + WRITE_EVERY
            attempt.renew_at = now + attempt.lease / 3
            attempt.sure_until = now + attempt.lease / 2
            if held.record.cancel_requested:
                self.begin_cancel(now)
            if checkpoint is not None:
                attempt.checkpoint = None
                assert self.child is not None
                self.child.pipe.send({"t": "stored", "number": checkpoint[0]})

        return after

    def _confirm_attempt(self, attempt: Attempt) -> None:
        """Raise ``Superseded`` before anything is written for an attempt that may have been taken over (R12).

        The guard refuses its record in any case; this keeps its output and events, which come first, out of the store.
        """
        if self._clock.monotonic() > attempt.sure_until:
            self.manager.confirm(attempt.held, attempt.number)

    def _step_settle(self) -> Callable[[], None]:
        attempt = self.attempt
        assert attempt is not None and attempt.outcome is not None
        outcome = attempt.outcome
        failpoints.hit("run.before_record")
        self._confirm_attempt(attempt)
        if isinstance(outcome, Succeeded) and attempt.output is not None:
            output = attempt.stored_output()
            output.close()
            outcome = Succeeded(Result(attempt.media_type, output.size, blob=output.blob), outcome.code)
        attempt.say_end(self._clock.now())
        attempt.recorder.flush(self.manager)
        failpoints.hit("run.after_data")
        held = self.manager.settle(
            attempt.held, attempt.number, outcome, attempt.told, attempt.completeness, attempt.message
        )

        def after() -> None:
            self._ended_record = held.record
            self._settled(held)

        return after

    def say_ended(self) -> None:
        """Log the end that was written last: after the next job has been handed over, which need not wait for it."""
        record, self._ended_record = self._ended_record, None
        if record is not None:
            logger.info(
                "ended job=%s attempt=%d state=%s code=%d",
                record.uuid,
                record.attempt,
                record.state,
                record.result_code,
            )

    def _settled(self, held: Held) -> None:
        """The record is written; now the queue's entry (R5)."""
        record, attempt = held.record, self.attempt
        moved = attempt is not None and record.revised != attempt.revised
        if attempt is not None and attempt.outcome is not None:
            cancelled = record.state is State.CANCELLED
            self.terms.account.ended(attempt.uuid, attempt.number, attempt.outcome, cancelled)
            if not isinstance(attempt.outcome, GivenBack):
                self.terms.statistics.observe(record.job_type, self._clock.monotonic() - attempt.started)
        self._end_attempt()
        if record.state is State.QUEUED and moved and isinstance(self.manager, Manager):
            # It was modified while it ran: its entry may lie where it does not belong any more.
            self._drop_entry()
            self.manager.enqueue([record])
        elif record.state is State.QUEUED:
            failpoints.hit("retry.after_record")
            delay = (record.not_before or 0.0) - self._clock.now()
            self._give_entry_back(max(0.0, delay), record.priority, "retry.release_fails")
        else:
            failpoints.hit("run.after_record")
            self._drop_entry()

    def heed(self, held: Held, now: float) -> None:
        """Look at the job's record as others see it: a cancel, or another attempt, may stand there."""
        if self.attempt is None:
            return
        if held.record.terminal or held.record.attempt != self.attempt.number:
            if self.stop is None:
                self.lost_token()
        elif held.record.cancel_requested:
            self.begin_cancel(now)

    def lost_token(self) -> None:
        """R12: another attempt exists, or the job has ended.  Stop the child and write nothing."""
        if self.token_lost:
            return  # it is being stopped already
        attempt = self.attempt
        self.superseded += 1
        self.terms.statistics.add("superseded")
        assert attempt is not None
        logger.warning("superseded job=%s attempt=%d", attempt.uuid, attempt.number)
        if self.phase is Phase.ENDING or self.child is None:
            self._end_superseded()
        else:
            self._stop_child(None, [signal.SIGTERM, signal.SIGKILL], self._clock.monotonic())

    def _end_superseded(self) -> None:
        """Be done with an attempt that is not the current one.  Its entry may be the only one that the job has."""
        self._end_attempt()
        self._give_entry_back(0.0, None)

    def abandon(self) -> None:
        """Get over an unexpected error: end the child, give the entry back after a while, go on with the next."""
        if self.child is not None and self.attempt is not None:
            self.child.signal(signal.SIGKILL)
            self.retire_child = True
        self._end_attempt()
        self._give_entry_back(self.terms.lease / 3, None)

    # Entries

    def _missed(self, uuid: str) -> None:
        if self._strays.is_over(uuid):
            self._drop_entry()
        else:
            self._give_entry_back(self.terms.lease / 3, None)

    def _give_entry_back(self, delay: float, priority: int | None, point: str | None = None) -> None:
        self.entries.give_back(delay, priority, point)
        self._free()

    def _drop_entry(self) -> None:
        self.entries.drop()
        self._free()

    def _free(self) -> None:
        if self.entries.current is not None:
            self.phase = Phase.CLAIMING
        else:
            self.phase = Phase.WAITING if self.entries.asked_ahead else Phase.IDLE

    def _say_queue_away(self, error: QueueUnavailable) -> None:
        self.manager.queue_away = True
        logger.warning("queue away: %s", error)

    def touch(self, now: float) -> None:
        """Keep the queue's promise while the job runs."""
        attempt = self.attempt
        if attempt is None or now < attempt.touch_at or self.entries.current is None or self.manager.queue_away:
            return
        attempt.touch_at = now + attempt.lease / 3
        self.entries.touch()

    # The child

    @property
    def gives_up_child(self) -> bool:
        """Whether the child is to be replaced, and can be now."""
        return self.retire_child and self.phase in (Phase.IDLE, Phase.CLAIMING)

    def adopt(self, child: Child) -> None:
        """Take a child that may still be starting."""
        self.child = child
        self.retire_child = False

    def on_message(self, message: dict[str, Any] | bytes) -> None:
        """Take what the child says."""
        attempt = self.attempt
        if attempt is None or attempt.outcome is not None:
            return
        elif isinstance(message, bytes):
            attempt.waiting_output += message
        elif message["t"] == "report":
            attempt.take_report(message)
        elif message["t"] == "output":
            attempt.media_type = message["mediaType"]
            attempt.output = self.manager.open_output(attempt.uuid, attempt.number, attempt.media_type)
        elif message["t"] == "checkpoint":
            attempt.checkpoint = (message["number"], json.loads(message["state"]))
        elif message["t"] in ("parents", "read", "publish", "document"):
            attempt.question = message
        elif message["t"] == "outcome":
            self._on_outcome(attempt, message)

    @property
    def full(self) -> bool:
        """Whether the child must wait: so much of its output is not stored yet."""
        return self.attempt is not None and len(self.attempt.waiting_output) >= _OUTPUT_WAITING

    def _on_outcome(self, attempt: Attempt, message: dict[str, Any]) -> None:
        child = self.child
        assert child is not None
        if (message["uuid"], message["attempt"]) != (attempt.uuid, attempt.number):
            raise ValueError("an outcome of another attempt")
        child.jobs += 1
        if message["leftovers"] or attempt.job.fresh_process or child.jobs >= self.terms.max_jobs:
            self.retire_child = True
        elif message["peak"] > self.terms.max_memory and child.memory() > self.terms.max_memory:
            logger.info("recycled child=%d: more than %d bytes", child.pid, self.terms.max_memory)
            self.retire_child = True
        if self.token_lost:
            # It came to its end before the signal reached it: whatever it came to is nobody's business any more.
            self._end_superseded()
            return
        if self.stop is not None and self.stop.outcome is not None and not self.stop.told:
            return  # it is being ended for a reason of ours, which stays the reason
        attempt.told = bool(message["told"])
        self._ended(attempt, read_outcome(message))

    def _ended(self, attempt: Attempt, outcome: Outcome) -> None:
        self._last_run = self._clock.monotonic() - attempt.started
        self._collect_output(attempt)
        attempt.outcome = outcome
        self.stop = None
        self.phase = Phase.ENDING

    def _collect_output(self, attempt: Attempt) -> None:
        """Take the captured output that is left: the child flushed it before it sent the outcome."""
        for name in ("stdout", "stderr"):
            self.on_stream(name, reads=1000)
        attempt.end_output(self._clock.now())

    def on_stream(
        self, name: str, reads: int = _STREAM_READS, said: Callable[[Child, str, bytes], None] | None = None
    ) -> bool:
        """Take captured output; False at its end.  ``said`` gets what was written while no job ran."""
        child = self.child
        if child is None:
            return False
        for _ in range(reads):
            data = child.read_stream(name)
            if data is None:
                return True
            if not data:
                return False
            if self.attempt is not None:
                self.attempt.take_output(name, data, self._clock.now())
            elif said is not None:
                said(child, name, data)
        return True

    def on_gone(self) -> None:
        """The child's process has ended, or its pipe broke: settle what it was doing."""
        child, attempt, stop = self.child, self.attempt, self.stop
        if child is None:
            return
        if attempt is not None and self.phase is Phase.RUNNING and attempt.outcome is None:
            text = child.exit_text() if child.gone() else "broke its pipe"
            outcome: Outcome | None = Crashed(f"the process of attempt {attempt.number} {text} without an outcome")
            if stop is not None:
                outcome = stop.outcome
            if outcome is None:
                self._end_superseded()
            else:
                self._ended(attempt, outcome)
        self.stop = None
        self.retire_child = True

    def _end_attempt(self) -> None:
        self.attempt = None
        self.stop = None

    # Stopping a child

    def begin_cancel(self, now: float) -> None:
        """R11: ask the child, then SIGTERM to its group, then SIGKILL."""
        if self.phase is not Phase.RUNNING or self.stop is not None or self.child is None:
            return
        assert self.attempt is not None
        logger.info("cancelling job=%s attempt=%d", self.attempt.uuid, self.attempt.number)
        self.child.pipe.send({"t": "cancel"})
        signals = [signal.SIGTERM, signal.SIGKILL]
        self.stop = Stop(Cancelled(), signals, now + self.terms.grace, told=True)

    def may_give_back(self, at_once: bool) -> bool:
        """Return whether the child is still to be ended, or to be ended faster than it is."""
        return self.stop is None or self.stop.told or (at_once and bool(self.stop.signals))

    def give_back(self, now: float, at_once: bool) -> None:
        """End the child without blame and give its job back, spending nothing: the agent stops."""
        if self.phase is Phase.CLAIMING and not self._claim_tried:
            self._give_entry_back(0.0, None)
        if self.phase is not Phase.RUNNING:
            return
        if self.stop is None:
            outcome = GivenBack()
        elif self.stop.outcome is not None:
            outcome = self.stop.outcome  # type: ignore[assignment]
        else:
            return
        signals = [signal.SIGKILL] if at_once else [signal.SIGTERM, signal.SIGKILL]
        self._stop_child(outcome, signals, now)

    def _stop_child(self, outcome: Outcome | None, signals: list[signal.Signals], now: float) -> None:
        self.stop = Stop(outcome, signals, now)
        self.retire_child = True
        self._rougher(now)

    def _rougher(self, now: float) -> None:
        assert self.stop is not None and self.child is not None
        if self.stop.signals:
            self.child.signal(self.stop.signals.pop(0))
            self.stop.told = False
        self.stop.next = now + self.terms.grace

    def tick(self, now: float) -> None:
        """Do what time asks for: limits, rougher signals, the touch, the last job's entry."""
        if now >= self.entries.delete_at and not self.manager.queue_away:
            self.entries.delete_done()
        if self.entries.looks_ahead and now >= self.entries.keep_until and self.phase in (Phase.RUNNING, Phase.ENDING):
            self._give_ahead_back(now)
        attempt = self.attempt
        if self.phase is not Phase.RUNNING or attempt is None:
            return
        failpoints.hit("run.mid")
        if self.stop is not None:
            if now >= self.stop.next:
                self.retire_child = True
                self._rougher(now)
        elif attempt.limit_at is not None and now >= attempt.limit_at:
            text = f"the attempt ran longer than its time limit of {attempt.limit:g} s"
            outcome = Failed(text, reason="time_limit", code=504)
            self._stop_child(outcome, [signal.SIGTERM, signal.SIGKILL], now)
        else:
            self._watch_child(now, attempt)
        self.touch(now)

    def _watch_child(self, now: float, attempt: Attempt) -> None:
        """Tell the child that its soft time limit has passed, and end it if its processes hold too much memory."""
        assert self.child is not None
        if attempt.expire_at is not None and now >= attempt.expire_at:
            attempt.expire_at = None
            self.child.pipe.send({"t": "expire"})
        if attempt.memory_at is None or now < attempt.memory_at:
            return
        attempt.memory_at = now + _MEMORY_EVERY
        limit, size = attempt.job.memory_limit, self.child.group_memory()
        if limit is not None and size > limit:
            text = f"the processes of the attempt held {size} bytes, more than its limit of {limit}"
            self._stop_child(Failed(text, reason="memory_limit", code=507), [signal.SIGKILL], now)

    @property
    def token_lost(self) -> bool:
        """Whether the child is being stopped because its attempt is not the current one."""
        return self.stop is not None and self.stop.outcome is None

    def next_time(self, store_away: bool) -> float:
        """Return when ``tick`` or ``step`` has something to do, on the monotonic clock."""
        times = [float("inf") if self.manager.queue_away else self.entries.delete_at]
        if self.entries.looks_ahead:
            times.append(self.entries.keep_until)
        attempt = self.attempt
        if self.phase is not Phase.RUNNING or attempt is None:
            return min(times)
        if not store_away and not self.token_lost and not self.in_flight:
            times.append(attempt.renew_at)
            if attempt.dirty:
                times.append(attempt.write_at)
        if not self.manager.queue_away and self.entries.current is not None:
            times.append(attempt.touch_at)
        if self.stop is not None:
            times.append(self.stop.next)
        else:
            times += [at for at in (attempt.limit_at, attempt.expire_at, attempt.memory_at) if at is not None]
        return min(times)
