"""The scenarios: what each injures, and what must hold beside lost = double result = stale write = 0."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zerog.chaos import ledger
from zerog.chaos.report import Report
from zerog.chaos.site import Site, kill, until
from zerog.client import Client
from zerog.exceptions import ServerUnreachable, StoreUnavailable, ZerogError

_TERMINAL = ("succeeded", "failed", "cancelled")

#: Seconds that all jobs get after the last fault, beside what they run.
_PATIENCE = 120.0
#: Threads that submit, and seconds for which a submit is repeated under its key.
_SUBMITTERS, _REPEAT = 4, 60.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table: sizes (jobs, faults) for every day and for a campaign, and what is done."""

    name: str
    what: str
    every_day: tuple[int, int]
    campaign: tuple[int, int]
    injure: Callable[[Run], None]
    queue: str | None = None
    lone: bool = True  # needs a deployment of its own: it injures more than agents
    burst: bool = False  # all jobs at once, so that many wait when the injury comes


class Run:
    """One run of a scenario over a site."""

    def __init__(self, scenario: Scenario, site: Site, jobs: int, faults: int, seed: int) -> None:
        self.scenario = scenario
        self.site = site
        self.jobs, self.faults = jobs, faults
        self.random = random.Random(seed)
        self.report = Report(scenario.name, site.store, site.queue, seed)
        self.acknowledged: dict[str, str] = {}  # key → UUID
        self.first_ends: dict[str, tuple[Any, ...]] = {}
        self.interruptions: list[tuple[float, int]] = []  # when, which agent
        self.drained = 0.0  # seconds from the last fault to the last end
        self._lock = threading.Lock()
        self._injured = threading.Event()

    def go(self) -> Report:
        """Submit, injure, wait, judge."""
        started = time.monotonic()
        self.site.start()
        plan = [(str(uuids.UUID(int=self.random.getrandbits(128))), self._length()) for _ in range(self.jobs)]
        self.report.attempted = len(plan)
        # The work lasts as long as the injuries do.
        pause = 0.0 if self.scenario.burst else self.expected_seconds() / max(1, len(plan))
        threads = [
            threading.Thread(target=self._submit, args=(plan[number::_SUBMITTERS], pause * _SUBMITTERS), daemon=True)
            for number in range(_SUBMITTERS)
        ]
        for thread in threads:
            thread.start()
        until(lambda: len(self.acknowledged) >= min(8, len(plan)), 60, "the first jobs")
        self.scenario.injure(self)
        self._injured.set()
        injured = time.monotonic()
        for thread in threads:
            thread.join(_REPEAT + pause * len(plan) + 10)
        self._wait_for_ends()
        self.drained = time.monotonic() - injured
        self._judge()
        JUDGES.get(self.scenario.name, _nothing)(self)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _length(self) -> float:
        return 5.0 if self.random.random() < 0.01 else self.random.uniform(0.01, 0.4)

    def expected_seconds(self) -> float:
        """Return about how long the injuries will take."""
        low, high = _PAUSES[self.scenario.name]
        return self.faults * (low + high) / 2

    # Submitting

    def _submit(self, plan: list[tuple[str, float]], pause: float) -> None:
        client = Client(self.site.url)
        for key, seconds in plan:
            end = time.monotonic() + _REPEAT
            while time.monotonic() < end:
                try:
                    parameters = {"ledger": str(self.site.ledger), "seconds": round(seconds, 3)}
                    uuid = client.submit("chaos-work", parameters, key)["uuid"]
                except (ServerUnreachable, StoreUnavailable):
                    time.sleep(0.1)  # as its Retry-After says; the key makes a repeat harmless
                    continue
                with self._lock:
                    if self.acknowledged.setdefault(key, uuid) != uuid:
                        self.report.findings.append(f"key {key} stands for two jobs")
                break
            if not self._injured.is_set():
                time.sleep(pause)

    # Waiting and judging

    def _wait_for_ends(self) -> None:
        client = Client(self.site.url)
        end = time.monotonic() + _PATIENCE
        open_jobs = set(self.acknowledged.values())
        while open_jobs and time.monotonic() < end:
            for uuid in list(open_jobs):
                with suppress(ZerogError):
                    view = client.job(uuid)
                    if view["state"] in _TERMINAL:
                        self.first_ends[uuid] = _end(view)
                        open_jobs.discard(uuid)
            time.sleep(0.05)

    def _judge(self) -> None:
        report, client = self.report, Client(self.site.url)
        report.acknowledged = len(self.acknowledged)
        for uuid in self.acknowledged.values():
            self._judge_job(client, uuid)
        executions = ledger.by_job(ledger.read(self.site.ledger))
        report.executed_twice = sum(len(runs) > 1 for runs in executions.values())
        report.overlapping = sum(ledger.overlapping(runs) for runs in executions.values())
        report.superseded = self.site.superseded()
        for moment, agent in self.interruptions:
            for runs in executions.values():
                for broken in ledger.interrupted(runs, moment, agent):
                    seconds = ledger.recovery(runs, broken, moment)
                    if seconds is not None:
                        report.recoveries.append(seconds)
        for name in ("lost", "double_result", "stale_write"):
            if getattr(report, name):
                report.findings.append(f"{name.replace('_', ' ')}: {getattr(report, name)}")
        if report.not_succeeded:
            report.findings.append(f"{report.not_succeeded} jobs did not succeed")
        if report.faults < _MOST * self.faults:
            report.findings.append(f"only {report.faults} of {self.faults} faults: the work was over before")
        if report.acknowledged < report.attempted:
            report.findings.append(f"{report.attempted - report.acknowledged} submits were never acknowledged")

    def _judge_job(self, client: Client, uuid: str) -> None:
        report = self.report
        try:
            view = client.job(uuid)
        except ZerogError:
            report.lost += 1
            return
        if view["state"] not in _TERMINAL:
            report.lost += 1
            report.findings.append(f"job {uuid} is {view['state']}: {client.explain(uuid)['message']}")
            return
        report.terminal += 1
        if self.first_ends.get(uuid, _end(view)) != _end(view):
            report.double_result += 1
        if view["state"] != "succeeded":
            report.not_succeeded += 1
            return
        try:
            data = json.loads(client.data(uuid))
        except ZerogError as error:
            report.findings.append(f"job {uuid} has succeeded and its data cannot be had: {error}")
            return
        if data != {"uuid": uuid, "attempt": view["attempt"]}:
            report.stale_write += 1

    # Helps of the scenarios

    def each_fault(self) -> Iterator[int]:
        """Count the faults, waiting before each as long as the scenario does."""
        for number in range(self.faults):
            time.sleep(self.random.uniform(*_PAUSES[self.scenario.name]))
            yield number

    def expect(self, holds: bool, finding: str) -> None:
        """Note what did not hold."""
        if not holds:
            self.report.findings.append(finding)

    def busy_agents(self) -> list[Any]:
        """Return the agents under which something runs now, as far as the ledger says."""
        running = {one.agent for one in ledger.read(self.site.ledger) if one.ended is None}
        return [agent for agent in self.site.agents if agent.pid in running]


