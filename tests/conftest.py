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
