"""Documents in memcached, through pymemcache: for statistics, which it may forget.

One connection a process, which its threads share, as memcached's own advice for a service of many processes; a call
waits for it and for its answer for at most ``deadline`` seconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from zerog.datastore.base import Document, Documents
from zerog.exceptions import AlreadyExists, Conflict, NotFound, StoreAmbiguous, StoreUnavailable

#: An expiry that has passed: the item is gone at once.
_NOW = -1


class MemcachedDocuments(Documents):
    """The documents of a service at one memcached."""

    def __init__(self, address: tuple[str, int], service: str, deadline: float = 0.1) -> None:
        self._service = service
        self._deadline = deadline
        self._lock = threading.Lock()
        self._client = Client(address, connect_timeout=deadline, timeout=deadline, no_delay=True, default_noreply=False)

    def get(self, key: str) -> Document:
        """Return a document; ``NotFound`` if there is none."""
        with self._reading() as client:
            body, cas = client.gets(self._key(key))
        if body is None:
            raise NotFound(key)
        return Document(body, int(cas))

    def get_many(self, keys: Sequence[str]) -> dict[str, Document]:
        """Return those of the documents that exist, by key."""
        if not keys:
            return {}
        with self._reading() as client:
            found = client.gets_many([self._key(key) for key in keys])
        prefix = len(self._key(""))
        return {name[prefix:]: Document(body, int(cas)) for name, (body, cas) in found.items()}

    def insert(self, key: str, body: bytes) -> int:
        """Write a new document and return its cas; ``AlreadyExists`` if there is one."""
        with self._writing() as client:
            if not client.add(self._key(key), body):
                raise AlreadyExists(key)
        return self._written(key, body)

    def replace(self, key: str, body: bytes, cas: int) -> int:
        """Change the very version ``cas`` and return the new cas; ``Conflict`` or ``NotFound`` if it is not there."""
        with self._writing() as client:
            self._changed(key, client.cas(self._key(key), body, str(cas).encode()))
        return self._written(key, body)

    def remove(self, key: str, cas: int | None = None) -> None:
        """Remove a document; ``NotFound`` if there is none, ``Conflict`` if it is another version than ``cas``."""
        with self._writing() as client:
            if cas is None:
                if not client.delete(self._key(key)):
                    raise NotFound(key)
            else:  # memcached has no delete that compares, but one that expires at once
                self._changed(key, client.cas(self._key(key), b"", str(cas).encode(), expire=_NOW))

    def probe(self) -> None:
        """Return if memcached answers now."""
        with self._reading() as client:
            client.version()

    def close(self) -> None:
        """Give back the connection.  May be called twice."""
        with suppress(OSError, MemcacheError):
            self._client.close()

    def _key(self, key: str) -> str:
        return f"{self._service}:{key}"

    def _changed(self, key: str, done: bool | None) -> None:
        if done is None:
            raise NotFound(key)
        if not done:
            raise Conflict(key)

    def _written(self, key: str, body: bytes) -> int:
        """Return the cas of what was just written, which memcached does not tell by itself.

        What somebody else has written since has a cas of its own, and this one then stands for neither.
        """
        with suppress(NotFound, StoreUnavailable):
            found = self.get(key)
            if found.body == body:
                return found.cas
        return 0

    @contextmanager
    def _reading(self) -> Iterator[Client]:
        with self._alone() as client:
            try:
                yield client
            except (OSError, MemcacheError) as error:
                raise StoreUnavailable(f"memcached: {error or type(error).__name__}") from error

    @contextmanager
    def _writing(self) -> Iterator[Client]:
        with self._alone() as client:
            try:
                yield client
            except ConnectionRefusedError as error:
                raise StoreUnavailable(f"memcached: {error}") from error
            except (OSError, MemcacheError) as error:
                raise StoreAmbiguous(f"memcached: {error or type(error).__name__}") from error

    @contextmanager
    def _alone(self) -> Iterator[Client]:
        if not self._lock.acquire(timeout=self._deadline):
            raise StoreUnavailable("memcached: its connection is busy")
        try:
            yield self._client
        finally:
            self._lock.release()
