"""Measure ZeroG beside what limits it, interleaved, and print a table: ``python -m tests.benchmarks [--runs 5] [NAME…]``.

Needs wrk and beanstalkd (Debian packages).  ``--write README.rst`` puts the table between the marks of that file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.bundles import bundle
from tests.deployment import Deployment
from tests.services import ROOT, Beanstalkd, CouchbaseServer, Process, connects, free_port, wait_until
from zerog import bootstrap, config
from zerog.clock import from_iso
from zerog.exceptions import DatastoreError, ZerogError
from zerog.manager import Submission
from zerog.record import JobRecord

BASELINES = Path(__file__).parent / "baselines"
SECONDS = 4
JOBS = 5000
#: Jobs that wait while the sweep is measured, and seconds between two sweeps: the default.
BACKLOG, REST = 100_000, 30
#: Requests that wait in a slow endpoint while the others are timed: more than have a thread there.
HELD = 50


class Row:
    """One line of the table."""

    def __init__(self, name: str, figure: str, limit: str = "", ratio: float | None = None, bound: str = "") -> None:
        self.cells = (name, figure, limit, "" if ratio is None else f"{ratio:.2f}", bound)


def wrk(url: str, post: bool = False) -> float:
    """Return the requests a second of one run of wrk."""
    arguments = ["wrk", "-t1", "-c32", f"-d{SECONDS}s", *(["-s", str(BASELINES / "post.lua")] if post else []), url]
    text = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60).stdout
    if "Non-2xx" in text:
        raise SystemExit(f"{url} answered errors:\n{text}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert found is not None
    return float(found.group(1))


def http(folder: Path, runs: int) -> list[Row]:
    """Submits and reads beside a bare Tornado handler."""
    with ExitStack() as stack:
        port = free_port()
        bare = Process([sys.executable, str(BASELINES / "bare_server.py"), str(port)], folder / "bare.log")
        stack.callback(bare.kill)
        wait_until(lambda: connects(port), 10)
        targets: dict[str, Deployment] = {}
        for name, durable in (("SQLite queue", None), ("beanstalkd", False), ("beanstalkd -b -f0", True)):
            server = None
            if durable is not None:
                server = Beanstalkd(folder / name.replace(" ", ""), durable).start()
                stack.callback(server.stop)
            made = deployment(folder / f"zerog {name}", "sqlite", server)
            stack.callback(made.close)
            made.start_server()
            targets[name] = made
        known = targets["SQLite queue"]
        uuid = known.submit("resize", {"path": "a"})
        limits, reads, documents = [], [], []
        figures: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(runs):
            limits.append(wrk(f"http://127.0.0.1:{port}/", True))
            for name, made in targets.items():
                with alone(made, targets.values()):
                    figures[name].append(wrk(f"{made.url}/run/resize", True))
            with alone(known, targets.values()):
                documents.append(wrk(f"http://127.0.0.1:{port}/document"))
                reads.append(wrk(f"{known.url}/jobs/{uuid}/progress"))
    bounds = {"SQLite queue": "≥ 0.50", "beanstalkd": "≥ 0.50", "beanstalkd -b -f0": "≥ 0.30"}
    rows = [ratio_row(f"submit, {name}", values, limits, bounds[name], "/s") for name, values in figures.items()]
    return [*rows, ratio_row("GET progress", reads, documents, "≥ 0.65", "/s")]


@contextmanager
def alone(made: Deployment, all_of_them: Iterable[Deployment]) -> Iterator[None]:
    """Let only one of several servers run: the others would sweep what their last run left in their queues."""
    parents = [psutil.Process(one.server.pid) for one in all_of_them if one is not made and one.server is not None]
    others = [process for parent in parents for process in (parent, *parent.children(recursive=True))]
    for other in others:
        other.suspend()
    try:
        yield
    finally:
        for other in others:
            other.resume()


def ratio_row(name: str, values: list[float], limits: list[float], bound: str, unit: str) -> Row:
    value, limit = statistics.median(values), statistics.median(limits)
    return Row(name, f"{value:,.0f}{unit}", f"{limit:,.0f}{unit}", value / limit, bound)


def deployment(
    folder: Path, store: str, server: Beanstalkd | None, couchbase: CouchbaseServer | None = None, **more: str
) -> Deployment:
    """Return a deployment with the settings that users get."""
    return Deployment(
        folder, store, "sqlite" if server is None else "beanstalkd", beanstalkd=server, couchbase=couchbase,
        applications="workers.examples,tests.benchmarks", http=False, **{"lease": "30", "sweep": "30", "grace": "5", **more},
    )  # fmt: skip


def drained(made: Deployment, count: int) -> float:
    """Return how many no-op jobs a second an agent ends that was up, and idle, when they came all at once.

    The agent is stopped while the queue is filled, so that the whole backlog is there when it looks: the plain loop,
    too, has imported what it needs before its time begins.
    """
    with parts_of(made) as parts:
        agent = psutil.Process(made.start_agent().pid)
        wait_until(lambda: settled(agent, int(made.environment["ZEROG_SLOTS"])), 60, "the agent's children")
        suspend(agent, parts)
        fill(parts, count)
        agent.resume()
        last = parts.manager.page(limit=1).items[0].uuid
        wait_until(lambda: parts.manager.get(last).terminal, 300)
        wait_until(lambda: not parts.manager.page(state="queued", limit=1).items, 60)
        times = [from_moment for record in pages(parts) if (from_moment := record.finished_at) is not None]
    return float((len(times) - 1) / (max(times) - min(times)))


@contextmanager
def parts_of(made: Deployment) -> Iterator[bootstrap.Parts]:
    """Make the parts of a deployment in this process."""
    environment = {name: value for name, value in made.environment.items() if name.startswith("ZEROG_")}
    before = Path.cwd()
    os.chdir(made.folder)
    os.environ["ZEROG_DATASTORE_PASSWORD"] = "password"
    try:
        parts = bootstrap.assemble(config.load(None, None, environment))
        yield parts
        parts.manager.close_queue()
        parts.store.close()
    finally:
        os.chdir(before)


def fill(parts: bootstrap.Parts, count: int) -> None:
    """Submit so many no-op jobs, 500 at a time."""
    parameters = parts.registry.validate("noop", b"{}")
    for _ in range(count // 500):
        for done in parts.manager.submit_all([Submission("noop", parameters) for _ in range(500)]):
            if isinstance(done, ZerogError):
                raise done


def suspend(agent: psutil.Process, parts: bootstrap.Parts) -> None:
    """Stop an agent where it holds no lock of the store."""
    for _ in range(100):
        agent.suspend()
        try:
            parts.store.append("benchmark", b"{}")
            return
        except DatastoreError:
            agent.resume()
            time.sleep(0.05)  # until its write is done
    raise SystemExit("the agent writes all the time")


def settled(agent: psutil.Process, slots: int) -> bool:
    """Return whether an agent has all its children and they have done what a start takes."""

    def spent() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in agent.children())

    before = spent()
    time.sleep(0.3)  # a process that does nothing for so long waits for work
    return len(agent.children()) >= slots and spent() == before


def pages(parts: bootstrap.Parts) -> list[JobRecord]:
    """Return all records."""
    found: list[JobRecord] = []
    before = None
    while True:
        page = parts.manager.page(before=before, limit=500)
        found += page.items
        if page.next is None:
            return found
        before = page.next


def drain(folder: Path, runs: int) -> list[Row]:
    """No-op jobs drained by one agent beside the plain loop with two processes."""
    figures: dict[tuple[str, int], list[float]] = {(q, s): [] for q in ("beanstalkd", "SQLite queue") for s in (2, 8)}
    limits = []
    for run in range(runs):
        with ExitStack() as stack:
            server = Beanstalkd(folder / f"plain{run}").start()
            stack.callback(server.stop)
            arguments = [
                sys.executable,
                str(BASELINES / "plain_loop.py"),
                "--beanstalkd",
                str(server.port),
                "--jobs",
                str(JOBS),
                "--processes",
                "2",
            ]
            limits.append(
                json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)[
                    "jobs_per_second"
                ]
            )
        for (queue, slots), values in figures.items():
            with ExitStack() as stack:
                server_ = None
                if queue == "beanstalkd":
                    server_ = Beanstalkd(folder / f"b{run}{slots}").start()
                    stack.callback(server_.stop)
                made = deployment(folder / f"drain{run}{slots}{queue[:3]}", "sqlite", server_, slots=str(slots))
                stack.callback(made.close)
                values.append(drained(made, JOBS))
    return [
        ratio_row(f"drain, {queue}, {slots} slots", values, limits, "≥ 0.90" if slots == 2 else "≥ 1.50", " jobs/s")
        for (queue, slots), values in figures.items()
    ]


def by_http(folder: Path, runs: int) -> list[Row]:
    """No-op jobs drained by one agent that speaks HTTP alone, beside one that reaches store and queue itself."""
    rows = []
    for queue in ("beanstalkd", "SQLite queue"):
        for slots in (2, 8):
            figures: dict[bool, list[float]] = {False: [], True: []}
            for run in range(runs):
                for http in (False, True):
                    with ExitStack() as stack:
                        name = f"http{run}{slots}{queue[:3]}{http:d}"
                        server = None
                        if queue == "beanstalkd":
                            server = Beanstalkd(folder / f"{name}b").start()
                            stack.callback(server.stop)
                        made = deployment(folder / name, "sqlite", server, slots=str(slots))
                        stack.callback(made.close)
                        made.start_server()
                        made.http = http
                        figures[http].append(drained(made, JOBS))
            rows.append(
                ratio_row(
                    f"drain over HTTP, {queue}, {slots} slots", figures[True], figures[False], "≥ 0.40", " jobs/s"
                )
            )
    return rows


def told(folder: Path, runs: int) -> list[Row]:
    """The time from a command's POST until an idle agent has done it and said so, at the default heartbeat of 10 s."""
    rows = []
    for queue in ("beanstalkd", "SQLite queue"):
        for http, bound in ((False, "≤ 100 ms"), (True, "≤ 500 ms")):
            with ExitStack() as stack:
                server = None
                if queue == "beanstalkd":
                    server = Beanstalkd(folder / f"told{http:d}").start()
                    stack.callback(server.stop)
                made = deployment(folder / f"told {queue}{http:d}", "sqlite", server)
                stack.callback(made.close)
                made.http = http
                made.start_server()
                made.start_agent(name="told")
                wait_until(partial(_runs, made, "told"), 30, "the agent")
                values = sorted(1000 * obeyed(made, "told", command) for command in ("drain", "resume") * 50)
            figure = f"{statistics.median(values):.1f} / {values[-2]:.1f} ms"
            way = "over HTTP" if http else "over the queue"
            rows.append(Row(f"command to an idle agent {way}, {queue}: median / p99", figure, "", None, bound))
    return rows


