"""Messages between an agent and its children: length-limited frames on a UNIX socket.

A frame is four bytes of length, one byte of kind (``j`` JSON, ``b`` bytes of an output), and the content.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from typing import Any

from zerog import codec
from zerog.exceptions import CorruptDocument

#: Bytes that one frame may hold; a longer one means that the other side is not what it should be.
MAX_FRAME = 64 * 1024 * 1024

_HEAD = struct.Struct(">IB")
_JSON, _BYTES = ord("j"), ord("b")
_READ = 64 * 1024

Message = dict[str, Any] | bytes


class BrokenPipe(Exception):
    """The other side closed the pipe, or wrote what is no frame."""


class _Frames:
    """Takes bytes as they come and gives whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Message | None:
        if len(self._buffer) < _HEAD.size:
            return None
        length, kind = _HEAD.unpack_from(self._buffer)
        if length > MAX_FRAME or kind not in (_JSON, _BYTES):
            raise BrokenPipe("not a frame")
        end = _HEAD.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEAD.size : end])
        del self._buffer[:end]
        return body if kind == _BYTES else _object(body)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = codec.loads(body)
    except CorruptDocument as error:
        raise BrokenPipe(str(error)) from error
    if not isinstance(value, dict):
        raise BrokenPipe("not an object")
    return value


def frame(message: Message) -> bytes:
    """Return a message as a frame."""
    body, kind = (message, _BYTES) if isinstance(message, bytes) else (codec.dumps(message), _JSON)
    return _HEAD.pack(len(body), kind) + body


class AgentPipe:
    """The agent's end: never blocks, so that a child which stops in the middle of a message delays nobody else."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._frames = _Frames()
        self._out = bytearray()

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether ``flush`` should be called once the descriptor is writable."""
        return bool(self._out)

    def send(self, message: Message) -> None:
        """Send a message, or as much of it as fits now."""
        self._out += frame(message)
        self.flush()

    def flush(self) -> None:
        """Send what is left of earlier messages."""
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise BrokenPipe(str(error)) from error
            del self._out[:sent]

    def read(self) -> None:
        """Take the bytes that are there; ``BrokenPipe`` at the end."""
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            raise BrokenPipe(str(error)) from error
        if not data:
            raise BrokenPipe("closed")
        self._frames.feed(data)

    def next(self) -> Message | None:
        """Return the next whole message that was read, or None."""
        return self._frames.next()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


class ChildPipe:
    """The child's end: blocks when it sends; messages may be sent by several threads."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        self._frames = _Frames()
        self._sending = threading.Lock()
        self._receiving = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor to select on."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message, waiting until the agent takes it."""
        with self._sending:
            self._socket.sendall(frame(message))

    def receive(self, timeout: float | None = None) -> Message | None:
        """Wait for the next message, for ``timeout`` seconds at most; ``BrokenPipe`` when the agent is gone."""
        with self._receiving:
            while (message := self._frames.next()) is None:
                if timeout is not None and not self._readable(timeout):
                    return None
                self._feed(self._socket.recv(_READ))
            return message

    def _readable(self, timeout: float) -> bool:
        poll = select.poll()  # which takes any descriptor, as a job may have opened very many
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def poll(self) -> Message | None:
        """Return a message if a whole one has arrived."""
        with self._receiving:
            try:
                self._feed(self._socket.recv(_READ, socket.MSG_DONTWAIT))
            except BlockingIOError:
                pass  # nothing new; an earlier read may have left a message
            return self._frames.next()

    def _feed(self, data: bytes) -> None:
        if not data:
            raise BrokenPipe("closed")
        self._frames.feed(data)
