"""Errands: how an agent's loop asks a superior, at once or without waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from zerog.exceptions import ZerogError

T = TypeVar("T")


class Errands(Protocol):
    """How what is asked of a superior is asked: at once, or where the loop does not wait for it."""

    def __call__(self, call: Callable[[], T]) -> Future[T]:
        """Do something and tell what came of it."""

    def close(self) -> None:
        """Wait for nothing more."""


class AtOnce:
    """Asks at once: a store answers as fast as everything else that the loop asks of it."""

    def __call__(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(call())
        except ZerogError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Do nothing."""


class Aside:
    """Asks in a thread of its own, one thing after the other, and wakes the loop when it is answered."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="errands")

    def __call__(self, call: Callable[[], T]) -> Future[T]:
        future = self._pool.submit(call)
        future.add_done_callback(lambda _: self._wake())
        return future

    def close(self) -> None:
        """Wait for nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
