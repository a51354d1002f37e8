"""The schemas of agents, commands and attempts, for ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zerog.fleet import STATES
from zerog.orders import COMMANDS


def _object(properties: Mapping[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": dict(properties), "required": required}


def _nullable(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], **more}


def _page(item: Mapping[str, Any]) -> dict[str, Any]:
    return _object({"items": {"type": "array", "items": dict(item)}, "next": _nullable("string"), "href": _HREF})


_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_COUNT = {"type": "integer", "minimum": 0}
_TIME = {"type": "string", "format": "date-time"}
_HREF = {"type": "string", "format": "uri-reference"}
_UUID = {"type": "string", "format": "uuid"}
_REFERENCE = _object({"href": _HREF})
_COUNTED = _object({"href": _HREF, "count": _COUNT})
_LIMITS = _object({"ram": _nullable("integer"), "cpus": _nullable("number")})

#: What a job asks of an agent.
NEEDS = _object({"ram": _COUNT, "cpus": {"type": "number", "minimum": 0}, "labels": _TEXTS})

_AGENT: dict[str, Any] = {
    "id": _TEXT,
    "hostname": _TEXT,
    "pid": _nullable("integer"),
    "version": _TEXT,
    "state": {**_TEXT, "enum": list(STATES)},
    "jobTypes": _TEXTS,
    "labels": _TEXTS,
    "ram": _nullable("integer"),
    "cpus": _nullable("number"),
    "limits": _LIMITS,
    "room": _LIMITS,
    "usage": _nullable("object"),
    "instance": _TEXT,
    "startedAt": _TIME,
    "lastCommunication": _nullable("string", format="date-time"),
    "supersededAttempts": _COUNT,
    **dict.fromkeys(("tasks", "processedJobs", "lastFailures", "exceptions"), _COUNTED),
    "commands": _REFERENCE,
    "href": _HREF,
}

#: An agent as it is shown.
AGENT = _object(_AGENT)

_COMMAND: dict[str, Any] = {
    "number": _COUNT,
    "command": {**_TEXT, "enum": list(COMMANDS)},
    "uuid": _UUID,
    "limits": {"type": "object"},
    "priority": _COUNT,
    "notBefore": _nullable("string", format="date-time"),
    "state": {**_TEXT, "enum": ["pending", "applied", "refused"]},
    "message": _nullable("string"),
    "at": _TIME,
    "href": _HREF,
}
_OPTIONAL = ("uuid", "limits", "priority", "notBefore")

_EXCEPTION = _object(
    {"type": _TEXT, "message": _TEXT, "traceback": _nullable("string"), "uuid": _nullable("string"), "at": _TIME}
)


_CONSUMER = _object(
    {
        "name": _TEXT,
        "application": _TEXT,
        "holder": _nullable("string"),
        "topics": {
            "type": "array",
            "items": _object(
                {"name": _TEXT, "position": _COUNT, "newest": _COUNT, "behind": _COUNT, "aside": _COUNT, "href": _HREF}
            ),
        },
        "handled": _COUNT,
        "deadLetters": _COUNT,
        "lastError": _nullable("string"),
        "updatedAt": _nullable("string"),
        "href": _HREF,
    }
)


def of_agents() -> dict[str, Any]:
    """Return the schemas by name."""
    command = _object(_COMMAND, *_OPTIONAL)
    attempt = {"uuid": _UUID, "attempt": _COUNT}
    registered = {
        **_AGENT,
        "heartbeat": {"type": "number", "description": "seconds within which the agent is to speak again"},
        "drained": {"type": "boolean"},
        "last": {**_COUNT, "description": "the number of the last command that it was given"},
        "talkback": {"type": "array", "items": command},
        "superseded": {"type": "array", "items": _object(attempt)},
    }
    given = {
        **attempt,
        "job": _REFERENCE,
        "number": _COUNT,
        "jobType": _TEXT,
        "parameters": {"type": "object"},
        "limits": NEEDS,
        "state": {},
        "lease": {"type": "number", "description": "seconds"},
        "parents": {"type": "array", "items": _REFERENCE},
        "href": _HREF,
    }
    refused = {"agent": _REFERENCE, "status": _COUNT, "code": _TEXT, "detail": _TEXT}
    held = {"agent": _REFERENCE, "job": _REFERENCE, "attempt": _COUNT, "since": _TIME}
    ended = {"job": _REFERENCE, "attempt": _COUNT, "outcome": _TEXT, "at": _TIME}
    return {
        "Agent": AGENT,
        "Agents": _page(AGENT),
        "Registered": _object(registered),
        "Assignment": _object(given),
        "Assignments": _page(_object(held)),
        "Messages": _page(_object({"number": _COUNT, "at": _TIME, "value": {}})),
        "Consumer": _CONSUMER,
        "Consumers": _page(_CONSUMER),
        "Published": _object({"number": _COUNT, "href": _HREF}),
        "EndedAttempts": _page(_object(ended)),
        "AgentException": _EXCEPTION,
        "AgentExceptions": _page(_EXCEPTION),
        "Command": command,
        "Commands": _object({**_page(command)["properties"], "last": _COUNT, "drained": {"type": "boolean"}}),
        "ManyCommands": _object(
            {**_page(command)["properties"], "refused": {"type": "array", "items": _object(refused)}}
        ),
        "Turn": _object(
            {
                **{name: {"type": "array", "items": {"type": "object"}} for name in ("reports", "outcomes")},
                "assignments": {"type": "array", "items": _object(given)},
                "href": _HREF,
            }
        ),
        "Answer": {"type": "object"},
    }
