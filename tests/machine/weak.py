"""The weakened variants of the code, which the machine must find out."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.machine.memory import MemoryDatastore
from zerog import leases
from zerog.agent.slot import Slot
from zerog.exceptions import Conflict, QueueUnavailable, ReservationLost, StoreAmbiguous
from zerog.leases import LeaseWatch
from zerog.manager import Submission
from zerog.manager import records as manager_records
from zerog.manager.records import CONFLICTS, Held, Records, check_attempt, too_busy
from zerog.manager.settling import Settling
from zerog.record import JobRecord
from zerog.sweep import Sweep

Weaken = Callable[[pytest.MonkeyPatch], None]


def no_attempt_in_the_guard(patch: pytest.MonkeyPatch) -> None:
    """A running record may be written by whoever ran it once."""

    def check(record: JobRecord, attempt: int, claim: str | None) -> None:
        check_attempt(record.evolve(attempt=attempt, lease=None), attempt, claim)

    patch.setattr(manager_records, "check_attempt", check)


def no_claim_in_the_guard(patch: pytest.MonkeyPatch) -> None:
    """The number of an attempt is all that is checked, also where a job was removed and made again."""

    def check(record: JobRecord, attempt: int, claim: str | None) -> None:
        check_attempt(record.evolve(lease=None), attempt, claim)

    patch.setattr(manager_records, "check_attempt", check)


def applied_again(patch: pytest.MonkeyPatch) -> None:
    """On a conflict the newer version is read, and replaced all the same."""

    def guarded(
        self: Records, held: Held, attempt: int, change: Callable[[JobRecord], JobRecord], point: str = ""
    ) -> Held:
        for _ in range(CONFLICTS):
            try:
                return self.write(held, change(held.record))
            except (Conflict, StoreAmbiguous):
                held = Held(held.record, self.read(held.record.uuid).cas)
        raise too_busy(held.record.uuid)

    patch.setattr(Records, "guarded", guarded)


def no_compare(patch: pytest.MonkeyPatch) -> None:
    """The store replaces whatever version there is."""
    replace = MemoryDatastore.replace

    def blindly(self: MemoryDatastore, key: str, body: bytes, cas: int) -> int:
        return replace(self, key, body, self.get(key).cas)

    patch.setattr(MemoryDatastore, "replace", blindly)


def no_sweep(patch: pytest.MonkeyPatch) -> None:
    """Nobody walks."""
    patch.setattr(Sweep, "walk", lambda self, go_on=None: None)
    patch.setattr(Sweep, "look", lambda self: None)


def entry_before_record(patch: pytest.MonkeyPatch) -> None:
    """The queue's entry is deleted when a job begins to run, before its record says how it ended."""
    start = Slot._start

    def delete_and_start(self: Slot, held: Held, now: float) -> None:
        if self.entries.current is not None:
            with suppress(ReservationLost, QueueUnavailable):
                self.entries.current.delete()
        start(self, held, now)

    patch.setattr(Slot, "_start", delete_and_start)


def no_key(patch: pytest.MonkeyPatch) -> None:
    """Each request makes a job of its own."""
    patch.setattr(
        Submission, "uuid", property(lambda self: f"{secrets.token_hex(4)}-0000-4000-8000-{secrets.token_hex(6)}")
    )


def impatient(patch: pytest.MonkeyPatch) -> None:
    """A lease has lapsed when it stood still for half of itself."""
    init = LeaseWatch.__init__

    def begin(self: LeaseWatch, clock: Any, lease: float) -> None:
        init(self, clock, lease / 2)

    patch.setattr(leases.LeaseWatch, "__init__", begin)


def no_entry_in_logs(patch: pytest.MonkeyPatch) -> None:
    """The record says how a job ended, and the logs of ends never hear of it."""
    patch.setattr(Settling, "_log_end", lambda self, ended, logged: None)


def claim_believed(patch: pytest.MonkeyPatch) -> None:
    """A claim that may have been written counts as written."""
    write_at = Records._write_at

    def believed(self: Records, point: str, held: Held, record: JobRecord) -> Held:
        try:
            return write_at(self, point, held, record)
        except StoreAmbiguous:
            if point != "run.claim_ambiguous":
                raise
            return Held(record, held.cas)

    patch.setattr(Records, "_write_at", believed)


def cancel_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What lapses while it is being cancelled goes back into the queue."""
    lose = Settling.lose

    def forgetful(self: Settling, held: Held) -> Held:
        return lose(self, Held(held.record.evolve(cancel_requested=False), held.cas))

    patch.setattr(Settling, "lose", forgetful)
