"""Records as the JSON that HTTP shows.  Pure: every function gets what it needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zerog import codec
from zerog.clock import to_iso
from zerog.exceptions import ZerogError
from zerog.fleet import AgentRecord, Assignment
from zerog.needs import Limits
from zerog.orders import Command
from zerog.queue.base import TubeStats
from zerog.record import JobRecord, State
from zerog.registry import redact

if TYPE_CHECKING:
    from zerog.statistics import Totals

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
    return f'"{digest(codec.dumps(view))}"'


def digest(body: bytes) -> str:
    """Return a short text that is another for other bytes."""
    return hashlib.blake2b(body, digest_size=9).hexdigest()


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
        "limits": record.needs.members(),
        "failedOn": list(record.failed_on),
        "revision": record.revision,
        "parents": [{"href": job_href(parent)} for parent in record.parents],
        "relationships": {"href": f"{job_href(record.uuid)}/relationships"},
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


#: The reasons of ``explain``, in the order in which they are looked for, and what they say to people; the facts stand
#: in braces.
WHY = {
    "newer_version": "it was written by a newer version of ZeroG, which alone may touch it",
    "finished": "it has {state}",
    "cancelling": "it is being cancelled",
    "running": "it runs on agent {agent}, which was heard {seconds} s ago",
    "lease_silent": "it runs on agent {agent}, which has been silent for {seconds} s; "
    "when its lease has lapsed the job goes on elsewhere",
    "agent_gone": "it ran on agent {agent}, which is gone; it is tried elsewhere, or ends",
    "waiting_for_parent": "it waits for {count} of its parents to succeed",
    "paused": "its type was paused by {by} at {at}",
    "not_before": "it may not run before {notBefore}",
    "no_agent": "no agent that takes jobs now serves the job type {jobType}",
    "no_agent_fits": "no living agent of its type has what it needs: {unmet}",
    "no_room": "every agent that has what it needs holds too much of it for other jobs now",
    "ahead": "at most {ahead} of its type are ahead of it",
}

#: What two of them say in one word: a lease of which nothing more will be heard is silent.
_SAME = {"agent_gone": "lease_silent"}


def explanation(record: JobRecord, reason: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return why a job is not done."""
    shown = dict(facts)
    for name in ("at", "notBefore"):
        if name in shown:
            shown[name] = to_iso(shown[name])
    if "parents" in shown:
        shown["parents"] = [{"href": job_href(parent)} for parent in shown["parents"]]
    return {
        "href": f"{job_href(record.uuid)}/explain",
        "uuid": record.uuid,
        "jobType": record.job_type,
        "state": record.state.value,
        "reason": _SAME.get(reason, reason),
        **shown,
        "message": _sentence(record, reason, shown),
    }


def _sentence(record: JobRecord, reason: str, shown: Mapping[str, Any]) -> str:
    """Return what a reason of ``explain`` says to people."""
    match reason, shown:
        case "finished", _ if record.state is not State.SUCCEEDED:
            end = "it was cancelled" if record.state is State.CANCELLED else "it has failed"
            return f"{end}: {record.message}" if record.message and record.reason != "cancelled" else end
        case "waiting_for_parent", {"parents": []}:
            return "all its parents have succeeded: it is released in a moment"
        case "waiting_for_parent", {"parents": parents}:
            return WHY[reason].format(count=len(parents))
        case "paused", {"message": str(message)} if message:
            return message  # the words of who paused it; who and when stand beside them
        case "no_agent_fits", {"unmet": unmet}:
            return WHY[reason].format(unmet=_in_words(unmet))
        case "ahead", {"ahead": None}:
            return "it waits in the queue, which does not answer now"
        case "ahead", {"ahead": 0}:
            return "none of its type is ahead of it: an agent takes it when a slot is free"
    words = {"state": record.state.value, **shown}
    return WHY[reason].format_map({name: "" if value is None else value for name, value in words.items()})


def _in_words(needs: Mapping[str, Any]) -> str:
    """Return needs as people read them."""
    words = [f"{needs['ram']:,} bytes of memory"] if needs.get("ram") else []
    words += [f"{needs['cpus']:g} cores"] if needs.get("cpus") else []
    words += [f"the label {label}" for label in needs.get("labels", ())]
    return ", ".join(words)


def retried(uuid: str, done: JobRecord | ZerogError) -> dict[str, Any]:
    """Return the verdict on one of many jobs that were to be tried again."""
    if isinstance(done, ZerogError):
        return {"job": {"href": job_href(uuid)}, "status": done.status, "code": done.code, "detail": done.detail}
    return {"job": {"href": job_href(uuid)}, "status": 202, "retried": {"href": job_href(done.uuid)}}


def problem(error: ZerogError) -> dict[str, Any]:
    """Return an error as a problem document (RFC 9457)."""
    detail = codec.printable(error.detail, 2000)
    return {
        "type": f"urn:zerog:problem:{error.code}",
        "title": type(error).title(),
        "status": error.status,
        "code": error.code,
        "detail": detail,
        "message": detail,
        "errors": [{**one, "detail": codec.printable(str(one["detail"]), 2000)} for one in error.errors],
        **error.members,
    }


def times(record: JobRecord) -> dict[str, str | None]:
    """Return when the current attempt started and when the job ended."""
    return {"startedAt": _iso(record.started_at), "finishedAt": _iso(record.finished_at)}


def counters(record: JobRecord) -> dict[str, int]:
    """Return what the job has spent."""
    return {"errors": record.errors, "crashes": record.crashes, "losses": record.losses}


