"""Feed: gives a consumer its messages, one after the other, and moves its position past what was handled.

It runs in a process of its own, which says on its way what it handles, so that whoever started it can count what it
died over.  The position is written at most every tenth of a second: after a crash the last few messages come again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from zerog import failpoints
from zerog.clock import Clock
from zerog.codec import printable
from zerog.consumer import FINISHED, Consumer, Entry
from zerog.consumers import MAX_ASIDE, Aside, ConsumerRecord, Consumers, under
from zerog.datastore import base
from zerog.exceptions import (
    CorruptDocument,
    DatastoreError,
    Fail,
    QueueError,
    Retry,
    StoreAmbiguous,
    StoreUnavailable,
)
from zerog.manager import Manager
from zerog.topics import Topics, message_of

logger = logging.getLogger(__name__)

#: Messages of a topic that are read in one go, and keys by which a message is known to be there twice.
_PAGE, _KEYS = 20, 10_000
#: Seconds between two writes of the position, and between two tries of a message.
_FLUSH, _PAUSE = 0.1, 0.5
#: Seconds after which a message that asked for it without a time is handled again; and those after which it is looked
#: again whether a job has ended as it was said, at first and at most.
_AGAIN, _LOOK_AGAIN, _LOOK_AGAIN_MAX = 1.0, 0.1, 5.0


class Feed:
    """One consumer's messages.  ``token`` is that of the lease under which it runs.

    ``say`` is told which message is being handled, and None after it; ``pause`` waits for so many seconds, or until it
    is to stop, and returns whether it is.
    """

    def __init__(
        self,
        consumer: Consumer,
        consumers: Consumers,
        topics: Topics,
        manager: Manager,
        clock: Clock,
        token: str,
        say: Callable[[tuple[str, int] | None], None],
        pause: Callable[[float], bool],
    ) -> None:
        self._consumer = consumer
        self._consumers = consumers
        self._topics = topics
        self._manager = manager
        self._clock = clock
        self._token = token
        self._say = say
        self._pause = pause
        self._keys: dict[str, OrderedDict[str, int]] = {topic: OrderedDict() for topic in consumer.topics}
        self._record = self._written = ConsumerRecord(consumer.name)
        self._written_at = 0.0
        self._chore_at = 0.0

    def turn(self) -> bool:
        """Handle what there is, a page of each topic; return whether there may be more.

        ``LeaseLost`` when the consumer is somebody else's.
        """
        self._record = self._written = under(self._consumers.get(self._consumer.name), self._token)
        more = False
        for topic in self._consumer.topics:
            self._look_at_aside(topic)
            if len(self._record.aside.get(topic, ())) >= MAX_ASIDE:
                continue
            found = self._topics.entries(topic, self._record.positions.get(topic, 0), _PAGE)
            for raw in found:
                if self._pause(0) or len(self._record.aside.get(topic, ())) >= MAX_ASIDE:
                    break
                self._pass(topic, raw)
            more = more or len(found) == _PAGE
        self._write()
        return more

    def within(self) -> float:
        """Return after how many seconds something is due that nothing will announce; infinite if nothing is."""
        due = [one.due - self._clock.now() for some in self._record.aside.values() for one in some]
        if type(self._consumer).chore_every is not None:
            due.append(self._chore_at - self._clock.monotonic())
        return max(0.0, min(due, default=float("inf")))

    def do_chore(self) -> None:
        """Call the consumer's chore if it is time for it."""
        every = type(self._consumer).chore_every
        if every is None or self._clock.monotonic() < self._chore_at:
            return
        self._chore_at = self._clock.monotonic() + every
        try:
            self._consumer.chore()
        except (DatastoreError, QueueError):
            raise
        except Exception:  # a defect in it must not end the messages
            logger.exception("the chore of the consumer %s failed", self._consumer.name)

    def _pass(self, topic: str, raw: base.Entry) -> None:
        """Deal with the next message of a topic and move past it."""
        due = self._deal(topic, raw, 0)
        aside = self._record.aside.get(topic, ())
        if due is not None:
            aside = (*aside, Aside(raw.number, due, 1))
        self._record = self._record.evolve(
            positions={**self._record.positions, topic: raw.number}, aside={**self._record.aside, topic: aside}
        )
        self._write_sometimes()

    def _look_at_aside(self, topic: str) -> None:
        now = self._clock.now()
        for one in self._record.aside.get(topic, ()):
            if one.due > now or self._pause(0):
                continue
            found = [raw for raw in self._topics.entries(topic, one.number - 1, 1) if raw.number == one.number]
            due = self._deal(topic, found[0], one.tries) if found else None
            others = tuple(other for other in self._record.aside[topic] if other.number != one.number)
            if due is not None:
                others = (*others, Aside(one.number, due, one.tries + 1))
            self._record = self._record.evolve(aside={**self._record.aside, topic: others})
            self._write_sometimes()

    def _deal(self, topic: str, raw: base.Entry, tries: int) -> float | None:
        """Handle a message; return when it is to be handled again, if it is."""
        try:
            message = message_of(topic, raw)
        except CorruptDocument as error:
            self._bury(Entry(topic, raw.number, 0.0, "", None), str(error))
            return None
        entry = Entry(topic, message.number, message.at, message.key, message.value)
        if topic == FINISHED and (due := self._verdict(entry, tries)) != 0:
            return due
        if self._is_repeat(entry):
            return None
        return self._handle(entry)

    def _is_repeat(self, entry: Entry) -> bool:
        """Remember the key of a message; True if another message had it before."""
        keys = self._keys[entry.topic]
        first = keys.setdefault(entry.key, entry.number)
        if len(keys) > _KEYS:
            keys.popitem(last=False)
        return first != entry.number

    def _verdict(self, entry: Entry, tries: int) -> float | None:
        """Return 0 if a job has ended as an entry says, None if it never will, or when to look again (R15).

        The entry is written before the record, and an attempt that is superseded in between leaves one that is untrue.
        """
        value = entry.value
        held = self._manager.read_many([value["uuid"]]).get(value["uuid"])
        if held is None:
            return None
        record = held.record
        if record.terminal:
            true = (record.attempt, record.state) == (value["attempt"], value["state"])
            return 0.0 if true else None
        if record.attempt > value["attempt"]:
            return None
        return self._clock.now() + min(_LOOK_AGAIN_MAX, _LOOK_AGAIN * 2.0 ** min(tries, 10))

    def _handle(self, entry: Entry) -> float | None:
        consumer = type(self._consumer)
        crashes = self._record.crashes
        if crashes is not None and crashes[:2] == (entry.topic, entry.number) and crashes[2] >= consumer.max_crashes:
            self._bury(entry, f"the process of the consumer died {crashes[2]} times over it: {self._record.last_error}")
            return None
        errors = 0
        while True:
            try:
                self._say((entry.topic, entry.number))
                failpoints.hit("consume.before_handle")
                self._consumer.handle(entry)
                failpoints.hit("consume.after_handle")
                self._record = self._record.evolve(handled=self._record.handled + 1)
                return None
            except Retry as retry:
                return self._clock.now() + max(0.0, retry.after if retry.after is not None else _AGAIN)
            except Fail as error:
                self._bury(entry, str(error))
                return None
            except (StoreUnavailable, StoreAmbiguous, QueueError):
                raise  # it waits until they are back
            except Exception as error:
                errors += 1
                logger.exception("consumer %s cannot handle message %d of %s", consumer.name, entry.number, entry.topic)
                if errors >= consumer.max_errors:
                    self._bury(entry, f"{type(error).__name__}: {error}")
                    return None
                if self._pause(_PAUSE):
                    raise Stopped from error
            finally:
                self._say(None)

    def _bury(self, entry: Entry, error: str) -> None:
        """Put what cannot be handled to the dead letters."""
        why = printable(error, 2000)
        logger.warning("consumer %s gives up message %d of %s: %s", self._consumer.name, entry.number, entry.topic, why)
        value = {"topic": entry.topic, "number": entry.number, "value": entry.value, "error": why}
        key = f"{self._consumer.name}:{entry.topic}:{entry.number}"
        try:
            self._topics.publish(self._consumer.dead_letters, value, key)
        except ValueError:  # with what is said of it, it is too large: where it stands is said in any case
            self._topics.publish(self._consumer.dead_letters, {**value, "value": None}, key)
        self._record = self._record.evolve(dead=self._record.dead + 1, last_error=why)

    def _write_sometimes(self) -> None:
        if self._clock.monotonic() - self._written_at >= _FLUSH:
            self._write()

    def _write(self) -> None:
        """Write how far it is, under the token."""
        mine, self._written_at = self._record, self._clock.monotonic()
        if mine == self._written:
            return

        def change(now: ConsumerRecord) -> ConsumerRecord:
            return under(now, self._token).evolve(
                positions=mine.positions,
                aside=mine.aside,
                handled=mine.handled,
                dead=mine.dead,
                last_error=mine.last_error,
                crashes=now.crashes if now.crashes is not None and self._ahead(now.crashes) else None,
                sequence=now.sequence + 1,
            )

        self._record = self._written = self._consumers.change(mine.name, change)

    def _ahead(self, crashes: tuple[str, int, int]) -> bool:
        """Return whether a message over which the process died is still to come."""
        topic, number, _ = crashes
        aside = any(one.number == number for one in self._record.aside.get(topic, ()))
        return number > self._record.positions.get(topic, 0) or aside

    def close(self) -> None:
        """Write how far it is, if that is possible."""
        with suppress(DatastoreError):
            self._write()


class Stopped(Exception):
    """It is to stop before a message was handled."""
