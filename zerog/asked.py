"""Asked: the documents of its application as a job has them, whose agent asks the store, or a master does.

Children import this: it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from zerog.exceptions import AlreadyExists, Conflict, NotFound

#: What the key of a document can be.
DOCUMENT_KEY = re.compile(r"[A-Za-z0-9._:-]{1,100}", re.ASCII)

#: What can be wrong, by the word for it between a child and its agent.
ERRORS: dict[str, type[NotFound] | type[AlreadyExists] | type[Conflict]] = {
    "notFound": NotFound,
    "alreadyExists": AlreadyExists,
    "conflict": Conflict,
}


class Documents(Protocol):
    """What an application can do with its documents.

    Keys are 1 to 100 characters of ``[A-Za-z0-9._:-]``, values are JSON of up to 512 KiB; ``ValueError`` for others.  A
    ``cas`` names one version of a document.  ``StoreUnavailable`` says that the store is away.
    """

    def get(self, key: str) -> tuple[Any, int]:
        """Return a document's value and its ``cas``; ``NotFound`` if there is none."""

    def insert(self, key: str, value: Any) -> int:
        """Write a new document and return its ``cas``; ``AlreadyExists`` if there is one."""

    def replace(self, key: str, value: Any, cas: int) -> int:
        """Write the next version and return its ``cas``; ``Conflict`` if the document is another one by now."""

    def remove(self, key: str, cas: int | None = None) -> None:
        """Remove a document, or that very version of it; ``NotFound``, or ``Conflict``."""


class AskedDocuments:
    """The documents of its application as a job has them: its agent asks the store, or a master does.

    ``attempt`` names the job's attempt: what the agent asks again, since it got no answer, is written once.
    """

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any] | bytes], attempt: str) -> None:
        self._ask = ask
        self._attempt = attempt
        self._writes = 0

    def get(self, key: str) -> tuple[Any, int]:
        """Return a document's value and its ``cas``; ``NotFound`` if there is none."""
        answer = self._asked("get", key)
        return answer["value"], answer["cas"]

    def insert(self, key: str, value: Any) -> int:
        """Write a new document and return its ``cas``; ``AlreadyExists`` if there is one."""
        return int(self._asked("insert", key, value=_text(value))["cas"])

    def replace(self, key: str, value: Any, cas: int) -> int:
        """Write the next version and return its ``cas``; ``Conflict`` if the document is another one by now."""
        return int(self._asked("replace", key, value=_text(value), cas=cas)["cas"])

    def remove(self, key: str, cas: int | None = None) -> None:
        """Remove a document, or that very version of it; ``NotFound``, or ``Conflict``."""
        self._asked("remove", key, cas=cas)

    def _asked(self, verb: str, key: str, **more: Any) -> dict[str, Any]:
        self._writes += 1
        write = f"{self._attempt}:{self._writes}"
        answer = self._ask({"t": "document", "verb": verb, "key": key, "write": write, **more})
        assert isinstance(answer, dict)
        if "error" in answer:
            raise ERRORS.get(answer.get("kind", ""), ValueError)(answer["error"])
        return answer


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