def job_type(
    description: Mapping[str, Any], host: str, stats: TubeStats | None, pause: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a job type, the line of curl that runs it, its pause, and its queue (``null`` while the queue is away)."""
    name = description["jobType"]
    body = codec.dumps(description["example"]).decode().replace("'", "'\\''")
    return {
        **description,
        "curl": f"curl -X POST http://{host}/run/{name} -H 'Content-Type: application/json' -d '{body}'",
        "queue": queue(stats),
        "paused": None if pause is None else {**pause, "at": to_iso(pause["at"])},
        "href": f"/types/{name}",
    }


def queue(stats: TubeStats | None) -> dict[str, int] | None:
    """Return a tube's counts by state."""
    if stats is None:
        return None
    return {"ready": stats.ready, "reserved": stats.reserved, "delayed": stats.delayed, "buried": stats.buried}


def statistics(totals: Totals | None, kind: str) -> dict[str, Any]:
    """Return what all servers have counted; numbers are ``null`` while that cannot be known."""
    counts: Mapping[str, Any] = totals.counts if totals is not None else {}
    requests, seconds = counts.get("requests", {}), counts.get("seconds", {})
    by_status: dict[str, int] = {}
    for statuses in requests.values():
        for status, count in statuses.items():
            by_status[status] = by_status.get(status, 0) + count
    known = totals is not None
    failed = counts.get("exceptions", {})
    return {
        **(_load(sum(by_status.values()), sum(failed.values()), sum(seconds.values())) if known else _UNKNOWN),
        "byEndpoint": {
            name: _load(sum(statuses.values()), failed.get(name, 0), seconds[name])
            for name, statuses in sorted(requests.items())
        }
        if known
        else None,
        "byStatus": dict(sorted(by_status.items())) if known else None,
        "since": to_iso(totals.since) if totals is not None else None,
        "store": {"kind": kind, "available": known},
    }


_UNKNOWN: dict[str, Any] = {"requests": None, "exceptions": None, "averageSeconds": None}


def _load(requests: int, exceptions: int, seconds: float) -> dict[str, Any]:
    return {
        "requests": requests,
        "exceptions": exceptions,
        "averageSeconds": round(seconds / requests, 6) if requests else 0.0,
    }


def agent_href(id: str) -> str:
    """Return the reference to an agent."""
    return f"/agents/{id}"


def agent(record: AgentRecord, state: str, limits: Limits, room: Limits) -> dict[str, Any]:
    """Return what an agent last said of itself; ``limits`` is what it may give in all, ``room`` what is left."""
    href = agent_href(record.id)
    return {
        "id": record.id,
        "hostname": record.hostname,
        "pid": record.pid,
        "version": record.version,
        "state": state,
        "jobTypes": list(record.job_types),
        "labels": list(record.labels),
        "ram": record.has.ram,
        "cpus": record.has.cpus,
        "limits": limits.members(),
        # Limits that were lowered while jobs run: there is none, and not less than none.
        "room": {name: None if left is None else max(0, left) for name, left in room.members().items()},
        "usage": record.usage,
        "instance": record.instance,
        "startedAt": to_iso(record.started_at),
        "lastCommunication": _iso(record.heard_at),
        "supersededAttempts": record.superseded,
        "tasks": {"href": f"{href}/assignments", "count": len(record.assignments)},
        "processedJobs": {"href": f"{href}/jobs", "count": record.processed},
        "lastFailures": {"href": f"{href}/failures", "count": record.failures},
        "exceptions": {"href": f"{href}/exceptions", "count": record.exceptions},
        "commands": {"href": f"{href}/commands"},
        "href": href,
    }


def assignment(id: str, one: Assignment) -> dict[str, Any]:
    """Return an attempt that an agent answers for."""
    return {
        "agent": {"href": agent_href(id)},
        "job": {"href": job_href(one.uuid)},
        "attempt": one.attempt,
        "since": to_iso(one.since),
    }


def given(record: JobRecord, lease: float) -> dict[str, Any]:
    """Return an attempt as its agent gets it, secrets and all; ``lease`` is in seconds."""
    href = f"{job_href(record.uuid)}/attempts/{record.attempt}"
    return {
        "job": {"href": job_href(record.uuid)},
        "uuid": record.uuid,
        "attempt": record.attempt,
        "number": record.number,
        "jobType": record.job_type,
        "parameters": record.parameters,
        "limits": record.needs.members(),
        "state": record.job_state,
        "lease": lease,
        "parents": [{"href": job_href(parent)} for parent in record.parents],
        "href": href,
    }


def ended_attempt(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return how an attempt ended on an agent."""
    return {
        "job": {"href": job_href(one["uuid"])},
        "attempt": one["attempt"],
        "outcome": one["outcome"],
        "at": one["at"],
    }


def command(id: str, one: Command) -> dict[str, Any]:
    """Return a command to an agent."""
    return {
        "number": one.number,
        "command": one.command,
        **one.members,
        "state": one.state,
        "message": one.message,
        "at": to_iso(one.at),
        "href": f"{agent_href(id)}/commands/{one.number}",
    }


def queued_type(name: str, stats: TubeStats | None, age: float | None, pause: Any) -> dict[str, Any]:
    """Return how much of a type waits, for how many seconds the next one has been due, and its pause."""
    shown = None if pause is None else {"by": pause.by, "at": to_iso(pause.at), "message": pause.message}
    return {"jobType": name, "href": f"/types/{name}", "queue": queue(stats), "ageSeconds": age, "paused": shown}


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
