"""Documents of an application's own in the store: JSON values by key, changed by compare-and-set.

Endpoints have them as ``self.documents``, jobs as ``context.documents``, where the agent asks the store.  An
application sees its own alone.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from zerog import codec
from zerog.asked import DOCUMENT_KEY, ERRORS
from zerog.datastore.base import Datastore
from zerog.exceptions import AlreadyExists, Conflict, NotFound, StoreAmbiguous

#: Bytes of JSON that a document may have.
MAX_DOCUMENT = 512 * 1024


class OwnDocuments:
    """The documents of one application in the store.  Safe to use from many threads.

    ``write`` names a write: one that may have been made before, under this name, is not made again.
    """

    def __init__(self, store: Datastore, application: str) -> None:
        self._store = store
        self._application = application

    def get(self, key: str) -> tuple[Any, int]:
        """Return a document's value and its ``cas``."""
        document = self._store.get(self._key(key))
        return codec.loads(document.body)["value"], document.cas

    def insert(self, key: str, value: Any, write: str | None = None) -> int:
        """Write a new document."""
        own, name = self._key(key), write or secrets.token_hex(8)
        try:
            return self._store.insert(own, _body(value, name))
        except (AlreadyExists, StoreAmbiguous):
            if (cas := self._written(own, name)) is not None:
                return cas
            raise

    def replace(self, key: str, value: Any, cas: int, write: str | None = None) -> int:
        """Write the next version of a document."""
        own, name = self._key(key), write or secrets.token_hex(8)
        try:
            return self._store.replace(own, _body(value, name), cas)
        except (Conflict, StoreAmbiguous):
            if (found := self._written(own, name)) is not None:
                return found
            raise

    def remove(self, key: str, cas: int | None = None) -> None:
        """Remove a document."""
        own = self._key(key)
        try:
            self._store.remove(own, cas)
        except StoreAmbiguous:
            if self._exists(own):
                raise

    def _exists(self, own: str) -> bool:
        try:
            self._store.get(own)
        except NotFound:
            return False
        return True

    def _written(self, own: str, write: str) -> int | None:
        """Return the ``cas`` of a document if this very write has made it."""
        try:
            document = self._store.get(own)
        except NotFound:
            return None
        return document.cas if codec.loads(document.body)["write"] == write else None

    def _key(self, key: str) -> str:
        if not DOCUMENT_KEY.fullmatch(key):
            raise ValueError(f"a document's key is {DOCUMENT_KEY.pattern}")
        return f"document:{self._application}:{key}"


def _body(value: Any, write: str) -> bytes:
    return codec.dumps({"schema": 1, "write": write, "value": codec.plain(value, MAX_DOCUMENT, "a document")})


def answered_document(documents: OwnDocuments, asked: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to what ``AskedDocuments`` asks; raises what an outage of the store raises, and then ask
    again."""
    key, write, cas = asked["key"], asked.get("write"), asked.get("cas")
    value = json.loads(asked["value"]) if asked.get("value") is not None else None
    try:
        match asked["verb"]:
            case "get":
                found, version = documents.get(key)
                return {"value": found, "cas": version}
            case "insert":
                return {"cas": documents.insert(key, value, write)}
            case "replace":
                assert isinstance(cas, int)
                return {"cas": documents.replace(key, value, cas, write)}
        documents.remove(key, cas)
        return {"cas": 0}
    except tuple(ERRORS.values()) as error:
        kind = next(name for name, one in ERRORS.items() if isinstance(error, one))
        return {"error": str(error), "kind": kind}
