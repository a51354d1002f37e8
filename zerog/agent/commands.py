"""Commands: the tube in which an agent hears at once what it would find out within a second."""

from __future__ import annotations

import logging
import selectors
from collections.abc import Callable

from zerog import codec
from zerog.exceptions import CorruptDocument
from zerog.queue.base import PENDING, Queue, Reservation

logger = logging.getLogger(__name__)


class Commands:
    """The agent's own tube, heard on a connection of its own.

    ``look`` is called with what should be looked at: the UUID of a job, or ``pauses``.  What is no command is dropped:
    nobody else will ever read this tube.  Every method but ``close`` may raise ``QueueUnavailable``.
    """

    def __init__(self, queue: Queue, tube: str, selector: selectors.BaseSelector, look: Callable[[str], None]) -> None:
        self._queue = queue
        self._tube = tube
        self._selector = selector
        self._look = look
        self._asked: int | None = None
        self._done: Reservation | None = None

    def listen(self) -> None:
        """Ask for the next command, or take it if a look is due."""
        if self._asked is None:
            done, self._done = self._done, None
            self._queue.ask([self._tube], done)
            self._asked = self._queue.fileno()
            self._selector.register(self._asked, selectors.EVENT_READ, self.hear)
        elif self._queue.look_within() <= 0:
            self.hear()

    def hear(self) -> None:
        """Take what has come."""
        answer = self._queue.take()
        if answer is PENDING:
            return
        self._unregister()
        if isinstance(answer, Reservation):
            self._done = answer
            self._obey(answer.body)

    def _obey(self, body: bytes) -> None:
        try:
            what = codec.loads(body)["look"]
        except (CorruptDocument, KeyError, TypeError):
            logger.warning("heard what is no command: %d bytes", len(body))
            return
        self._look(str(what))

    def within(self) -> float:
        """Return after how many seconds ``listen`` must be called."""
        return 0.0 if self._asked is None else self._queue.look_within()

    def lost(self) -> None:
        """Say that the queue is away."""
        if self._asked is not None:
            self._unregister()
            self._queue.withdraw()

    def _unregister(self) -> None:
        if self._asked is not None:
            self._selector.unregister(self._asked)
            self._asked = None

    def close(self) -> None:
        """Stop listening."""
        self.lost()
        self._queue.close()
