"""Interchangeable masters: several processes on one port, several servers over one store, one truth."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deployment import Deployment, alive, answers
from tests.services import Beanstalkd, CouchbaseServer, Memcached, Nginx, Process, free_port, wait_until
from zerog.client import Client, Job
from zerog.clock import from_iso

TWO = {"processes": "2"}

#: What takes a minute is done over both stores with ``bin/test --full`` alone.
FULL = bool(os.environ.get("TESTS_FULL"))
STORES = ["sqlite", "couchbase"] if FULL else ["sqlite"]


@pytest.fixture
def zerog(tmp_path: Path) -> Iterator[Deployment]:
    """A deployment whose server is not started yet."""
    made = Deployment(tmp_path / "zerog")
    yield made
    made.close()


def status_of(url: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{url}/view_status", timeout=10).json()
    return answer


def serving(zerog: Deployment) -> set[int]:
    """Return which processes have answered some requests, each on a connection of its own."""
    return {status_of(zerog.url)["process"]["pid"] for _ in range(8)}


def both(zerog: Deployment) -> set[int]:
    return wait_until(lambda: pids if len(pids := serving(zerog)) == 2 else None, 20, "two processes answer")


# Several processes on one port


@pytest.mark.requirement("M3", "M4")
def test_several_processes_answer_on_one_port_and_end_together(zerog: Deployment) -> None:
    parent = zerog.start_server(**TWO)
    pids = both(zerog)
    assert pids == {one.pid for one in psutil.Process(parent.pid).children()}
    opened = {Path(one.path).suffix for one in psutil.Process(parent.pid).open_files()}
    assert opened <= {".log"}, "the parent has neither store nor queue"
    assert parent.terminate(20) == 0
    assert not any(alive(pid) for pid in pids)
    assert "Traceback" not in zerog.log("server")


@pytest.mark.requirement("M3")
def test_a_process_that_dies_is_replaced_within_a_second_and_the_others_answer(zerog: Deployment) -> None:
    parent = psutil.Process(zerog.start_server(**TWO).pid)

    def replaced(old: set[int]) -> bool:
        return len({one.pid for one in parent.children() if alive(one.pid)} - old) == 1

    for _ in range(3):
        pids = both(zerog)
        victim = min(pids)
        psutil.Process(victim).send_signal(signal.SIGKILL)
        since = time.monotonic()
        wait_until(partial(replaced, pids), 5, "another one")
        assert time.monotonic() - since < 1.0
        # Meanwhile who connects gets an answer: what nobody has accepted waits for the others.
        assert httpx.get(f"{zerog.url}/readyz").status_code == 200
        assert victim not in both(zerog)


@pytest.mark.requirement("M3")
def test_requests_in_flight_are_answered_when_a_server_ends(zerog: Deployment) -> None:
    """A client that waits for a job hears where it stands; one that waits for an application hears what it asked."""
    zerog.start()
    with ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(
                httpx.post, f"{zerog.url}/run/sleep", json={"seconds": 60}, headers={"Prefer": "wait=30"}, timeout=40
            ),
            pool.submit(httpx.get, f"{zerog.url}/slow?seconds=2", timeout=40),
        ]
        wait_until(lambda: zerog.client.get("/jobs?type=sleep").json()["items"], what="the job is there")
        time.sleep(0.5)  # until the slow one is there too
        assert zerog.server is not None
        zerog.server.signal(signal.SIGTERM)
        assert [one.result().status_code for one in waiting] == [202, 200]
        assert zerog.server.popen.wait(20) == 0


def test_an_application_that_waits_does_not_hold_up_the_end_of_a_server(zerog: Deployment) -> None:
    zerog.start_server()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.get, f"{zerog.url}/slow?seconds=10", timeout=40)
        time.sleep(0.5)  # until it is there
        assert zerog.server is not None
        begun = time.monotonic()
        zerog.server.signal(signal.SIGTERM)
        assert zerog.server.popen.wait(20) == 0
        assert time.monotonic() - begun < 9, "and not when it has come to its end"
        with pytest.raises(httpx.HTTPError):
            waiting.result()


def test_what_is_unsafe_is_said_once_by_a_server_of_several_processes(
    tmp_path: Path, couchbase: CouchbaseServer
) -> None:
    made = Deployment(tmp_path, "couchbase", couchbase=couchbase, processes="2", durability="none")
    try:
        made.start_server()
        wait_until(lambda: made.log("server").count("datastore: ") >= 1, what="the place of the store")
        assert made.log("server").count("durability is off") == 1, made.log("server")
    finally:
        made.close()


def test_a_queue_that_does_not_answer_makes_no_server_unready(tmp_path: Path, beanstalkd: Beanstalkd) -> None:
    made = Deployment(tmp_path, "sqlite", "beanstalkd", beanstalkd=beanstalkd)
    try:
        made.start_server()
        beanstalkd.signal(signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(20) as pool:
                asked = [pool.submit(httpx.get, f"{made.url}/metrics", timeout=60) for _ in range(20)]
                statuses = []
                while not all(one.done() for one in asked):
                    statuses.append(made.client.get("/readyz").json()["store"])
                assert {one.result().status_code for one in asked} == {200}
        finally:
            beanstalkd.signal(signal.SIGCONT)
        assert set(statuses) == {"ok"}, statuses
    finally:
        made.close()


def test_no_process_outlives_its_parent(zerog: Deployment) -> None:
    parent = zerog.start_server(**TWO)
    pids = both(zerog)
    parent.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), 10, "the processes of a killed parent end")


@pytest.mark.requirement("M3")
def test_a_server_that_cannot_begin_ends_at_once_and_says_why(zerog: Deployment) -> None:
    process = zerog._start("server", processes="3", applications="no.such.application")
    assert process.popen.wait(20) == 1
    assert "no.such.application" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()


# Several servers


@pytest.fixture(params=["datastore", "memcached"])
def masters(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Deployment, str, Memcached | None]]:
    """Two servers and an agent over one store; the second address, and where they count."""
    memcached = Memcached(tmp_path / "memcached").start() if request.param == "memcached" else None
    made = Deployment(tmp_path / "zerog", stats=memcached.url if memcached is not None else "datastore")
    other = free_port()
    second = None
    try:
        made.start()
        second = made._start("server", port=str(other))
        wait_until(lambda: answers(other), 20, "the second server")
        yield made, f"http://127.0.0.1:{other}", memcached
    finally:
        if second is not None:
            second.kill()
        made.close()
        if memcached is not None:
            memcached.stop()


def after_quiet(url: str) -> dict[str, Any]:
    time.sleep(1.0 + 0.5)  # the second of quiet after which the figures are exact, and what a busy machine adds
    statistics: dict[str, Any] = status_of(url)["statistics"]
    return statistics


@pytest.mark.requirement("G11", "G12", "M3", "M21", "M23", "M24")
def test_seven_requests_are_seven_whichever_server_is_asked(
    masters: tuple[Deployment, str, Memcached | None],
) -> None:
    zerog, other, memcached = masters
    for number in range(7):
        httpx.get(f"{(zerog.url, other)[number % 2]}/types")
    httpx.delete(f"{other}/types")  # 405
    httpx.get(f"{other}/types", headers={"Accept": "image/png"})  # 406
    httpx.get(f"{zerog.url}/nowhere")
    for url in (zerog.url, other):
        statistics = after_quiet(url)
        assert statistics["byEndpoint"]["types"]["requests"] == 9
        assert (statistics["byStatus"]["405"], statistics["byStatus"]["406"], statistics["byStatus"]["404"]) == (
            1,
            1,
            1,
        )
        assert statistics["exceptions"] == 0
        assert 0 < statistics["byEndpoint"]["types"]["averageSeconds"] < 5
        assert statistics["store"] == {"kind": "datastore" if memcached is None else "memcached", "available": True}
        assert sum(one["requests"] for one in statistics["byEndpoint"].values()) == statistics["requests"]
        assert sum(statistics["byStatus"].values()) == statistics["requests"]
    # Who ends in order, and who is killed, leaves its counts.
    assert zerog.server is not None
    zerog.server.terminate(20)
    assert after_quiet(other)["byEndpoint"]["types"]["requests"] == 9
    zerog.start_server()
    httpx.get(f"{zerog.url}/types")
    assert after_quiet(other)["byEndpoint"]["types"]["requests"] == 10
    zerog.server.kill()
    assert after_quiet(other)["byEndpoint"]["types"]["requests"] == 10


@pytest.mark.requirement("G11", "G16")
def test_without_memcached_everything_goes_on_and_the_status_says_so(tmp_path: Path) -> None:
    memcached = Memcached(tmp_path / "memcached").start()
    zerog = Deployment(tmp_path / "zerog", stats=memcached.url)
    try:
        zerog.start()
        zerog.client.get("/types")
        before = after_quiet(zerog.url)
        assert before["byEndpoint"]["types"]["requests"] == 1
        since = before["since"]
        submits: list[float] = []
        stopped = (partial(memcached.signal, signal.SIGSTOP), partial(memcached.signal, signal.SIGCONT))
        gone: tuple[Callable[[], Any], Callable[[], Any]] = (memcached.stop, memcached.start)
        for injure, heal in (stopped, gone):
            injure()
            submits.append(time.time())
            uuid = zerog.submit("noop")
            assert zerog.wait(uuid)["state"] == "succeeded"
            begun = time.monotonic()
            statistics = status_of(zerog.url)["statistics"]
            assert time.monotonic() - begun < 2
            assert statistics["store"] == {"kind": "memcached", "available": False}
            assert statistics["requests"] is statistics["byEndpoint"] is statistics["byStatus"] is None
            heal()
            # Also what the server counted meanwhile is there: what it would still have to write it writes after the next.
            wait_until(lambda: (status_of(zerog.url)["statistics"]["byEndpoint"] or {}).get("run job"), 10)
        found = after_quiet(zerog.url)
        assert "types" not in found["byEndpoint"], "that was before the store of the statistics forgot everything"
        assert found["since"] > since
        later = [one for one in submits if one > from_iso(found["since"])]
        assert found["byEndpoint"]["run job"]["requests"] == len(later) >= 1
        assert "Traceback" not in zerog.log("server")
    finally:
        zerog.close()
        memcached.stop()


@pytest.mark.requirement("G12", "G13", "G14", "G15")
def test_the_status_shows_process_configuration_endpoints_queue_and_agents(zerog: Deployment) -> None:
    zerog.environment.update(ZEROG_TOKEN="hunter2-token", ZEROG_SERVER="http://me:hunter2-password@127.0.0.1:1")
    zerog.start()
    view = zerog.client.get("/view_status").json()
    assert zerog.server is not None
    assert view["process"]["pid"] == zerog.server.pid
    memory = psutil.Process(zerog.server.pid).memory_info().rss
    assert view["process"]["memory"] == pytest.approx(memory, rel=0.1)
    assert view["process"]["cpu"] == pytest.approx(sum(psutil.Process(zerog.server.pid).cpu_times()[:2]), abs=0.3)
    assert view["configuration"]["port"] == {"value": zerog.port, "source": "ZEROG_PORT"}
    assert view["configuration"]["retention"]["source"] == "default"
    assert "hunter2" not in str(view)
    assert view["configuration"]["token"]["value"] == "**********"
    jobs = next(one for one in view["endpoints"] if one["name"] == "jobs")
    assert jobs == {"name": "jobs", "url": "/jobs", "methods": ["GET"], "required": [],
                    "optional": ["cursor", "expand", "limit", "state", "type"]}  # fmt: skip
    assert {"view_status", "metrics", "run job"} <= {one["name"] for one in view["endpoints"]}
    assert next(one for one in view["queue"]["items"] if one["jobType"] == "noop")["queue"]["ready"] == 0
    wait_until(lambda: zerog.client.get("/view_status").json()["agents"]["states"]["running"] == 1, 10)
    zerog.agents.pop().terminate()
    (agent,) = wait_until(
        lambda: [one for one in zerog.client.get("/view_status").json()["agents"]["items"] if one["state"] == "offline"]
    )
    assert agent["jobTypes"]
    page = zerog.client.get("/view_status", headers={"Accept": "text/html"})
    assert page.status_code == 200 and agent["id"] in page.text and "hunter2" not in page.text


# Metrics


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.mark.requirement("G12", "M23")
def test_metrics_are_those_of_all_processes(masters: tuple[Deployment, str, Memcached | None]) -> None:
    zerog, other, _ = masters
    for _ in range(3):
        zerog.wait(zerog.submit("noop"))
    failing = zerog.submit("raise", {"what": "exception"})
    zerog.wait(failing)
    zerog.client.post("/types/sleep/pause", json={})
    waiting = [zerog.submit("sleep", {"seconds": 0}) for _ in range(2)]

    after_quiet(other)
    answer = httpx.get(f"{other}/metrics", headers={"Accept": "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert not any(uuid in answer.text for uuid in waiting), "no ids in labels"
    found = samples(answer.text)
    attempts = zerog.job(failing)["attempt"]
    assert found["zerog_attempts_total"] == 3 + attempts
    assert found['zerog_job_seconds_count{type="noop"}'] == 3
    assert found['zerog_job_seconds_bucket{le="+Inf",type="noop"}'] == 3
    assert found['zerog_job_seconds_bucket{le="86400",type="noop"}'] == 3
    assert found['zerog_job_seconds_sum{type="noop"}'] < 3
    assert found['zerog_queue_depth{type="sleep"}'] == 2
    assert 0 <= found['zerog_queue_age_seconds{type="sleep"}'] < 60
    assert found["zerog_leases"] == 0
    assert found['zerog_agents{state="running"}'] == 1
    assert found["zerog_superseded_total"] == 0
    assert found["zerog_sweeps_total"] > 0
    assert found['zerog_requests_total{endpoint="run job",status="202"}'] == 6


# Two servers behind a load balancer


@pytest.mark.requirement("M3", "M4", "M5", "M31")
@pytest.mark.parametrize("store", STORES)
def test_everything_goes_on_while_servers_behind_nginx_are_killed(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    """Round robin over two servers; one after the other is killed in the middle of everything that clients do."""
    queue = Beanstalkd(tmp_path / "beanstalkd").start()
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    zerog = Deployment(tmp_path / "zerog", store, "beanstalkd", beanstalkd=queue, couchbase=couchbase, slots="4")
    ports = [zerog.port, free_port()]
    servers: dict[int, Process] = {}
    nginx = Nginx(tmp_path / "nginx", ports)
    stop = threading.Event()
    killer = threading.Thread(target=kill_in_turn, args=(zerog, servers, stop))
    try:
        zerog.start_agent()
        for port in ports:
            servers[port] = zerog._start("server", port=str(port))
            wait_until(partial(answers, port), 30, "a server")
        nginx.start()
        killer.start()
        client = Client(nginx.url)
        with ThreadPoolExecutor(4) as pool:
            flows = [pool.submit(flow, client, number) for number in range(24)]
            for one in flows:
                one.result(120)
        assert len({one["uuid"] for one in client.api.jobs("sleep", limit=None)}) == 48, "each submit made one job"
        assert {one["state"] for one in client.api.jobs(limit=None)} == {"succeeded", "cancelled"}
    finally:
        stop.set()
        if killer.is_alive():
            killer.join(40)  # first, since it may be starting a server that is to be ended too
        nginx.stop()
        for server in servers.values():
            server.kill()
        zerog.close()
        queue.stop()


def kill_in_turn(zerog: Deployment, servers: dict[int, Process], stop: threading.Event) -> None:
    """Kill one server after the other, each replaced before the next goes."""
    for port in cycle(list(servers)):
        if stop.wait(1.0):
            return
        servers[port].kill()
        servers[port] = zerog._start("server", port=str(port))
        wait_until(partial(answers, port), 30, "a server")


def flow(client: Client, number: int) -> None:
    """All that a client does with a job: submit, follow, read, list, fetch, and cancel another."""
    views: list[float] = []
    job = client.submit("sleep", {"seconds": 0.5}, key=f"flow-{number}-{client.api.url}")
    job.wait(timeout=60, progress=lambda job: views.append(job.completeness))
    assert (job.state, job.data()["slept"] >= 0.4, views[-1]) == ("succeeded", True, 1.0)
    assert views == sorted(views)
    assert client.submit("sleep", {"seconds": 0.5}, key=f"flow-{number}-{client.api.url}") == job
    parent, child = client.batch("noop", [{"parameters": {}, "name": "a"}, {"parameters": {}, "parents": ["a"]}])
    assert isinstance(parent, Job) and isinstance(child, Job)
    assert child.wait(timeout=60).parents == (parent,)
    other = client.run("sleep", seconds=60)  # so long that no cancel comes when it has ended
    assert other.cancel().wait(timeout=60).state == "cancelled"
    assert job in list(client.jobs(type="sleep", limit=None))


# Exactly what was counted


@pytest.mark.requirement("G11", "M23")
def test_ten_thousand_requests_to_two_servers_are_ten_thousand(
    masters: tuple[Deployment, str, Memcached | None],
) -> None:
    zerog, other, _ = masters
    paths = {"/types": 200, "/jobs?limit=1": 200, "/nowhere": 404, "/types/none": 404, "/jobs?limit=x": 400}
    each = 10_000 // len(paths) // 4 if FULL else 40

    def ask(worker: int) -> Counter[str]:
        told: Counter[str] = Counter()
        with httpx.Client(base_url=(zerog.url, other)[worker % 2]) as client:
            for _ in range(each):
                for path in paths:
                    told[str(client.get(path).status_code)] += 1
        return told

    before = after_quiet(other)
    with ThreadPoolExecutor(4) as pool:
        ledger = sum(pool.map(ask, range(4)), Counter())
    after = after_quiet(other)
    assert sum(ledger.values()) == 4 * each * len(paths)
    counted = {status: after["byStatus"].get(status, 0) - before["byStatus"].get(status, 0) for status in ledger}
    counted["200"] -= 1  # the first look at the statistics
    assert counted == dict(ledger)
    assert (
        after["byEndpoint"]["types"]["requests"] - before["byEndpoint"].get("types", {}).get("requests", 0) == 4 * each
    )
