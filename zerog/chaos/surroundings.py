"""Injuries to what processes stand on: the disk, the store, the network, the clock, and everything at once."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from zerog.chaos.proxy import Proxy
from zerog.chaos.run import Run
from zerog.chaos.site import Site, free_port, until
from zerog.datastore import faulty
from zerog.exceptions import MissingDependency, ZerogError

# D1: no room

#: Size of the small file system in bytes, what a submit that fills it carries, and seconds for which it stays full.
_SMALL, _BALLAST, _FULL = 48 * 1024**2, 200_000, 3.0
#: Seconds within which a full store must refuse, and one with room accept again.
_NOTICE, _AGAIN = 30.0, 10.0


def put_store_on_small_disk(site: Site) -> None:
    """Put the datastore on a file system of its own, where that is possible: root may mount one."""
    disk = site.folder / "disk"
    disk.mkdir()
    site.environment["ZEROG_DATASTORE"] = f"sqlite:///{disk}/zerog.db"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_SMALL}", "zerog-chaos", str(disk)]
    if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
        site.cleanup.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)


def fill_disk(run: Run) -> None:
    """Take the room away twice: from the file system, and by a limit on the size of files."""
    disk = run.site.folder / "disk"
    ways = [_limited] if disk.stat().st_dev == run.site.folder.stat().st_dev else [_ballast, _limited]
    for number in run.each_fault():
        before = run.refused_as_full
        with ways[number % len(ways)](run.site):
            run.report.faults += 1
            end = time.monotonic() + _NOTICE
            while run.refused_as_full == before and time.monotonic() < end:
                run.report.attempted += run.submit(run.key(), 0.01, ballast=_BALLAST, patience=0.5) is not None
            run.expect(run.refused_as_full > before, f"no submit was refused within {_NOTICE:g} s without room")
            time.sleep(_FULL)
            known = next(iter(run.acknowledged.values()))
            run.expect(run.site.client.job(known)["uuid"] == known, "a full store could not be read")
        moment = time.monotonic()
        run.submit_more(0.01)
        run.report.recoveries.append(time.monotonic() - moment)


@contextmanager
def _ballast(site: Site) -> Iterator[None]:
    """Fill the file system."""
    path = site.folder / "disk" / "ballast"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            continue
    try:
        yield
    finally:
        path.unlink()


@contextmanager
def _limited(site: Site) -> Iterator[None]:
    """Let no file of a process grow beyond what the store has now."""
    size = (site.folder / "disk" / "zerog.db").stat().st_size
    pids = [process.pid for process in (*site.agents, *site.servers.values())]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def judge_d1(run: Run) -> None:
    worst = run.report.quantile(1.0)
    run.expect_in_time(
        worst is not None and worst <= _AGAIN, f"submits were refused for {worst} s after there was room again"
    )


# S1: a store that fails

#: Share of calls that fail, and of writes that another writer precedes; leases for which the store is away.
_RATE, _CONFLICTS, _AWAY = 0.05, 0.05, 6.0


def let_store_fail(site: Site) -> None:
    """Let server and agents ask a file what is to fail."""
    site.environment[faulty.VARIABLE] = str(site.folder / "faults")


def fail_store(run: Run) -> None:
    """Let calls fail from the first job to the last, and now and then all of them for a while."""
    path = Path(run.site.environment[faulty.VARIABLE])
    failing = faulty.Faults(_RATE, _CONFLICTS)
    failing.write(path)
    for _ in run.each_fault():
        run.submit_long(run.scenario.lasts * run.site.lease / 2)
        faulty.Faults(away=True).write(path)
        moment = time.monotonic()
        time.sleep(run.scenario.lasts * run.site.lease)
        run.outages.append((moment, time.monotonic()))
        failing.write(path)
    until(lambda: len(run.acknowledged) >= run.report.attempted, 120 + run.jobs, "all submits")
    faulty.Faults().write(path)
    run.report.faults = len(Path(f"{path}.log").read_text().splitlines())
    run.report.trials = len(run.outages)


def judge_s1(run: Run) -> None:
    """A job that ran when the store went away goes on, and runs once."""
    counts = Counter(one.uuid for one in run.executions())
    through = 0
    for gone, back in run.outages:
        there = run.under_way(gone)
        through += len(there)
        for one in there:
            run.expect(one.ended is not None, f"job {one.uuid} was stopped while the store was away")
            again = counts[one.uuid] > run.runs_of(one.uuid)
            run.expect(not again, f"job {one.uuid} ran again after the store had been away")
        later = [one.started for one in run.executions() if one.started > back]
        if later:
            run.report.recoveries.append(min(later) - back)
    run.expect(through > 0, "no job ran when the store went away")


# N1: a network that tears

#: Seconds for which the network is torn, and which it takes an agent to see that beside its deadline.
_TORN, _SEE, _DEADLINE = 3.0, 1.0, 1.0


def put_proxy_before_queue(site: Site) -> None:
    """Let server and agents reach beanstalkd only through a proxy."""
    port = free_port()
    site.proxy = Proxy(port, site.queue_port)
    site.cleanup.callback(site.proxy.close)
    site.environment["ZEROG_QUEUE"] = f"beanstalk://127.0.0.1:{port}"
    site.environment["ZEROG_DEADLINE"] = f"{_DEADLINE:g}"


def tear_network(run: Run) -> None:
    """Stop forwarding, drop what comes back, cut connections in the middle of a line; in turn."""
    assert run.site.proxy is not None
    for number in run.each_fault():
        run.site.proxy.mode = ("stop", "half", "cut")[number % 3]
        run.report.faults += 1
        time.sleep(_TORN)
        for _ in range(4):
            run.submit_more(0.01)  # stored, and left to the sweep
        run.site.proxy.mode = "forward"
        run.recovered(
            partial(_goes_on, run, time.monotonic()), _DEADLINE + _SEE, "a job starts and the server sees the queue"
        )


def _goes_on(run: Run, moment: float) -> bool:
    return _started_after(run, moment) and run.site.client.type("chaos-work")["queue"] is not None


def _started_after(run: Run, moment: float) -> bool:
    return any(one.started > moment for one in run.executions())


# T1: clocks that jump

#: Seconds of the jump forward: what is put off while the clock is ahead waits so much longer when it is right again.
FORWARD = 200.0
#: The jumps; delays of which only a jump ends the longer soon; how soon work must start after a jump.
_JUMPS, _DELAY, _SHORT_DELAY, _SOON = (FORWARD, -3600.0), 100.0, 3.0, 10.0
_LIBRARY = "*/faketime/libfaketime.so.1"
#: What Python processes import at their start: libfaketime 0.9 refuses the absolute sleeps of Python on a clock that it
#: is to leave alone.
_SLEEP = """import select, time

