"""What one attempt of a job came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zerog.exceptions import is_code, is_delay


@dataclass(frozen=True, slots=True)
class Result:
    """Where the bytes of a result are: ``inline`` JSON text in the record, or chunks in the blob ``blob``."""

    media_type: str
    size: int
    inline: str | None = None
    blob: str | None = None


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The job is done.  A job returns it itself to give its own ``code`` of 200 to 299."""

    data: Any = None
    code: int = 200

    def __post_init__(self) -> None:
        if not is_code(self.code, 200, 299):
            raise ValueError(f"the result code of a success is 200 to 299, not {self.code!r}")


@dataclass(frozen=True, slots=True)
class Requeued:
    """The job goes on later: after ``delay`` seconds, with ``state`` as its ``context.state``.

    A job returns it under the name ``zerog.Requeue``.  It spends nothing, resets all counters, and keeps completeness.
    """

    delay: float = 0.0
    state: Any = None

    def __post_init__(self) -> None:
        if not is_delay(self.delay):
            raise ValueError(f"a delay is 0 to 31,536,000 seconds, not {self.delay!r}")


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed: one error is spent.  ``final`` forbids another attempt; ``after`` sets its delay."""

    message: str
    reason: str = "exception"
    code: int = 500
    traceback: str | None = None
    final: bool = False
    after: float | None = None
    free: bool = False  # the failure is not the attempt's fault and spends no error


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The attempt ended because the job was cancelled."""

    message: str = "cancelled"


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process of the attempt is gone without an outcome."""

    message: str


#: What is said of a job that was given back and must not run again: its code may have done all of its work.
GIVEN_BACK_UNKNOWN = "its agent stopped while the job ran, and its type forbids to run it again"


#: Bytes of a result that stand in the record itself.
INLINE = 8 * 1024


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The agent stops and returns the job; nothing is spent.

    ``started`` says whether its code may have begun.
    """

    started: bool = True
    message: str = "given back by its agent"


Outcome = Succeeded | Requeued | Failed | Cancelled | Crashed | GivenBack
