"""Standing orders: each command is done once and in order, and the loop waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.services import wait_until
from zerog.agent.errands import Aside, AtOnce
from zerog.agent.standing import Standing
from zerog.exceptions import StoreUnavailable
from zerog.master import Heard, Registration
from zerog.orders import Command, Wanted


class Superior:
    """One that answers when it is let, and can be away."""

    def __init__(self, *commands: str) -> None:
        self.pending = tuple(Command(number, name, {}, 0.0) for number, name in enumerate(commands, 1))
        self.said: list[int] = []
        self.away = 0
        self.free = threading.Event()
        self.free.set()

    def hear(self, news: Registration) -> Heard:
        raise NotImplementedError

    def wanted(self, id: str) -> Wanted:
        self._answer()
        return Wanted(len(self.pending), tuple(one for one in self.pending if one.number not in self.said))

    def acknowledge(self, id: str, number: int, state: str, message: str | None) -> Command:
        self._answer()
        self.said.append(number)
        return self.pending[number - 1]

    def _answer(self) -> None:
        assert self.free.wait(10)
        if self.away:
            self.away -= 1
            raise StoreUnavailable("away")


class Doer:
    """What was done."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def finish(self) -> None:
        self.done.append("finish")

    def cancel(self, uuid: str) -> bool:
        return True

    def modify(self, uuid: str, limits: Mapping[str, Any]) -> bool:
        return True


def obeyed(standing: Standing, doer: Doer, holds: Callable[[], bool]) -> None:
    def one_turn() -> bool:
        try:
            standing.obey(doer)
        except StoreUnavailable:
            return False
        return holds()

    wait_until(one_turn, 10, "the orders to be done")


@pytest.mark.requirement("M25")
def test_a_loop_does_not_wait_for_a_master_that_says_nothing() -> None:
    superior, doer, woken = Superior("drain", "resume"), Doer(), threading.Event()
    standing = Standing(superior, "one", Aside(woken.set))
    superior.free.clear()
    standing.look()
    for _ in range(3):
        assert not standing.obey(doer)
    superior.free.set()
    assert woken.wait(10)
    superior.free.clear()
    assert not standing.obey(doer), "the first is done and not heard: it is no time for the second"
    assert not standing.obey(doer)
    assert superior.said == []
    superior.free.set()
    obeyed(standing, doer, lambda: superior.said == [1, 2])
    standing.close()


@pytest.mark.requirement("M25")
def test_a_command_that_is_known_to_be_acknowledged_is_not_taken_for_the_next_one() -> None:
    """A heartbeat is answered between the acknowledgement and its answer: the first command is not pending there."""
    superior, doer, woken = Superior("drain", "resume"), Doer(), threading.Event()
    standing = Standing(superior, "one", Aside(woken.set))
    standing.take(superior.wanted("one"))
    superior.free.clear()
    assert not standing.obey(doer)
    standing.take(Wanted(2, superior.pending[1:]))
    assert not standing.obey(doer)
    superior.free.set()
    assert woken.wait(10)
    obeyed(standing, doer, lambda: superior.said == [1, 2])
    standing.close()


@pytest.mark.requirement("M25")
@pytest.mark.parametrize("way", ["at once", "aside"])
def test_what_could_not_be_said_is_said_again_and_not_done_again(way: str) -> None:
    superior, doer = Superior("drain", "restart", "resume"), Doer()
    standing = Standing(superior, "one", AtOnce() if way == "at once" else Aside(lambda: None))
    superior.away = 4
    standing.look()
    obeyed(standing, doer, lambda: standing.then is not None)
    assert superior.said == [1, 2]
    assert (standing.then, doer.done) == ("restart", ["finish"])
    obeyed(standing, doer, lambda: superior.said == [1, 2, 3])
    assert doer.done == ["finish"], "what follows is done while it drains"
    standing.close()


@pytest.mark.requirement("M25")
def test_an_agent_that_is_new_to_its_masters_begins_at_the_first_command() -> None:
    superior, doer = Superior("drain"), Doer()
    standing = Standing(superior, "one", AtOnce())
    standing.take(superior.wanted("one"))
    assert standing.obey(doer)
    superior.said.clear()
    standing.take(superior.wanted("one"))
    assert not standing.obey(doer), "it is done"
    standing.take(superior.wanted("one"), anew=True)
    assert standing.obey(doer)
    assert superior.said == [1]


@pytest.mark.requirement("M25")
def test_an_older_answer_that_comes_later_undoes_nothing() -> None:
    standing = Standing(Superior(), "one", AtOnce())
    standing.take(Wanted(5, drained=True))
    standing.take(Wanted(4, drained=False))
    assert standing.drained
    standing.take(Wanted(6, drained=False))
    assert not standing.drained
