"""The child of a consumer: handles its messages until it is told to stop, or its lease is somebody else's.

Started by exec: ``python -m zerog.consuming NAME TOKEN DESCRIPTOR PARENT``; it dies with the process that started it.
Into the page of memory behind the descriptor it writes which message it handles, and since when.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from zerog import bootstrap, config, failpoints
from zerog.agent.consumers import PAGE
from zerog.bootstrap import Parts
from zerog.commands import set_up_logging
from zerog.consumer import Services
from zerog.consumers import LeaseLost
from zerog.documents import OwnDocuments
from zerog.exceptions import DatastoreError, QueueError, StoreUnavailable, UnknownConsumer
from zerog.feed import Feed, Stopped
from zerog.queue.base import Queue, Reservation

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

#: Seconds between two looks at the topics when nobody says that there is something, and while store or queue are away.
_LOOK, _AWAY = 1.0, 0.5
#: Seconds of one wait for the queue, after which it is seen whether it is to stop.
_WAIT = 0.5
#: Entries of its tube that it removes in one go.
_DRAINED = 100


class _Page:
    """What the host sees of it."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, PAGE)

    def say(self, message: tuple[str, int] | None) -> None:
        """Say which message is being handled, or that none is."""
        text = f"{message[0]} {message[1]} {time.monotonic()}" if message is not None else ""
        self._page[:] = text.encode().ljust(PAGE, b"\0")


class _Bell:
    """Waits until somebody says that there is something in a topic; without the queue it only waits."""

    def __init__(self, queue: Queue, tube: str, stop: threading.Event) -> None:
        self._queue = queue
        self._tube = tube
        self._stop = stop
        self._away = False

    def wait(self, seconds: float) -> None:
        """Wait for at most so many seconds."""
        until = time.monotonic() + seconds
        while not self._stop.is_set() and (left := until - time.monotonic()) > 0:
            try:
                entry = self._queue.reserve([self._tube], min(left, _WAIT))
                if self._away:
                    self._away = False
                    logger.info("queue back")
                if entry is not None:
                    self._drain(entry)
                    return
            except QueueError as error:
                if not self._away:
                    self._away = True
                    logger.warning("queue away: %s", error)
                self._stop.wait(min(left, _AWAY))

    def _drain(self, entry: Reservation | None) -> None:
        for _ in range(_DRAINED):
            if entry is None:
                return
            with suppress(QueueError):
                entry.delete()
            entry = self._queue.reserve([self._tube], 0.0)


def main() -> None:
    """Run the consumer that the arguments name."""
    name, token, descriptor, parent = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it died before the signal was set
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    set_up_logging()
    failpoints.arm(os.environ.get(failpoints.VARIABLE))
    parts = bootstrap.assemble(config.load())
    try:
        _serve(parts, name, token, _Page(descriptor), stop)
    finally:
        parts.manager.close_queue()
        parts.store.close()


def _serve(parts: Parts, name: str, token: str, page: _Page, stop: threading.Event) -> None:
    manager = parts.manager
    follower = parts.registry.consumers[name]
    documents = OwnDocuments(parts.store, follower.application)
    services = Services(manager, manager.topics, documents, parts.registry.settings.get(follower.application))
    bell = _Bell(parts.open_queue(), manager.consumer_tube(name), stop)

    def pause(seconds: float) -> bool:
        return stop.wait(seconds) if seconds else stop.is_set()

    feed = Feed(
        follower.consumer(services), manager.consumers, manager.topics, manager, parts.clock, token, page.say, pause
    )
    try:
        _feed(feed, bell, stop, parts)
    except (LeaseLost, UnknownConsumer):
        logger.warning("consumer %s is somebody else's now", name)
    except Stopped:
        feed.close()


def _feed(feed: Feed, bell: _Bell, stop: threading.Event, parts: Parts) -> None:
    away = False
    while not stop.is_set():
        try:
            more = feed.turn()
            feed.do_chore()
            if away:
                away = False
                logger.info("store back")
        except (DatastoreError, QueueError) as error:
            if not away:
                away = True
                logger.warning("waits: %s%s", "store away: " if isinstance(error, StoreUnavailable) else "", error)
            stop.wait(_AWAY)
            continue
        if not more:
            if parts.manager.queue_away:
                parts.manager.probe_queue()
            bell.wait(min(_LOOK, feed.within()))


if __name__ == "__main__":
    main()
