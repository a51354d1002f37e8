"""Fixtures of all tests."""

from __future__ import annotations

import os
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
    "test_chaos.py", "test_masters.py", "test_whole_path.py", "test_takeover.py", "test_failpoints.py", "test_tokens.py",
    "test_pages.py", "test_graphs.py", "test_batch.py", "test_pipeline.py", "test_agent.py", "test_explain.py",
    "test_documentation.py", "test_machine.py", "test_outages.py", "test_control.py", "test_protocol.py",
    "test_fuzz.py", "test_commands.py", "test_client.py", "test_own_deployment.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the longest files come first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
