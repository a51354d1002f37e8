"""A TCP proxy on loopback that can stop forwarding, drop the answers, or cut a connection in the middle of a line."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

#: What the proxy does with what comes: pass it on; keep it; throw the answers away; pass on half an answer and end.
MODES = ("forward", "stop", "half", "cut")

#: Bytes taken at once, and seconds between two looks at what is to be done.
_BLOCK, _LOOK = 65536, 0.05


class Proxy:
    """Listens on ``port`` and forwards to ``target``, a port of loopback, as ``mode`` says."""

    def __init__(self, port: int, target: int) -> None:
        self.mode = "forward"
        self._target = target
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def close(self) -> None:
        """Listen no more, and end what is open."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for source, sink, answers in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, sink, answers), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        """Carry bytes one way until either end is closed."""
        with suppress(OSError):
            while data := source.recv(_BLOCK):
                while self.mode == "stop" and not self._closed:
                    time.sleep(_LOOK)
                if self._closed:
                    break
                if answers and self.mode == "half":
                    continue
                if answers and self.mode == "cut":
                    sink.sendall(data[: max(1, len(data) // 2)])
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the thread that carries the other way
            end.close()
