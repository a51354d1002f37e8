"""Documents of an application: jobs and endpoints see the same, and nobody overwrites what he has not seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import Deployment

WAYS = ["sqlite-direct", "sqlite-http", "couchbase-direct"]


@pytest.fixture(params=WAYS)
def zerog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    """A server, and two agents."""
    store, way = request.param.split("-")
    couchbase = request.getfixturevalue("couchbase") if store == "couchbase" else None
    made = Deployment(tmp_path, store, couchbase=couchbase, http=way == "http")
    made.start()
    made.start_agent()
    yield made
    made.close()


@pytest.mark.requirement("S3", "S18")
def test_counts_of_many_jobs_at_once_are_exact(zerog: Deployment) -> None:
    assert zerog.client.get("/counts/together").json()["count"] is None
    uuids = [zerog.submit("counting", {"key": "together", "times": 15}) for _ in range(8)]
    for uuid in uuids:
        assert zerog.wait(uuid, 60)["state"] == "succeeded"
    assert zerog.client.get("/counts/together").json()["count"] == 8 * 15


@pytest.mark.requirement("S3", "S18")
def test_what_cannot_be_done_with_a_document_is_said(zerog: Deployment) -> None:
    uuid = zerog.submit("asking")
    record = zerog.wait(uuid)
    assert record["state"] == "succeeded", zerog.info(uuid)
    assert zerog.client.get(f"/jobs/{uuid}/data").json() == {
        "read": "[1, 'é']", "insert": "AlreadyExists", "get": "NotFound", "replace": "Conflict",
        "replace missing": "NotFound", "remove": "Conflict", "remove missing": "NotFound", "key": "ValueError",
        "size": "ValueError", "value": "ValueError",
    }  # fmt: skip
