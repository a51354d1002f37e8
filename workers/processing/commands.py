"""``zerog processing``: everything that processing requests need, and its parts."""

from __future__ import annotations

from typing import Any

import click

import zerog

_APPLICATION = "workers.processing"
_PORT = 5003


@click.group()
def processing() -> None:
    """Processing requests: the gateway, its agent and the results listener."""


@processing.command()
@zerog.commands.with_settings("everything", "server", "agent")
def up(config: str | None, verbose: bool, **flags: Any) -> None:
    """Start everything, on port 5003 unless another is set."""
    zerog.commands.run_up(zerog.commands.load(config, verbose, flags, _APPLICATION, port=_PORT))


@processing.command()
@zerog.commands.with_settings("everything", "agent")
def listener(config: str | None, verbose: bool, **flags: Any) -> None:
    """Start the results listener, the only writer of results."""
    zerog.commands.run_consumer(zerog.commands.load(config, verbose, flags, _APPLICATION), ["processing-results"])