def _end(view: dict[str, Any]) -> tuple[Any, ...]:
    return view["state"], view["resultCode"], view["attempt"], view["finishedAt"], str(view["result"])


#: Share of the faults without which a run has proven nothing.
_MOST = 0.7

#: Seconds between two faults.
_PAUSES = {
    "K1": (0.3, 1.0), "K2": (0.2, 0.8), "K3": (1.0, 3.0), "K4": (3.0, 5.0), "K5": (0.5, 1.0), "P1": (1.0, 2.0),
    "P2": (1.0, 2.0),
}  # fmt: skip


def _kill_agents(run: Run) -> None:
    for _ in run.each_fault():
        agent = run.random.choice(run.site.agents)
        run.interruptions.append((run.site.replace_agent(agent), agent.pid))
        run.report.faults += 1


def _judge_k1(run: Run) -> None:
    p50, p99 = run.report.quantile(0.5), run.report.quantile(0.99)
    bound = run.site.lease + run.site.sweep + 1
    run.expect(p50 is not None, "no kill interrupted a job: nothing is known of recovery")
    run.expect(p50 is None or p50 <= 1.0, f"median recovery {p50} s: more than 1 s")
    run.expect(p99 is None or p99 <= bound, f"p99 of recovery {p99} s: more than {bound:g} s")


def _kill_children(run: Run) -> None:
    killer = run.site.client.submit("chaos-killer", {"ledger": str(run.site.folder / "killer")})["uuid"]
    for _ in run.each_fault():
        try:
            victim = run.random.choice(until(lambda: _running(run), 10, "a job that runs"))
        except TimeoutError:
            break  # all have ended
        moment = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
            run.report.faults += 1
            _await_record(run, victim, moment)
    view = until(
        lambda: v if (v := run.site.client.job(killer))["state"] in _TERMINAL else None, 60, "the killer's quarantine"
    )
    right = (view["state"], view["reason"], view["counters"]["crashes"]) == ("failed", "crashed", 3)
    run.expect(right, f"the job that always kills its child ended as {view['state']} {view['reason']}")


def _running(run: Run) -> list[ledger.Execution]:
    """Return what runs now: not come to its end, and its process still the child of its agent."""
    return [one for one in ledger.read(run.site.ledger) if one.ended is None and _parent(one.pid) == one.agent]


