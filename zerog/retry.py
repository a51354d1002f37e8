"""The retry policy: given a record and how its attempt ended, again after how long, or not.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from zerog.needs import NOTHING, Needs
from zerog.outcome import Crashed, Failed
from zerog.record import JobRecord


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits, delays and needs of a job type, read from its class attributes; delays in seconds."""

    max_errors: int = 3
    max_crashes: int = 3
    max_losses: int = 10
    backoff: float = 1.0
    backoff_max: float = 60.0
    rerun_after_crash: bool = True
    needs: Needs = NOTHING


@dataclass(frozen=True, slots=True)
class Again:
    """Another attempt follows, not before ``delay`` seconds; the counters as they are after this one."""

    delay: float
    errors: int
    crashes: int


@dataclass(frozen=True, slots=True)
class Over:
    """No further attempt: the job has failed."""

    code: int
    reason: str
    message: str
    errors: int
    crashes: int


def delay_before(policy: Policy, spent: int, uniform: Callable[[float, float], float]) -> float:
    """Return the delay before the try that follows ``spent`` failed ones: exponential, capped, with jitter."""
    grown = policy.backoff * 2.0 ** min(spent - 1, 60)
    return min(policy.backoff_max, grown) * uniform(0.5, 1.0)


def after_error(
    policy: Policy, record: JobRecord, outcome: Failed, uniform: Callable[[float, float], float]
) -> Again | Over:
    """Decide after user code raised, asked for a retry, or met a limit."""
    errors = record.errors + (0 if outcome.free else 1)
    if outcome.final or errors >= policy.max_errors:
        return Over(outcome.code, outcome.reason, outcome.message, errors, record.crashes)
    delay = outcome.after if outcome.after is not None else delay_before(policy, errors, uniform)
    return Again(delay, errors, record.crashes)


def after_crash(
    policy: Policy, record: JobRecord, outcome: Crashed, uniform: Callable[[float, float], float]
) -> Again | Over:
    """Decide after the child process died under a living agent."""
    crashes = record.crashes + 1
    if not policy.rerun_after_crash:
        return Over(500, "outcome_unknown", outcome.message, record.errors, crashes)
    if crashes >= policy.max_crashes:
        message = f"worker died {crashes} times while running this job"
        return Over(500, "crashed", message, record.errors, crashes)
    return Again(delay_before(policy, crashes, uniform), record.errors, crashes)
