"""Many jobs in one request, and what jobs are to each other."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deployment import Deployment, deployed
from tests.services import Beanstalkd, CouchbaseServer

pytestmark = pytest.mark.requirement("M9", "M26", "M27")

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module", params=["sqlite", "couchbase"])
def zerog(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, couchbase: CouchbaseServer
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("batch")
    if request.param == "sqlite":
        with deployed(folder) as made:
            yield made
        return
    queue = Beanstalkd(folder / "beanstalkd").start()
    try:
        with deployed(folder / "zerog", "couchbase", "beanstalkd", beanstalkd=queue, couchbase=couchbase) as made:
            yield made
    finally:
        queue.stop()


def batch(zerog: Deployment, *items: Any, job_type: str = "noop", **headers: str) -> httpx.Response:
    return zerog.client.post(f"/run/{job_type}:batch", json=list(items), headers=headers)


def item(name: str | None = None, *parents: str, **more: Any) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {"parameters": {}, **named, **({"parents": list(parents)} if parents else {}), **more}


def codes(answer: httpx.Response) -> list[str]:
    return ["ok" if one["status"] == 202 else one["code"] for one in answer.json()["items"]]


def test_a_batch_is_answered_in_order_and_runs(zerog: Deployment) -> None:
    before = zerog.submit("noop")
    answer = batch(
        zerog, item("last", "middle", "first"), item("first", before), item("middle", "first"), item(),
    )  # fmt: skip
    assert (answer.status_code, codes(answer)) == (202, ["ok"] * 4)
    last, first, middle, alone = answer.json()["items"]
    ends = [zerog.wait(one["uuid"]) for one in (first, middle, last, alone)]
    assert [end["state"] for end in ends] == ["succeeded"] * 4
    assert ends[0]["startedAt"] <= ends[1]["startedAt"] <= ends[2]["startedAt"], "each after its parents"
    assert [parent["href"] for parent in ends[2]["parents"]] == [f"/jobs/{middle['uuid']}", f"/jobs/{first['uuid']}"]
    assert first["href"] == f"/jobs/{first['uuid']}"


def test_what_is_wrong_is_refused_and_the_rest_accepted(zerog: Deployment) -> None:
    answer = batch(
        zerog,
        item("good"), item("twice"), item("twice"), item("on twice", "twice"),
        item("a", "c"), item("b", "a"), item("c", "b"), item("behind", "c"), item("itself", "itself"),
        item("stranger", "nobody"), item("orphan", NOBODY), item("behind orphan", "orphan"),
        item("bad", priority=-1), item("behind bad", "bad"), item("next", "good"), "no object",
        item(parameters={"x": 1}), item(delay=1, notBefore="2999-01-01T00:00:00Z"), item(notBefore="soon"),
        item(nonsense=True), {"name": "without"}, item("x" * 101), item(delay=float(2**40)),
    )  # fmt: skip
    assert answer.status_code == 202
    assert codes(answer) == [
        "ok", "duplicate_name", "duplicate_name", "parent_refused",
        "cyclic_parents", "cyclic_parents", "cyclic_parents", "parent_refused", "cyclic_parents",
        "unknown_parent", "unknown_parent", "parent_refused",
        "invalid_parameters", "parent_refused", "ok", "invalid_parameters",
        "invalid_parameters", "invalid_parameters", "invalid_parameters",
        "invalid_parameters", "invalid_parameters", "invalid_parameters", "invalid_parameters",
    ]  # fmt: skip
    items = answer.json()["items"]
    assert items[12]["errors"][0]["pointer"] == "/priority"
    assert items[16]["errors"][0]["pointer"] == "/parameters/x"
    assert items[18]["errors"][0]["pointer"] == "/notBefore"
    assert items[20]["errors"][0]["pointer"] == "/parameters"
    assert all({"type", "title", "status", "code", "detail", "message", "errors"} <= set(one) for one in items[1:4])
    for index in (0, 14):
        assert zerog.wait(items[index]["uuid"])["state"] == "succeeded"


def test_a_batch_of_which_nothing_can_be_accepted_is_422(zerog: Deployment) -> None:
    answer = batch(zerog, item("a", "b"), item("b", "a"))
    assert (answer.status_code, codes(answer)) == (422, ["cyclic_parents"] * 2)
    for body in ([], [item()] * 1001):
        refused = zerog.client.post("/run/noop:batch", json=body)
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "length")
    for content, code in (
        ("{}", "array_expected"),
        ("", "empty_body"),
        ("[", "invalid_json"),
        ('[{"a":1,"a":2}]', "duplicate_key"),
    ):
        refused = zerog.client.post("/run/noop:batch", content=content, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["code"]) == (400, code)
    assert zerog.client.post("/run/no-such:batch", json=[item()]).status_code == 404
    assert zerog.client.get("/run/noop:batch").status_code == 405


def test_a_key_counts_with_the_place_in_the_batch(zerog: Deployment) -> None:
    items = [item("a"), item("b", "a"), item(None, "b")]
    key = {"Idempotency-Key": f"batch-{time.time()}"}
    first, again = batch(zerog, *items, **key).json()["items"], batch(zerog, *items, **key).json()["items"]
    assert [one["uuid"] for one in first] == [one["uuid"] for one in again]
    assert [one["replayed"] for one in (*first, *again)] == [False] * 3 + [True] * 3
    longer = batch(zerog, *items, item("d"), **key)
    assert [one["uuid"] for one in longer.json()["items"]][:3] == [one["uuid"] for one in first]
    other = batch(zerog, item("a", delay=1), *items[1:], **key)
    # The children are the same jobs as before, whatever is said of their parent now.
    assert codes(other)[0] == "idempotency_key_reused"
    single = zerog.client.post("/run/noop", json={}, headers={"Idempotency-Key": key["Idempotency-Key"] + "[0]"})
    assert single.json()["uuid"] not in {one["uuid"] for one in first}


def test_large_batches_of_any_shape_are_answered_soon(zerog: Deployment) -> None:
    """A chain, a circle of everything, and as many parents as an item may have."""
    begun = time.monotonic()
    chain = [item(f"n{number}", *([f"n{number - 1}"] if number else [])) for number in reversed(range(300))]
    assert codes(batch(zerog, *chain)) == ["ok"] * 300
    circle = [item(f"n{number}", *(f"n{(number + step) % 1000}" for step in range(1, 11))) for number in range(1000)]
    assert codes(batch(zerog, *circle)) == ["cyclic_parents"] * 1000
    wide = [item(f"n{number}", *(f"n{one}" for one in range(max(0, number - 20), number))) for number in range(200)]
    wide[0]["priority"] = -1
    assert codes(batch(zerog, *wide)) == ["invalid_parameters"] + ["parent_refused"] * 199
    assert time.monotonic() - begun < 30


def test_delays_and_priorities_are_those_of_each_item(zerog: Deployment) -> None:
    first, second = batch(zerog, item(delay=0.3, priority=5), item(notBefore="2001-01-01T00:00:00Z")).json()["items"]
    record = zerog.job(first["uuid"])
    assert (record["priority"], record["notBefore"] is not None) == (5, True)
    assert zerog.job(second["uuid"])["notBefore"] is None


# Relationships


def test_relationships_are_references_with_counts(zerog: Deployment) -> None:
    parents = [zerog.submit("noop") for _ in range(2)]
    query = "&".join(f"parent={one}" for one in parents)
    child = zerog.client.post(f"/run/noop?{query}", json={}).json()["uuid"]
    zerog.wait(child)
    view = zerog.client.get(f"/jobs/{child}/relationships").json()
    assert view == {
        "href": f"/jobs/{child}/relationships",
        "parents": {"href": f"/jobs/{child}/parents", "count": 2},
        "children": {"href": f"/jobs/{child}/children", "count": 0},
    }
    assert zerog.client.get(f"/jobs/{child}").json()["relationships"] == {"href": view["href"]}
    listed = zerog.client.get(view["parents"]["href"]).json()
    assert [one["uuid"] for one in listed["items"]] == parents
    of_parent = zerog.client.get(f"/jobs/{parents[0]}/relationships?expand=children&expand=parents").json()
    assert (of_parent["children"]["count"], of_parent["parents"]["items"]) == (1, [])
    assert [one["uuid"] for one in of_parent["children"]["items"]] == [child]
    assert zerog.client.get(f"/jobs/{NOBODY}/relationships").status_code == 404
    assert zerog.client.get(f"/jobs/{child}/relationships?expand=nonsense").status_code == 400
    page = zerog.client.get(f"/jobs/{child}/relationships", headers={"Accept": "text/html"})
    assert page.status_code == 200 and f"/jobs/{child}/parents" in page.text


def test_children_come_in_pages_in_the_order_of_their_submits(zerog: Deployment) -> None:
    parent = zerog.submit("noop", params={"delay": 3600})
    children = [one["uuid"] for one in batch(zerog, *[item(None, parent)] * 7).json()["items"]]
    found: list[str] = []
    href: str | None = f"/jobs/{parent}/children?limit=3"
    pages = 0
    while href is not None:
        answer = zerog.client.get(href)
        body = answer.json()
        found += [one["uuid"] for one in body["items"]]
        href, pages = body["next"], pages + 1
        assert (href is not None) == ("next" in answer.links)
    assert (found, pages) == (children, 3)
    assert zerog.client.get(f"/jobs/{parent}/relationships").json()["children"]["count"] == 7
    # A submit that was refused, or tried again, left its mark and no child.
    assert zerog.client.post(f"/run/sleep?parent={parent}", json={"seconds": -1}).status_code == 422
    assert zerog.client.get(f"/jobs/{parent}/relationships").json()["children"]["count"] == 7


def test_references_are_embedded_when_asked_for(zerog: Deployment) -> None:
    failed = zerog.submit("raise", {"what": "fail"})
    zerog.wait(failed)
    again = zerog.client.post(f"/jobs/{failed}/retry", json={"what": "fail"}).json()["uuid"]
    assert zerog.client.get(f"/jobs/{again}").json()["retriedFrom"] == {"href": f"/jobs/{failed}"}
    embedded = zerog.client.get(f"/jobs/{again}?expand=retriedFrom").json()["retriedFrom"]
    assert (embedded["href"], embedded["uuid"], embedded["state"]) == (f"/jobs/{failed}", failed, "failed")
    parent = zerog.submit("noop")
    child = zerog.client.post(f"/run/noop?parent={parent}", json={}).json()["uuid"]
    (shown,) = zerog.client.get(f"/jobs/{child}?expand=parents").json()["parents"]
    assert (shown["href"], shown["uuid"]) == (f"/jobs/{parent}", parent)
    listed = zerog.client.get("/jobs?limit=1&expand=items").json()
    assert "parameters" in listed["items"][0] and "expand=items" in listed["next"]
    assert zerog.client.get(f"/jobs/{child}?expand=everything").status_code == 400


# The data of parents


def test_a_job_reads_the_data_of_its_parents_in_the_order_named(zerog: Deployment) -> None:
    small = zerog.submit("return", {"what": "dict"})
    csv = zerog.submit("write-output", {"how": "one"})
    nothing = zerog.submit("noop")
    large = zerog.submit("return", {"what": "text", "size": 100_000})
    parents = [csv, small, nothing, large]
    query = "&".join(f"parent={one}" for one in parents)
    child = zerog.client.post(f"/run/gather?{query}", json={}).json()["uuid"]
    record = zerog.wait(child)
    assert record["state"] == "succeeded", record["message"]
    data = zerog.client.get(f"/jobs/{child}/data").json()
    assert [one[:2] for one in data] == [[csv, "write-output"], [small, "return"], [nothing, "noop"], [large, "return"]]
    assert data[0][2].encode() == zerog.client.get(f"/jobs/{csv}/data").content
    assert data[1][2] == zerog.client.get(f"/jobs/{small}/data").json()
    assert data[2][2] is None
    assert data[3][2] == zerog.client.get(f"/jobs/{large}/data").json()


def test_large_data_of_a_parent_are_read_a_piece_at_a_time(zerog: Deployment) -> None:
    size = 3 * 1024 * 1024 + 17
    parent = zerog.submit("bulk", {"size": size})
    child = zerog.client.post(f"/run/gather?parent={parent}", json={"how": "open"}).json()["uuid"]
    assert zerog.wait(child)["state"] == "succeeded"
    content = zerog.client.get(f"/jobs/{parent}/data").content
    expected = [hashlib.sha256(content).hexdigest(), 100_000, content[-3:].hex(), content[5:7].hex()]
    assert zerog.client.get(f"/jobs/{child}/data").json() == [[parent, size, expected]]


def test_a_job_that_reads_its_parents_is_cancelled_like_any_other(zerog: Deployment) -> None:
    parent = zerog.submit("noop")
    child = zerog.client.post(f"/run/gather?parent={parent}", json={"pause": 60}).json()["uuid"]
    zerog.wait_for(child, state="running")
    zerog.client.delete(f"/jobs/{child}")
    assert zerog.wait(child)["state"] == "cancelled"


def test_reading_goes_on_when_the_store_was_away(tmp_path: Path) -> None:
    with deployed(tmp_path, slots="1", deadline="0.3") as zerog:
        parent = zerog.submit("bulk", {"size": 1024 * 1024})
        zerog.wait(parent)
        child = zerog.client.post(f"/run/gather?parent={parent}", json={"how": "open", "pause": 1}).json()["uuid"]
        zerog.wait_for(child, state="running")
        lock = sqlite3.connect(tmp_path / "var" / "zerog.db")
        lock.execute("BEGIN IMMEDIATE")  # nobody writes now, and so no agent's step comes to its end
        time.sleep(3)  # longer than the job's pause: it asks meanwhile
        lock.rollback()
        lock.close()
        record = zerog.wait(child)
        assert (record["state"], record["attempt"]) == ("succeeded", 1)