def _await_record(run: Run, victim: ledger.Execution, moment: float) -> None:
    """Wait until the record no longer says that this attempt runs, and note how long that took."""

    def over() -> bool:
        view = run.site.client.job(victim.uuid)
        return bool(view["state"] != "running" or view["attempt"] != victim.attempt)

    try:
        until(over, 10, "the record of a crash")
    except TimeoutError:
        run.expect(False, f"job {victim.uuid}: its child's end was not recorded within 10 s")
    run.report.recoveries.append(time.monotonic() - moment)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _judge_k2(run: Run) -> None:
    p99 = run.report.quantile(0.99)
    run.expect(p99 is None or p99 <= 1.0, f"p99 from a child's end to its record {p99} s: more than 1 s")


def _kill_server(run: Run) -> None:
    for _ in run.each_fault():
        assert run.site.server is not None
        kill(run.site.server)
        run.report.faults += 1
        run.site.start_server()


def _judge_k3(run: Run) -> None:
    listed = [view["uuid"] for view in run.site.client.jobs("chaos-work", limit=10 * run.jobs)]
    run.expect(len(listed) == len(set(listed)), "a job is listed twice")
    run.expect(set(run.acknowledged.values()) <= set(listed), "an acknowledged job is not listed")
    run.expect(len(listed) <= run.jobs, f"{len(listed)} jobs for {run.jobs} keys")


def _kill_queue(run: Run) -> None:
    for _ in run.each_fault():
        assert run.site.beanstalkd is not None
        kill(run.site.beanstalkd)
        run.report.faults += 1
        time.sleep(run.random.uniform(0, 5))
        run.site.start_queue()


def _judge_k4(run: Run) -> None:
    run.expect(run.drained <= 15, f"drained {run.drained:.1f} s after the last restart: more than 15 s")


def _wipe_queue(run: Run) -> None:
    for _ in run.each_fault():
        run.site.wipe_queue()
        run.report.faults += 1
        moment = time.monotonic()
        bound = run.site.sweep + 5
        try:
            until(lambda: _is_whole(run.site.client), bound, "a whole queue")
        except TimeoutError:
            run.expect(False, f"the queue was not whole again within {bound:g} s")
        run.report.recoveries.append(time.monotonic() - moment)


def _is_whole(client: Client) -> bool:
    """Return whether the queue has an entry for every queued job, or more."""
    with suppress(ZerogError):
        queue = client.type("chaos-work")["queue"]
        queued = sum(1 for _ in client.jobs("chaos-work", "queued", 1000))
        return queue is not None and queue["ready"] + queue["delayed"] + queue["reserved"] >= queued
    return False


def _stop_agents(run: Run) -> None:
    for _ in run.each_fault():
        agent = run.random.choice(run.busy_agents() or run.site.agents)
        agent.send_signal(signal.SIGSTOP)
        run.report.faults += 1
        time.sleep(run.random.uniform(2, 4) * run.site.lease)
        agent.send_signal(signal.SIGCONT)


def _judge_p1(run: Run) -> None:
    run.expect(not run.report.overlapping or run.report.superseded > 0, "no superseded attempt was counted")


def _stop_queue_and_server(run: Run) -> None:
    for number in run.each_fault():
        process = run.site.beanstalkd if number % 2 == 0 else run.site.server
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        run.report.faults += 1
        time.sleep(2 * run.site.lease)
        process.send_signal(signal.SIGCONT)


def _judge_p2(run: Run) -> None:
    run.expect(run.report.executed_twice == 0, f"{run.report.executed_twice} jobs under a live lease ran twice")


def _nothing(_: Run) -> None:
    """Expect nothing beside what every scenario must hold."""


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("K1", "kill -9 a random agent, restarted at once", (500, 60), (20_000, 3_000), _kill_agents,
                 lone=False),
        Scenario("K2", "kill -9 a child; a job that always kills its child", (300, 40), (10_000, 1_000),
                 _kill_children, lone=False),
        Scenario("K3", "kill -9 the server, clients repeat with their keys", (500, 10), (20_000, 1_000), _kill_server),
        Scenario("K4", "kill -9 beanstalkd with a binlog, restarted after 0 to 5 s", (300, 5), (10_000, 300),
                 _kill_queue, "beanstalkd-durable"),
        Scenario("K5", "the queue forgets everything", (300, 3), (10_000, 100), _wipe_queue, burst=True),
        Scenario("P1", "SIGSTOP an agent for 2 to 4 leases, then SIGCONT", (60, 6), (5_000, 500), _stop_agents,
                 lone=False),
        Scenario("P2", "SIGSTOP beanstalkd, or the server, for 2 leases", (60, 2), (3_000, 100),
                 _stop_queue_and_server, "beanstalkd"),
    )
}  # fmt: skip

#: What must hold beside what every scenario must hold.
JUDGES: dict[str, Callable[[Run], None]] = {
    "K1": _judge_k1,
    "K2": _judge_k2,
    "K3": _judge_k3,
    "K4": _judge_k4,
    "P1": _judge_p1,
    "P2": _judge_p2,
}
