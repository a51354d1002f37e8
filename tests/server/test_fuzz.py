"""schemathesis against ``/openapi.json``: whatever it sends, no 5xx, and every operation does its work too."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.deployment import Deployment, deployed
from tests.following.jobs import Apart
from tests.speaker import Speaker
from zerog.clock import Clock
from zerog.consumers import Consumers
from zerog.datastore.sqlite import SQLiteDatastore

#: Requests to each operation: with ``bin/test --full`` ten thousand in all.
EXAMPLES = 360 if os.environ.get("TESTS_FULL") else 8


@pytest.fixture(scope="module")
def zerog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A deployment that runs what it is sent, but nothing large or long."""
    with deployed(tmp_path_factory.mktemp("fuzz"), applications="tests") as made:
        yield made


@pytest.mark.requirement("G16", "G18")
def test_no_operation_answers_5xx_and_each_answers_2xx(zerog: Deployment, tmp_path: Path) -> None:
    statuses: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    failures: list[str] = []
    finished = zerog.submit("return", {"what": "dict"})
    zerog.wait(finished)
    schema = schemathesis.openapi.from_url(f"{zerog.url}/openapi.json")
    for found in schema.get_all_operations():
        if found.ok().path not in ("/broken-endpoint", "/ends", "/defects"):  # whose defects are wanted
            ask_many(zerog, found.ok(), finished, statuses, failures)
    assert failures == []
    total = sum(sum(counter.values()) for counter in statuses.values())
    assert total >= EXAMPLES * len(statuses) * 0.5, statuses
    for label, counter in statuses.items():
        good = sum(count for status, count in counter.items() if status < 300)
        assert good * 10 >= sum(counter.values()), f"{label}: {dict(counter)}"


