"""One run of a scenario: jobs are submitted, something is injured, and in the end everything is judged."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid as uuids
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from zerog.chaos import ledger
from zerog.chaos.report import Report
from zerog.chaos.site import Site, until
from zerog.client import Api
from zerog.exceptions import ServerUnreachable, StoreFull, StoreUnavailable, ZerogError

TERMINAL = ("succeeded", "failed", "cancelled")

#: Seconds that all jobs get after the last fault, beside what they run; and more of them for each job.
_PATIENCE, _PATIENCE_PER_JOB = 120.0, 0.02
#: Threads that submit, and seconds for which a submit is repeated under its key.
_SUBMITTERS, _REPEAT = 4, 60.0
#: Share of the faults without which a run has proven nothing.
_ENOUGH = 0.7
#: Times the seconds that something may take after which it counts as never.
_NEVER = 5.0
#: Seconds between two looks at a job while others are injured.
_LOOK = 0.05


#: What jobs do, how large a share does it, and how often such a job runs when nothing is injured.  Some of every
#: scenario raise once, always raise, or go on later once (Z12, Z13).
_SHARES = {"succeeds": 0.8, "raises": 0.08, "fails": 0.04, "requeues": 0.08}
_RUNS = {"succeeds": 1, "raises": 2, "fails": 3, "requeues": 2}
_PARAMETERS: dict[str, dict[str, int]] = {
    "succeeds": {}, "raises": {"raises": 1}, "fails": {"raises": 1_000_000}, "requeues": {"requeues": 1}
}  # fmt: skip


def nothing(_: Any) -> None:
    """Do nothing: the part of a scenario that it does not need."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One row of the table: sizes (jobs, faults) for every day and for a campaign, and what is done.

    ``pause`` is how many seconds pass before each fault, from least to most, ``lasts`` how many leases a fault lasts,
    ``length`` how many seconds jobs run.
    """

    name: str
    what: str
    every_day: tuple[int, int]
    campaign: tuple[int, int]
    injure: Callable[[Run], None]
    pause: tuple[float, float] = (1.0, 2.0)
    lasts: float = 0.0
    judge: Callable[[Run], None] = nothing
    prepare: Callable[[Site], None] = nothing  # before anything is started
    queue: str | None = None
    store: str | None = None
    lone: bool = True  # needs a deployment of its own: it injures more than agents
    burst: bool = False  # all jobs at once, so that many wait when the injury comes
    length: tuple[float, float] = (0.01, 0.4)
    long: float = 0.01  # share of the jobs that run for 5 s
    once: bool = False  # nothing is done to agents and jobs, so that no job may run twice
    puts_off: float = 0.0  # seconds by which it may put off a job that goes on later


class Run:
    """One run of a scenario over a site."""

    def __init__(self, scenario: Scenario, site: Site, jobs: int, faults: int, seed: int) -> None:
        self.scenario = scenario
        self.site = site
        self.jobs, self.faults = jobs, faults
        self.random = random.Random(seed)
        several = f", {len(site.ports)} servers" if len(site.ports) > 1 else ""
        several += {"http": ", agents over HTTP", "both": ", half of the agents over HTTP"}.get(site.speak, "")
        self.report = Report(scenario.name, site.store, site.queue + several, seed)
        self.acknowledged: dict[str, str] = {}  # key → UUID
        self.kinds: dict[str, str] = {}  # UUID → what the job does, if it is not to succeed at once
        self.first_ends: dict[str, tuple[Any, ...]] = {}
        self.outages: list[tuple[float, float]] = []  # from when to when the store was away
        self.stops: list[tuple[float, int]] = []  # when an agent was stopped for a while, and which
        self.interruptions: list[tuple[float, int]] = []  # when, which agent
        self.refused_as_full = 0  # submits that were answered with 507
        self.drained = 0.0  # seconds from the last fault to the last end
        self._keys = uuids.uuid4()
        self._lock = threading.Lock()
        self._injured = threading.Event()

    def go(self) -> Report:
        """Submit, injure, wait, judge."""
        started = time.monotonic()
        self.site.start()
        plan = [(self.key(), self._length(), self._kind()) for _ in range(self.jobs)]
        self.report.attempted = len(plan)
        # The work lasts as long as the injuries do.
        pause = 0.0 if self.scenario.burst else self.expected_seconds() / max(1, len(plan))
        threads = [
            threading.Thread(target=self._submit, args=(plan[number::_SUBMITTERS], pause * _SUBMITTERS), daemon=True)
            for number in range(_SUBMITTERS)
        ]
        threads.append(threading.Thread(target=self._notice_ends, daemon=True))
        for thread in threads:
            thread.start()
        until(lambda: len(self.acknowledged) >= min(8, len(plan)), 60, "the first jobs")
        if not self.site.hold_agents:
            until(self.executions, 60, "the first job that runs")
        self.scenario.injure(self)
        self._injured.set()
        injured = time.monotonic()
        for thread in threads:
            thread.join(_REPEAT + pause * len(plan) + 10)
        self._wait_for_ends()
        self.drained = time.monotonic() - injured
        self._judge()
        self.scenario.judge(self)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _length(self) -> float:
        return 5.0 if self.random.random() < self.scenario.long else self.random.uniform(*self.scenario.length)

    def _kind(self) -> str:
        return self.random.choices(list(_SHARES), list(_SHARES.values()))[0]

    def expected_seconds(self) -> float:
        """Return about how long the injuries will take."""
        low, high = self.scenario.pause
        return self.faults * ((low + high) / 2 + self.scenario.lasts * self.site.lease)

    # Submitting

    def _submit(self, plan: list[tuple[str, float, str]], pause: float) -> None:
        for key, seconds, kind in plan:
            self.submit(key, seconds, kind=kind)
            if not self._injured.is_set():
                time.sleep(pause)

    def submit(
        self,
        key: str,
        seconds: float,
        delay: float | None = None,
        ballast: int = 0,
        patience: float = _REPEAT,
        kind: str = "succeeds",
    ) -> str | None:
        """Submit a job, again and again under its key until it is acknowledged or ``patience`` seconds have passed.

        It runs for ``seconds``, ``delay`` seconds later at the earliest; ``ballast`` bytes are among its parameters.
        Returns its UUID, or None.
        """
        client = Api(self.site.url, patience=0)
        parameters = {"ledger": str(self.site.ledger), "seconds": round(seconds, 3), "ballast": "x" * ballast}
        parameters.update(_PARAMETERS[kind])
        end = time.monotonic() + patience
        while time.monotonic() < end:
            try:
                uuid: str = client.submit("chaos-work", parameters, key, delay=delay)["uuid"]
            except StoreFull:
                self.refused_as_full += 1
            except (ServerUnreachable, StoreUnavailable):
                pass
            except ZerogError as error:
                self.report.findings.append(f"a submit was refused: {error}")
                return None
            else:
                with self._lock:
                    self.kinds[uuid] = kind
                    if self.acknowledged.setdefault(key, uuid) != uuid:
                        self.report.findings.append(f"key {key} stands for two jobs")
                return uuid
            time.sleep(0.1)  # as its Retry-After says; the key makes a repeat harmless
        return None

    def key(self) -> str:
        """Return a new idempotency key: new also to a deployment in which this seed was used before."""
        return str(uuids.uuid5(self._keys, f"{self.random.getrandbits(128):x}"))

    def submit_more(self, seconds: float, delay: float | None = None) -> str:
        """Submit a job beside those of the plan; ``TimeoutError`` if that is not possible."""
        uuid = self.submit(self.key(), seconds, delay)
        self.report.attempted += 1
        if uuid is None:
            raise TimeoutError(f"a submit was not acknowledged within {_REPEAT:g} s")
        return uuid

    # Waiting and judging

    def _notice_ends(self) -> None:
        """Look at one job after the other while injuries happen: what has ended once must not change any more."""
        choice = random.Random(self.jobs)
        client = Api(self.site.url, patience=0)
        while not self._injured.wait(_LOOK):
            with self._lock:
                uuids = list(self.acknowledged.values())
            unseen = [uuid for uuid in uuids if uuid not in self.first_ends]
            if unseen:
                with suppress(ZerogError):
                    self._notice(client, choice.choice(unseen))

    def _notice(self, client: Api, uuid: str) -> bool:
        """Look at a job; whether it has ended."""
        view = client.job(uuid)
        if view["state"] not in TERMINAL:
            return False
        self.first_ends.setdefault(uuid, _end(view))
        return True

    def _wait_for_ends(self) -> None:
        client = Api(self.site.url, patience=0)
        end = time.monotonic() + _PATIENCE + _PATIENCE_PER_JOB * self.jobs + self.scenario.puts_off
        open_jobs = set(self.acknowledged.values())
        while open_jobs and time.monotonic() < end:
            for uuid in list(open_jobs):
                with suppress(ZerogError):
                    if self._notice(client, uuid):
                        open_jobs.discard(uuid)
            time.sleep(0.05)

    def _judge(self) -> None:
        report, client = self.report, Api(self.site.url, patience=0)
        report.acknowledged = len(self.acknowledged)
        executions = ledger.by_job(self.executions())
        for uuid in self.acknowledged.values():
            self._judge_job(client, uuid, executions.get(uuid, []))
        report.executed_twice = sum(len(runs) > self.runs_of(uuid) for uuid, runs in executions.items())
        report.overlapping = sum(ledger.overlapping(runs) for runs in executions.values())
        report.superseded = self.site.superseded()
        self._measure_recoveries(client, executions)
        for name in ("lost", "double_result", "stale_write"):
            if getattr(report, name):
                report.findings.append(f"{name.replace('_', ' ')}: {getattr(report, name)}")
        if self.scenario.once and report.executed_twice:
            report.findings.append(f"{report.executed_twice} jobs under a live lease ran twice")
        if report.not_succeeded:
            report.findings.append(f"{report.not_succeeded} jobs did not end as they should")
        if report.faults < _ENOUGH * self.faults:
            report.findings.append(f"only {report.faults} of {self.faults} faults: the work was over before")
        if report.acknowledged < report.attempted:
            report.findings.append(f"{report.attempted - report.acknowledged} submits were never acknowledged")

    def _measure_recoveries(self, client: Api, executions: dict[str, list[ledger.Execution]]) -> None:
        """Note how long each job waited that an injury interrupted, and what the events say of the longest wait if no
        lease and sweep explain it."""
        found: list[tuple[float, float, str]] = []
        for moment, agent in self.interruptions:
            for uuid, runs in executions.items():
                for broken in ledger.interrupted(runs, moment, agent):
                    seconds = ledger.recovery(runs, broken, moment)
                    if seconds is not None:
                        found.append((seconds, moment, uuid))
        self.report.recoveries.extend(seconds for seconds, _, _ in found)
        if not found:
            return
        longest, moment, uuid = max(found)
        if longest > self.site.lease + self.site.sweep + 1:
            self.report.longest = [f"{longest:.2f} s, job {uuid}", *_since(client, uuid, moment)]

    def _judge_job(self, client: Api, uuid: str, executions: list[ledger.Execution]) -> None:
        report = self.report
        try:
            view = client.job(uuid)
        except ZerogError:
            report.lost += 1
            return
        if view["state"] not in TERMINAL:
            report.lost += 1
            report.findings.append(f"job {uuid} is {view['state']}: {client.explain(uuid)['message']}")
            return
        report.terminal += 1
        if any(one.attempt > view["attempt"] for one in executions):
            report.findings.append(f"job {uuid} ended in attempt {view['attempt']} and a later one has run")
        if self.first_ends.get(uuid, _end(view)) != _end(view):
            report.double_result += 1
        fails = self.kinds.get(uuid) == "fails"
        if view["state"] != ("failed" if fails else "succeeded"):
            report.not_succeeded += 1
            return
        way = "raise" if fails else "end"
        if not any(one.attempt == view["attempt"] and one.way == way for one in executions):
            report.findings.append(f"job {uuid} has {view['state']} in an attempt of which the ledger does not say so")
        if fails:
            if view["counters"]["errors"] != _RUNS["fails"]:
                report.findings.append(f"job {uuid} has failed after {view['counters']['errors']} errors")
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
            time.sleep(self.random.uniform(*self.scenario.pause))
            yield number

    def expect(self, holds: bool, finding: str) -> None:
        """Note what did not hold."""
        if not holds:
            self.report.findings.append(finding)

    def expect_in_time(self, holds: bool, finding: str) -> None:
        """Note what took longer than it may."""
        if not holds:
            self.report.late.append(finding)

    def recovered(self, holds: Callable[[], Any], bound: float, what: str, since: float | None = None) -> None:
        """Wait until something holds again, and note how long that took; after ``bound`` seconds it is late.

        ``since`` is the moment of the fault or of its end, monotonic, if that is not now.  What fails holds not yet.
        """

        def quietly() -> Any:
            with suppress(ZerogError):
                return holds()

        moment = time.monotonic() if since is None else since
        try:
            until(quietly, _NEVER * bound, what)
        except TimeoutError as error:
            self.report.unrecovered += 1
            self.expect(False, str(error))
            return
        seconds = time.monotonic() - moment
        self.report.recoveries.append(seconds)
        self.expect_in_time(seconds <= bound, f"after {seconds:.2f} s and not {bound:g} s: {what}")

    def executions(self) -> list[ledger.Execution]:
        """Return what the ledger tells, in the order of the starts."""
        return ledger.read(self.site.ledger)

    def runs_of(self, uuid: str) -> int:
        """Return how often a job runs when nothing is injured."""
        return _RUNS[self.kinds.get(uuid, "succeeds")]

    def any_started(self, uuids: Collection[str]) -> bool:
        """Return whether one of these jobs has started."""
        return any(one.uuid in uuids for one in self.executions())

    def submit_long(self, seconds: float) -> None:
        """Submit some jobs of this length, and wait until one of them runs."""
        long = [self.submit_more(seconds) for _ in range(4)]
        with suppress(TimeoutError):
            until(lambda: self.any_started(long), 30, "a long job that runs")

    def under_way(self, moment: float) -> list[ledger.Execution]:
        """Return what ran at a moment."""
        return [one for one in self.executions() if one.started < moment and (one.ended is None or one.ended > moment)]

    def busy_agents(self) -> list[Any]:
        """Return the agents under which something runs now, as far as the ledger says."""
        running = {one.agent for one in self.executions() if one.ended is None}
        return [agent for agent in self.site.agents if agent.pid in running]


def _since(client: Api, uuid: str, moment: float) -> list[str]:
    """Return the events of a job with the seconds since a moment of the monotonic clock."""
    began = moment + time.time() - time.monotonic()
    with suppress(ZerogError):
        return [
            f"{datetime.fromisoformat(one['at']).timestamp() - began:+.2f} s {one['message']}"
            for one in client.events(uuid)
        ]
    return []


def _end(view: dict[str, Any]) -> tuple[Any, ...]:
    return view["state"], view["resultCode"], view["attempt"], view["finishedAt"], str(view["result"])
