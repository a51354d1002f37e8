"""Processing requests, over HTTP and as processes: the rules, and that every execution has one result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid as uuids
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deployment import Deployment, answers, over_pair
from tests.documented import run_session
from tests.services import Process, free_port, wait_until
from zerog.chaos.site import until
from zerog.datastore.faulty import Faults

PAIRS = [("sqlite", "sqlite"), ("couchbase", "beanstalkd")]
EVERY_DAY = PAIRS[1:]
FULL = bool(os.environ.get("TESTS_FULL"))
#: How often twenty execute one request at once.
ROUNDS = 100 if FULL else 25

#: What the processing server's own documentation shows, key by key; the times are of another form there.
EXECUTION = json.loads("""
{
    "id": "60e8d09b-7a8d-4580-a6d2-200708e56e7a",
    "force_error": true,
    "creation_date": "2020-11-07 16:31:58.103057",
    "processing_request": {
        "id": "1be8f5ad-9472-4daf-89db-ce6484449940",
        "payload": {
            "message": "ping",
            "parameterA": "valueA",
            "parameterB": false,
            "parameterC": ["abc", "xyz"],
            "parameterD": {"d1": 1, "d2": 2}
        }
    }
}
""")
RESULT = {
    "id": "c1626f00-39a9-4e62-9625-718e38508310",
    "is_success": False,
    "processing_start_time": "2020-11-07 16:26:04.319542",
    "processing_end_time": "2020-11-07 16:26:14.329619",
    "processing_total_seconds": 10.010077,
    "outputs": {},
    "execution": EXECUTION,
}
PAYLOAD = EXECUTION["processing_request"]["payload"]
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@contextmanager
def processing(
    folder: Path, request: pytest.FixtureRequest, pair: tuple[str, str], listener: bool = True, **settings: Any
) -> Iterator[Deployment]:
    wanted = {"processing_seconds": "0.1", **settings}
    with over_pair(folder, request, pair, "workers.processing", **wanted) as made:
        if listener:
            made.start_daemon("processing", "listener")
        yield made


@pytest.fixture(scope="module", params=EVERY_DAY, ids="-".join)
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with processing(tmp_path_factory.mktemp("processing"), request, request.param) as made:
        made.start_agent()
        yield made


def create(zerog: Deployment, payload: Any = None, **more: Any) -> str:
    answer = zerog.client.post("/requests", json={"payload": payload}, **more)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def execute(zerog: Deployment, request: str, force_error: bool = False, **more: Any) -> httpx.Response:
    return zerog.client.post(f"/requests/{request}/executions", json={"force_error": force_error}, **more)


def results(zerog: Deployment, request: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = zerog.client.get(f"/requests/{request}/results").json()["results"]
    return found


def wait_for(zerog: Deployment, what: Callable[[], Any], text: str, seconds: float = 30.0) -> Any:
    try:
        return until(what, seconds, text)
    except TimeoutError as error:
        logs = "\n".join(f"{name}:\n{zerog.log(name)[-4000:]}" for name in ("worker", "processing"))
        pytest.fail(f"{error}\n{logs}")


def wait_for_results(
    zerog: Deployment, request: str, count: int, meanwhile: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    def there() -> bool:
        meanwhile()
        return len(results(zerog, request)) >= count

    wait_for(zerog, there, f"{count} results of {request}")
    return results(zerog, request)


def topic(zerog: Deployment, name: str) -> list[Any]:
    found, url = [], f"/topics/{name}?limit=1000"
    while url:
        page = zerog.client.get(url).json()
        found += [one["value"] for one in page["items"]]
        url = page["next"]
    return found


def letters(zerog: Deployment, request: str) -> list[dict[str, Any]]:
    found = [one for one in topic(zerog, "dead-letters") if "processing_request" in one]
    return [one for one in found if one["processing_request"]["id"] == request]


def check_like(shown: Any, seen: Any, where: str = "") -> None:
    """Check that what is seen has the keys that are shown, each of the same type, and ``href`` at most beside them."""
    assert type(seen) is type(shown), where
    if isinstance(shown, dict):
        assert list(seen)[: len(shown)] == list(shown) or set(seen) - {"href"} == set(shown), where
        for key, value in shown.items():
            check_like(value, seen[key], f"{where}/{key}")
    elif isinstance(shown, list):
        assert len(seen) == len(shown), where
        for number, value in enumerate(shown):
            check_like(value, seen[number], f"{where}/{number}")
    elif re.fullmatch(r"\d{4}-\d\d-\d\d .*", str(shown)):
        assert TIME.fullmatch(seen), where
    elif re.fullmatch(r"[0-9a-f-]{36}", str(shown)):
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", seen), where


@pytest.mark.requirement("S1", "S2", "S4", "S5", "S6", "S7", "S8", "S10", "S13", "S14", "S15", "S16", "S17")
def test_a_request_is_executed_until_it_succeeds_and_the_results_are_as_documented(zerog: Deployment) -> None:
    made = zerog.client.post("/requests", json={"payload": PAYLOAD})
    assert (made.status_code, made.headers["Location"]) == (201, made.json()["href"])
    check_like(EXECUTION["processing_request"], made.json())
    request = made.json()["id"]
    assert zerog.client.get(f"/requests/{request}").json() == made.json()
    assert results(zerog, request) == []
    failing = execute(zerog, request, True)
    assert failing.status_code == 201
    check_like(EXECUTION, failing.json())
    assert failing.json()["processing_request"]["payload"] == PAYLOAD
    first = failing.json()["id"]
    assert zerog.client.get(failing.headers["Location"]).json() == failing.json()
    (result,) = wait_for_results(zerog, request, 1)
    check_like(RESULT, result)
    assert (result["is_success"], result["outputs"], result["execution"]) == (False, {}, failing.json())
    assert result["processing_total_seconds"] >= 0.1
    assert result["processing_start_time"] <= result["processing_end_time"]
    good = wait_for(
        zerog, lambda: (found := execute(zerog, request)).status_code == 201 and found, "the next execution"
    )
    both = wait_for_results(zerog, request, 2)
    assert [one["is_success"] for one in both] == [False, True]
    assert both[1]["outputs"] == {"message": "pong"}
    check_like({**RESULT, "is_success": True, "outputs": {"message": "pong"}}, both[1])
    shown = zerog.client.get(f"/requests/{request}/executions").json()["executions"]
    assert shown == [failing.json(), good.json()]
    assert zerog.client.get(f"/requests/{request}/executions/{first}/results").json()["results"] == [result]
    refused = execute(zerog, request)
    assert (refused.status_code, refused.json()["code"]) == (409, "already_succeeded")
    assert refused.json()["results"]["href"] == f"/requests/{request}/results"
    assert f"/requests/{request}/results" in refused.json()["message"]
    for name, wanted in (("executions", shown), ("failures", [result]), ("successes", [both[1]])):
        there = [one for one in topic(zerog, name) if request in json.dumps(one)]
        assert there == wanted, name
    assert letters(zerog, request) == [], "that an execution fails is nothing unexpected"


def curl(zerog: Deployment, path: str, body: Any = None) -> Any:
    """Ask as the document says: curl, a URI, and for a POST its JSON."""
    more = ["-X", "POST", "-H", "Content-type: application/json", "-d", json.dumps(body)] if body is not None else []
    command = ["curl", "--silent", "--show-error", "--fail-with-body", *more, f"{zerog.url}{path}"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)


@pytest.mark.requirement("S13", "S14", "S16", "S17")
def test_the_conversation_of_the_document_key_by_key_and_type_by_type(zerog: Deployment) -> None:
    made = curl(zerog, "/requests", {"payload": PAYLOAD})
    check_like(EXECUTION["processing_request"], made)
    assert made["payload"] == PAYLOAD
    for count, force_error in enumerate((True, False), 1):
        execution = curl(zerog, f"/requests/{made['id']}/executions", {"force_error": force_error})
        check_like({**EXECUTION, "force_error": force_error}, execution)
        wait_for_results(zerog, made["id"], count)
    shown = curl(zerog, f"/requests/{made['id']}/results")
    good = {**RESULT, "is_success": True, "outputs": {"message": "pong"}}
    check_like([RESULT, good], shown["results"])
    assert [one["is_success"] for one in shown["results"]] == [False, True]
    assert set(shown) - {"href"} == {"results"}


@pytest.mark.requirement("S9")
def test_there_is_one_active_execution_at_a_time(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Twenty at once, on two servers, again and again: exactly one wins."""
    with processing(tmp_path, request, EVERY_DAY[0], listener=False, processing_seconds="600") as zerog:
        port = free_port()
        other = f"http://127.0.0.1:{port}"
        zerog.start_daemon("server", port=port)
        wait_until(lambda: answers(port), 20, "the second server")
        clients = [httpx.Client(base_url=url, timeout=30) for url in (zerog.url, other) for _ in range(10)]
        try:
            with ThreadPoolExecutor(20) as pool:
                for round in range(ROUNDS):
                    one = create(zerog, round)
                    heard = list(
                        pool.map(
                            lambda client, one=one: client.post(
                                f"/requests/{one}/executions", json={"force_error": False}
                            ),
                            clients,
                        )
                    )
                    counts = Counter(answer.status_code for answer in heard)
                    assert counts == {201: 1, 409: 19}, (round, [answer.text for answer in heard])
                    codes = {answer.json()["code"] for answer in heard if answer.status_code == 409}
                    assert codes == {"active_execution"}
                    (winner,) = [answer.json() for answer in heard if answer.status_code == 201]
                    shown = zerog.client.get(f"/requests/{one}/executions").json()["executions"]
                    assert [execution["id"] for execution in shown] == [winner["id"]]
            assert len(topic(zerog, "executions")) == ROUNDS
        finally:
            for client in clients:
                client.close()


