"""Injuries to processes: they are killed or stopped, and the queue forgets."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from zerog.chaos import ledger
from zerog.chaos.run import TERMINAL, Run
from zerog.chaos.site import kill, until

#: Of so many kills one is aimed at an agent under which a job runs.  Were they all, no long job would ever come to its
#: end, and those that wait behind it would tell nothing of recovery.
_AIMED = 4

#: Times that jobs are submitted so that one of them runs under an agent of the run: in the deployment of somebody else
#: its own agents take some.
_TRIES = 10

#: Seconds without anything to injure after which more jobs are submitted.
_IDLE = 2.0

T = TypeVar("T")


def kill_agents(run: Run) -> None:
    for number in run.each_fault():
        aimed: list[Any] = []
        if number % _AIMED == 0:
            with suppress(TimeoutError):
                aimed = until(run.busy_agents, 10, "an agent under which a job runs")
        agent = run.random.choice(aimed or run.site.agents)
        run.interruptions.append((run.site.replace_agent(agent), agent.pid))
        run.report.faults += 1


def judge_k1(run: Run) -> None:
    p50, p99 = run.report.quantile(0.5), run.report.quantile(0.99)
    bound = run.site.lease + run.site.sweep + 1
    run.expect(p50 is not None, "no kill interrupted a job: nothing is known of recovery")
    run.expect_in_time(p50 is None or p50 <= 1.0, f"median recovery {p50} s: more than 1 s")
    run.expect_in_time(p99 is None or p99 <= bound, f"p99 of recovery {p99} s: more than {bound:g} s")


def kill_children(run: Run) -> None:
    killer = run.site.client.submit("chaos-killer", {"ledger": str(run.site.folder / "killer")})["uuid"]
    for _ in run.each_fault():
        victim = _any_of(run, lambda: _running(run))
        moment = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
            run.report.faults += 1
            _await_record(run, victim, moment)
    view = until(
        lambda: v if (v := run.site.client.job(killer))["state"] in TERMINAL else None, 60, "the killer's quarantine"
    )
    right = (view["state"], view["reason"], view["counters"]["crashes"]) == ("failed", "crashed", 3)
    run.expect(right, f"the job that always kills its child ended as {view['state']} {view['reason']}")


def _any_of(run: Run, look: Callable[[], list[T]]) -> T:
    """Return one of what there is to be injured; jobs are submitted as long as nothing is, since those of the plan may
    all have ended."""
    for _ in range(_TRIES):
        with suppress(TimeoutError):
            return run.random.choice(until(look, _IDLE, "a job that runs"))
        run.submit_long(run.random.uniform(0.5, 2.0))
    raise TimeoutError(f"{_TRIES} times no agent of this run got a job")


def _running(run: Run) -> list[ledger.Execution]:
    """Return what runs now under agents of this run: not come to its end, its process still the child of its agent."""
    own = {agent.pid for agent in run.site.agents}
    return [one for one in run.executions() if one.ended is None and one.agent in own and _parent(one.pid) == one.agent]


def _await_record(run: Run, victim: ledger.Execution, moment: float) -> None:
    """Wait until the record no longer says that this attempt runs, and note how long that took."""

    def over() -> bool:
        view = run.site.client.job(victim.uuid)
        return bool(view["state"] != "running" or view["attempt"] != victim.attempt)

    try:
        until(over, 10, "the record of a crash")
    except TimeoutError:
        run.expect(False, f"job {victim.uuid}: its child's end was not recorded within 10 s")
        run.report.unrecovered += 1
        return
    seconds = time.monotonic() - moment
    if run.site.client.job(victim.uuid)["counters"]["crashes"]:  # else it had ended just before it was killed
        run.report.recoveries.append(seconds)


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def judge_k2(run: Run) -> None:
    p99 = run.report.quantile(0.99)
    run.expect_in_time(p99 is None or p99 <= 1.0, f"p99 from a child's end to its record {p99} s: more than 1 s")


def kill_server(run: Run) -> None:
    """Kill a server, one of several if there are; it is started again at once."""
    for _ in run.each_fault():
        moment = time.monotonic()
        kill(run.random.choice(list(run.site.servers.values())))
        run.report.faults += 1
        run.site.start_servers()
        run.report.recoveries.append(time.monotonic() - moment)


def judge_k3(run: Run) -> None:
    listed = [view["uuid"] for view in run.site.client.jobs("chaos-work", limit=10 * run.jobs)]
    run.expect(len(listed) == len(set(listed)), "a job is listed twice")
    run.expect(set(run.acknowledged.values()) <= set(listed), "an acknowledged job is not listed")
    run.expect(len(listed) <= run.jobs, f"{len(listed)} jobs for {run.jobs} keys")


def kill_queue(run: Run) -> None:
    for _ in run.each_fault():
        assert run.site.beanstalkd is not None
        kill(run.site.beanstalkd)
        run.report.faults += 1
        time.sleep(run.random.uniform(0, 5))
        run.site.start_queue()


def judge_k4(run: Run) -> None:
    run.report.recoveries.append(run.drained)
    run.expect_in_time(run.drained <= 15, f"drained {run.drained:.1f} s after the last restart: more than 15 s")


def wipe_queue(run: Run) -> None:
    for _ in run.each_fault():
        if not _open(run):
            break  # there is nothing left that the queue could forget
        run.site.wipe_queue()
        run.report.faults += 1
        run.recovered(lambda: _is_whole(run), run.site.sweep + 5, "a whole queue")


def _open(run: Run) -> int:
    """Return how many jobs have not started yet: by the ledger, since to list them takes longer than they may be away
    from the queue."""
    return len(run.acknowledged) - len({one.uuid for one in run.executions()})


def _is_whole(run: Run) -> bool:
    """Return whether the queue has an entry for every job that has not started yet, or more."""
    waiting = _open(run)  # before the queue, which only gets shorter by itself
    queue = run.site.client.type("chaos-work")["queue"]
    return queue is not None and queue["ready"] + queue["delayed"] + queue["reserved"] >= waiting


def stop_agents(run: Run) -> None:
    for _ in run.each_fault():
        run.submit_long(run.random.uniform(1.0, 2.0))  # one that is not over before its agent stops
        agent = _any_of(run, run.busy_agents)
        run.stops.append((time.monotonic(), agent.pid))
        agent.send_signal(signal.SIGSTOP)
        run.report.faults += 1
        time.sleep(run.random.uniform(2, 4) * run.site.lease)
        agent.send_signal(signal.SIGCONT)


def judge_p1(run: Run) -> None:
    executions = ledger.by_job(run.executions())
    for moment, agent in run.stops:
        for broken in run.under_way(moment):
            seconds = ledger.recovery(executions[broken.uuid], broken, moment)
            if broken.agent == agent and seconds is not None:
                run.report.recoveries.append(seconds)
    superseded, faults = run.report.superseded, run.report.faults
    run.expect(2 * superseded >= faults, f"{superseded} superseded attempts after {faults} stops under a job")


def stop_queue_and_server(run: Run) -> None:
    for number in run.each_fault():
        run.submit_long((run.scenario.lasts + 1) * run.site.lease)
        process = run.site.beanstalkd if number % 2 == 0 else next(iter(run.site.servers.values()))
        assert process is not None
        moment = time.monotonic()
        process.send_signal(signal.SIGSTOP)
        run.report.faults += 1
        time.sleep(run.scenario.lasts * run.site.lease)
        process.send_signal(signal.SIGCONT)
        run.outages.append((moment, time.monotonic()))


def judge_p2(run: Run) -> None:
    for moment, _ in run.outages:
        run.expect(bool(run.under_way(moment)), "no job ran when beanstalkd, or the server, was stopped")
