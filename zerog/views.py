"""Records as the JSON that HTTP shows.  Pure: every function gets what it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from zerog import codec
from zerog.clock import to_iso
from zerog.queue.base import TubeStats
from zerog.record import JobRecord
from zerog.registry import redact

#: Endings of downloaded files, by media type.
EXTENSIONS: Mapping[str, str] = {
    "application/json": "json",
    "text/csv": "csv",
    "text/plain": "txt",
    "text/html": "html",
    "application/pdf": "pdf",
    "application/zip": "zip",
    "application/gzip": "gz",
    "application/x-tar": "tar",
    "application/x-parquet": "parquet",
    "application/vnd.apache.parquet": "parquet",
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/svg+xml": "svg",
}


def job_href(uuid: str) -> str:
    """Return the reference to a job."""
    return f"/jobs/{uuid}"


def progress(record: JobRecord) -> dict[str, Any]:
    """Return how far a job is."""
    return {
        "uuid": record.uuid,
        "jobType": record.job_type,
        "state": record.state.value,
        "cancelling": record.cancelling,
        "completeness": record.completeness,
        "resultCode": record.result_code,
        "message": record.message,
        "reason": record.reason,
        "attempt": record.attempt,
        "updatedAt": to_iso(record.updated_at),
        "href": job_href(record.uuid),
    }


def etag(view: Mapping[str, Any]) -> str:
    """Return the entity tag of a view: equal views have equal tags."""
    return f'"{hashlib.blake2b(codec.dumps(view), digest_size=9).hexdigest()}"'


def item(record: JobRecord) -> dict[str, Any]:
    """Return a job as it stands in a list."""
    return {**progress(record), "number": record.number, "createdAt": to_iso(record.created_at)}


def whole(record: JobRecord) -> dict[str, Any]:
    """Return the whole record, secrets redacted, without what is between agents and the store alone."""
    return {
        **item(record),
        "parameters": redact(record.parameters, record.secrets),
        "priority": record.priority,
        "notBefore": _iso(record.not_before),
        **times(record),
        "counters": counters(record),
        "agent": record.agent,
        "parents": [{"href": job_href(parent)} for parent in record.parents],
        "retriedFrom": {"href": job_href(record.retried_from)} if record.retried_from else None,
        "result": _result(record),
    }


def info(
    record: JobRecord, newest: Mapping[str, Sequence[Mapping[str, Any]]], dropped: Mapping[str, int]
) -> dict[str, Any]:
    """Return progress and what happened so far; ``newest`` has the entries by level."""
    return {
        **progress(record),
        "createdAt": to_iso(record.created_at),
        **times(record),
        "counters": counters(record),
        "agent": record.agent,
        "dropped": dict(dropped),
        "events": [entry(one) for one in newest["event"]],
        "warnings": [entry(one) for one in newest["warning"]],
        "errors": [entry(one) for one in newest["error"]],
    }


def entry(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry of ``info``, where the member that holds it already says its level."""
    return {name: value for name, value in one.items() if name != "level"}


def times(record: JobRecord) -> dict[str, str | None]:
    """Return when the current attempt started and when the job ended."""
    return {"startedAt": _iso(record.started_at), "finishedAt": _iso(record.finished_at)}


def counters(record: JobRecord) -> dict[str, int]:
    """Return what the job has spent."""
    return {"errors": record.errors, "crashes": record.crashes, "losses": record.losses}


def job_type(description: Mapping[str, Any], host: str, stats: TubeStats | None) -> dict[str, Any]:
    """Return a job type, the line of curl that runs it, and its queue (``null`` while the queue is away)."""
    name = description["jobType"]
    body = codec.dumps(description["example"]).decode().replace("'", "'\\''")
    return {
        **description,
        "curl": f"curl -X POST http://{host}/run/{name} -H 'Content-Type: application/json' -d '{body}'",
        "queue": queue(stats),
        "href": f"/types/{name}",
    }


def queue(stats: TubeStats | None) -> dict[str, int] | None:
    """Return a tube's counts by state."""
    if stats is None:
        return None
    return {"ready": stats.ready, "reserved": stats.reserved, "delayed": stats.delayed, "buried": stats.buried}


def extension(media_type: str) -> str:
    """Return the ending of a file of this media type."""
    return EXTENSIONS.get(media_type.split(";")[0].strip().lower(), "bin")


def _iso(moment: float | None) -> str | None:
    return None if moment is None else to_iso(moment)


def _result(record: JobRecord) -> dict[str, Any] | None:
    if record.result is None:
        return None
    return {
        "mediaType": record.result.media_type,
        "size": record.result.size,
        "href": f"{job_href(record.uuid)}/data",
    }