def _runs(made: Deployment, id: str) -> bool:
    answer = made.client.get(f"/agents/{id}")
    return answer.status_code == 200 and answer.json()["state"] == "running"


def obeyed(made: Deployment, id: str, command: str) -> float:
    """Return the seconds that a command takes to be applied, as a client sees it."""
    start = time.perf_counter()
    href = made.client.post(f"/agents/{id}/commands", json={"command": command}).json()["href"]
    while made.client.get(href).json()["state"] == "pending":
        if time.perf_counter() - start > 30:
            raise SystemExit(f"{command} was not done within 30 s")
    return time.perf_counter() - start


def latency(folder: Path, runs: int) -> list[Row]:
    """The time from POST to succeeded of jobs that come one by one to an idle deployment."""
    rows = []
    for queue in ("SQLite queue", "beanstalkd"):
        with ExitStack() as stack:
            server = None
            if queue == "beanstalkd":
                server = Beanstalkd(folder / "latency").start()
                stack.callback(server.stop)
            made = deployment(folder / f"latency {queue}", "sqlite", server)
            stack.callback(made.close)
            rows += latencies(made.start(), queue)
    return rows


def latencies(made: Deployment, name: str, count: int = 500) -> list[Row]:
    own, seen = [], []
    made.wait(made.submit("noop"))
    with httpx.Client(base_url=made.url) as client:
        for _ in range(count):
            start = time.perf_counter()
            href = client.post("/run/noop", json={}).headers["Location"]
            while client.get(f"{href}/progress").json()["resultCode"] == -1:
                continue
            seen.append(1000 * (time.perf_counter() - start))
            record = client.get(href).json()
            own.append(1000 * (from_iso(record["finishedAt"]) - from_iso(record["createdAt"])))
    rows = []
    for what, values in (("by its times", own), ("as a client sees it", seen)):
        values.sort()
        figure = f"{statistics.median(values):.1f} / {values[int(len(values) * 0.99)]:.1f} ms"
        rows.append(Row(f"POST to succeeded, {name}, {what}: median / p99", figure, "", None, "≤ 12 / ≤ 30 ms"))
    return rows


