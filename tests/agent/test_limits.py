"""What jobs hold of an agent never exceeds what it has, and nothing waits where there is room."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.deployment import TERMINAL, Deployment
from tests.services import wait_until

FULL = bool(os.environ.get("TESTS_FULL"))
#: Random jobs in all, and in one example.
JOBS, EACH = (2000, 100) if FULL else (120, 40)

#: What each agent has: bytes, cores, labels.
AGENTS = {"big": (1000, 4.0, ("gpu",)), "small": (400, 1.0, ())}
SLOTS = 3


@dataclass(frozen=True)
class Wanted:
    """One random job."""

    ram: int
    cpus: float
    label: bool
    seconds: float

    def fits(self, agent: str, ram: int, cpus: float) -> bool:
        """Whether an agent with so much left can run it."""
        return self.ram <= ram and self.cpus <= cpus and (not self.label or "gpu" in AGENTS[agent][2])


# Of a few sizes, so that tubes are shared.
JOB = st.builds(
    Wanted,
    ram=st.sampled_from([0, 0, 100, 250, 400, 700]),
    cpus=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]),
    label=st.sampled_from([False, False, False, True]),
    seconds=st.sampled_from([0.01, 0.05, 0.15]),
)


@pytest.fixture(scope="module", params=["direct", "http"])
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server and two unequal agents."""
    made = Deployment(tmp_path_factory.mktemp("limits"), http=request.param == "http", lease="20", sweep="2")
    made.start_server()
    for name, (ram, cpus, labels) in AGENTS.items():
        made.start_agent(name=name, ram=ram, cpus=cpus, labels=",".join(labels), slots=SLOTS)
    for name in AGENTS:
        wait_until(lambda name=name: made.client.get(f"/agents/{name}").status_code == 200, 15, name)  # type: ignore[misc]
    yield made
    made.close()


@pytest.mark.requirement("M14")
def test_limits_are_never_exceeded_and_nothing_waits_where_there_is_room(zerog: Deployment, tmp_path: Path) -> None:
    number = iter(range(10_000))

    @settings(
        max_examples=JOBS // EACH, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(JOB, min_size=EACH, max_size=EACH))
    def run(wanted: list[Wanted]) -> None:
        judge(zerog, wanted, tmp_path / f"ledger-{next(number)}")

    run()


def judge(zerog: Deployment, wanted: list[Wanted], path: Path) -> None:
    jobs: dict[str, Wanted] = {}
    submitted: dict[str, float] = {}
    for one in wanted:
        body = {"path": str(path), "seconds": one.seconds}
        uuid = zerog.submit("holding", body, params={"delay": "3600"})
        labels = ["gpu"] if one.label else []
        change = {"notBefore": None, "limits": {"ram": one.ram, "cpus": one.cpus, "labels": labels}}
        answer = zerog.client.patch(f"/jobs/{uuid}", json=change, headers={"If-Match": "*"})
        assert answer.status_code == 200, answer.text
        jobs[uuid], submitted[uuid] = one, time.monotonic()
    possible = [uuid for uuid, one in jobs.items() if any(one.fits(name, *AGENTS[name][:2]) for name in AGENTS)]
    wait_until(lambda: all(state(zerog, uuid) in TERMINAL for uuid in possible), 60, "the jobs that can run")
    agents = {zerog.job(uuid)["agent"]: None for uuid in possible}
    assert set(agents) <= set(AGENTS)
    for uuid in set(jobs) - set(possible):
        assert zerog.client.get(f"/jobs/{uuid}/explain").json()["reason"] == "no_agent_fits"
        zerog.client.delete(f"/jobs/{uuid}")
    check(jobs, submitted, path.read_text().splitlines(), {uuid: zerog.job(uuid)["agent"] for uuid in possible})


def state(zerog: Deployment, uuid: str) -> str:
    try:
        return str(zerog.client.get(f"/jobs/{uuid}/progress").json()["state"])
    except httpx.HTTPError:
        return ""


def check(jobs: dict[str, Wanted], submitted: dict[str, float], lines: list[str], agent_of: dict[str, str]) -> None:
    """Go through the moments at which something began or ended."""
    moments = sorted((float(at), word, uuid) for at, word, uuid, *_ in (line.split() for line in lines))
    assert len(moments) == 2 * len(agent_of), "each ran once"
    held: dict[str, list[str]] = {name: [] for name in AGENTS}
    began: set[str] = set()
    #: Since when each job could have begun on an agent, as far as that agent's room says.
    free_since: dict[tuple[str, str], float] = {}
    for at, word, uuid in moments:
        agent = agent_of[uuid]
        if word == "begin":
            began.add(uuid)
            held[agent].append(uuid)
            for name in AGENTS:
                free_since.pop((uuid, name), None)
        else:
            held[agent].remove(uuid)
        ram = sum(jobs[one].ram for one in held[agent])
        cpus = sum(jobs[one].cpus for one in held[agent])
        assert ram <= AGENTS[agent][0], f"{agent} holds {ram} bytes"
        assert cpus <= AGENTS[agent][1] + 1e-9, f"{agent} holds {cpus} cores"
        for name in AGENTS:
            idle = not held[name]
            for waiting in set(agent_of) - began:
                fits = idle and jobs[waiting].fits(name, *AGENTS[name][:2]) and submitted[waiting] <= at
                if not fits:
                    free_since.pop((waiting, name), None)
                    continue
                since = free_since.setdefault((waiting, name), at)
                assert at - since <= 1.0, f"{waiting} waits for {at - since:.2f} s while {name} is idle"
