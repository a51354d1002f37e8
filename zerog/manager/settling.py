"""How attempts end: R5 and R15 (what is written before the outcome), R10 (retry), and the loss of a lease.

Every verb writes the record and leaves the queue's entry to its caller: the record comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zerog import codec, failpoints
from zerog.clock import to_iso
from zerog.exceptions import (
    CorruptDocument,
    NewerVersion,
    StoreAmbiguous,
    StoreUnavailable,
    Superseded,
    UnknownJob,
)
from zerog.manager.needing import Needing
from zerog.manager.records import Held, claim_of, same_content
from zerog.outcome import (
    GIVEN_BACK_UNKNOWN,
    Cancelled,
    Crashed,
    Failed,
    GivenBack,
    Outcome,
    Requeued,
    Result,
    Succeeded,
)
from zerog.record import JobRecord, State
from zerog.retry import Again, Over, after_crash, after_error

#: The lease, the agent's part of a record, is gone in every state but running.
_UNCLAIMED: dict[str, Any] = {"lease": None}

#: Agents on which a job has failed that its record keeps.
_FAILED_ON = 100


class Settling(Needing):
    """The verbs that end an attempt."""

    def settle(
        self,
        held: Held,
        attempt: int,
        outcome: Outcome,
        told: bool = False,
        completeness: float | None = None,
        message: str | None = None,
        written_as: str | None = None,
    ) -> Held:
        """Write what an attempt came to, under its token, with the last progress that it reported.

        ``written_as`` tells the same outcome from another, where it may come twice; ``told`` says that the child knew
        of a cancel: then even a success is cancelled.  Calling it again after an ambiguous answer is safe: an attempt
        that is over comes back as it is.
        """
        cancelled = isinstance(outcome, Cancelled)
        claim = claim_of(held.record)

        def change(record: JobRecord) -> JobRecord:
            record = with_progress(record, completeness, message)
            stopped = record.cancel_requested and (told or not isinstance(outcome, Succeeded))
            ended = self._cancelled(record) if stopped or cancelled else self._changes(record, outcome)
            return ended.evolve(settled_by=claim, settled_as=written_as)

        try:
            return self._end(held, attempt, change)
        except Superseded:
            current = self.read_many([held.record.uuid]).get(held.record.uuid)
            if current is None or claim is None or current.record.settled_by != claim:
                raise  # it was taken from this attempt: what the record says now is another's word
            return current

    def _end(self, held: Held, attempt: int, change: Callable[[JobRecord], JobRecord]) -> Held:
        """Apply a change that may be terminal: the entry in its log is there before the record says so (R15)."""
        logged: set[str] = set()

        def with_entry(record: JobRecord) -> JobRecord:
            ended = change(record)
            if ended.terminal:
                self._log_end(ended, logged)
            return ended

        return self.guarded(held, attempt, with_entry, "run.record_ambiguous")

    def _log_end(self, ended: JobRecord, logged: set[str]) -> None:
        """Append to ``finished``, and ``failed`` for dead letters, once each."""
        entry = codec.dumps(
            {
                "uuid": ended.uuid,
                "attempt": ended.attempt,
                "state": ended.state.value,
                "type": ended.job_type,
                "at": to_iso(ended.finished_at or 0.0),
            }
        )
        for log in ("failed", "finished") if ended.state is State.FAILED else ("finished",):
            if log not in logged:
                self.store.append(log, entry)
                logged.add(log)
        failpoints.hit("run.after_failed_entry")

    def _changes(self, record: JobRecord, outcome: Outcome) -> JobRecord:
        match outcome:
            case Succeeded(data=data, code=code):
                return self._succeeded(record, data, code)
            case Requeued(delay=delay, state=state):
                return self._requeued(record, delay, state)
            case Failed():
                return self._after(record, after_error(self._policy(record), record, outcome, self._uniform), outcome)
            case Crashed():
                return self._after(record, after_crash(self._policy(record), record, outcome, self._uniform), outcome)
            case GivenBack(started=started):
                return self._given_back(record, started)
        raise TypeError(f"{outcome!r} is no outcome of a running attempt")

    def _policy(self, record: JobRecord) -> Any:
        return self.registry.policy(record.job_type)

    def _succeeded(self, record: JobRecord, result: Result | None, code: int) -> JobRecord:
        now = self.clock.now()
        return record.after(
            "succeed", result=result, result_code=code, completeness=1.0, finished_at=now, reason=None, **_UNCLAIMED
        )

    def _requeued(self, record: JobRecord, delay: float, state: Any) -> JobRecord:
        return record.after(
            "requeue",
            job_state=state,
            not_before=self.clock.now() + delay if delay > 0 else None,
            errors=0,
            crashes=0,
            losses=0,
            **_UNCLAIMED,
        )

    def _after(self, record: JobRecord, decision: Again | Over, outcome: Failed | Crashed) -> JobRecord:
        spent: dict[str, Any] = {"errors": decision.errors, "crashes": decision.crashes, **_UNCLAIMED}
        if isinstance(decision, Again):
            moment = self.clock.now() + decision.delay
            return record.after(
                "retry",
                not_before=moment,
                completeness=0.0,
                message=cut(outcome.message),
                reason=None,
                failed_on=_also(record.failed_on, record.agent),
                **spent,
            )
        failed_on = _also(record.failed_on, record.agent)
        return self._failed(record, decision.code, decision.reason, decision.message, failed_on=failed_on, **spent)

    def _failed(self, record: JobRecord, code: int, reason: str, message: str, **changes: Any) -> JobRecord:
        now = self.clock.now()
        return record.after("fail", result_code=code, reason=reason, message=cut(message), finished_at=now, **changes)

    def _given_back(self, record: JobRecord, started: bool) -> JobRecord:
        if started and not self._policy(record).rerun_after_crash:
            return self._failed(record, 500, "outcome_unknown", GIVEN_BACK_UNKNOWN, **_UNCLAIMED)
        return record.after("give_back", completeness=0.0, **_UNCLAIMED)

    def _cancelled(self, record: JobRecord) -> JobRecord:
        now = self.clock.now()
        running = record.state is State.RUNNING
        step = "settle_cancel" if running else "cancel"
        unasked = running and not record.cancel_requested
        return record.after(
            step,
            result_code=410,
            reason="cancelled",
            message="cancelled by its agent" if unasked else "cancelled on request",
            finished_at=now,
            cancel_requested=True,
            **_UNCLAIMED,
        )

    def refuse_worn(self, held: Held) -> bool:
        """End a queued job that has worn out as many workers as its type allows (R9); False if it has not."""
        record, policy = held.record, self._policy(held.record)
        if record.crashes >= policy.max_crashes:
            reason, times = "crashed", record.crashes
        elif record.losses >= policy.max_losses:
            reason, times = "lost", record.losses
        else:
            return False

        def change(record: JobRecord) -> JobRecord:
            return record.after(
                "refuse",
                result_code=500,
                reason=reason,
                message=f"worker died {times} times while running this job",
                finished_at=self.clock.now(),
            )

        self._end_seen(held, change)
        return True

    def lose(self, held: Held) -> Held:
        """Take a running job whose lease has lapsed from its attempt: back to the queue, or to its end (R8, R9)."""

        def change(record: JobRecord) -> JobRecord:
            policy = self._policy(record)
            losses = record.losses + 1
            if record.cancel_requested:
                return self._cancelled(record)
            if record.once or not policy.rerun_after_crash:
                message = "the worker was lost while the job ran; it may have finished"
                return self._failed(record, 500, "outcome_unknown", message, losses=losses, **_UNCLAIMED)
            if losses >= policy.max_losses:
                message = f"worker died {losses} times while running this job"
                return self._failed(record, 500, "lost", message, losses=losses, **_UNCLAIMED)
            return record.after("lose", losses=losses, completeness=0.0, **_UNCLAIMED)

        try:
            with self.store.together():
                after = self._end_seen(held, change)
                # Only now: a lease that was renewed in the meantime was not lost.  A cancel spends nothing.
                if after.record.losses > held.record.losses:
                    self._say_lost(held.record)
        except StoreUnavailable:
            self.doubtful.append(held.record)
            raise
        return after

    def say_doubtful(self) -> None:
        """Leave the errors of those losses of which this process could not know whether they were written, if so."""
        for _ in range(len(self.doubtful)):
            before = self.doubtful.popleft()
            try:
                record = self.read(before.uuid).record
                spent = (record.errors, record.crashes, record.losses)
                # More has happened since: whoever wrote that has said it.
                if spent == (before.errors, before.crashes, before.losses + 1):
                    self._say_lost(before)
            except (UnknownJob, CorruptDocument, NewerVersion):
                continue
            except StoreUnavailable:
                self.doubtful.append(before)
                raise

    def _say_lost(self, record: JobRecord) -> None:
        """Leave an error among the job's events.  Readers drop repeated batches."""
        gone = self.lost(record)
        entry = {
            "at": to_iso(self.clock.now()),
            "level": "error",
            "message": f"{'the agent is gone' if gone else 'the lease lapsed'}: "
            f"attempt {record.attempt} was lost with its agent {record.agent}",
            "code": 500,
            "reason": "lost",
        }
        batch = {"attempt": record.attempt, "batch": "lost", "entries": [entry]}
        self.store.append(self.events_log(record.uuid), codec.dumps(batch))

    def _end_seen(self, held: Held, change: Callable[[JobRecord], JobRecord]) -> Held:
        """Apply ``change`` to the very version that was judged, and to no other: a renewed lease is none lapsed."""
        ended = change(held.record)
        if ended.terminal:
            self._log_end(ended, set())
        try:
            return self.write(held, ended)
        except StoreAmbiguous:
            found = self.read(ended.uuid)
            if not same_content(found.record, ended):
                raise
            return found


def _also(agents: tuple[str, ...], agent: str | None) -> tuple[str, ...]:
    """Return the agents on which a job has failed, with one more; the last ones."""
    return agents if agent is None or agent in agents else (*agents, agent)[-_FAILED_ON:]


def with_progress(record: JobRecord, completeness: float | None, message: str | None) -> JobRecord:
    """Return a record with new progress; completeness never goes back within an attempt."""
    changes: dict[str, Any] = {}
    if completeness is not None:
        changes["completeness"] = max(record.completeness, completeness)
    if message is not None:
        changes["message"] = message
    return record.evolve(**changes) if changes else record


def cut(message: str, limit: int = 1000) -> str:
    """Return the first ``limit`` characters of a message for the record; the whole is among the errors."""
    return message if len(message) <= limit else message[: limit - 1] + "…"
