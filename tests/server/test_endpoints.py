"""The endpoints: negotiation, validators, waiting, streams, ranges, pages of collections."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse

from zerog import codec
from zerog.leases import LeaseWatch
from zerog.manager import Claimed, Held, Manager, Submission
from zerog.outcome import Result, Succeeded
from zerog.registry import Parameters
from zerog.server.endpoint import METHODS, Endpoint
from zerog.server.negotiation import choose
from zerog.server.routes import ENDPOINTS, names

pytestmark = pytest.mark.gen_test(timeout=30)

JSON = {"Content-Type": "application/json"}


def submit(manager: Manager, job_type: str = "noop", values: dict[str, Any] | None = None) -> str:
    return manager.submit(Submission(job_type, Parameters(values or {}))).record.uuid


def claim(manager: Manager, uuid: str) -> Held:
    verdict = manager.claim(uuid, "agent", "claim", LeaseWatch(manager.clock, manager.lease))
    assert isinstance(verdict, Claimed)
    return verdict.held


def succeed(manager: Manager, uuid: str, data: bytes | None = None, media_type: str = "text/csv") -> None:
    held = claim(manager, uuid)
    result = None
    if data is not None:
        writer = manager.open_output(uuid, held.record.attempt)
        writer.write(data)
        writer.close()
        result = Result(media_type, writer.size, blob=writer.blob)
    manager.settle(held, held.record.attempt, Succeeded(result))


async def ask(client: AsyncHTTPClient, url: str, method: str = "GET", body: Any = None, **headers: str) -> HTTPResponse:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    text = None
    if method == "POST":
        text = json.dumps({} if body is None else body)
        sent.setdefault("Content-Type", "application/json")
    return await client.fetch(HTTPRequest(url, method, sent, text, request_timeout=25), raise_error=False)


# What an endpoint is


@pytest.mark.requirement("G4", "G5", "G6", "G7")
async def test_every_endpoint_says_what_it_is(http_client: AsyncHTTPClient, base_url: str) -> None:
    description = codec.loads((await ask(http_client, f"{base_url}/openapi.json")).body)
    for endpoint in ENDPOINTS:
        assert issubclass(endpoint, Endpoint)
        assert endpoint.name and endpoint.url.startswith("/") and endpoint.__doc__
        assert endpoint.methods()
        assert set(endpoint.responses) == set(endpoint.methods())
        operations = description["paths"][endpoint.url]
        assert {method.upper() for method in operations} == set(endpoint.methods())
        for method in endpoint.methods():
            listed = {one["name"]: one["required"] for one in operations[method.lower()]["parameters"]}
            assert {name for name, required in listed.items() if required} >= set(names(endpoint.url))
            assert {one.name for one in endpoint.query_parameters(method)} <= set(listed)


@pytest.mark.requirement("G8")
async def test_every_other_method_gets_405_with_allow(http_client: AsyncHTTPClient, base_url: str) -> None:
    for endpoint in ENDPOINTS:
        url = base_url + endpoint.url.replace("{uuid}", "x").replace("{jobType}", "noop")
        for method in METHODS:
            if method in endpoint.methods():
                continue
            request = HTTPRequest(url, method, allow_nonstandard_methods=True)
            answer = await http_client.fetch(request, raise_error=False)
            assert answer.code == 405, (method, url)
            assert answer.headers["Allow"].split(", ")[: len(endpoint.methods())] == list(endpoint.methods())


@pytest.mark.requirement("M31")
async def test_no_answer_sets_a_cookie(http_client: AsyncHTTPClient, base_url: str, manager: Manager) -> None:
    uuid = submit(manager)
    for endpoint in ENDPOINTS:
        if "GET" in endpoint.methods():
            url = base_url + endpoint.url.replace("{uuid}", uuid).replace("{jobType}", "noop")
            assert "Set-Cookie" not in (await ask(http_client, url)).headers


# Negotiation

OFFERS = ("application/json", "text/html", "text/event-stream")


@pytest.mark.requirement("G20")
@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "text/html"),
        ("text/*", "text/html"),
        ("application/json;q=0.5, text/html", "text/html"),
        ("text/html;q=0.5, application/json;q=0.9", "application/json"),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "text/html"),
        ("*/*, application/json;q=0", "text/html"),
        ("text/*;q=0.9, text/html;q=0.1, application/json;q=0.5", "text/event-stream"),
        ("text/event-stream, application/json", "text/event-stream"),
        ("application/json, text/event-stream", "application/json"),
        ("TEXT/HTML", "text/html"),
        ("image/png", None),
        ("application/json;q=0", None),
        ("*/*;q=0", None),
        ("nonsense", "application/json"),
    ],
)
async def test_the_accept_header_decides(accept: str, chosen: str | None) -> None:
    assert choose(accept, OFFERS) == chosen


@pytest.mark.requirement("G20", "G21")
async def test_the_same_url_is_json_or_a_page(http_client: AsyncHTTPClient, base_url: str, manager: Manager) -> None:
    uuid = submit(manager)
    for path in ("/", "/jobs", f"/jobs/{uuid}", f"/jobs/{uuid}/info", f"/jobs/{uuid}/events", "/types", "/types/noop"):
        answer = await ask(http_client, base_url + path)
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Vary"] == "Accept"
        page = await ask(http_client, base_url + path, Accept="text/html")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert page.code == 200
        assert b"<!doctype html>" in page.body
        assert page.body.count(b"<script") == page.body.count(b'<script src="/live.js" defer></script>') == 1
    posted = await ask(http_client, f"{base_url}/run/noop", "POST", Accept="text/html")
    assert (posted.code, posted.headers["Content-Type"]) == (202, "text/html; charset=utf-8")


# Submit


@pytest.mark.requirement("Z2", "Z3", "Z4", "Z8", "M12")
async def test_a_submit_answers_202_with_the_progress_view(http_client: AsyncHTTPClient, base_url: str) -> None:
    answer = await ask(http_client, f"{base_url}/run/sleep", "POST", {"seconds": 1})
    view = codec.loads(answer.body)
    assert answer.code == 202
    assert answer.headers["Location"] == f"/jobs/{view['uuid']}"
    assert list(view) == [
        "uuid", "jobType", "state", "cancelling", "completeness", "resultCode", "message", "reason", "attempt",
        "updatedAt", "href",
    ]  # fmt: skip
    assert (view["attempt"], view["message"], view["resultCode"]) == (0, None, -1)


@pytest.mark.requirement("Z5", "Z6", "Z7")
async def test_the_record_is_stored_before_the_queue_has_the_uuid_and_only_that(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = codec.loads((await ask(http_client, f"{base_url}/run/sleep", "POST", {"seconds": 1})).body)["uuid"]
    assert manager.get(uuid).parameters == {"seconds": 1.0}
    found = manager.queue.reserve([manager.tube("sleep")], 1)
    assert found is not None and found.body == uuid.encode()


async def test_prefer_wait_answers_200_when_the_job_ends_in_time(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    waiting = asyncio.ensure_future(ask(http_client, f"{base_url}/run/noop", "POST", Prefer="wait=20"))
    while not (page := manager.page()).items:
        await asyncio.sleep(0.01)
    succeed(manager, page.items[0].uuid)
    answer = await waiting
    assert (answer.code, codec.loads(answer.body)["state"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=20"
    late = await ask(http_client, f"{base_url}/run/noop", "POST", Prefer="respond-async, wait=0")
    assert late.code == 202
    ignored = await ask(http_client, f"{base_url}/run/noop", "POST", Prefer="wait=soon")
    assert "Preference-Applied" not in ignored.headers


async def test_a_delayed_job_shows_when_it_may_run(http_client: AsyncHTTPClient, base_url: str) -> None:
    answer = await ask(http_client, f"{base_url}/run/noop?delay=100&priority=5", "POST")
    record = codec.loads((await ask(http_client, base_url + answer.headers["Location"])).body)
    assert record["priority"] == 5
    assert record["notBefore"] > record["createdAt"]


# Progress


@pytest.mark.requirement("Z15", "Z16")
async def test_progress_has_an_etag_and_answers_304(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = submit(manager)
    url = f"{base_url}/jobs/{uuid}/progress"
    first = await ask(http_client, url)
    tag = first.headers["ETag"]
    same = await ask(http_client, url, If_None_Match=tag)
    assert (same.code, same.body, same.headers["ETag"]) == (304, b"", tag)
    assert (await ask(http_client, url, If_None_Match=f'"other", W/{tag}')).code == 304
    held = claim(manager, uuid)
    changed = await ask(http_client, url, If_None_Match=tag)
    assert changed.code == 200
    renewed = manager.report(held, 1)
    assert (await ask(http_client, url, If_None_Match=changed.headers["ETag"])).code == 304, "a renewal is no change"
    manager.report(renewed, 1, 0.5, "half")
    view = codec.loads((await ask(http_client, url)).body)
    assert (view["completeness"], view["message"]) == (0.5, "half")
    assert view["href"] == f"/jobs/{uuid}"


async def test_prefer_wait_answers_at_the_first_change(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = submit(manager)
    url = f"{base_url}/jobs/{uuid}/progress"
    tag = (await ask(http_client, url)).headers["ETag"]
    assert (await ask(http_client, url, Prefer="wait=1", If_None_Match=tag)).code == 304
    waiting = asyncio.ensure_future(ask(http_client, url, Prefer="wait=20", If_None_Match=tag))
    await asyncio.sleep(0.2)  # so that the change comes while the request waits
    assert not waiting.done()
    claim(manager, uuid)
    answer = await waiting
    assert (answer.code, codec.loads(answer.body)["state"]) == (200, "running")
    assert answer.headers["Preference-Applied"] == "wait=20"


async def test_a_stream_of_events_ends_with_the_terminal_view(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = submit(manager)
    pieces: list[bytes] = []
    request = HTTPRequest(
        f"{base_url}/jobs/{uuid}/progress",
        headers={"Accept": "text/event-stream"},
        streaming_callback=pieces.append,
        request_timeout=25,
    )
    waiting = asyncio.ensure_future(http_client.fetch(request))
    while not pieces:
        await asyncio.sleep(0.01)
    succeed(manager, uuid)
    answer = await waiting
    assert answer.headers["Content-Type"] == "text/event-stream"
    events = [
        dict(line.split(": ", 1) for line in part.splitlines())
        for part in b"".join(pieces).decode().strip().split("\n\n")
    ]
    views = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == ["progress"] * len(events)
    assert views[0]["state"] == "queued"
    assert views[-1]["state"] == "succeeded"
    tag = (await ask(http_client, f"{base_url}/jobs/{uuid}/progress")).headers["ETag"]
    assert events[-1]["id"] == tag.strip('"')


# Data


@pytest.mark.requirement("Z18", "G21")
async def test_unfinished_data_say_when_to_ask_again(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = submit(manager)
    answer = await ask(http_client, f"{base_url}/jobs/{uuid}/data")
    assert (answer.code, answer.headers["Content-Type"]) == (202, "application/json")
    assert int(answer.headers["Retry-After"]) >= 1
    assert codec.loads(answer.body)["state"] == "queued"


@pytest.mark.parametrize(
    ("header", "status", "start", "stop"),
    [
        (None, 200, 0, 600_000),
        ("bytes=0-9", 206, 0, 10),
        ("bytes=262140-262150", 206, 262_140, 262_151),
        ("bytes=599990-", 206, 599_990, 600_000),
        ("bytes=-10", 206, 599_990, 600_000),
        ("bytes=0-99999999", 206, 0, 600_000),
        ("bytes=5-2", 200, 0, 600_000),
        ("bytes=0-1,5-6", 200, 0, 600_000),
        ("lines=0-1", 200, 0, 600_000),
    ],
)
async def test_data_are_served_by_ranges(
    http_client: AsyncHTTPClient,
    base_url: str,
    manager: Manager,
    header: str | None,
    status: int,
    start: int,
    stop: int,
) -> None:
    data = bytes(range(250)) * 2400
    uuid = submit(manager)
    succeed(manager, uuid, data)
    headers = {} if header is None else {"Range": header}
    answer = await ask(http_client, f"{base_url}/jobs/{uuid}/data", **headers)
    assert answer.code == status
    assert answer.body == data[start:stop]
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert int(answer.headers["Content-Length"]) == stop - start
    if status == 206:
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/600000"


async def test_a_range_outside_is_416_and_if_range_needs_the_tag(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuid = submit(manager)
    succeed(manager, uuid, b"0123456789")
    url = f"{base_url}/jobs/{uuid}/data"
    answer = await ask(http_client, url, Range="bytes=10-")
    assert (answer.code, answer.headers["Content-Range"]) == (416, "bytes */10")
    assert codec.loads(answer.body)["code"] == "range_not_satisfiable"
    tag = (await ask(http_client, url)).headers["ETag"]
    assert (await ask(http_client, url, Range="bytes=0-1", If_Range=tag)).code == 206
    assert (await ask(http_client, url, Range="bytes=0-1", If_Range='"other"')).code == 200
    assert (await ask(http_client, url, If_None_Match=tag)).code == 304


# Collections


async def test_pages_hold_everything_once_and_in_order(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    uuids = [submit(manager, "noop" if n % 2 else "sleep") for n in range(25)]
    for expected, filters in ((uuids[::-1], ""), ([u for n, u in enumerate(uuids) if n % 2][::-1], "&type=noop")):
        found: list[str] = []
        href: str | None = f"/jobs?limit=4{filters}"
        while href is not None:
            answer = await ask(http_client, base_url + href)
            page = codec.loads(answer.body)
            assert len(page["items"]) <= 4
            found += [item["uuid"] for item in page["items"]]
            href = page["next"]
            assert answer.headers.get("Link") == (None if href is None else f'<{href}>; rel="next"')
        assert found == expected


async def test_a_cursor_is_good_for_its_own_collection_only(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    for _ in range(3):
        submit(manager)
    href = codec.loads((await ask(http_client, f"{base_url}/jobs?limit=1&type=noop")).body)["next"]
    assert (await ask(http_client, base_url + href)).code == 200
    assert (await ask(http_client, base_url + href.replace("type=noop", "type=sleep"))).code == 400
    assert (await ask(http_client, base_url + href[:-2] + "AA")).code == 400


async def test_jobs_are_filtered_by_state(http_client: AsyncHTTPClient, base_url: str, manager: Manager) -> None:
    uuids = [submit(manager) for _ in range(3)]
    manager.cancel(uuids[1])
    page = codec.loads((await ask(http_client, f"{base_url}/jobs?state=cancelled")).body)
    assert [item["uuid"] for item in page["items"]] == [uuids[1]]
    item = page["items"][0]
    assert (item["number"], item["createdAt"][-1]) == (2, "Z")


async def test_types_say_how_to_run_them(http_client: AsyncHTTPClient, base_url: str, manager: Manager) -> None:
    submit(manager)
    view = codec.loads((await ask(http_client, f"{base_url}/types/noop")).body)
    assert view["queue"] == {"ready": 1, "reserved": 0, "delayed": 0, "buried": 0}
    host = base_url.removeprefix("http://")
    assert view["curl"] == f"curl -X POST http://{host}/run/noop -H 'Content-Type: application/json' -d '{{}}'"
    every = codec.loads((await ask(http_client, f"{base_url}/types")).body)["items"]
    for one in every:
        example = await ask(http_client, f"{base_url}/run/{one['jobType']}", "POST", one["example"])
        assert example.code in (202, 422), one["jobType"]
        assert one["schema"]["additionalProperties"] is False


@pytest.mark.requirement("G16")
async def test_health_touches_nothing_and_ready_asks_the_store(
    http_client: AsyncHTTPClient, base_url: str, manager: Manager
) -> None:
    assert codec.loads((await ask(http_client, f"{base_url}/healthz")).body) == {"status": "ok"}
    ready = await ask(http_client, f"{base_url}/readyz")
    assert (ready.code, codec.loads(ready.body)) == (200, {"status": "ok", "store": "ok", "queue": "ok"})
    manager.store.close()
    assert (await ask(http_client, f"{base_url}/healthz")).code == 200
    ready = await ask(http_client, f"{base_url}/readyz")
    assert (ready.code, codec.loads(ready.body)["store"]) == (503, "unavailable")
    failed = await ask(http_client, f"{base_url}/run/noop", "POST")
    assert (failed.code, codec.loads(failed.body)["code"]) == (503, "store_unavailable")
    assert failed.headers["Retry-After"]


@pytest.mark.requirement("M6", "G19")
async def test_the_description_is_valid(http_client: AsyncHTTPClient, base_url: str) -> None:
    from openapi_spec_validator import validate

    description = json.loads((await ask(http_client, f"{base_url}/openapi.json")).body)
    validate(description)
    assert description["openapi"].startswith("3.1")
    assert "/run/{jobType}" in description["paths"]
    body = description["paths"]["/run/sleep"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Parameters.sleep"}
