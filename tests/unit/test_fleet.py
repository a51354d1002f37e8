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
from zerog.exceptions import BadSetting
from zerog.fleet import LOG_JOBS, AgentRecord, Assignment, Fleet, Lock, Name, Presence, remove_old
from zerog.needs import Limits, Needs

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
    record = AgentRecord(
        "host-1", "host-1-abc", "host", "0.2", ("noop",), 1_800_000_000.0, labels=("gpu",), presence=presence,
        has=Limits(1024, 2.0), assignments=(Assignment("a" * 32, 3, 1_800_000_000.0, Needs.of(1, 0.5, ("gpu",))),),
    )  # fmt: skip
    assert fleet.change("host-1", lambda before: record) == record
    assert fleet.get("host-1") == record
    assert not fleet.gone("host-1", "host-1-abc")
    assert not fleet.gone("nobody", "nobody")
    store.insert("agent:damaged", b'{"name": "damaged"}')
    assert not fleet.gone("damaged", "damaged")
    process.kill()
    process.wait()
    assert fleet.gone("host-1", "host-1-abc")
    store.close()


@pytest.mark.requirement("M13")
def test_an_instance_is_gone_when_another_one_has_registered_or_it_said_goodbye(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    fleet = Fleet(store, Clock())
    first = AgentRecord("a", "a-1", "host", "0.2", (), 1_800_000_000.0)
    fleet.change("a", lambda before: first)
    elsewhere = Fleet(store, Clock())
    assert not elsewhere.gone("a", "a-1")
    fleet.change("a", lambda before: dataclasses.replace(first, instance="a-2"))
    assert not elsewhere.gone("a", "a-2"), "what was known a moment ago must not condemn the new one"
    assert elsewhere.gone("a", "a-1")
    fleet.change("a", lambda before: dataclasses.replace(first, instance="a-2", state="offline"))
    assert Fleet(store, Clock()).gone("a", "a-2")
    store.close()


@pytest.mark.requirement("M13")
def test_an_agent_takes_the_first_name_that_is_free_on_its_host(tmp_path: Path) -> None:
    names = [Name(tmp_path, None, "host") for _ in range(3)]
    assert [one.id for one in names] == ["host-1", "host-2", "host-3"]
    names[1].close()
    names[1].close()
    assert Name(tmp_path, None, "host").id == "host-2"
    with pytest.raises(BadSetting, match="host-1"):
        Name(tmp_path, "host-1", "host")


def test_what_an_agent_keeps_is_paged_newest_first(tmp_path: Path) -> None:
    store = SQLiteDatastore(tmp_path / "zerog.db")
    fleet = Fleet(store, Clock())
    for start in range(0, 450, 150):
        fleet.keep("a", LOG_JOBS, [{"n": number} for number in range(start, start + 150)])
    found: list[int] = []
    before: int | None = None
    for _ in range(100):
        items, before = fleet.kept("a", LOG_JOBS, before, 7)
        found += [one["n"] for one in items]
        if before is None:
            break
    assert found == list(reversed(range(450)))
    store.close()
