"""Parent: what a job may know of one that it waited for."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from zerog.exceptions import NotFound

#: Bytes that are asked for at a time.
_BLOCK = 256 * 1024

Ask = Callable[[dict[str, Any]], dict[str, Any] | bytes]


class Parent:
    """A job that had to succeed before this one: its ``uuid``, its ``job_type``, and its data.

    ``media_type`` and ``size`` (bytes) describe the data; both are None if it has none.  ``job_type`` is None of a
    parent that has been removed since.
    """

    def __init__(self, description: dict[str, Any], ask: Ask) -> None:
        self.uuid: str = description["uuid"]
        self.job_type: str | None = description["jobType"]
        self.media_type: str | None = description["mediaType"]
        self.size: int | None = description["size"]
        self._ask = ask

    def data(self) -> Any:
        """Return the data, all in memory: the value if it is JSON, else bytes; None if there are none.

        ``NotFound`` if the parent has been removed.
        """
        if self.size is None:
            if self.job_type is None:
                raise NotFound(f"job {self.uuid} has been removed")
            return None
        with self.open() as file:
            content = file.read()
        return json.loads(content) if self.media_type == "application/json" else content

    def open(self) -> BinaryIO:
        """Return the data as a binary file, of which only what is read is fetched; it can be sought in."""
        if self.job_type is None:
            raise NotFound(f"job {self.uuid} has been removed")
        return cast(BinaryIO, io.BufferedReader(_Remote(self.uuid, self.size or 0, self._ask), _BLOCK))

    def __repr__(self) -> str:
        return f"Parent({self.uuid!r}, {self.job_type!r})"


class _Remote(io.RawIOBase):
    """The bytes of a parent's data, fetched through the agent."""

    def __init__(self, uuid: str, size: int, ask: Ask) -> None:
        self._uuid, self._size, self._ask = uuid, size, ask
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the start of the data")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        piece = ask_for(self._ask, {"t": "read", "uuid": self._uuid, "start": self._position})
        if not isinstance(piece, bytes) or not piece:
            raise NotFound(f"the data of job {self._uuid} are not whole")
        count = min(len(buffer), len(piece))
        buffer[:count] = piece[:count]
        self._position += count
        return count


def ask_for(ask: Ask, question: dict[str, Any]) -> dict[str, Any] | bytes:
    """Return the answer to a question; ``NotFound`` if it says that there is none."""
    answer = ask(question)
    if isinstance(answer, dict) and "error" in answer:
        raise NotFound(answer["error"])
    return answer


def parents(uuids: tuple[str, ...], ask: Ask) -> tuple[Parent, ...]:
    """Return the parents with these UUIDs, in this order."""
    if not uuids:
        return ()
    answer = ask_for(ask, {"t": "parents"})
    assert isinstance(answer, dict)
    return tuple(Parent(one, ask) for one in answer["parents"])