def idle(folder: Path, runs: int) -> list[Row]:
    """What an idle ``zerog up`` costs."""
    made = deployment(folder / "idle", "sqlite", None)
    arguments = [sys.executable, "-m", "zerog", "up"]
    up = Process(arguments, folder / "up.log", cwd=made.folder, env=made.environment)
    try:
        wait_until(lambda: made.client.get("/readyz").status_code == 200 if connects(made.port) else False, 30)
        time.sleep(3)  # its start is over by then
        family = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
        before = sum(sum(one.cpu_times()[:2]) for one in family)
        time.sleep(20)  # long enough for the clock of the processes' times
        spent = sum(sum(one.cpu_times()[:2]) for one in family) - before
    finally:
        up.terminate()
        made.close()
    return [Row("idle zerog up, share of a core", f"{100 * spent / 20:.2f} %", "", None, "≤ 1 %")]


def couchbase(folder: Path, runs: int) -> list[Row]:
    """The same on Couchbase's test server and beanstalkd; the test server is the limit, so there is no bound."""
    rows = []
    with ExitStack() as stack:
        store = CouchbaseServer(folder / "couchbase").start()
        stack.callback(store.stop)
        server = Beanstalkd(folder / "cb").start()
        stack.callback(server.stop)
        made = deployment(folder / "cb zerog", "couchbase", server, store)
        stack.callback(made.close)
        made.start_server()
        uuid = made.submit("resize", {"path": "a"})
        rows.append(
            Row("submit, Couchbase's test server + beanstalkd", f"{wrk(f'{made.url}/run/resize', True):,.0f}/s")
        )
        rows.append(Row("GET progress, Couchbase's test server", f"{wrk(f'{made.url}/jobs/{uuid}/progress'):,.0f}/s"))
        other = deployment(folder / "cb drain", "couchbase", server, store, slots="8")
        stack.callback(other.close)
        rows.append(Row("drain, Couchbase's test server + beanstalkd, 8 slots", f"{drained(other, 2000):,.0f} jobs/s"))
        third = deployment(folder / "cb latency", "couchbase", server, store)
        stack.callback(third.close)
        rows += [Row(*row.cells[:2]) for row in latencies(third.start(), "Couchbase's test server", 200)]
    return rows