def ask_many(
    zerog: Deployment,
    operation: Any,
    finished: str,
    statuses: dict[str, collections.Counter[int]],
    failures: list[str],
) -> None:
    """Send an operation's requests, every second one such that it should succeed."""
    turn = cycle((True, False))
    label = f"{operation.method.upper()} {operation.path}"

    @settings(
        max_examples=EXAMPLES, database=None, deadline=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if next(turn):
            make_meaningful(case, operation, zerog, finished)
        if operation.path == "/jobs:prune":
            spare_the_young(case)
        answer = send(zerog, case)
        statuses[label][answer.status_code] += 1
        if answer.status_code >= 500 or "Traceback" in answer.text[:10_000]:
            failures.append(f"{label}: {answer.status_code} {answer.text[:300]}")

    ask()


def spare_the_young(case: Any) -> None:
    """Let a prune remove nothing that the other operations need."""
    if isinstance(case.body, dict) and isinstance(case.body.get("olderThan"), (int, float)):
        case.body["olderThan"] += 100_000


#: Bodies of operations that take other things than parameters.
BODIES: dict[str, dict[str, Any] | None] = {
    "/jobs:prune": {"olderThan": 0},
    "/jobs:retry": {"type": "return"},
    "/types/{jobType}/pause": {"message": "for a test"},
    "/types/{jobType}/resume": None,
    "/sums": {"last": 5},
    "/agents": {"id": "fuzz"},
    "/agents/commands": {"command": "resume", "label": "fuzz"},
    "/agents/{id}/commands": {"command": "resume"},
    "/agents/{id}/commands/{number}": {"state": "applied"},
    "/agents/{id}/exceptions": {"type": "ValueError", "message": "for a test"},
    "/agents/{id}/assignments": {},
    "/agents/{id}/turns": {},
    "/topics/{name}": {"of": "the fuzz"},
    "/jobs/{uuid}/attempts/{attempt}": {"completeness": 0.5},
    "/jobs/{uuid}/attempts/{attempt}/outcome": {"outcome": "succeeded"},
    "/jobs/{uuid}/attempts/{attempt}/questions": {"question": "parents"},
}


def agent_of_the_test(zerog: Deployment) -> Speaker:
    """An agent that has what no other has."""
    agent = Speaker(zerog.client, "fuzz", "noop-later", labels=["fuzz"])
    assert agent.hear(state="running").status_code in (200, 201)
    return agent


def attempt_of_the_test(zerog: Deployment) -> dict[str, str]:
    """The parts of the URL of an attempt that runs under that agent."""
    agent = agent_of_the_test(zerog)
    uuid = zerog.submit("noop-later?delay=1000", {})
    change = {"notBefore": None, "limits": {"labels": ["fuzz"]}}
    assert zerog.client.patch(f"/jobs/{uuid}", json=change, headers={"If-Match": "*"}).status_code == 200
    given = agent.take(10)
    assert given is not None
    return {"uuid": given["uuid"], "attempt": str(given["attempt"])}


def number_of_the_test(zerog: Deployment) -> str:
    """The number of a command to that agent."""
    agent_of_the_test(zerog)
    answer = zerog.client.post("/agents/fuzz/commands", json={"command": "resume"})
    return str(answer.json()["number"])


def consumer_of_the_test(zerog: Deployment) -> str:
    """The name of a consumer that has run and does so no more."""
    store = SQLiteDatastore(zerog.folder / "var" / "zerog.db", "zerog", 5)
    Consumers(store, Clock()).make(Apart, "tests.following")
    store.close()
    return Apart.name


def make_meaningful(case: Any, operation: Any, zerog: Deployment, finished: str) -> None:
    """Give a case what makes it succeed: a job that exists, parameters that fit, no query that may not."""
    if "uuid" in (case.path_parameters or {}):
        cancels = operation.path.endswith("/cancel") or operation.method.upper() == "DELETE"
        uuid = zerog.submit("noop-later?delay=1000", {}) if cancels else finished
        if operation.path.endswith("/retry"):
            uuid = zerog.submit("return?delay=1000", {"what": "none"})
            zerog.client.delete(f"/jobs/{uuid}")
            case.body = {"what": "none"}
        if operation.method.upper() == "PATCH":
            uuid = zerog.submit("noop-later?delay=1000", {})
            case.headers = {"If-Match": "*"}
            case.body = {"priority": 5}
        case.path_parameters = {"uuid": uuid}
        if "{attempt}" in operation.path:
            case.path_parameters = attempt_of_the_test(zerog)
            case.headers = {}
    if "id" in (case.path_parameters or {}):
        agent_of_the_test(zerog)
        case.path_parameters = {"id": "fuzz"}
        if "{number}" in operation.path:
            case.path_parameters = {"id": "fuzz", "number": number_of_the_test(zerog)}
        case.headers = {}
    if "jobType" in (case.path_parameters or {}):
        case.path_parameters = {"jobType": "return"}
        if operation.method.upper() == "POST" and operation.path not in BODIES:
            case.body = {"what": "none"}
        if operation.path.endswith(":batch"):
            case.body = [{"parameters": case.body, "name": "a"}, {"parameters": case.body, "parents": ["a"]}]
    elif operation.path.startswith("/run/"):
        name = operation.path.removeprefix("/run/")
        case.body = zerog.client.get(f"/types/{name}").json()["example"]
    if BODIES.get(operation.path) is not None and operation.method.upper() != "GET":
        case.body = {**(BODIES[operation.path] or {})}
    if operation.path == "/topics/{name}":
        case.path_parameters = {"name": "fuzz"}
        assert zerog.client.post("/topics/fuzz", json="something").status_code == 201
    if operation.path == "/consumers/{name}":
        case.path_parameters = {"name": consumer_of_the_test(zerog)}
    if operation.path == "/counts/{key}":
        case.path_parameters = {"key": "fuzz"}
    if operation.path == "/greetings/{name}":
        case.path_parameters = {"name": "world"}
    case.query = {"last": "5"} if (operation.path, operation.method.upper()) == ("/sums", "GET") else {}


def send(zerog: Deployment, case: Any) -> httpx.Response:
    """Send what the case describes, or as much of it as HTTP can carry."""
    prepared = case.as_transport_kwargs(base_url=zerog.url)
    wanted = ("method", "url", "json", "data", "headers", "params")
    arguments = {name: prepared[name] for name in wanted if prepared.get(name) is not None}
    if "data" in arguments:
        arguments["content"] = arguments.pop("data")
    return zerog.client.request(**arguments)
