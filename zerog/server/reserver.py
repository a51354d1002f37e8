"""Reserver: the one thread of a server that reserves for all agents that wait over HTTP (R16).

Who waits has a connection to the queue and no thread.  What comes is claimed for the agent, and then the entry goes:
from there on the lease alone is the promise.  One turn of the loop claims all that has come, in one commit. ::

    waiting ──an entry──▶ claiming ──Claimed──▶ delivered
       ▲                     │
       └──not ours, no room──┘
"""

from __future__ import annotations

import logging
import queue
import secrets
import selectors
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from zerog import failpoints
from zerog.attempts import Report, Settlement
from zerog.entries import Entries, Strays
from zerog.exceptions import InternalError, QueueUnavailable, StoreUnavailable, TooBusy, ZerogError
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, Drop, GiveBack, Held, Missing, Verdict
from zerog.master import Master
from zerog.queue.base import Queue
from zerog.record import JobRecord
from zerog.turn import Turn

logger = logging.getLogger(__name__)

#: Agents' requests that may wait in one server: each has a connection to the queue.
MOST = 1000

#: Seconds after which what an agent may be given is looked at anew, and between two tries while something is away.
_LOOK_AGAIN, _AWAY = 1.0, 0.25

#: Connections to the queue that are kept for those that will come.
_SPARE = 50

#: Seconds after which the loop turns although nothing happened.
_IDLE = 60.0

Delivered = Held | ZerogError | None


@dataclass(eq=False, slots=True)
class Waiting:
    """One request that waits for an assignment.  ``deliver`` is called once, in the thread of the reserver."""

    agent: str
    types: Sequence[str] | None
    until: float
    deliver: Callable[[Delivered], None]
    #: Nobody waits for it any more: what comes is given back.
    gone: bool = False
    entries: Entries | None = None
    asked: int | None = None
    claim: str = ""
    tubes: tuple[str, ...] = field(default=())
    looked_at: float = 0.0
    delivered: bool = False
    #: Only what is ready now; and whether it might have been given something before.
    now: bool = False
    open: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a round: for each item the job's record, or what is wrong; and what the agent is given."""

    results: Sequence[JobRecord | Exception]
    given: Sequence[Held]


@dataclass(eq=False, slots=True)
class Round:
    """One request that says how attempts go and end, and wants up to ``want`` of what is ready now."""

    agent: str
    types: Sequence[str] | None
    items: Sequence[Report | Settlement]
    want: int
    deliver: Callable[[Done | ZerogError], None]
    #: The places in which something may come, and how many of them are not done with.
    places: list[Waiting] = field(default_factory=list)
    open: int = 0
    #: Nobody waits for it any more.
    gone: bool = False
    given: list[Held] = field(default_factory=list)
    results: list[JobRecord | Exception] = field(default_factory=list)
    written: bool = False

    @property
    def ready(self) -> bool:
        """Whether it can be written: the queue has said what there is."""
        return not self.written and all(place.asked is None for place in self.places)