def sweep(folder: Path, runs: int) -> list[Row]:
    """What a server costs while 100,000 jobs wait and nothing else happens."""
    made = deployment(folder / "sweep", "sqlite", None)
    with parts_of(made) as parts:
        fill(parts, BACKLOG)
    rows = [Row(f"sweep at rest, {BACKLOG:,} queued, SQLite: share of a core", at_rest(made), "", None, "< 5 %")]
    with ExitStack() as stack:
        store = CouchbaseServer(folder / "couchbase").start()
        stack.callback(store.stop)
        server = Beanstalkd(folder / "sweep beanstalkd").start()
        stack.callback(server.stop)
        other = deployment(folder / "cb sweep", "couchbase", server, store)
        with parts_of(other) as parts:
            fill(parts, BACKLOG)
        name = f"sweep at rest, {BACKLOG:,} queued, Couchbase's test server + beanstalkd: share of a core"
        rows.append(Row(name, at_rest(other)))
    return rows


def at_rest(made: Deployment) -> str:
    """Start a server over a backlog and return its share of a core, once it has looked at all, for two sweeps."""
    try:
        process = psutil.Process(made.start_server().pid)
        time.sleep(REST)  # the full walk of a start, and the first sweep after it
        before = sum(process.cpu_times()[:2])
        time.sleep(2 * REST)
        spent = sum(process.cpu_times()[:2]) - before
    finally:
        made.close()
    return f"{100 * spent / (2 * REST):.2f} %"