def sleep(seconds):
    select.select((), (), (), seconds)

time.sleep = sleep
"""


def fake_clock(site: Site) -> None:
    """Let every process take its time of day from libfaketime, which a file moves; the monotonic clock stays true."""
    library = next(Path("/usr/lib").glob(_LIBRARY), None)
    if library is None:
        raise MissingDependency("this scenario needs libfaketime: apt install faketime")
    (site.folder / "clocks").mkdir()
    (site.folder / "clocks" / "sitecustomize.py").write_text(_SLEEP)
    site.environment.update(
        PYTHONPATH=os.pathsep.join([str(site.folder / "clocks"), site.environment["PYTHONPATH"]]),
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(site.folder / "clock"),
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
    )
    _set_clock(site, 0)


def _set_clock(site: Site, seconds: float) -> None:
    path = site.folder / "clock"
    fresh = path.with_suffix(".new")
    fresh.write_text(f"{seconds:+g}")
    fresh.replace(path)


def jump(run: Run) -> None:
    """Move the clock forward over a delay, back by an hour, and right again."""
    for number in run.each_fault():
        seconds = _JUMPS[number % len(_JUMPS)]
        long = run.submit_more(5.0)
        delayed = run.submit_more(0.01, delay=_DELAY if seconds > 0 else _SHORT_DELAY)
        until(partial(_has_started, run, long), _SOON, "a job before the jump")
        run.expect(seconds < 0 or not _has_started(run, delayed), "a delayed job started too early")
        moment = time.monotonic()
        _set_clock(run.site, seconds)
        run.report.faults += 1
        _expect_start(run, run.submit_more(0.01), f"a job that was submitted after a jump of {seconds:+g} s")
        if seconds > 0:
            _expect_start(run, delayed, "a delayed job whose time the jump has passed")
        run.report.recoveries.append(time.monotonic() - moment)
        time.sleep(2 * run.site.lease)  # so long a lease could lapse
        _set_clock(run.site, 0)
        _expect_start(run, delayed, "a delayed job after the clock is right again")


def _has_started(run: Run, uuid: str) -> bool:
    return run.any_started([uuid])


def _expect_start(run: Run, uuid: str, what: str) -> None:
    try:
        until(lambda: _has_started(run, uuid), _SOON, what)
    except TimeoutError as error:
        run.expect(False, f"did not start {error}")


# B1: a backlog, and everything starts anew

#: Seconds within which work starts, sweeps for which the queue is watched, and what it may hold of the backlog.
_STARTS, _SWEEPS, _FULLEST = 10.0, 3, 1.2


def start_without_agents(site: Site) -> None:
    """Let a backlog grow: the agents come later."""
    site.hold_agents = True


def restart_all(run: Run) -> None:
    """Kill server, queue and agents over a backlog, while jobs run, start all again, and watch the queue."""
    until(lambda: len(run.acknowledged) >= run.report.attempted, 60 + run.jobs / 20, "the backlog")
    run.site.start_agents()
    until(run.executions, 60, "a job that runs")
    for _ in run.each_fault():
        run.site.kill_all()
        run.report.faults += 1
        moment = time.monotonic()
        run.site.start_queue()
        run.site.start_servers()
        run.site.start_agents()
        run.recovered(partial(_started_after, run, moment), _STARTS, "the first job after the restart", moment)
        _watch_queue(run)


def _watch_queue(run: Run) -> None:
    """Look at the length of the queue for some sweeps."""
    end = time.monotonic() + _SWEEPS * run.site.sweep
    most = 0
    while time.monotonic() < end:
        with suppress(ZerogError):
            queue = run.site.client.type("chaos-work")["queue"]
            if queue is not None:
                most = max(most, queue["ready"] + queue["reserved"] + queue["delayed"])
        time.sleep(0.1)  # between two looks
    run.expect(most > 0, "the queue was empty before it could be watched")
    run.expect(most <= _FULLEST * run.jobs, f"the queue grew to {most} entries for {run.jobs} jobs")
