"""Fifty agents: eight real processes, direct and over HTTP, that are killed or stopped, and others that a test speaks.

Those that the test speaks come to grief too: they forget what they had and begin anew, or are silent for longer than
a lease and then say what nobody may hear any more.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.services import Beanstalkd
from tests.speaker import Speaker
from zerog.chaos.run import Run
from zerog.chaos.scenarios import SCENARIOS
from zerog.chaos.site import Site

FULL = bool(os.environ.get("TESTS_FULL"))
#: Scenario → jobs and faults, in full and every day; how many agents the test speaks; seconds of a lease.
SIZES = {"K1": ((2500, 120), (150, 8)), "P1": ((2500, 12), (80, 2))}
SPOKEN = 42 if FULL else 10
LEASE = 3.0


class Crowd:
    """Agents that one process speaks, each in a thread of its own."""

    def __init__(self, site: Site, count: int, seed: int) -> None:
        self._site = site
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._speak, args=(number, random.Random(seed + number)), daemon=True)
            for number in range(count)
        ]
        self.done = self.forgotten = self.refused = 0
        self.broken: list[str] = []  # what ended threads that should not end
        self._lock = threading.Lock()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)

    def _speak(self, number: int, choices: random.Random) -> None:
        with httpx.Client(base_url=self._site.url, timeout=15) as client:
            agent = Speaker(client, f"spoken-{number}", "chaos-work")
            # Of ten, one forgets its first job and one is silent over it; later all come to grief now and then.
            fate = {0: 0.0, 1: 0.025}.get(number % 10, 1.0)
            while not self._ended.is_set():
                try:
                    agent.hear()
                    given = agent.take(2)
                    if given is not None:
                        self._run(agent, given, fate)
                        fate = choices.random()
                except (httpx.HTTPError, AssertionError):
                    self._ended.wait(0.2)  # the server is not there yet, or not any more
                except Exception as error:
                    self.broken.append(repr(error))
                    raise

    def _run(self, agent: Speaker, given: dict[str, Any], fate: float) -> None:
        """Run a job as its class does, or come to grief."""
        parameters = given["parameters"]
        self._note("start", given, parameters)
        if fate < 0.02:
            agent.begin_anew()
            agent.hear()
            with self._lock:
                self.forgotten += 1
            return
        if fate < 0.03:
            self._ended.wait(2 * LEASE)
        end = time.monotonic() + parameters["seconds"]
        while (left := end - time.monotonic()) > 0 and not self._ended.is_set():
            time.sleep(min(left, LEASE / 6))
            agent.hear(given)
        outcome: dict[str, Any] = {"outcome": "succeeded"}
        for way, how in (("raise", "failed"), ("requeue", "requeued")):
            asked = parameters[{"raise": "raises", "requeue": "requeues"}[way]]
            if outcome["outcome"] == "succeeded" and asked > self._noted(way, given):
                self._note(way, given, parameters)
                outcome = {"outcome": how, **({"error": {"message": "as was asked"}} if how == "failed" else {})}
        if outcome["outcome"] == "succeeded":
            self._note("end", given, parameters)
            outcome["data"] = {"uuid": given["uuid"], "attempt": given["attempt"]}
        answer = agent.client.post(f"{given['href']}/outcome", json=outcome)
        with self._lock:
            self.done += answer.status_code == 200
            self.refused += answer.status_code == 409

    def _note(self, what: str, given: dict[str, Any], parameters: dict[str, Any]) -> None:
        # Of each thread another "process": the judge tells executions apart by that.
        line = f"{what} {given['uuid']} {given['attempt']} {time.monotonic():.6f} {threading.get_ident()} 1\n"
        descriptor = os.open(parameters["ledger"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def _noted(self, what: str, given: dict[str, Any]) -> int:
        with open(given["parameters"]["ledger"], "rb") as ledger:
            return ledger.read().count(f"{what} {given['uuid']} ".encode())


@pytest.mark.requirement("M2", "M7", "M8", "M10", "M13")
@pytest.mark.parametrize("name", sorted(SIZES) if FULL else ["K1"])
def test_nothing_is_lost_and_nothing_finishes_twice_under_fifty_agents(name: str, beanstalkd: Beanstalkd) -> None:
    jobs, faults = SIZES[name][0 if FULL else 1]
    site = Site("sqlite", "beanstalkd", LEASE, LEASE, 8 if FULL else 4, 2, speak="both")
    crowd = Crowd(site, SPOKEN, 11)
    # What the test's own agents do to jobs is no injury of the scenario, so it is judged by what was lost alone.
    scenario = replace(SCENARIOS[name], judge=lambda run: None)
    run = Run(scenario, site, jobs, faults, 11)
    try:
        crowd.start()
        report = run.go()
    finally:
        crowd.stop()
        site.close(keep=False)
    assert report.findings == []
    assert (report.lost, report.double_result, report.stale_write, report.not_succeeded) == (0, 0, 0, 0)
    assert report.acknowledged == report.terminal >= jobs
    assert report.faults >= 0.7 * faults
    assert crowd.broken == []
    assert crowd.forgotten > 0, "some have forgotten what they ran"
    assert crowd.done > 0.2 * jobs * SPOKEN / (SPOKEN + 16), "the test's own agents have worked as well"
    print(f"{name}: {report.text()}\n  spoken: done {crowd.done}, forgotten {crowd.forgotten}, refused {crowd.refused}")