def masters(folder: Path, runs: int) -> list[Row]:
    """The CPU time of a request, of all processes of a server: two beside one, statistics beside none."""
    shapes: dict[str, dict[str, Any]] = {"one": {}, "two": {"processes": "2"}, "off": {"stats": "off"}}
    figures: dict[tuple[str, bool], list[float]] = {(name, post): [] for name in shapes for post in (False, True)}
    with ExitStack() as stack:
        made = {}
        for name, settings in shapes.items():
            made[name] = deployment(folder / name, "sqlite", None, **settings)
            stack.callback(made[name].close)
            made[name].start_server()
        uuids = {name: one.submit("resize", {"path": "a"}) for name, one in made.items()}
        for _ in range(runs):
            for name, one in made.items():
                with alone(one, made.values()):
                    figures[name, False].append(cpu_seconds(one, f"{one.url}/jobs/{uuids[name]}/progress"))
                    figures[name, True].append(cpu_seconds(one, f"{one.url}/run/resize", True))
    rows = []
    for what, name, limit, bound in (("two processes", "two", "one", "≤ 1.25"), ("statistics", "one", "off", "≤ 1.05")):
        for post, kind in ((False, "GET progress"), (True, "submit")):
            value, beside = statistics.median(figures[name, post]), statistics.median(figures[limit, post])
            title = f"CPU time of a {kind}, {what}, beside {'one' if limit == 'one' else 'none'}"
            rows.append(Row(title, f"{1e6 * value:.0f} µs", f"{1e6 * beside:.0f} µs", value / beside, bound))
    return rows


def cpu_seconds(made: Deployment, url: str, post: bool = False) -> float:
    """Return the CPU seconds that all processes of a server spend on a request, user and system."""
    assert made.server is not None
    parent = psutil.Process(made.server.pid)
    family = [parent, *parent.children(recursive=True)]
    before = sum(sum(one.cpu_times()[:2]) for one in family)
    requests = wrk(url, post) * SECONDS
    return (sum(sum(one.cpu_times()[:2]) for one in family) - before) / requests


def slow(folder: Path, runs: int) -> list[Row]:
    """What 50 connections that ask all the time wait for at most, while one endpoint waits for its store."""
    quiet: dict[str, list[float]] = {"GET progress": [], "submit": []}
    beside: dict[str, list[float]] = {"GET progress": [], "submit": []}
    with ExitStack() as stack:
        made = Deployment(
            folder / "slow", applications="workers.examples,tests,tests.benchmarks", lease="30", sweep="30", grace="5"
        )
        stack.callback(made.close)
        made.start_server()
        uuid = made.submit("resize", {"path": "a"})
        for _ in range(runs):
            for name, (url, post) in {
                "GET progress": (f"{made.url}/jobs/{uuid}/progress", False),
                "submit": (f"{made.url}/run/resize", True),
            }.items():
                quiet[name].append(p99(url, post))
                with held(made.port, HELD):
                    beside[name].append(p99(url, post))
    return [
        Row(
            f"p99 of a {name}, 50 at once, {HELD} in a slow endpoint, beside none there",
            f"{statistics.median(beside[name]):.1f} ms",
            f"{statistics.median(quiet[name]):.1f} ms",
            statistics.median(beside[name]) / statistics.median(quiet[name]),
            "< 100 ms",
        )
        for name in quiet
    ]