@pytest.mark.requirement("S11", "S5")
def test_after_three_failures_every_attempt_is_refused_and_is_a_dead_letter(zerog: Deployment) -> None:
    request = create(zerog, {"too": "often"})
    executions = []
    for count in range(3):
        answer = wait_for(zerog, lambda: (a := execute(zerog, request, True)).status_code == 201 and a, "an execution")
        executions.append(answer.json())
        wait_for_results(zerog, request, count + 1)
    last = wait_for(
        zerog, lambda: (a := execute(zerog, request)).json().get("code") == "too_many_failures" and a, "the refusal"
    )
    assert last.status_code == 409
    refused = 1 + sum(execute(zerog, request, force_error=True).status_code == 409 for _ in range(2))
    found = letters(zerog, request)
    assert len(found) == refused == 3
    for letter in found:
        assert list(letter) == ["attempt", "processing_request", "last_execution", "failures", "maximum"]
        assert letter["last_execution"] == executions[-1]
        assert (letter["failures"], letter["maximum"]) == (3, 3)
        assert set(letter["attempt"]) == {"force_error", "creation_date"}
    assert [letter["attempt"]["force_error"] for letter in found] == [False, True, True]
    assert len(results(zerog, request)) == 3


@pytest.mark.requirement("S6", "S18", "S3")
def test_without_the_listener_results_stop_and_nothing_is_lost(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with processing(tmp_path, request, EVERY_DAY[0], listener=False, slots="4") as zerog:
        zerog.start_agent()
        wanted = [create(zerog, number) for number in range(5)]
        for one in wanted:
            assert execute(zerog, one).status_code == 201
        wait_for(zerog, lambda: len(topic(zerog, "successes")) == 5, "the successes")
        assert all(results(zerog, one) == [] for one in wanted)
        listener = zerog.start_daemon("processing", "listener")
        for one in wanted:
            assert len(wait_for_results(zerog, one, 1)) == 1
        assert listener.terminate() == 0
        later = create(zerog)
        assert execute(zerog, later).status_code == 201
        wait_for(zerog, lambda: len(topic(zerog, "successes")) == 6, "one more success")
        assert results(zerog, later) == []
        zerog.start_daemon("processing", "listener")
        wait_for_results(zerog, later, 1)
        assert all(len(results(zerog, one)) == 1 for one in [*wanted, later])


@pytest.mark.requirement("S5", "S6")
@pytest.mark.parametrize("name", ["successes", "failures", "processing-intents"])
@pytest.mark.parametrize("value", [None, 5, "x", [], {}, {"execution": {"id": 5}}, {"is_success": True}], ids=repr)
def test_a_malformed_message_goes_to_the_dead_letters_and_the_consumer_lives(
    zerog: Deployment, name: str, value: Any
) -> None:
    answer = zerog.client.post(
        f"/topics/{name}", content=json.dumps(value), headers={"Content-Type": "application/json"}
    )
    number = answer.json()["number"]

    def dead() -> dict[str, Any] | None:
        wanted = (name, number)
        return next(
            (one for one in topic(zerog, "dead-letters") if (one.get("topic"), one.get("number")) == wanted), None
        )

    letter = wait_for(zerog, dead, "the dead letter")
    assert letter["value"] == value and letter["error"]


def test_a_result_of_nothing_is_a_dead_letter(zerog: Deployment) -> None:
    invented = {**RESULT, "execution": {**EXECUTION, "id": str(uuids.uuid4())}}
    number = zerog.client.post("/topics/failures", json=invented).json()["number"]
    wait_for(
        zerog,
        lambda: any(one.get("topic") == "failures" and one["number"] == number for one in topic(zerog, "dead-letters")),
        "the dead letter",
    )
    request = create(zerog)
    assert execute(zerog, request).status_code == 201
    assert wait_for_results(zerog, request, 1)[0]["is_success"], "the listener lives"


#: Where processes die, and which.  Children that are started again come past the same point: they die at every second
#: job or message, the others once.
POINTS = {
    "server": ["own.processing.after_intent@1", "own.processing.after_execution@1", "own.processing.after_active@1",
               "submit.after_append@1", "submit.after_insert@1", "own.processing.after_submit@1", "log.after_number@1",
               "own.processing.after_announced@1"],
    "worker": ["run.after_reserve@1", "run.after_claim@1", "run.mid@1", "child.mid@2", "run.before_record@1",
               "run.after_failed_entry@1", "run.after_record@1", "consume.before_handle@2", "consume.after_handle@2",
               "own.processing.after_published@2", "own.processing.after_freed@2"],
    "listener": ["consume.before_handle@2", "consume.after_handle@2"],
}  # fmt: skip


#: Every third one every day, all with TESTS_FULL.
EVERY_POINT = POINTS if FULL else {who: points[::3] for who, points in POINTS.items()}


@pytest.mark.requirement("S6", "S9")
@pytest.mark.parametrize("who", sorted(POINTS))
def test_whoever_is_killed_wherever_each_execution_has_one_result(
    request: pytest.FixtureRequest, tmp_path: Path, who: str
) -> None:
    """Gateway, processor and listener die at every point; the client repeats with its key."""
    with processing(tmp_path, request, EVERY_DAY[0], listener=False, lease="1s", sweep="500ms") as zerog:
        running: dict[str, Process] = {}

        def begin(name: str, **settings: Any) -> None:
            if name == "server":
                zerog.server = running[name] = zerog.start_daemon("server", **settings)
                wait_until(lambda: zerog._ready() or running[name].popen.poll() is not None, 30, "the server")
            elif name == "worker":
                running[name] = zerog.start_agent(**settings)
            else:
                running[name] = zerog.start_daemon("processing", "listener", **settings)

        assert zerog.server is not None
        running["server"] = zerog.server
        for name in ("worker", "listener"):
            begin(name)

        def restarted() -> None:
            for name, process in running.items():
                if process.popen.poll() is not None:
                    begin(name)

        for point in EVERY_POINT[who]:
            running[who].kill()
            name, _, hit = point.partition("@")
            begin(who, failpoint=f"{name}=kill@{hit}")
            keys = [uuids.uuid4().hex for _ in range(2)]
            failing, good = (
                insistently(zerog, restarted, keys[0], True),
                insistently(zerog, restarted, keys[1]),
            )
            for one, succeeded in ((failing, False), (good, True)):
                found = wait_for_results(zerog, one, 1, restarted)
                assert [result["is_success"] for result in found] == [succeeded], point
                again = freed(zerog, one, f"the request to be free after {point}", restarted)
                assert again.status_code == (409 if succeeded else 201), point
                if not succeeded:
                    found = wait_for_results(zerog, one, 2, restarted)
                    assert [result["is_success"] for result in found] == [False, True], point
        assert len({result["id"] for result in topic(zerog, "successes")}) == 2 * len(EVERY_POINT[who])


def freed(zerog: Deployment, request: str, text: str, meanwhile: Callable[[], None]) -> httpx.Response:
    """Execute a request as soon as its last execution is not active any more; what is answered then."""

    def ask() -> httpx.Response | None:
        meanwhile()
        answer = execute(zerog, request)
        return answer if answer.json().get("code") != "active_execution" else None

    answer: httpx.Response = wait_for(zerog, ask, text)
    return answer


def insistently(zerog: Deployment, meanwhile: Callable[[], None], key: str, force_error: bool = False) -> str:
    """Make a request and execute it, both with a key and as often as it takes."""

    def ask(url: str, body: dict[str, Any]) -> httpx.Response | None:
        meanwhile()
        try:
            answer = zerog.client.post(url, json=body, headers={"Idempotency-Key": key})
        except httpx.HTTPError:
            return None
        assert answer.status_code in (201, 503), answer.text
        return answer if answer.status_code == 201 else None

    request = wait_until(lambda: ask("/requests", {"payload": key}), 20, "a request").json()["id"]
    url = f"/requests/{request}/executions"
    made = wait_until(lambda: ask(url, {"force_error": force_error}), 20, "an execution").json()
    assert made["processing_request"]["payload"] == key
    assert zerog.client.get(url).json()["executions"] == [made]
    return str(request)


@pytest.mark.requirement("S9", "S11")
def test_jobs_that_are_cancelled_or_break_end_with_one_result_and_free_their_requests(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with processing(tmp_path, request, EVERY_DAY[0], processing_seconds="0.5") as zerog:
        queued = create(zerog, "never begun")
        job = execute(zerog, queued).json()["id"]
        assert zerog.client.post(f"/jobs/{job}/cancel").status_code == 200
        zerog.start_agent(failpoint="child.mid=kill")
        (result,) = wait_for_results(zerog, queued, 1)
        assert (result["is_success"], result["processing_total_seconds"]) == (False, 0.0)
        assert result["processing_start_time"] == result["processing_end_time"]
        assert letters(zerog, queued) == []
        broken = create(zerog, "breaks its process")
        execution = execute(zerog, broken).json()
        (result,) = wait_for_results(zerog, broken, 1)
        assert (result["is_success"], result["outputs"], result["execution"]) == (False, {}, execution)
        (letter,) = letters(zerog, broken)
        assert (letter["last_execution"], letter["failures"]) == (execution, 1)
        for one in (queued, broken):
            assert execute(zerog, one).status_code == 201, "it is free"


@pytest.mark.requirement("S9", "S10")
def test_a_job_that_is_submitted_past_the_gateway_fails_and_changes_nothing(zerog: Deployment) -> None:
    one = create(zerog)
    past = zerog.wait(zerog.submit("processing-execution", {"request": one, "force_error": False}))
    assert (past["state"], past["resultCode"]) == ("failed", 409)
    nowhere = {"request": str(uuids.uuid4()), "force_error": False}
    assert zerog.wait(zerog.submit("processing-execution", nowhere))["resultCode"] == 404
    cancelled = execute(zerog, one).json()["id"]
    zerog.client.post(f"/jobs/{cancelled}/cancel")
    wait_for_results(zerog, one, 1)
    again = zerog.client.post(f"/jobs/{cancelled}/retry")
    if again.status_code == 202:  # it may have succeeded before the cancel came
        assert zerog.wait(again.json()["uuid"])["state"] == "failed"
        assert execute(zerog, one).status_code == 201
        assert len(wait_for_results(zerog, one, 2)) == 2


@pytest.mark.requirement("S9")
def test_an_execution_whose_document_is_gone_ends_all_the_same(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Whoever tidied up took it for one that never became active, a moment before it did."""
    with processing(tmp_path, request, PAIRS[0]) as zerog:
        one = create(zerog, "precious")
        made = execute(zerog, one).json()
        with zerog.documents("workers.processing") as documents:
            documents.remove(f"execution:{made['id']}")
        zerog.start_agent()
        (result,) = wait_for_results(zerog, one, 1)
        assert result["execution"] == made and result["is_success"]
        assert zerog.client.get(made["href"]).json() == made


@pytest.mark.requirement("S9")
def test_while_the_queue_is_away_an_execution_is_made_and_runs_later(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with processing(tmp_path, request, EVERY_DAY[0]) as zerog:
        zerog.start_agent()
        assert zerog.beanstalkd is not None
        one = create(zerog)
        zerog.beanstalkd.stop()
        assert execute(zerog, one).status_code == 201
        zerog.beanstalkd.start()
        assert wait_for_results(zerog, one, 1)[0]["is_success"]


@pytest.mark.requirement("S9")
def test_while_the_store_is_away_nothing_is_made(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    faults = tmp_path / "faults"
    with processing(tmp_path, request, PAIRS[0], store_faults=faults) as zerog:
        one = create(zerog)
        Faults(away=True).write(faults)
        wait_until(lambda: zerog.client.get(f"/requests/{one}").status_code == 503, 5, "the outage")
        answer = execute(zerog, one)
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
        assert zerog.client.post("/requests", json={"payload": 1}).status_code == 503
        Faults().write(faults)
        shown = wait_until(
            lambda: (a := zerog.client.get(f"/requests/{one}/executions")).status_code == 200 and a.json(),
            5,
            "the store",
        )
        assert shown["executions"] == [] and topic(zerog, "executions") == []
        zerog.start_agent()
        assert execute(zerog, one).status_code == 201
        assert wait_for_results(zerog, one, 1)[0]["is_success"]


@pytest.mark.requirement("S13", "S14")
@pytest.mark.parametrize(
    ("path", "body", "status", "code", "pointer"),
    [
        ("/requests", {}, 422, "invalid_parameters", "/payload"),
        ("/requests", {"payload": 1, "more": 2}, 422, "invalid_parameters", "/more"),
        ("/requests", {"payload": "x" * 300_000}, 422, "invalid_parameters", "/payload"),
        ("/requests", [], 400, "object_expected", None),
        ("EXECUTIONS", {}, 422, "invalid_parameters", "/force_error"),
        ("EXECUTIONS", {"force_error": "true"}, 422, "invalid_parameters", "/force_error"),
        ("EXECUTIONS", {"force_error": 1}, 422, "invalid_parameters", "/force_error"),
        ("EXECUTIONS", {"force_error": None}, 422, "invalid_parameters", "/force_error"),
        ("EXECUTIONS", {"force_error": True, "id": "mine"}, 422, "invalid_parameters", "/id"),
        ("/requests/00000000-0000-0000-0000-000000000000/executions", {"force_error": True}, 404, "unknown_request", None),
        ("/requests/nonsense/executions", {"force_error": True}, 404, "unknown_request", None),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_and_leave_nothing(
    zerog: Deployment, path: str, body: Any, status: int, code: str, pointer: str | None
) -> None:
    request = create(zerog)
    answer = zerog.client.post(path.replace("EXECUTIONS", f"/requests/{request}/executions"), json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    if pointer is not None:
        assert [one["pointer"] for one in answer.json()["errors"]] == [pointer]
    assert zerog.client.get(f"/requests/{request}/executions").json()["executions"] == []


@pytest.mark.requirement("S7")
@pytest.mark.parametrize(
    ("path", "code"),
    [("", "unknown_request"), ("/executions", "unknown_request"), ("/results", "unknown_request"),
     ("/executions/00000000-0000-0000-0000-000000000000", "unknown_request")],
)  # fmt: skip
@pytest.mark.parametrize("id", ["00000000-0000-0000-0000-000000000000", "5", "%00", "x" * 5000])
def test_what_is_unknown_is_404(zerog: Deployment, path: str, code: str, id: str) -> None:
    answer = zerog.client.get(f"/requests/{id}{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, code)


def test_an_execution_of_another_request_is_unknown(zerog: Deployment) -> None:
    one, other = create(zerog), create(zerog)
    execution = execute(zerog, one).json()["id"]
    for path in ("", "/results"):
        assert zerog.client.get(f"/requests/{one}/executions/{execution}{path}").status_code == 200
        answer = zerog.client.get(f"/requests/{other}/executions/{execution}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_execution")
    assert zerog.client.get(f"/requests/{one.upper()}").status_code == 200


@pytest.mark.parametrize("payload", [None, 0, "", [], {}, 2**64, 1.5, "\x00é", {"$where": {"__class__": 1}}], ids=repr)
def test_any_payload_comes_back_as_it_was(zerog: Deployment, payload: Any) -> None:
    request = create(zerog, payload)
    seen = zerog.client.get(f"/requests/{request}").json()["payload"]
    assert (seen, type(seen)) == (payload, type(payload))
    execution = execute(zerog, request).json()
    assert execution["processing_request"]["payload"] == payload


def test_a_key_makes_a_request_and_an_execution_once(zerog: Deployment) -> None:
    key = {"Idempotency-Key": uuids.uuid4().hex}
    first = zerog.client.post("/requests", json={"payload": 1}, headers=key)
    again = zerog.client.post("/requests", json={"payload": 1}, headers=key)
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    assert "Idempotency-Replayed" not in first.headers and again.headers["Idempotency-Replayed"] == "true"
    other = zerog.client.post("/requests", json={"payload": 2}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    request = first.json()["id"]
    made, replayed = execute(zerog, request, headers=key), execute(zerog, request, headers=key)
    assert (made.status_code, replayed.status_code, replayed.json()) == (201, 201, made.json())
    assert "Idempotency-Replayed" not in made.headers and replayed.headers["Idempotency-Replayed"] == "true"
    assert execute(zerog, request, True, headers=key).json()["code"] == "idempotency_key_reused"
    assert len(wait_for_results(zerog, request, 1)) == 1
    assert execute(zerog, request, headers=key).status_code == 201, "also when it has succeeded"
    assert len(zerog.client.get(f"/requests/{request}/executions").json()["executions"]) == 1
    assert execute(zerog, create(zerog), headers=key).json()["id"] != made.json()["id"], "another request, another one"


def token(zerog: Deployment, name: str, roles: list[str], types: list[str]) -> str:
    arguments = [*(f"--role={role}" for role in roles), *(f"--type={one}" for one in types)]
    done = subprocess.run(
        [sys.executable, "-m", "zerog", "token", "create", name, *arguments],
        env=zerog.environment, cwd=zerog.folder, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["token"])


def test_tokens_need_the_role_submit_and_the_type(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with processing(tmp_path, request, PAIRS[0], listener=False) as zerog:
        one = create(zerog)
        made = {}
        for name, roles, types in (
            ("admin", ["admin"], []), ("reader", ["read"], []), ("submitter", ["submit"], []),
            ("own", ["submit", "read"], ["processing-execution"]), ("other", ["submit", "read"], ["told"]),
        ):  # fmt: skip
            made[name] = token(zerog, name, roles, types)

        def status(name: str, method: str, path: str, **more: Any) -> int:
            headers = {"Authorization": f"Bearer {made[name]}"}
            return zerog.client.request(method, path, headers=headers, **more).status_code

        wait_until(lambda: status("other", "GET", "/") == 200, 10, "the newest token to count")
        body = {"json": {"payload": 1}}
        assert [status(name, "POST", "/requests", **body) for name in ("reader", "submitter", "own", "other")] == [
            403, 201, 201, 403,
        ]  # fmt: skip
        paths = [f"/requests/{one}", f"/requests/{one}/executions", f"/requests/{one}/results"]
        assert {status(name, "GET", path) for name in ("reader", "own") for path in paths} == {200}
        assert {status(name, "GET", path) for name in ("submitter", "other") for path in paths} == {403}


@pytest.mark.requirement("S12", "S8")
def test_the_session_in_the_documentation_is_what_happens(tmp_path: Path) -> None:
    made = Deployment(tmp_path)
    environment = {name: value for name, value in made.environment.items() if name != "ZEROG_APPLICATIONS"}
    made.environment = {**environment, "ZEROG_PROCESSING_SECONDS": "0.5", "ZEROG_PORT": str(made.port)}
    try:
        up = made.start_daemon("processing", "up")
        wait_until(made._ready, 30, "the gateway")
        replaced = {"localhost:5003": f"127.0.0.1:{made.port}"}
        assert run_session("processing.rst", tmp_path, replaced, {}) >= 9
        assert up.terminate() == 0
    finally:
        made.close()


@pytest.mark.requirement("S12")
def test_one_command_brings_all_up_on_port_5003(tmp_path: Path) -> None:
    """The port is looked at in what it says of itself: another program of this machine may have 5003."""
    made = Deployment(tmp_path)
    environment = {n: v for n, v in made.environment.items() if n not in ("ZEROG_APPLICATIONS", "ZEROG_PORT")}
    made.environment = environment
    try:
        up = made.start_daemon("processing", "up")
        wait_until(
            lambda: (
                all(one in made.log("processing") for one in ("runs the consumer processing-results", "127.0.0.1:5003"))
                or up.popen.poll() is not None
            ),
            30,
            "the gateway",
        )
        assert "127.0.0.1:5003" in made.log("processing")
        if up.popen.poll() is None:
            listener = next(
                one for one in psutil.Process(up.pid).children() if "processing-results" in " ".join(one.cmdline())
            )
            listener.kill()
            again = "consumers' process ended with status -9, and is started again"
            wait_until(
                lambda: made.log("processing").count("runs the consumer processing-results") == 2, 20, "it again"
            )
            assert again in made.log("processing") and up.popen.poll() is None
            assert up.terminate() == 0
            assert "consumer stopped" in made.log("processing")
    finally:
        made.close()
