"""What goes on while the queue or the store is away, and that memory stays bounded."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from tests.deployment import Deployment, deployed
from tests.services import Beanstalkd, CouchbaseServer, wait_until


@pytest.mark.requirement("Z7", "Z8")
def test_a_stopped_beanstalkd_blocks_nothing(tmp_path: Path, beanstalkd: Beanstalkd) -> None:
    with deployed(tmp_path / "zerog", "sqlite", "beanstalkd", beanstalkd=beanstalkd, deadline="1s") as zerog:
        known = zerog.submit("noop")
        zerog.wait(known)
        beanstalkd.signal(signal.SIGSTOP)
        reads: list[float] = []
        probes: list[float] = []

        def post(_: int) -> tuple[str, float]:
            start = time.monotonic()
            answer = httpx.post(f"{zerog.url}/run/noop", json={}, timeout=20)
            assert answer.status_code == 202
            return answer.json()["uuid"], time.monotonic() - start

        with ThreadPoolExecutor(4) as pool:
            posts = [pool.submit(post, n) for n in range(12)]
            while not all(one.done() for one in posts) or len(reads) < 30:
                for path, times in ((f"/jobs/{known}/progress", reads), ("/healthz", probes)):
                    start = time.monotonic()
                    assert zerog.client.get(path).status_code == 200
                    times.append(time.monotonic() - start)
        assert max(seconds for _, seconds in (one.result() for one in posts)) < 2.5
        # What waited for beanstalkd would take its deadline, a second; one in fifty may be the doing of the machine.
        assert sorted(reads)[len(reads) * 49 // 50 - 1] < 0.5
        assert sorted(probes)[len(probes) * 49 // 50 - 1] < 0.5
        assert zerog.client.get("/readyz").json()["status"] == "degraded"
        assert zerog.client.get("/types/noop").json()["queue"] is None
        beanstalkd.signal(signal.SIGCONT)
        for one in posts:
            assert zerog.wait(one.result()[0])["state"] == "succeeded"


def test_a_running_job_goes_on_while_beanstalkd_restarts(tmp_path: Path, beanstalkd: Beanstalkd) -> None:
    with deployed(tmp_path / "zerog", "sqlite", "beanstalkd", beanstalkd=beanstalkd) as zerog:
        ledger = tmp_path / "ledger"
        uuid = zerog.submit("ledger", {"path": str(ledger), "seconds": 6})
        zerog.wait_for(uuid, state="running")
        beanstalkd.restart()
        record = zerog.wait(uuid)
        assert (record["state"], record["attempt"], record["counters"]["losses"]) == ("succeeded", 1, 0)
        assert ledger.read_text() == f"{uuid} 1\n"
        assert zerog.wait(zerog.submit("noop"))["state"] == "succeeded"


def test_a_running_job_goes_on_while_the_store_is_locked(tmp_path: Path) -> None:
    with deployed(tmp_path, lease="9s", deadline="500ms") as zerog:
        ledger = tmp_path / "ledger"
        uuid = zerog.submit("ledger", {"path": str(ledger), "seconds": 1.5})
        zerog.wait_for(uuid, state="running")
        lock = sqlite3.connect(tmp_path / "var" / "zerog.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        refused = zerog.client.post("/run/noop", json={})
        assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        assert refused.headers["Retry-After"]
        assert zerog.job(uuid)["state"] == "running"
        time.sleep(1.5)  # until the job has ended while nobody could write that down
        lock.execute("ROLLBACK")
        lock.close()
        record = zerog.wait(uuid)
        assert (record["state"], record["attempt"]) == ("succeeded", 1)
        assert ledger.read_text() == f"{uuid} 1\n"


#: Leases for which the store is away.  Of 5 s, thirty in all, where there is time for it.
LEASE, LEASES = (5, 6) if os.environ.get("TESTS_FULL") else (2, 3)


@contextmanager
def away(store: str, folder: Path, couchbase: CouchbaseServer | None) -> Iterator[None]:
    """Take the store away: a process of Couchbase is stopped, and nobody can write into the file of SQLite."""
    if couchbase is not None:
        couchbase.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            couchbase.signal(signal.SIGCONT)
        return
    lock = sqlite3.connect(folder / "var" / "zerog.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        lock.execute("ROLLBACK")
        lock.close()


@pytest.mark.requirement("Z12", "Z14")
@pytest.mark.parametrize(("store", "queue"), [("sqlite", "sqlite"), ("couchbase", "beanstalkd")])
def test_no_running_job_is_stopped_or_run_twice_while_the_store_is_away_for_leases(
    tmp_path: Path, store: str, queue: str, beanstalkd: Beanstalkd
) -> None:
    """One job ends while the store is away, one does after it is back; two agents could take over either."""
    couchbase = CouchbaseServer(tmp_path / "couchbase").start() if store == "couchbase" else None
    ledger = tmp_path / "ledger"
    try:
        with deployed(
            tmp_path / "zerog", store, queue, beanstalkd=beanstalkd, couchbase=couchbase,
            lease=f"{LEASE}s", sweep="1s", deadline="1s",
        ) as zerog:  # fmt: skip
            zerog.start_agent()
            within = zerog.submit("ledger", {"path": str(ledger), "seconds": LEASE})
            beyond = zerog.submit("ledger", {"path": str(ledger), "seconds": LEASE * (LEASES + 1.5)})
            for uuid in (within, beyond):
                zerog.wait_for(uuid, state="running")
            with away(store, zerog.folder, couchbase):
                refused = zerog.client.post("/run/noop", json={}, timeout=20)
                assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
                time.sleep(LEASE * LEASES)  # so long it is away
            for uuid in (within, beyond):
                record = zerog.wait(uuid, 60)
                assert (record["state"], record["attempt"]) == ("succeeded", 1), record
                assert record["counters"] == {"errors": 0, "crashes": 0, "losses": 0}
            assert sorted(ledger.read_text().splitlines()) == sorted([f"{within} 1", f"{beyond} 1"])
            assert zerog.wait(zerog.submit("noop"))["state"] == "succeeded"
    finally:
        if couchbase is not None:
            couchbase.stop()


def memory(pid: int) -> int:
    """Return what a process and its children hold alone, without pages of files."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(one.memory_full_info().uss for one in family)