class Reserver(threading.Thread):
    """Hands out assignments.  All but ``run`` may be called from any thread."""

    def __init__(self, master: Master, open_queue: Callable[[], Queue]) -> None:
        super().__init__(name="reserver", daemon=True)
        self._master = master
        self._manager = master.manager
        self._clock = master.manager.clock
        self._open_queue = open_queue
        self._watch = LeaseWatch(self._clock, self._manager.lease)
        self._selector = selectors.DefaultSelector()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._waiting: list[Waiting] = []
        self._claiming: list[Waiting] = []
        self._rounds: list[Round] = []
        #: What is known of agents for a moment: which tubes they may be given from, by how many places.
        self._shares: dict[tuple[str, int], tuple[float, list[tuple[str, ...]]]] = {}
        self._free: list[Entries] = []
        self._first: Queue | None = None
        self._strays = Strays()
        self._retry_at = 0.0
        self._look: set[str] = set()
        self._ended = False

    # From other threads

    def ask(self, waiting: Waiting) -> None:
        """Wait for an assignment."""
        self._tell(lambda: self._take_up(waiting))

    def turn(self, round: Round) -> None:
        """Write how attempts go and end, and hand out what is ready."""
        self._tell(lambda: self._begin_round(round))

    def give_up(self, waiting: Waiting) -> None:
        """Wait no longer: nobody would get what comes."""
        waiting.gone = True
        self._tell(lambda: None)

    def poke(self, agent: str) -> None:
        """Look anew at what an agent may be given: something about it has changed."""
        self._tell(lambda: self._look_anew(agent))

    def look_everywhere(self) -> None:
        """Look anew at what all agents may be given: needs came into use."""
        self._tell(self._look_at_all)

    def stop(self) -> None:
        """Let nobody wait, and end.  May be called twice."""
        self._tell(self._end)

    def _tell(self, call: Callable[[], None]) -> None:
        self._inbox.put(call)
        with suppress(OSError):
            self._theirs.send(b"\0")

    # The loop

    def run(self) -> None:
        """Hand out until ``stop``."""
        self._selector.register(self._ours, selectors.EVENT_READ, None)
        while not self._ended or self._claiming or self._rounds:
            try:
                self._turn()
            except Exception:
                # A defect: whoever waits waits on, and nothing is held for ever.
                logger.exception("the reserver failed")
                self._retry_at = self._clock.monotonic() + _AWAY
        self._close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout()):
            if key.data is None:
                with suppress(BlockingIOError):
                    self._ours.recv(4096)
            else:
                self._on_queue(key.data)
        while not self._inbox.empty():
            self._inbox.get()()
        now = self._clock.monotonic()
        self._let_go(now)
        if self._manager.queue_away:
            self._queue_lost()
        elif now >= self._retry_at:
            self._serve(now)
        ready = [one for one in self._rounds if one.ready]
        if (self._claiming or ready) and now >= self._retry_at:
            self._write_all(ready)
        for entries in self._free:
            if now >= entries.delete_at and not self._manager.queue_away:
                entries.delete_done()

    def _timeout(self) -> float:
        if not self._inbox.empty():
            return 0.0
        now = self._clock.monotonic()
        times = [one.until - now for one in self._waiting]
        times += [one.looked_at + _LOOK_AGAIN - now for one in self._waiting]
        times += [entries.delete_at - now for entries in self._free]
        times += [one.entries.queue.look_within() for one in self._waiting if one.asked is not None and one.entries]
        if any(one.ready for one in self._rounds):
            times.append(max(self._retry_at - now, 0.0))
        if self._claiming or (self._manager.queue_away and self._waiting):
            times.append(max(self._retry_at - now, 0.0) if self._claiming else _AWAY)
        if self._look:
            times.append(0.0)
        return max(0.0, min([*times, _IDLE]))

    def _look_anew(self, agent: str) -> None:
        self._look.add(agent)
        for key in [key for key in self._shares if key[0] == agent]:
            del self._shares[key]

    def _look_at_all(self) -> None:
        self._shares.clear()
        self._look.update(one.agent for one in self._waiting)

    def _begin_round(self, round: Round) -> None:
        """Ask for what is ready now, one entry for each that is wanted; then it is written."""
        self._rounds.append(round)
        if not round.want or self._manager.queue_away or self._ended:
            return
        try:
            shares = self._shares_of(round.agent, round.types, round.want)
        except ZerogError:
            return  # what is wrong shows itself where it is written
        places = [
            Waiting(round.agent, round.types, float("inf"), partial(self._came, round), tubes=tubes, now=True)
            for tubes in shares
            if tubes
        ][: max(0, MOST - len(self._waiting))]
        round.places, round.open = places, len(places)
        self._waiting += places
        for place in places:
            place.looked_at = self._clock.monotonic()
            place.entries = self._connection()
        if places and places[0].entries is not None:
            try:
                with places[0].entries.queue.together():
                    for place in places:
                        self._ask(place)
            except QueueUnavailable as error:
                self._away(error)
        for place in places:
            self._on_queue(place)

    def _came(self, round: Round, what: Delivered) -> None:
        """Note what came in one of the places of a round."""
        if isinstance(what, Held) and round.gone:
            self._quietly(lambda: self._master.give_back(what))
        elif isinstance(what, Held):
            round.given.append(what)
        round.open -= 1
        self._finish_round(round)

    def _finish_round(self, round: Round) -> None:
        if round.written and not round.open and round in self._rounds:
            self._rounds.remove(round)
            round.deliver(Done(round.results, round.given))

    def _shares_of(self, agent: str, types: Sequence[str] | None, count: int) -> list[tuple[str, ...]]:
        """Return the tubes for some places of an agent; what was known a moment ago still holds if nobody said else."""
        key = (agent, count)
        now = self._clock.monotonic()
        known = self._shares.get(key)
        if types is None and known is not None and now < known[0]:
            return known[1]
        found = self._master.shares_of(agent, types, count)
        if types is None and not self._manager.needs_in_use and not self._has_needs():
            if len(self._shares) > MOST:
                self._shares.clear()
            self._shares[key] = (now + _AWAY, found)
        return found

    def _has_needs(self) -> bool:
        """Return whether a job type has needs: then what an agent may be given depends on what it holds."""
        registry = self._manager.registry
        return any(registry.policy(name).needs for name in registry.names)

    def _take_up(self, waiting: Waiting) -> None:
        if self._ended:
            waiting.deliver(None)
        elif len(self._waiting) >= MOST:
            error = TooBusy(f"{MOST} requests wait for assignments already")
            error.headers["Retry-After"] = "1"
            waiting.deliver(error)
        else:
            self._waiting.append(waiting)
            self._look.add(waiting.agent)

    def _let_go(self, now: float) -> None:
        """Answer those whose time is over, and forget those that have gone."""
        for one in self._undecided():
            if one.gone or now >= one.until or self._ended:
                self._withdraw(one)
                self._finish(one, None)

    def _undecided(self) -> list[Waiting]:
        """Return those for whom nothing has come: what has come is claimed, and then delivered or given back."""
        return [one for one in self._waiting if one not in self._claiming]

    def _finish(self, waiting: Waiting, what: Delivered) -> None:
        """Be done with one that waits."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        self._give_connection(waiting)
        if not waiting.delivered:
            waiting.delivered = True
            waiting.deliver(what)

    # What each may be given

    def _serve(self, now: float) -> None:
        """Let each that waits ask for what its agent has room for."""
        of_agent: dict[str, dict[tuple[str, ...] | None, list[Waiting]]] = defaultdict(lambda: defaultdict(list))
        for one in self._undecided():
            if not one.now:
                # Of one agent, but perhaps under tokens that see different types.
                of_agent[one.agent][None if one.types is None else tuple(one.types)].append(one)
        due = {one.agent for one in self._waiting if now >= one.looked_at + _LOOK_AGAIN} | self._look
        self._look.clear()
        for agent in due:
            for several in of_agent[agent].values() if agent in of_agent else ():
                self._serve_agent(several, now)
        for one in self._waiting:
            if one.asked is not None and one.entries is not None and one.entries.queue.look_within() <= 0:
                self._on_queue(one)

    def _serve_agent(self, several: Sequence[Waiting], now: float) -> None:
        try:
            shares = self._shares_of(several[0].agent, several[0].types, len(several))
        except ZerogError as error:
            for one in several:
                self._withdraw(one)
                self._finish(one, error)
            return
        for one, tubes in zip(several, shares, strict=True):
            one.looked_at = now
            if one.asked is not None and one.tubes == tubes:
                continue
            self._withdraw(one)
            one.tubes = tubes
            if tubes:
                one.open = True
                self._ask(one)
            elif one.open and not any(shares):
                self._finish(one, None)  # it has just been drained: whoever closes down need not wait

    def _ask(self, waiting: Waiting) -> None:
        waiting.entries = waiting.entries or self._connection()
        waiting.entries.tubes = waiting.tubes
        try:
            if waiting.now:
                waiting.entries.ask_now()
            else:
                waiting.entries.ask()
            self._register(waiting)
            if not waiting.now:
                self._on_queue(waiting)
        except QueueUnavailable as error:
            self._away(error)

    def _connection(self) -> Entries:
        """Return a connection to the queue; the last one that was used may still have an entry to delete."""
        if self._free:
            return self._free.pop()
        if self._first is None:
            self._first = self._open_queue()
            connection = self._first
        else:
            connection = self._first.another()
        return Entries(connection, self._clock, (), self._away)

    def _give_connection(self, waiting: Waiting) -> None:
        entries, waiting.entries = waiting.entries, None
        if entries is not None and len(self._free) < _SPARE:
            self._free.append(entries)
        elif entries is not None:
            entries.delete_done()
            entries.queue.close()

    def _register(self, waiting: Waiting) -> None:
        assert waiting.entries is not None
        waiting.asked = waiting.entries.queue.fileno()
        self._selector.register(waiting.asked, selectors.EVENT_READ, waiting)

    def _unregister(self, waiting: Waiting) -> None:
        if waiting.asked is not None:
            with suppress(KeyError, ValueError):
                self._selector.unregister(waiting.asked)
            waiting.asked = None

    def _withdraw(self, waiting: Waiting) -> None:
        if waiting.asked is not None and waiting.entries is not None:
            self._unregister(waiting)
            waiting.entries.withdraw()

    def _on_queue(self, waiting: Waiting) -> None:
        """Take what has come for one that waits."""
        if waiting.asked is None or waiting.entries is None:
            return
        try:
            if not waiting.entries.take():
                return
        except QueueUnavailable as error:
            self._away(error)
            return
        self._unregister(waiting)
        if waiting.entries.current is None and waiting.now:
            self._finish(waiting, None)
            return
        if waiting.entries.current is None:
            self._look.add(waiting.agent)
            waiting.tubes = ()
            return
        waiting.claim = secrets.token_hex(8)
        self._claiming.append(waiting)

    def _away(self, error: QueueUnavailable) -> None:
        if not self._manager.queue_away:
            logger.warning("queue away: %s", error)
        self._manager.queue_away = True  # the chores probe it
        self._queue_lost()

    def _queue_lost(self) -> None:
        for one in self._undecided():
            self._withdraw(one)
            one.tubes = ()
            if one.now:
                self._finish(one, None)
        self._look.update(one.agent for one in self._waiting)

    # Claiming

    def _write_all(self, rounds: Sequence[Round]) -> None:
        """Claim all that has come, and write what rounds say, in one commit.

        When the store is away it is tried again, under the same names: what was written is found so.
        """
        claiming = list(self._claiming)
        turn = Turn(self._master)
        try:
            with self._manager.store.together():
                results = [[turn.answer(item) for item in one.items] for one in rounds]
                verdicts = [self._claim(turn, one) for one in claiming]
                turn.write()
        except StoreUnavailable as error:
            self._wait_for_store(error, rounds)
            return
        except Exception:
            logger.exception("what came together could not be written")
            self._give_up_on(claiming, rounds)
            return
        self._claiming.clear()
        for one, done in zip(rounds, results, strict=True):
            one.results, one.written = done, True
            if any(isinstance(record, JobRecord) and record.needs for record in done):
                self._look_anew(one.agent)  # there is room again
        for place, verdict in zip(claiming, verdicts, strict=True):
            self._settle(place, turn.refused.get(self._uuid(place), verdict))
        for one in rounds:
            self._finish_round(one)
        self._after(turn)

    def _give_up_on(self, claiming: Sequence[Waiting], rounds: Sequence[Round]) -> None:
        """Be done with what shows a defect: its entries come again later, and whoever asked is told."""
        self._claiming.clear()
        for place in claiming:
            if place.entries is not None:
                place.entries.give_back(self._manager.lease / 3, None)
            self._finish(place, None if place.now else InternalError())
        for one in rounds:
            if one in self._rounds:
                self._rounds.remove(one)
            one.deliver(InternalError())

    def _after(self, turn: Turn) -> None:
        try:
            turn.after()
        except ZerogError as error:
            logger.warning("entries are left to the sweep: %s", error)

    def _wait_for_store(self, error: StoreUnavailable, rounds: Sequence[Round]) -> None:
        """Try again in a moment; who has said something may say it again elsewhere."""
        self._watch.silence()
        self._retry_at = self._clock.monotonic() + _AWAY
        logger.warning("assignments wait: store away: %s", error)
        for one in rounds:
            if not one.open:
                self._rounds.remove(one)
                one.deliver(error)

    @staticmethod
    def _uuid(waiting: Waiting) -> str:
        assert waiting.entries is not None and waiting.entries.current is not None
        return waiting.entries.current.body.decode()

    def _claim(self, turn: Turn, waiting: Waiting) -> Verdict | ZerogError:
        assert waiting.entries is not None and waiting.entries.current is not None
        reservation = waiting.entries.current
        try:
            return turn.take(waiting.agent, self._uuid(waiting), waiting.claim, self._watch, reservation)
        except StoreUnavailable:
            raise
        except ZerogError as error:
            return error
        except Exception:
            logger.exception("job %s cannot be claimed", self._uuid(waiting))
            return InternalError()

    def _settle(self, waiting: Waiting, verdict: Verdict | ZerogError) -> None:
        entries = waiting.entries
        assert entries is not None and entries.current is not None
        uuid = self._uuid(waiting)
        waiting.tubes = ()
        match verdict:
            case Claimed(held=held):
                failpoints.hit("run.after_claim")
                self._strays.found(uuid)
                entries.drop()
                self._deliver(waiting, held)
                return
            case GiveBack(delay=delay, priority=priority):
                entries.give_back(delay, priority)
            case Drop():
                entries.drop()
            case Missing():
                self._missed(entries, uuid)
            case ZerogError():
                entries.give_back(_AWAY, None)
                self._finish(waiting, verdict)
        if waiting.now:
            self._finish(waiting, None)
        self._look.add(waiting.agent)

    def _deliver(self, waiting: Waiting, held: Held) -> None:
        if waiting.gone:
            self._quietly(lambda: self._master.give_back(held))
            self._finish(waiting, None)
        else:
            self._finish(waiting, held)
        if held.record.needs:
            self._look_anew(waiting.agent)

    def _missed(self, entries: Entries, uuid: str) -> None:
        if self._strays.is_over(uuid):
            entries.drop()
        else:
            entries.give_back(self._manager.lease / 3, None)

    @staticmethod
    def _quietly(call: Callable[[], None]) -> None:
        """Do what the sweep would do otherwise."""
        try:
            call()
        except ZerogError as error:
            logger.info("a job that nobody waited for is left to lapse: %s", error)

    # The end

    def _end(self) -> None:
        self._ended = True

    def _close(self) -> None:
        for one in list(self._waiting):
            self._withdraw(one)
            self._finish(one, None)
        for entries in self._free:
            with suppress(QueueUnavailable):
                entries.delete_done()
            entries.queue.close()
        self._manager.close_queue()
        self._selector.close()
        self._ours.close()
        self._theirs.close()
