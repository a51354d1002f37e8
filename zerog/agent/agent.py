"""Agent: one running worker daemon.

One main thread with one selector loop over all slots, and the thread of the chores with connections of its own.  A turn
of the loop: hear what happened, do what time asks for, let every slot that needs the store do one step inside one
commit, then what had to wait for that commit, then ask for more work.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from zerog import failpoints
from zerog.agent.attempt import Terms
from zerog.agent.commands import Commands
from zerog.agent.consumers import Hosts
from zerog.agent.errands import Aside, AtOnce
from zerog.agent.family import adopt_orphans, end_orphans
from zerog.agent.flights import Flights
from zerog.agent.heartbeat import Heartbeat, Superior
from zerog.agent.keeper import Keeper
from zerog.agent.pipe import BrokenPipe
from zerog.agent.process import Child, Program
from zerog.agent.slot import Phase, Slot
from zerog.agent.standing import Standing
from zerog.agent.usage import Usage
from zerog.chores import Rounds
from zerog.clock import Clock
from zerog.exceptions import AgentAlive, QueueUnavailable, StoreAmbiguous, StoreUnavailable, Superseded, UnknownAgent
from zerog.fleet import Assignment
from zerog.leases import LeaseWatch
from zerog.manager import Manager
from zerog.master import Registration
from zerog.needs import UNSAID, Needs
from zerog.queue.base import Queue
from zerog.remote import Remote

logger = logging.getLogger(__name__)

#: Seconds between two looks at the records of running jobs, where a cancel may stand.
_LOOK_EVERY = 1.0
#: Seconds after which the loop looks around although nothing happened; shorter while something is away.
_IDLE, _AWAY = 5.0, 0.25
#: Share of ``max_jobs`` after which the successor of a child is started.
_SPARE_AT = 0.8
#: Seconds for which the end of one short job waits for that of another (the selector knows no less).
_SIBLING = 0.001
_CHILD_BACKOFF = 30.0
#: Reads of what a dead child left in its pipe; a socket's buffer holds less.
_REST_READS = 16


#: Makes the thread of the chores: of those that come first, and of those that come after all others.
MakeRounds = Callable[[Sequence[Callable[[], None]], Sequence[Callable[[], None]]], Rounds]


class Agent:
    """Reserves ids, hands each to a child process, and answers for it until it ends.

    ``slots`` jobs run at once.  ``superior`` is whom it tells that it lives, as ``registration`` and what is added to
    it, and who tells it what to do.  ``rounds`` makes the thread of the chores, of those that come first and of those
    that come after all others.  ``drain`` is the seconds that running jobs get after the first signal.  It runs
    ``consumers`` beside jobs.  ``run`` must be called in the main thread.
    """

    def __init__(
        self,
        manager: Manager | Remote,
        queue: Queue,
        commands: Queue,
        clock: Clock,
        terms: Terms,
        program: Program,
        slots: int,
        superior: Superior,
        registration: Registration,
        rounds: MakeRounds,
        usage: Usage | None = None,
        drain: float = 60.0,
        consumers: Hosts | None = None,
    ) -> None:
        self._manager = manager
        self._consumers = consumers
        self._clock = clock
        self._terms = terms
        self._program = program
        self._drain = drain
        self._watch = LeaseWatch(clock, terms.lease)
        queues = [queue, *(queue.another() for _ in range(slots - 1))]
        self._slots = [Slot(manager, one, clock, self._watch, terms) for one in queues]
        if isinstance(manager, Manager):  # a master counts for itself
            for slot in self._slots:
                slot.fits = self._fits
        self._selector = selectors.DefaultSelector()
        self._flights = Flights(manager, self._wake) if isinstance(manager, Remote) else None
        #: Jobs that have ended and left their slots, until that is written.
        self._leaving: list[Slot] = []
        self._left_superseded = 0
        self._commands = Commands(commands, manager.agent_tube(terms.agent), self._selector, self._on_command)
        self._heartbeat = Heartbeat(superior, registration, terms, clock, usage)
        errands = Aside(self._wake) if isinstance(manager, Remote) else AtOnce()
        self._orders = Standing(superior, terms.agent, errands)
        if isinstance(manager, Manager):
            manager.on_needs = self._wake
        self._chores = rounds([self._say_here], [self._probe_store, self._notice_changes])
        #: What the slots were told which tubes to serve by, of what concerns all, and all of it.
        self._served_by: tuple[object, ...] | None = None
        self._selective = False
        self._served_now: object = None
        #: Until when, monotonic, running jobs may go on although the agent is to take no others; None if it takes them.
        self._rest_until: float | None = None
        self._store_away = False
        #: Whether another process has its name; and until when, monotonic, it does not look at its orders.
        self._ousted = False
        self._obey_at = 0.0
        self._turned_at = clock.monotonic()
        self._signals = 0
        #: The process that this one must not outlive, if there is one.
        self.parent: int | None = None
        self._drain_until: float | None = None
        self._look_at = 0.0
        self._spares: list[Child] = []
        self._start_after = 0.0
        self._start_delay = 0.5
        self._asked: dict[Slot, int] = {}
        self._paused: set[Child] = set()

    def run(self) -> None:
        """Work until a signal has drained the agent."""
        self._catch_signals()
        adopt_orphans(False)  # it may be the process that executed itself anew
        self._keeper = Keeper()
        adopt_orphans()  # after the keeper, which is to be nobody's child
        self._chores.start()
        if self._consumers is not None:
            self._consumers.use(self._keeper.environment)
            self._consumers.wanted = lambda: not self._signals and self._rest_until is None
            self._consumers.start()
        self._terms.statistics.start()
        logger.info(
            "agent %s serves %s with %d slots", self._terms.agent, ", ".join(self._terms.job_types), len(self._slots)
        )
        try:
            while not self._finished():
                self._turn()
        finally:
            self._close()
        logger.info("agent %s stopped", self._terms.agent)

    @property
    def superseded(self) -> int:
        """How many attempts turned out not to be the current ones any more."""
        return self._left_superseded + sum(slot.superseded for slot in self._places)

    @property
    def _places(self) -> list[Slot]:
        """The slots, and what has left them and is not over."""
        return [*self._slots, *self._leaving]

    @property
    def then(self) -> str | None:
        """What is to be done when ``run`` has returned, if a command said so: retire or restart."""
        return self._orders.then

    def say_goodbye(self) -> None:
        """Say that it is no more; raises what an outage of the store raises."""
        state = {"retire": "retired", "restart": "draining"}.get(self.then or "", "offline")
        self._heartbeat.say(state, self.superseded, (), own=True)

    def stop(self) -> None:
        """Drain; the second call, or the first one after the end of ``parent``, stops now."""
        self._signals += 1
        if self.parent is not None and os.getppid() != self.parent:
            self._signals += 1

    def finish(self) -> None:
        """Drain, as after the first signal; running jobs get their time however often it is said."""
        if not self._signals:
            self.stop()

    # The turn

    def _turn(self) -> None:
        self._turned_at = self._clock.monotonic()
        self._hear(self._timeout())
        now = self._clock.monotonic()
        if self._lonely(now):
            self._hear(_SIBLING)
            now = self._clock.monotonic()
        self._land()
        self._obey(now)
        if self._flights is not None:
            self._flights.takes = not self._signals and self._rest_until is None
            self._flights.tidy(now)
        if self._signals:
            self._advance_drain(now)
        elif self._rest_until is not None:
            self._advance_rest(now)
        self._tend_children(now)
        for slot in self._slots:
            self._guard_slot(slot, partial(slot.tick, now))
        self._store_steps(now)
        self._ask_for_work(now)

    def _hear(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            self._guard(key.data)

    def _lonely(self, now: float) -> bool:
        """Return whether one job has ended alone and another is about to: then one commit may serve both."""
        ended = sum(slot.phase is Phase.ENDING for slot in self._slots)
        return ended == 1 and any(slot.ends_soon(now) for slot in self._slots)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except QueueUnavailable as error:
            self._queue_lost(error)

    def _timeout(self) -> float:
        now = self._clock.monotonic()
        # What has to wait for a flight to land is woken by that.
        least = self._flights.least() if self._flights is not None else 0.0
        if self._flights is not None and any(slot.claims and slot.wants_store(now) for slot in self._slots):
            return 0.0  # it begins without a word to the master
        if not self._store_away and any(self._at_once(slot, now) for slot in self._places):
            return least
        times = [slot.next_time(self._store_away) - now for slot in self._slots]
        times += [slot.entries.queue.look_within() for slot in self._asked]
        if self._flights is not None:
            times.append(self._flights.stale_at - now)
        if not self._manager.queue_away:
            times.append(self._commands.within())
        times.append(_AWAY if self._store_away or self._manager.queue_away or self._signals else _IDLE)
        looks = self._flights is None and not self._store_away  # over HTTP it is told
        if looks and any(slot.phase is Phase.RUNNING for slot in self._slots):
            times.append(self._look_at - now)
        if self._starts and any(slot.child is None for slot in self._slots):
            times.append(self._start_after - now)
        return max(least, min(times))

    def _at_once(self, slot: Slot, now: float) -> bool:
        """Return whether a slot has something to do that no event will announce."""
        if slot.wants_store(now) or (slot.child is not None and slot.gives_up_child):
            return True
        return slot.wants_to_ask() and not self._signals and not self._manager.queue_away

    # The store

    def _store_steps(self, now: float) -> None:
        """Let every slot that needs it do one step with the store, all inside one commit."""
        if self._store_away:
            return
        if self._flights is not None:
            self._leaving += self._flights.let_go(self._slots)
        slots = [slot for slot in self._places if slot.wants_store(now)]
        looking = now >= self._look_at and any(slot.phase is Phase.RUNNING for slot in self._slots)
        if not slots and not looking:
            return
        if self._flights is not None:
            if self._flights.holds(slots, self._slots, now):
                slots = [slot for slot in slots if slot.claims]
            self._flights.begin(slots, self._slots, lambda slot: self._step(slot, slot.step, now), self._follow)
            for slot in self._slots:
                slot.say_ended()
            return
        steps: list[tuple[Slot, Callable[[], None]]] = []
        self._ask_ahead(slots, now)
        try:
            if slots:
                steps = failpoints.ambiguous(
                    "run.commit_ambiguous", lambda: self._steps_together(slots, now), StoreAmbiguous
                )
        except StoreUnavailable as error:
            # None of it counts: every slot does its step again when the store is back, and finds what had happened.
            self._store_lost(error)
            return
        for slot, followup in steps:
            self._guard_slot(slot, followup)
        self._ask_ahead(slots, self._clock.monotonic())
        for slot in slots:
            slot.say_ended()
        if self._manager.ended_parents:
            self._chores.hurry("release")
        if isinstance(self._manager, Manager) and self._manager.ends_untold:
            self._chores.hurry("ends")
        if looking:
            self._look(now)

    def _forget_left(self) -> None:
        """Forget those that have left and whose end is written, or nobody's business any more."""
        over = [slot for slot in self._leaving if slot.attempt is None]
        if over:
            self._left_superseded += sum(slot.superseded for slot in over)
            self._leaving = [slot for slot in self._leaving if slot.attempt is not None]
        for slot in over:
            slot.say_ended()

    def _steps_together(self, slots: list[Slot], now: float) -> list[tuple[Slot, Callable[[], None]]]:
        def step(slot: Slot, what: Callable[[float], Callable[[], None]]) -> tuple[Slot, Callable[[], None]]:
            return slot, self._step(slot, what, now)

        assert isinstance(self._manager, Manager)
        return self._manager.side_by_side(
            [partial(step, slot, slot.step) for slot in slots],
            lambda: [partial(step, slot, slot.step_ahead) for slot in self._ahead(slots)],
        )

    def _follow(self, slot: Slot, followup: Callable[[], None]) -> None:
        """Do what had to wait until what a step wrote is known."""
        self._guard_slot(slot, followup)

    def _land(self) -> None:
        """Hear what became of what was on its way to a master."""
        if self._flights is not None:
            error = self._flights.land(self._follow)
            self._forget_left()
            if error is not None:
                self._store_lost(error)

    def _ask_ahead(self, slots: list[Slot], now: float) -> None:
        """Ask for the next jobs of slots whose last ones have ended, or are about to."""
        if self._signals or self._rest_until is not None or self._manager.queue_away:
            return
        asking = [slot for slot in slots if slot.wants_to_ask_ahead(now)]
        if not asking:
            return
        try:
            with asking[0].entries.queue.together():
                for slot in asking:
                    slot.entries.ask_ahead()
        except QueueUnavailable as error:
            self._queue_lost(error)
            for slot in asking:
                slot.queue_lost()

    def _ahead(self, slots: list[Slot]) -> list[Slot]:
        """Return the slots that may claim their next job in the commit that ends their last one."""
        if self._signals:
            return []
        return [slot for slot in slots if slot.phase is Phase.ENDING and slot.entries.looks_ahead]

    def _step(self, slot: Slot, step: Callable[[float], Callable[[], None]], now: float) -> Callable[[], None]:
        try:
            return step(now)
        except Superseded:
            return slot.lost_token
        except StoreUnavailable:
            raise
        except Exception as error:
            self._slot_failed(slot, error)
            return slot.abandon

    def _slot_failed(self, slot: Slot, error: Exception) -> None:
        """A defect, or a document that nobody foresaw: this job waits, the agent and its other jobs go on."""
        uuid = slot.attempt.uuid if slot.attempt is not None else None
        logger.exception("slot failed, its job is given back: job=%s", uuid)
        self._terms.account.exception(error, uuid)

    def _guard_pipe(self, followup: Callable[[], None]) -> None:
        try:
            followup()
        except BrokenPipe:
            return  # the end of the child is heard separately

    def _guard_slot(self, slot: Slot, call: Callable[[], None]) -> None:
        """Do something with one slot, so that what goes wrong with it stays there."""
        try:
            call()
        except BrokenPipe:
            return  # the end of the child is heard separately
        except Superseded:
            slot.lost_token()
        except (QueueUnavailable, StoreUnavailable):
            raise
        except Exception as error:
            self._slot_failed(slot, error)
            slot.abandon()

    def _look(self, now: float) -> None:
        """Look at the records of what runs here: a cancel, or another attempt, may stand there."""
        running = {slot.attempt.uuid: slot for slot in self._slots if slot.attempt and slot.phase is Phase.RUNNING}
        try:
            found = self._manager.read_many(list(running))
        except StoreUnavailable as error:
            self._store_lost(error)
            return
        self._look_at = now + _LOOK_EVERY
        for uuid, slot in running.items():
            if uuid in found:
                self._guard_pipe(partial(slot.heed, found[uuid], now))

    def _store_lost(self, error: StoreUnavailable) -> None:
        if not self._store_away:
            logger.warning("store away, running jobs go on: %s", error)
        self._store_away = True
        self._watch.silence()

    # What it says of itself, and what it is told

    def _say_here(self) -> None:
        """Say who this is and that it lives, in the thread of the chores."""
        attempts = [attempt for slot in self._places if (attempt := slot.attempt) is not None]
        self._terms.statistics.gauge("leases", len(attempts))
        stuck = self._clock.monotonic() - self._turned_at > self._terms.lease / 2
        # A loop that does not turn answers for nothing: what it ran lapses, as it would without this thread.
        said = [Assignment(one.uuid, one.number, one.since, one.needs) for one in attempts if not stuck]
        if self._flights is not None and not stuck:
            said += self._flights.at_hand()
        try:
            if self._heartbeat.say(self._state(), self.superseded, said):
                self._wake()
        except AgentAlive as error:
            if not self._heartbeat.registered:
                raise
            if not self._ousted:
                logger.error("this agent ends: %s", error)
                self._ousted = True  # what it is told from now on is for the other one
                self.finish()
                self._wake()

    def _state(self) -> str:
        """Return what it does, as others see it."""
        if not self._signals and self._rest_until is None:
            return "running"
        busy = self._signals or any(slot.attempt is not None for slot in self._places)
        return "draining" if busy else "drained"

    def _wake(self) -> None:
        """Wake the loop from another thread."""
        with suppress(OSError, IndexError):
            self._wakeup[1].send(b"\0")

    def _on_command(self, what: str) -> None:
        """Look at once at what runs here, at what is paused, or at what it was told."""
        logger.debug("is to look at %s", what)
        if what == "pauses":
            self._chores.hurry("pauses", "needs", "_notice_changes")
        elif what == "orders":
            self._orders.look()
        else:
            self._look_at = 0.0

    def _notice_changes(self) -> None:
        """Wake the loop when a type was paused or resumed, or needs came into use, from the thread of the chores."""
        if (self._manager.paused, self._manager.needs_in_use) != self._served_by:
            self._wake()

    def _obey(self, now: float) -> None:
        """Do what it was told, and say so."""
        for heard in self._heartbeat.heard():
            self._orders.take(heard.wanted, heard.new)
            for uuid, attempt in heard.superseded:
                self._lost(uuid, attempt)
        if not self._store_away and not self._ousted and now >= self._obey_at:
            self._obey_orders(now)
        resting = self._orders.drained and self._heartbeat.registered
        if resting and self._rest_until is None:
            self._rest_until = now + self._drain
            logger.info("drains: %d jobs run, at most %g s", self._running, self._drain)
        elif not resting and self._rest_until is not None:
            self._rest_until = None
            logger.info("takes jobs again")
            for slot in self._slots:
                slot.draining = bool(self._signals)

    def _obey_orders(self, now: float) -> None:
        try:
            if self._orders.obey(self):
                self._chores.hurry(self._say_here.__name__)
        except StoreUnavailable as error:
            self._store_lost(error)
        except UnknownAgent:
            self._obey_at = now + 1.0  # it was forgotten: the next heartbeat makes it known again
        except Exception as error:
            # A defect, or a document that nobody foresaw: what runs goes on, and the orders are tried again.
            logger.exception("orders cannot be done")
            self._terms.account.exception(error, None)
            self._obey_at = now + self._terms.lease / 3

    @property
    def _running(self) -> int:
        return sum(slot.attempt is not None for slot in self._slots)

    def _lost(self, uuid: str, attempt: int) -> None:
        slot = self._slot_with(uuid)
        if slot is None or slot.attempt is None or slot.in_flight:
            return  # what is on its way says it, or is told so
        if slot.attempt.number == attempt:
            slot.lost_token()

    def _slot_with(self, uuid: str) -> Slot | None:
        """Return the slot in which a job runs."""
        return next((slot for slot in self._places if slot.attempt is not None and slot.attempt.uuid == uuid), None)

    def cancel(self, uuid: str) -> bool:
        """Begin to cancel a job that runs here; False if it does not."""
        slot = self._slot_with(uuid)
        if slot is None:
            return False
        self._guard_pipe(partial(slot.begin_cancel, self._clock.monotonic()))
        return True

    def modify(self, uuid: str, limits: Mapping[str, Any]) -> bool:
        """Count a job that runs here by other needs; False if it does not run here."""
        slot = self._slot_with(uuid)
        if slot is None or slot.attempt is None:
            return False
        slot.attempt.needs = slot.attempt.needs.with_limits(limits)
        return True

    # What it serves

    def _serve(self) -> None:
        """Let each slot that waits serve the tubes for which there is room, and the others what needs none."""
        manager, terms = self._manager, self._terms
        limits = terms.has.least(self._orders.limits)
        held = [slot.attempt.needs for slot in self._slots if slot.attempt is not None and slot.attempt.needs]
        by = (manager.paused, manager.needs_in_use)
        if by != self._served_by:
            self._selective = any(manager.needs_of(name) for name in terms.job_types)
        free = [slot for slot in self._slots if slot.phase in (Phase.IDLE, Phase.WAITING)] if self._selective else []
        now_by = (*by, limits, held, [(slot, slot.phase) for slot in free])
        if now_by == self._served_now:
            return
        if self._served_by is not None and by[0] != self._served_by[0]:
            logger.info("serves %s", ", ".join(sorted(set(terms.job_types) - manager.paused)) or "nothing: all paused")
        self._served_by, self._served_now = by, now_by
        # Those that wait come first: what they watch need not change.
        free.sort(key=lambda slot: slot.phase is not Phase.WAITING)
        if free and isinstance(manager, Manager):
            shares = manager.shares(terms.job_types, limits.less(held), terms.labels, len(free))
            for slot, tubes in zip(free, shares, strict=True):
                self._serve_with(slot, tubes)
        for slot in self._slots:
            if slot not in free:
                self._serve_with(slot, manager.tubes_within(terms.job_types, UNSAID, terms.labels))

    def _fits(self, needs: Needs) -> bool:
        """Return whether there is room for what a job needs, beside those that run."""
        held = [slot.attempt.needs for slot in self._slots if slot.attempt is not None]
        limits = self._terms.has.least(self._orders.limits)
        return not needs or limits.less(held).fit(needs)

    def _serve_with(self, slot: Slot, tubes: Sequence[str]) -> None:
        if slot.entries.tubes != tuple(tubes):
            if slot in self._asked:
                self._unregister_queue(slot)
            slot.serve(tubes)

    def _probe_store(self) -> None:
        """Ask the store for a sign of life, in the thread of the chores."""
        if self._store_away:
            self._manager.store.probe()
            self._store_away = False
            logger.info("store back")
            self._wake()

    # The queue

    def _ask_for_work(self, now: float) -> None:
        if self._manager.queue_away:
            self._commands.lost()
            for slot in self._slots:
                self._unregister_queue(slot)
                slot.queue_lost()
            return
        try:
            self._commands.listen()
        except QueueUnavailable as error:
            self._queue_lost(error)
            return
        self._serve()
        idle = self._signals or self._rest_until is not None
        for slot in self._slots:
            if slot.phase is not Phase.WAITING:
                self._unregister_queue(slot)
            try:
                if idle:
                    slot.withdraw(now)
                elif not self._store_away and self._heartbeat.registered and slot.wants_to_ask():
                    slot.ask()
                    slot.on_queue()
                elif slot.phase is Phase.WAITING and slot.entries.queue.look_within() <= 0:
                    slot.on_queue()
            except QueueUnavailable as error:
                self._queue_lost(error)
                return
            if slot.phase is Phase.WAITING and slot not in self._asked:
                self._register_queue(slot)

    def _register_queue(self, slot: Slot) -> None:
        descriptor = slot.entries.queue.fileno()
        self._asked[slot] = descriptor
        self._selector.register(descriptor, selectors.EVENT_READ, lambda: self._on_queue(slot))

    def _on_queue(self, slot: Slot) -> None:
        slot.on_queue()
        if slot.phase is not Phase.WAITING:
            self._unregister_queue(slot)

    def _unregister_queue(self, slot: Slot) -> None:
        descriptor = self._asked.pop(slot, None)
        if descriptor is not None:
            self._selector.unregister(descriptor)

    def _queue_lost(self, error: QueueUnavailable) -> None:
        if not self._manager.queue_away:
            logger.warning("queue away: %s", error)
        self._manager.queue_away = True  # the chores probe it
        # At once: the adapter has closed its connection, and the next socket that is opened may get its number.
        self._commands.lost()
        for slot in list(self._asked):
            self._unregister_queue(slot)
            slot.queue_lost()

    # The children

    def _tend_children(self, now: float) -> None:
        for slot in self._slots:
            child = slot.child
            if child is None or slot.gives_up_child:
                if child is not None:
                    self._close_child(child)
                    slot.child = None
                if self._starts:
                    self._give_child(slot, now)
            self._throttle(slot)
        if self._starts:
            self._prepare_spares(now)

    @property
    def _starts(self) -> bool:
        """Whether it starts children.  What it ran before its end goes on elsewhere when its masters hear of it: that
        comes first where nobody else sees it."""
        return not self._signals and (self._flights is None or self._heartbeat.registered)

    def _give_child(self, slot: Slot, now: float) -> None:
        if self._spares:
            child: Child | None = self._spares.pop(0)
        else:
            child = self._start_child(now)
        if child is not None:
            slot.adopt(child)

    def _prepare_spares(self, now: float) -> None:
        """Start the successors of children that will not be used much longer, one for each."""
        wanted = sum(slot.child is not None and self._retires_soon(slot, slot.child) for slot in self._slots)
        while len(self._spares) < wanted:
            child = self._start_child(now)
            if child is None:
                return
            self._spares.append(child)

    def _retires_soon(self, slot: Slot, child: Child) -> bool:
        if slot.retire_child or child.jobs + 1 >= self._terms.max_jobs * _SPARE_AT:
            return True
        return slot.attempt is not None and slot.attempt.job.fresh_process

    def _start_child(self, now: float) -> Child | None:
        if now < self._start_after:
            return None
        try:
            child = Child(self._program, self._keeper.environment)
        except (OSError, BrokenPipe) as error:
            logger.error("a child cannot be started: %s", error)
            self._delay_starts(now)
            return None
        self._keeper.add(child.pid)
        self._selector.register(child.pipe, selectors.EVENT_READ, lambda: self._on_pipe(child))
        self._selector.register(child.end, selectors.EVENT_READ, lambda: self._on_gone(child))
        for name, descriptor in child.streams.items():
            self._selector.register(descriptor, selectors.EVENT_READ, lambda name=name: self._on_stream(child, name))
        return child

    def _delay_starts(self, now: float) -> None:
        self._start_after = now + self._start_delay
        self._start_delay = min(_CHILD_BACKOFF, self._start_delay * 2)

    def _slot_of(self, child: Child) -> Slot | None:
        return next((slot for slot in self._slots if slot.child is child), None)

    def _on_pipe(self, child: Child) -> None:
        if child.closed:
            return  # it was closed in this very turn
        slot = self._slot_of(child)
        try:
            child.pipe.read()
            while (message := child.pipe.next()) is not None:
                if isinstance(message, dict) and message.get("t") == "ready":
                    child.ready = True
                    self._start_delay = 0.5
                elif slot is not None:
                    slot.on_message(message)
        except BrokenPipe:
            self._on_gone(child)
        except (KeyError, TypeError, ValueError, AssertionError):
            logger.exception("child=%d said what is no message", child.pid)
            self._on_gone(child)

    def _throttle(self, slot: Slot) -> None:
        """Read no more from a child whose output waits for the store, and read again when it does not."""
        child = slot.child
        if child is None:
            return
        if slot.full and child not in self._paused:
            self._paused.add(child)
            self._selector.unregister(child.pipe)
        elif not slot.full and child in self._paused:
            self._paused.discard(child)
            self._selector.register(child.pipe, selectors.EVENT_READ, lambda: self._on_pipe(child))
        if child.pipe.unsent:
            self._guard_pipe(child.pipe.flush)

    def _on_stream(self, child: Child, name: str) -> None:
        if child.closed:
            return
        slot = self._slot_of(child)
        if slot is None:
            data = child.read_stream(name)
            alive = data is None or bool(data)
            if data:
                logger.warning("child=%d says while it starts: %s", child.pid, data[:2000].decode("utf-8", "replace"))
        else:
            alive = slot.on_stream(name, said=self._say_outside)
        if not alive:
            self._selector.unregister(child.streams[name])

    @staticmethod
    def _say_outside(child: Child, name: str, data: bytes) -> None:
        logger.warning("child=%d says on %s outside a job: %r", child.pid, name, data[:2000])

    def _on_gone(self, child: Child) -> None:
        if child.closed:
            return
        now = self._clock.monotonic()
        slot = self._slot_of(child)
        if not child.ready:
            logger.error("child=%d %s before it was ready", child.pid, child.exit_text())
            self._delay_starts(now)
        if slot is not None:
            self._await_end(child)
            self._read_rest(child, slot)
            slot.on_gone()
            # Closed here, also in the middle of a job: the pipe would stay readable for ever.
            slot.child = None
        elif child in self._spares:
            self._spares.remove(child)
        self._close_child(child)

    @staticmethod
    def _read_rest(child: Child, slot: Slot) -> None:
        """Hear what the child had said before it ended."""
        with suppress(BrokenPipe, KeyError, TypeError, ValueError):
            for _ in range(_REST_READS):
                child.pipe.read()
                while (message := child.pipe.next()) is not None:
                    slot.on_message(message)

    @staticmethod
    def _await_end(child: Child) -> None:
        """A pipe can break a moment before its process is gone; a child that closed it and lives on is ended."""
        end = time.monotonic() + 0.2
        while not child.gone() and time.monotonic() < end:
            time.sleep(0.002)

    def _close_child(self, child: Child) -> None:
        for descriptor in (child.pipe.fileno(), child.end, *child.streams.values()):
            with suppress(KeyError, ValueError):
                self._selector.unregister(descriptor)
        self._paused.discard(child)
        child.close()
        self._keeper.remove(child.pid)
        # The children adopt what their jobs have orphaned; of one that is gone it comes here.
        known = {one.pid for one in (*(slot.child for slot in self._slots), *self._spares) if one is not None}
        if self._consumers is None:
            end_orphans(known)
            return
        with self._consumers.starting:
            end_orphans(known | self._consumers.pids)

    # The end

    def _catch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = (ours, theirs)
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._woken(ours))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    @staticmethod
    def _woken(end: socket.socket) -> None:
        with suppress(BlockingIOError):
            end.recv(64)

    def _advance_rest(self, now: float) -> None:
        """Let running jobs end, and give back what takes longer than they may."""
        assert self._rest_until is not None
        if now >= self._rest_until:
            for slot in self._slots:
                if slot.phase is Phase.RUNNING and slot.may_give_back(False):
                    self._guard_slot(slot, partial(slot.give_back, now, False))

    def _advance_drain(self, now: float) -> None:
        if self._drain_until is None:
            self._drain_until = now + self._drain
            running = sum(slot.phase is Phase.RUNNING for slot in self._slots)
            logger.info("draining: %d jobs run, at most %g s", running, self._drain)
            for slot in self._slots:
                self._unregister_queue(slot)
                with suppress(QueueUnavailable):
                    slot.withdraw(now)
            for child in self._spares:
                self._close_child(child)
            self._spares.clear()
        at_once = self._signals > 1
        over = at_once or now >= self._drain_until
        for slot in self._slots:
            if slot.phase is Phase.CLAIMING or (over and slot.phase is Phase.RUNNING and slot.may_give_back(at_once)):
                slot.give_back(now, at_once)

    def _finished(self) -> bool:
        if not self._signals or self._drain_until is None:
            return False
        if all(slot.phase in (Phase.IDLE, Phase.WAITING) for slot in self._places):
            return True
        # The store is away for longer than anybody waits: the leases will lapse, and others take over.
        hopeless = self._drain_until + 3 * self._terms.grace + self._terms.lease
        return self._store_away and self._clock.monotonic() > (0 if self._signals > 1 else hopeless)

    def _close(self) -> None:
        self._chores.stop()
        if self._consumers is not None:
            self._consumers.stop()
        for slot in self._slots:
            if slot.child is not None:
                self._close_child(slot.child)
            with suppress(QueueUnavailable):
                slot.entries.delete_done()
            slot.entries.queue.close()
        self._commands.close()
        for child in self._spares:
            self._close_child(child)
        if self._consumers is not None:
            self._consumers.join(self._terms.grace + 3.0)
        self._keeper.close()
        if self._flights is not None:
            self._flights.close()
        self._orders.close()
        self._chores.join(self._terms.grace)
        self._manager.close_queue()
        signal.set_wakeup_fd(-1)
        for end in self._wakeup:
            end.close()
        self._selector.close()
