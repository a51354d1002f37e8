"""The steps of an ingest, in their order, as a job does them; what ``get_state`` shows of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import zerog
from workers.ingest.services import remove, write

UPLOADING, OPEN_TAR, LOAD_METADATA, POLICY = "UPLOADING", "open tar", "load metadata", "Policy Validation"
INGEST_FILES, MOVE_FILES, INGEST_METADATA = "ingest files", "move files", "ingest metadata"
TASKS = (UPLOADING, OPEN_TAR, LOAD_METADATA, POLICY, INGEST_FILES, MOVE_FILES, INGEST_METADATA)

INGEST, MOVE = "ingest", "move"
JOB_TYPES = (INGEST, MOVE)

#: The share of all the work that is done when a task begins, and the share that it takes.
_SHARES = {
    OPEN_TAR: (0.0, 0.04),
    LOAD_METADATA: (0.04, 0.02),
    POLICY: (0.06, 0.02),
    INGEST_FILES: (0.08, 0.9),
    MOVE_FILES: (0.08, 0.9),
    INGEST_METADATA: (0.98, 0.02),
}

#: The documents of a job: the task that it is at, and the state that somebody has set by hand.
TASK_OF, STATE_OF = "task:{uuid}", "state:{uuid}"

_SAID = re.compile(rf"({'|'.join(TASKS)}): ([0-9]{{1,3}}\.[0-9])%")


class Steps:
    """Says which task a job is at, and how far."""

    def __init__(self, context: zerog.Context) -> None:
        self._context = context
        self._task = UPLOADING

    @contextmanager
    def task(self, name: str) -> Iterator[None]:
        """Do a task: it is known that it has begun before it does."""
        self._task = name
        write(self._context.documents, TASK_OF.format(uuid=self._context.uuid), {"task": name})
        self.far(0.0)
        yield
        self.far(1.0)

    def far(self, share: float) -> None:
        """Say how far the task is, 0 to 1."""
        begun, takes = _SHARES[self._task]
        self._context.progress(begun + takes * share, f"{self._task}: {100 * share:.1f}%")


def said(message: str | None) -> tuple[str, str] | None:
    """Return the task and its percent that the message of a running job says, if it says any."""
    match = _SAID.fullmatch(message or "")
    return (match.group(1), match.group(2)) if match is not None else None


def state_view(
    record: Any, task: str, percent: str, exception: str, updated: str, created: str, state: str
) -> dict[str, Any]:
    """Return the state of a job as it is shown."""
    return {
        "job_id": record.number,
        "state": state,
        "task": task,
        "task_percent": percent,
        "updated": updated,
        "created": created,
        "exception": exception,
    }


def state_of(record: Any, documents: Any, manager: Any, iso: Any) -> dict[str, Any]:
    """Return where an ingest stands: as it was set by hand if it was, else as its record says."""
    created = iso(record.created_at)
    by_hand = _document(documents, STATE_OF.format(uuid=record.uuid))
    if by_hand is not None:
        return state_view(
            record, by_hand["task"], by_hand["task_percent"], by_hand["exception"], by_hand["updated"], created,
            by_hand["state"],
        )  # fmt: skip
    updated, state = iso(record.updated_at), str(record.state)
    if state == "succeeded":
        return state_view(record, INGEST_METADATA, "100.0", "", updated, created, "OK")
    task = (_document(documents, TASK_OF.format(uuid=record.uuid)) or {"task": UPLOADING})["task"]
    if state in ("failed", "cancelled"):
        return state_view(record, task, "0.0", _why(record, manager), updated, created, "FAILED")
    now = said(record.message) if state == "running" else None
    if now is not None and now[0] == task:
        return state_view(record, task, now[1], "", updated, created, "OK")
    return state_view(record, task, "0.0", "", updated, created, "OK")


def _why(record: Any, manager: Any) -> str:
    """Return the traceback of the last error of a job, or what else is known of its end."""
    errors = manager.newest_events(record.uuid, 1)[0]["error"]
    if errors and errors[-1].get("traceback"):
        return str(errors[-1]["traceback"])
    return str(record.message or record.reason or record.state)


def _document(documents: Any, key: str) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = documents.get(key)[0]
    except zerog.NotFound:
        return None
    return found


def newest_of(record: Any, manager: Any) -> Any:
    """Return the job that tries another one again, and again the one that tries that, to the last; or itself."""
    for _ in range(1000):
        following = manager.successor(record.uuid)
        if following is None:
            return record
        record = following
    return record


def is_set_by_hand(documents: Any, uuid: str) -> bool:
    """Return whether somebody has set the state of a job."""
    return _document(documents, STATE_OF.format(uuid=uuid)) is not None


def set_by_hand(documents: Any, manager: Any, record: Any, state: Mapping[str, Any]) -> bool:
    """Write a state that whatever the job does leaves as it is, and stop the job if it goes on.

    False if the job was pruned a moment before: then nothing is left behind that the next one of its key would find.
    """
    key = STATE_OF.format(uuid=record.uuid)
    write(documents, key, dict(state))
    now = manager.get_many([record.uuid]).get(record.uuid)
    if now is None or now.number != record.number:
        remove(documents, key)
        return False
    if not now.terminal:
        manager.cancel(record.uuid)
    return True