@contextmanager
def held(port: int, count: int) -> Iterator[None]:
    """Hold so many requests in the endpoint that waits; none may be answered before the end."""
    with ExitStack() as stack:
        ends = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(count)]
        for end in ends:
            end.sendall(b"GET /slow?seconds=10 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(1)  # until they have their threads, as many as there are
        yield
        if select.select(ends, [], [], 0)[0]:
            raise SystemExit("the slow requests were not there to the end")


def p99(url: str, post: bool) -> float:
    """Return the milliseconds within which 99 of 100 requests of 50 connections were answered."""
    arguments = [
        "wrk",
        "-t1",
        "-c50",
        f"-d{SECONDS}s",
        "--latency",
        *(["-s", str(BASELINES / "post.lua")] if post else []),
    ]
    text = subprocess.run([*arguments, url], check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    assert found is not None and "Non-2xx" not in text, text
    return float(found.group(1)) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found.group(2)]


def ingest(folder: Path, runs: int) -> list[Row]:
    """A bundle of 320 MiB over HTTP, beside the same bytes written and synced by nobody in between; and how long others
    wait meanwhile."""
    made = Deployment(folder / "zerog", applications="workers.ingest", ingest_volume=folder / "volume")
    piece, count = os.urandom(1024 * 1024), 320
    data = {"a": piece * 16}
    speeds, limits, idle_p99, busy_p99, growth = [], [], [], [], 0.0
    try:
        made.start()
        assert made.server is not None
        server = psutil.Process(made.server.pid)
        made.client.post("/ingest", content=bundle(data), headers=TAR)
        for _ in range(runs):
            idle_p99.append(delay_of(made, 2.0))
            begun, before = time.perf_counter(), server.memory_info().rss
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(made.client.post, "/ingest", content=iter([piece] * count), headers=TAR)
                busy_p99.append(delay_of(made, 60.0, sent.done))
                assert sent.result().status_code == 200
            speeds.append(count / (time.perf_counter() - begun))
            growth = max(growth, server.memory_info().rss - before)
            begun = time.perf_counter()
            with (folder / "plain").open("wb") as file:
                for _ in range(count):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            limits.append(count / (time.perf_counter() - begun))
    finally:
        made.close()
    rows = [ratio_row("upload, beside a plain file", speeds, limits, "", " MiB/s")]
    waits, rest = statistics.median(busy_p99), statistics.median(idle_p99)
    rows.append(
        Row("GET progress during it, p99", f"{waits:.1f} ms", f"{rest:.1f} ms at rest", waits / rest, "< 50 ms")
    )
    rows.append(Row("memory of the server during it", f"{growth / 2**20:+.1f} MiB", "", None, "< 64 MiB"))
    return rows


TAR = {"Content-Type": "application/x-tar"}


def delay_of(made: Deployment, seconds: float, over: Callable[[], bool] = lambda: False) -> float:
    """Return the milliseconds within which 99 of 100 reads of a job were answered, one after the other."""
    uuid = made.client.get("/jobs?limit=1").json()["items"][0]["uuid"]
    found, end = [], time.perf_counter() + seconds
    with httpx.Client(base_url=made.url) as client:
        while time.perf_counter() < end and not over():
            begun = time.perf_counter()
            client.get(f"/jobs/{uuid}/progress").raise_for_status()
            found.append(1000 * (time.perf_counter() - begun))
            time.sleep(0.002)  # as somebody who looks often, and not as a load
    return sorted(found)[int(len(found) * 0.99)]


BENCHMARKS: dict[str, Callable[[Path, int], list[Row]]] = {
    "http": http, "drain": drain, "agents": by_http, "told": told, "latency": latency, "idle": idle, "couchbase": couchbase, "sweep": sweep,
    "masters": masters, "slow": slow, "ingest": ingest,
}  # fmt: skip


def machine(folder: Path) -> str:
    """Say where and when, with the file system and the time of its fsync."""
    with (folder / "fsync").open("wb") as file:
        times = []
        for _ in range(200):
            file.write(b"x" * 4096)
            file.flush()
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    system = next(
        p.fstype
        for p in sorted(psutil.disk_partitions(all=True), key=lambda p: -len(p.mountpoint))
        if str(folder).startswith(p.mountpoint)
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"{system}, fdatasync {1e6 * statistics.median(times):.0f} µs"
    )


def table(rows: list[Row], where: str, runs: int) -> str:
    """Return the table as reStructuredText."""
    titles = ("What", "ZeroG", "Limit", "Ratio", "Wanted")
    cells = [titles, *(row.cells for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    note = f"{where}. Medians of {runs} alternating runs; SQLite with ``synchronous=FULL``."
    return "\n".join(
        [note, "", rule, lines[0], rule, *(line if line[0] != " " else f"..{line}" for line in lines[1:]), rule]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--write", metavar="FILE", help="put the table between the marks of this file")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt install wrk")
    rows: list[Row] = []
    where = ""
    for name in options.names or BENCHMARKS:
        with tempfile.TemporaryDirectory(dir=ROOT) as text:
            os.sync()  # what the last one wrote must not be what this one waits for
            if not rows:
                where = machine(Path(text))
            rows += BENCHMARKS[name](Path(text), options.runs)
    written = table(rows, where, options.runs)
    print(written)
    if options.write:
        path = Path(options.write)
        before, _, rest = path.read_text().partition(".. benchmarks begin\n")
        path.write_text(
            f"{before}.. benchmarks begin\n\n{written}\n\n.. benchmarks end{rest.partition('.. benchmarks end')[2]}"
        )


if __name__ == "__main__":
    main()
