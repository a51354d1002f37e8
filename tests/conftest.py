"""Fixtures of all tests."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import Beanstalkd, CouchbaseServer

# A shell ignores it for what it starts in the background, and every process below would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: What is long, or needs more than the files of the project (its history): ``bin/test --full`` has it too.
collect_ignore = [] if os.environ.get("TESTS_FULL") else ["chaos/test_releases.py"]

#: The files that take longest, the longest first: files that run side by side are to end at about the same time.
LONGEST = (
    "agent/test_agents.py", "test_processing.py", "test_ingest.py", "test_masters.py", "test_chaos.py",
    "test_failpoints.py", "test_consumers.py", "test_takeover.py", "test_whole_path.py", "server/test_agents.py",
    "test_commands.py", "test_explain.py", "test_agent.py", "test_fuzz.py", "test_tokens.py", "test_outages.py",
    "test_pipeline.py", "test_pages.py", "test_applications.py", "test_documentation.py", "test_protocol.py",
    "test_own_documents.py", "test_graphs.py", "test_batch.py", "test_control.py", "test_client.py", "test_machine.py",
    "test_own_deployment.py",
)  # fmt: skip

#: The files whose tests run in several places each: over pairs of store and queue, or with agents of both kinds.  Every
#: day each test runs in one of them, in turn, so that all are there; ``bin/test --full`` runs each in all.
IN_TURN = (
    "test_failpoints.py", "test_whole_path.py", "test_takeover.py", "agent/test_agents.py", "test_consumers.py",
    "test_ingest.py", "test_outages.py", "test_pipeline.py", "test_own_documents.py", "test_masters.py", "test_batch.py",
    "server/test_agents.py",
)  # fmt: skip
PLACES = {
    *("sqlite-sqlite", "sqlite-beanstalkd", "couchbase-sqlite", "couchbase-beanstalkd"),
    *("sqlite", "couchbase", "beanstalkd", "direct", "http", "datastore", "memcached"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the longest files come first; every day leave out the places in which a test has no turn."""
    items.sort(
        key=lambda item: next((n for n, end in enumerate(LONGEST) if str(item.path).endswith(end)), len(LONGEST))
    )
    chosen = config.option.keyword or any("::" in argument for argument in config.args)
    if os.environ.get("TESTS_FULL") or chosen:
        return
    left_out = set(without_turn(items))
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def without_turn(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the items of the files ``IN_TURN`` that do not run today: all but one of those that differ by place alone."""
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        place = place_of(item)
        if place is not None and str(item.path).endswith(IN_TURN):
            groups.setdefault((str(item.path), item.name.replace(place, "", 1)), []).append(item)
    for turn, group in enumerate(one for one in groups.values() if len(one) > 1):
        yield from (item for number, item in enumerate(group) if number != turn % len(group))


def place_of(item: pytest.Item) -> str | None:
    """Return the place of a test, as it stands in its name."""
    inside = item.name.partition("[")[2].removesuffix("]")
    return next(
        (one for one in sorted(PLACES, key=lambda one: (-len(one), one)) if re.search(rf"(^|-){one}(-|$)", inside)),
        None,
    )


@pytest.fixture
def beanstalkd(tmp_path: Path) -> Iterator[Beanstalkd]:
    """A beanstalkd of this test alone."""
    server = Beanstalkd(tmp_path / "beanstalkd").start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def couchbase(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CouchbaseServer]:
    """Couchbase's test server, shared by the tests, which use services of their own in it."""
    server = CouchbaseServer(tmp_path_factory.mktemp("couchbase")).start()
    yield server
    server.stop()
