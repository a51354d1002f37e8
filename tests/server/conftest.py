"""A server in the test's own event loop, over real adapters on temporary files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tornado.ioloop
import tornado.web

from zerog import bootstrap, config
from zerog.manager import Manager
from zerog.server.app import Server


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[bootstrap.Parts]:
    """What the server stands on."""
    flags = {
        "datastore": f"sqlite:///{tmp_path}/zerog.db",
        "queue": f"sqlite:///{tmp_path}/queue.db",
        "run_dir": str(tmp_path / "run"),
        "applications": "workers.examples,tests",
    }
    made = bootstrap.assemble(config.load(None, flags, {}))
    yield made
    made.manager.close_queue()
    made.store.close()


@pytest.fixture
def manager(parts: bootstrap.Parts) -> Manager:
    """The Manager of the server."""
    return parts.manager


@pytest.fixture
def app(io_loop: tornado.ioloop.IOLoop, parts: bootstrap.Parts) -> Iterator[tornado.web.Application]:
    """The application that pytest-tornado serves."""
    server = Server(parts.manager, parts.registry, parts.clock)

    server.prepare()

    async def start() -> tornado.web.Application:
        return server.start()

    yield io_loop.run_sync(start)
    io_loop.run_sync(server.stop)
