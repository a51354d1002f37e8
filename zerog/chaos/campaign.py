"""Runs scenarios one after the other and says what was found."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zerog import config
from zerog.chaos.report import Report
from zerog.chaos.run import Run, Scenario
from zerog.chaos.scenarios import SCENARIOS
from zerog.chaos.site import Site
from zerog.client import Api
from zerog.exceptions import BadSetting, UnknownType, ZerogError

logger = logging.getLogger(__name__)

_AGENTS, _SLOTS = 4, 2
_LEASE = _SWEEP = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be run: ``jobs`` and ``faults`` stand for the sizes of the scenarios, seconds for ``lease``."""

    scenarios: Sequence[str]
    datastore: str = "sqlite"
    queue: str = "sqlite"
    jobs: int | None = None
    faults: int | None = None
    seed: int | None = None
    campaign: bool = False
    server: str | None = None
    servers: int = 1
    agents: str = "direct"
    lease: float = _LEASE
    sweep: float = _SWEEP
    keep: bool = False


def run(wanted: Wanted, say: Callable[[str], None]) -> list[Report]:
    """Run the scenarios and return their reports; ``say`` gets each as text."""
    possible = [name for name, one in SCENARIOS.items() if wanted.server is None or not one.lone]
    chosen = [_scenario(name, wanted) for name in wanted.scenarios or possible]
    _check(wanted)
    seed = wanted.seed if wanted.seed is not None else random.SystemRandom().randrange(2**31)
    reports = []
    for scenario in chosen:
        done = _run_one(scenario, wanted, seed)
        say(done.text())
        reports.append(done)
    return reports


def _check(wanted: Wanted) -> None:
    """Raise ``BadSetting`` for what no scenario could begin with."""
    if not (math.isfinite(wanted.lease) and math.isfinite(wanted.sweep)):
        raise BadSetting("lease and sweep are seconds")
    if wanted.datastore != "sqlite":
        config.load(None, {"datastore": wanted.datastore}, {})
    if wanted.server is not None:
        try:
            Api(wanted.server, patience=0).type("chaos-work")
        except UnknownType as error:
            raise BadSetting(f"{wanted.server} does not serve the application zerog.chaos") from error


def _scenario(name: str, wanted: Wanted) -> Scenario:
    scenario = SCENARIOS.get(name.upper())
    if scenario is None:
        raise BadSetting(f"there is no scenario {name!r}, only {', '.join(SCENARIOS)}")
    if wanted.server is not None and scenario.lone:
        raise BadSetting(f"{scenario.name} needs a deployment of its own: with --server only agents are injured")
    return scenario


def _run_one(scenario: Scenario, wanted: Wanted, seed: int) -> Report:
    jobs, faults = scenario.campaign if wanted.campaign else scenario.every_day
    queue = scenario.queue or wanted.queue
    site = Site(
        scenario.store or wanted.datastore,
        queue,
        wanted.lease,
        wanted.sweep,
        _AGENTS,
        _SLOTS,
        wanted.server,
        wanted.servers,
        wanted.agents,
    )
    one = Run(
        scenario,
        site,
        wanted.jobs if wanted.jobs is not None else jobs,
        wanted.faults if wanted.faults is not None else faults,
        seed,
    )
    one.report.size = "campaign" if wanted.campaign else "day"
    try:
        scenario.prepare(site)
        return one.go()
    except (TimeoutError, ZerogError) as error:
        one.report.findings.append(f"the run broke off: {error}")
        return one.report
    finally:
        site.close(keep=wanted.keep or not one.report.clean)
        if not one.report.clean:
            logger.warning("what the processes said is kept in %s", site.folder)


def as_json(reports: Sequence[Report]) -> str:
    """Return the reports as JSON."""
    return json.dumps([one.view() for one in reports])
