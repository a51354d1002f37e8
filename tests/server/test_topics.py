"""Topics over HTTP: any JSON value goes in, and comes out by position."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment


@pytest.fixture(scope="module", params=["sqlite", "couchbase"])
def zerog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A server with pipelines, whose entries lie in topics too."""
    folder = tmp_path_factory.mktemp("topics")
    made = Deployment(
        folder, request.param, "sqlite", applications="workers.examples,workers.pipeline",
        couchbase=request.getfixturevalue("couchbase") if request.param == "couchbase" else None,
    )  # fmt: skip
    made.start_server()
    yield made
    made.close()


def publish(zerog: Deployment, topic: str, value: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return zerog.client.post(f"/topics/{topic}", content=json.dumps(value), headers=headers)


VALUES: list[Any] = [{"a": [1, {"b": None}]}, ["x", 2.5], "text é", 7, -0.125, True, None, {}, [], "", 2**53]


@pytest.mark.requirement("S4")
def test_every_json_value_comes_out_as_it_went_in_and_in_order(zerog: Deployment) -> None:
    for number, value in enumerate(VALUES, 1):
        answer = publish(zerog, "values", value)
        assert (answer.status_code, answer.json()["number"]) == (201, number)
        assert answer.headers["Location"] == answer.json()["href"]
        (item,) = zerog.client.get(answer.json()["href"]).json()["items"]
        assert (item["number"], item["value"]) == (number, value)
    items = zerog.client.get("/topics/values").json()["items"]
    assert [one["value"] for one in items] == VALUES
    assert [type(one["value"]) for one in items] == [type(value) for value in VALUES]
    assert sorted(one["at"] for one in items) == [one["at"] for one in items]
    assert set(items[0]) == {"number", "at", "value"}


@pytest.mark.requirement("S4", "M26")
def test_a_topic_is_paged_by_position(zerog: Deployment) -> None:
    for value in range(7):
        publish(zerog, "paged", value)
    found, url, pages = [], "/topics/paged?limit=3", 0
    while url:
        answer = zerog.client.get(url)
        page = answer.json()
        found += [one["value"] for one in page["items"]]
        pages += 1
        assert page["href"] == url
        assert (page["next"] is None) == ("next" not in answer.links)
        url = page["next"]
    assert (found, pages) == (list(range(7)), 3)
    assert zerog.client.get("/topics/paged?after=7").json()["items"] == [], "nothing yet, and no unknown topic"
    assert [one["value"] for one in zerog.client.get("/topics/paged?after=5").json()["items"]] == [5, 6]
    page = zerog.client.get("/topics/paged", headers={"Accept": "text/html"})
    assert page.status_code == 200 and "<table>" in page.text


@pytest.mark.requirement("G16", "G18")
@pytest.mark.parametrize("name", ["never", "a%2Fb", "%00", "x" * 101, "a%20b", "%C3%A9"])
def test_an_unknown_topic_is_404(zerog: Deployment, name: str) -> None:
    answer = zerog.client.get(f"/topics/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_topic")


@pytest.mark.requirement("G16", "G18")
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "empty_body"), (b"{", 400, "invalid_json"), (b"NaN", 400, "invalid_number"),
        (b'{"a":1,"a":2}', 400, "duplicate_key"), (b'"\\ud800"', 400, "invalid_unicode"),
        (b"[" * 200 + b"]" * 200, 400, "too_deep"), (b'"' + b"x" * 600_000 + b'"', 422, "invalid_parameters"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_and_leaves_nothing(
    zerog: Deployment, body: bytes, status: int, code: str
) -> None:
    answer = zerog.client.post("/topics/refused", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert zerog.client.get("/topics/refused").status_code == 404
    assert zerog.client.post("/topics/refused", content=b"1").status_code == 415


@pytest.mark.requirement("G1", "G2")
@pytest.mark.parametrize(
    "strange", [5, None, [], {"job": 1, "state": "x"}, {"job": "a"}, {"job": "a", "state": "s"},
                {"job": "a", "state": "s", "message": 3}, {"job": "a", "state": "s", "message": None, "ended": "x"}],
)  # fmt: skip
def test_a_pipeline_passes_over_messages_that_are_no_entries(zerog: Deployment, strange: Any) -> None:
    entry = {"pipeline": "mixed", "job": "one", "state": "begun"}
    assert zerog.client.post("/log", json=entry).status_code in (200, 201)
    assert publish(zerog, "pipeline.mixed", strange).status_code == 201
    assert publish(zerog, "pipelines", {"no": "name"}).status_code == 201
    assert zerog.client.post("/log", json={**entry, "state": "done"}).status_code == 200
    shown = zerog.client.get("/pipelines/mixed").json()
    assert [(one["job"], one["state"]) for one in shown["jobs"]] == [("one", "done")]
    history = zerog.client.get("/log?pipeline=mixed&limit=1000").json()["items"]
    assert {one["job"] for one in history} == {"one"}
    assert [one["name"] for one in zerog.client.get("/pipelines").json()["items"]] == ["mixed"]
