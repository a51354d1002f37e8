"""The named points at which a test makes a process die, stop or doubt; off unless ``ZEROG_FAILPOINT`` is set.

``ZEROG_FAILPOINT="point=action[@n],…"``.  The actions:

* ``kill`` ends the process with SIGKILL;
* ``raise`` raises ``FailpointHit``, at a point that is named ``…_fails`` or ``…_lost`` what the store or the queue
  would raise;
* ``pause:SECONDS`` stops the thread, ``until:FILE`` until there is such a file, and if none comes within a minute it
  raises ``FailpointHit``; its name has no comma and no ``@``;
* ``applied`` and ``not_applied``, at points that are named ``…_ambiguous``, do what stands there or leave it, and then
  claim not to know.

With ``@n`` only the n-th time that the process comes past counts, else every time.  Servers and agents read the
variable at their start; children know only ``child.mid``, and the points of applications, ``own.…``.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from zerog.exceptions import BadSetting, ZerogError

T = TypeVar("T")

logger = logging.getLogger(__name__)

VARIABLE = "ZEROG_FAILPOINT"

#: Every point there is, and what happens just before it.  ``docs/proof.rst`` says what each leaves behind.
POINTS = {
    "submit.after_append": "a job's number was taken",
    "submit.insert_ambiguous": "the records of a submit are written",
    "submit.after_insert": "the record of a submit was written",
    "submit.put_fails": "its entry is put into the queue",
    "submit.put_ambiguous": "its entry is put into the queue",
    "submit.after_put": "its entry was put into the queue",
    "run.after_reserve": "an agent got an entry",
    "run.claim_ambiguous": "a claim is written",
    "run.after_claim": "a claim was written",
    "run.mid": "a job runs",
    "run.touch_lost": "an entry is touched while its job runs",
    "run.renew_ambiguous": "a lease is renewed, or progress is written",
    "run.after_data": "the output of a job was stored, its outcome not yet",
    "run.before_record": "a job's outcome is known and not written yet",
    "run.after_failed_entry": "a job's end was noted in the logs of ends, not in its record yet",
    "run.record_ambiguous": "an outcome is written",
    "run.commit_ambiguous": "all steps of one turn of an agent are committed",
    "run.after_record": "a job's end was written, its entry is still in the queue",
    "retry.after_record": "a job's next try was written, its entry is still reserved",
    "retry.release_fails": "the entry of a job that is tried again goes back into the queue",
    "cancel.after_write": "a cancel was written",
    "release.before_write": "a job whose parents have succeeded is about to be released",
    "release.after_write": "such a job was released, its entry is not in the queue yet",
    "sweep.mid": "the sweep has looked at a segment",
    "prune.mid": "what a job had written was removed, its record not yet",
    "log.after_number": "the number of a log's entry was taken, its entry not written",
    "consume.before_handle": "a consumer is about to handle a message",
    "consume.after_handle": "a consumer has handled a message, its position is not written",
    "child.mid": "a child is about to run a job's code",
}

#: What the points of applications begin with: ``zerog.failpoint("ingest.after_spool")`` is ``own.ingest.after_spool``.
OWN = "own."

#: Seconds after which ``until`` ends without the file: a test that died must not keep a process for ever.
_LONGEST_WAIT = 60

_RULE = re.compile(
    r"(?P<point>[a-z_.]+)=(?P<action>kill|raise|applied|not_applied|pause:(?P<seconds>[0-9]+(\.[0-9]+)?)"
    r"|until:(?P<file>[^,@]+))"
    r"(@(?P<hit>[1-9][0-9]*))?"
)


class FailpointHit(Exception):
    """What a fail point raises where nothing else is to be expected."""


@dataclass(slots=True)
class _Rule:
    action: str
    seconds: float
    file: str
    hit: int | None
    hits: int = 0


_rules: dict[str, list[_Rule]] = {}
_lock = threading.Lock()


def arm(text: str | None, only: Collection[str] | None = None) -> list[str]:
    """Read the variable's text and return the points that are armed now; ``BadSetting`` if it cannot be read.

    ``only`` are the points that this process knows.
    """
    armed: dict[str, list[_Rule]] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        match = _RULE.fullmatch(part)
        if match is None:
            raise BadSetting(
                f"{VARIABLE}: {part!r} is not point=kill|raise|pause:SECONDS|until:FILE|applied|not_applied[@n]"
            )
        point, action = match["point"], match["action"].partition(":")[0]
        if point not in POINTS and not point.startswith(OWN):
            raise BadSetting(f"{VARIABLE}: there is no point {point!r}")
        if (action in ("applied", "not_applied")) != point.endswith("_ambiguous"):
            raise BadSetting(f"{VARIABLE}: {action} is not possible at {point}")
        if only is None or point in only or point.startswith(OWN):
            hit = int(match["hit"]) if match["hit"] else None
            armed.setdefault(point, []).append(_Rule(action, float(match["seconds"] or 0), match["file"] or "", hit))
    _rules.clear()
    _rules.update(armed)
    return list(armed)


def hit(point: str, error: Callable[[str], ZerogError] | None = None) -> None:
    """Come past a point; ``error`` is what ``raise`` raises there."""
    if point not in _rules:
        return
    action = _next(point)
    if action == "raise":
        text = f"fail point {point}"
        raise error(text) if error is not None else FailpointHit(text)


def hit_own(point: str) -> None:
    """Come past a point of an application."""
    hit(OWN + point)


def ambiguous(point: str, call: Callable[[], T], error: Callable[[str], ZerogError]) -> T:
    """Make a call whose answer may get lost on the way: then ``error`` is raised, whether it happened or not."""
    if point not in _rules:
        return call()
    action = _next(point)
    if action is None:
        return call()
    if action == "applied":
        call()
    raise error(f"fail point {point}")


def _next(point: str) -> str | None:
    """Count a hit and return what the caller has to do, having done the rest here."""
    due = None
    with _lock:
        for rule in _rules[point]:
            rule.hits += 1
            if rule.hit is None or rule.hit == rule.hits:
                due = due or rule
    if due is None:
        return None
    logger.warning("fail point %s: %s", point, due.action)
    if due.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if due.action == "pause":
        time.sleep(due.seconds)
        return None
    if due.action == "until":
        for _ in range(_LONGEST_WAIT * 50):
            if os.path.exists(due.file):
                return None
            time.sleep(0.02)
        raise FailpointHit(f"fail point {point}: {due.file} did not come")
    return due.action