def grown(zerog: Deployment, size: int) -> tuple[int, int, int]:
    """Run and download an output of ``size`` bytes; return the growth of server and agent, and the bytes."""
    assert zerog.server is not None
    zerog.wait(zerog.submit("bulk", {"size": 4 * 1024**2}))
    pids = (zerog.server.pid, zerog.agents[0].pid)
    before = [memory(pid) for pid in pids]
    most = list(before)

    def look() -> None:
        for index, pid in enumerate(pids):
            most[index] = max(most[index], memory(pid))

    uuid = zerog.submit("bulk", {"size": size})

    def ended() -> bool:
        look()
        return zerog.job(uuid)["state"] in ("succeeded", "failed")

    wait_until(ended, 240, "the output")
    assert zerog.job(uuid)["result"]["size"] == size
    digest = hashlib.sha256()
    received = 0
    with zerog.client.stream("GET", f"/jobs/{uuid}/data") as answer:
        for piece in answer.iter_bytes(1024**2):
            received += len(piece)
            digest.update(piece)
            if received % (16 * 1024**2) < len(piece):
                look()
    expected = hashlib.sha256()
    for block in range(0, size, 1024**2):
        expected.update((block.to_bytes(8, "big") * (1024**2 // 8))[: size - block])
    assert digest.digest() == expected.digest()
    return most[0] - before[0], most[1] - before[1], received


@pytest.mark.requirement("Z18")
def test_a_large_result_grows_nobody_on_sqlite(tmp_path: Path) -> None:
    """1 GiB with ``bin/test --full``, else a quarter of it: four times what either process may grow by."""
    size = 1024**3 if os.environ.get("TESTS_FULL") else 256 * 1024**2
    with deployed(tmp_path, slots="1") as zerog:
        server, agent, received = grown(zerog, size)
        assert received == size
        assert server < 64 * 1024**2, f"the server grew by {server:,} bytes"
        assert agent < 64 * 1024**2, f"the agent grew by {agent:,} bytes"


@pytest.mark.requirement("Z18")
def test_a_result_of_64_mib_grows_nobody_on_couchbase(tmp_path: Path, beanstalkd: Beanstalkd) -> None:
    server_process = CouchbaseServer(tmp_path / "couchbase").start()
    try:
        with deployed(
            tmp_path / "zerog", "couchbase", "beanstalkd", beanstalkd=beanstalkd, couchbase=server_process, slots="1"
        ) as zerog:
            server, agent, received = grown(zerog, 64 * 1024**2)
            assert received == 64 * 1024**2
            assert server < 64 * 1024**2, f"the server grew by {server:,} bytes"
            assert agent < 64 * 1024**2, f"the agent grew by {agent:,} bytes"
    finally:
        server_process.stop()
