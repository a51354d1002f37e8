"""Who is gone and who is not (R7): the lock of a file that the kernel lets go of."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zerog.clock import Clock
from zerog.datastore.sqlite import SQLiteDatastore
from zerog.fleet import AgentRecord, Fleet, Lock, Presence, remove_old

HOLDER = """
import sys, time
from pathlib import Path
from zerog.fleet import Lock
lock = Lock(Path(sys.argv[1]), "a")
print(lock.presence.path, lock.presence.boot, lock.presence.device, lock.presence.inode, lock.presence.text, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Presence]]:
    """A process that holds the lock of a file, and its presence."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path, boot, device, inode, text = process.stdout.readline().split()
    yield process, Presence(path, boot, int(device), int(inode), text)
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_the_lock_is_there_and_who_was_killed_is_gone(
    holder: tuple[subprocess.Popen[str], Presence],
) -> None:
    process, presence = holder
    assert not presence.ended()
    process.kill()
    process.wait()
    assert presence.ended()
    assert presence.ended(), "looking must not change it"


def test_another_file_another_boot_or_none_proves_nothing(holder: tuple[subprocess.Popen[str], Presence]) -> None:
    process, presence = holder
    process.kill()
    process.wait()
    for change in ({"boot": "other"}, {"device": 0}, {"inode": 1}, {"text": "other"}, {"path": presence.path + "x"}):
        assert not dataclasses.replace(presence, **change).ended(), change
    path = Path(presence.path)
    copy = path.with_suffix(".copy")
    copy.write_text(presence.text)
    copy.rename(path)
    assert not presence.ended(), "a copy is not the file"
    path.unlink()
    assert not presence.ended()


def test_an_agent_that_ended_in_order_leaves_no_file(tmp_path: Path) -> None:
    lock = Lock(tmp_path, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    lock.close()
    lock.close()
    assert list(tmp_path.iterdir()) == []
    assert not lock.presence.ended()


def test_files_of_the_dead_are_kept_for_a_day(tmp_path: Path) -> None:
    (tmp_path / "dead.lock").write_text("x")
    living = Lock(tmp_path, "living")
    remove_old(tmp_path, time.time())
    assert len(list(tmp_path.iterdir())) == 2
    remove_old(tmp_path, time.time() + 90_000)
    assert [path.name for path in tmp_path.iterdir()] == ["living.lock"]
    living.close()


def test_a_fleet_knows_who_is_gone(tmp_path: Path, holder: tuple[subprocess.Popen[str], Presence]) -> None:
    process, presence = holder
    store = SQLiteDatastore(tmp_path / "zerog.db")
    fleet = Fleet(store, Clock())
    record = AgentRecord("host-1-abc", "host", 1, "0.1", ("noop",), 1_800_000_000.0, presence)
    fleet.register(record)
    assert fleet.get("host-1-abc") == record
    assert not fleet.gone("host-1-abc")
    assert not fleet.gone("nobody")
    store.insert("agent:damaged", b'{"name": "damaged"}')
    assert not fleet.gone("damaged")
    process.kill()
    process.wait()
    assert fleet.gone("host-1-abc")
    store.close()
