"""What a child asks of the store, and what the agent answers.

``{"t": "parents", "number": 3}`` asks who the job's parents are, ``{"t": "read", "number": 4, "uuid": …, "start": 0}``
for bytes of the data of one; ``{"t": "publish", "number": 5, "topic": …, "key": …, "value": …}`` adds a message to a
topic, ``{"t": "document", "number": 6, "verb": "insert", "key": …, "value": …, "write": …}`` is about a document of the
application.  The answer, or why there is none, comes as ``{"t": "answer", "number": 3, …}``, bytes as such.
"""

from __future__ import annotations

import json
from typing import Any

from zerog.documents import OwnDocuments, answered_document
from zerog.exceptions import CorruptDocument, NewerVersion, NotFound, UnknownJob, UnknownType
from zerog.manager import Manager
from zerog.record import JobRecord


def answered(manager: Manager, record: JobRecord, question: dict[str, Any]) -> dict[str, Any] | bytes:
    """Return the answer to a child's question; raises only what an outage of the store raises, and then ask again."""
    number = question["number"]
    try:
        if question["t"] == "publish":
            message = manager.topics.publish(question["topic"], json.loads(question["value"]), question["key"])
            return {"t": "answer", "number": number, "published": message.number}
        if question["t"] == "document":
            documents = OwnDocuments(manager.store, manager.registry.application(record.job_type))
            return {"t": "answer", "number": number, **answered_document(documents, question)}
        if question["t"] == "parents":
            return {"t": "answer", "number": number, "parents": _parents(manager, record)}
        return _bytes(manager, record, question)
    except (UnknownJob, UnknownType, NotFound, CorruptDocument, NewerVersion, ValueError) as error:
        return {"t": "answer", "number": number, "error": str(error)}


def _parents(manager: Manager, record: JobRecord) -> list[dict[str, Any]]:
    found = manager.get_many(record.parents)
    return [_described(uuid, found.get(uuid)) for uuid in record.parents]


def _described(uuid: str, parent: JobRecord | None) -> dict[str, Any]:
    """Return what a child knows of a parent; one that was pruned in the meantime has neither type nor data."""
    result = parent.result if parent is not None else None
    return {
        "uuid": uuid,
        "jobType": parent.job_type if parent is not None else None,
        "mediaType": result.media_type if result is not None else None,
        "size": result.size if result is not None else None,
    }


def _bytes(manager: Manager, record: JobRecord, question: dict[str, Any]) -> bytes:
    uuid, start = question["uuid"], int(question["start"])
    if uuid not in record.parents:
        raise UnknownJob(f"{uuid} is no parent of this job")
    result = manager.read(uuid).record.result
    if result is None or not 0 <= start < result.size:
        return b""
    return next(manager.open_data(result, start, result.size), b"")
