"""What commands are made of, ZeroG's own and those of applications: settings as flags, a client, logging.

A command of an application is a click command behind an entry point of the group ``zerog.commands``::

    # setup.cfg of the application
    [options.entry_points]
    zerog.commands =
        mywork = mywork.commands:mywork

    # mywork/commands.py
    @click.command()
    @zerog.commands.with_settings("everything")
    def mywork(config: str | None, verbose: bool, **flags: object) -> None:
        with zerog.commands.opened("mywork", config, flags, verbose) as opened:
            click.echo(opened.documents.get("count")[0])

It is ``zerog mywork`` then, wherever the application is installed.
"""

from __future__ import annotations

import difflib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click

from zerog import config as settings_of
from zerog.client import Api
from zerog.codec import printable
from zerog.config import SETTINGS, Settings

if TYPE_CHECKING:
    from zerog.asked import Documents
    from zerog.manager import Manager
    from zerog.topics import Topics

#: Seconds for which a command tries to reach its server; one that follows a job has more.
_PATIENCE = 1.0
#: Where ``--ca`` waits until a command makes its client.
_CA = "zerog.ca"


class _Formatter(logging.Formatter):
    """One line a record, control characters escaped; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = f"{_to_local(int(record.created))},{int(record.msecs):03d}"
        line = printable(f"{stamp} {record.levelname} {record.name} {record.getMessage()}", 4000)
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


@lru_cache(maxsize=16)  # a busy agent writes thousands of lines a second
def _to_local(second: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def set_up_logging(verbose: bool = False) -> None:
    """Log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
    # What the format does not show need not be found out; the logging documentation names these switches.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.getLogger("tornado.general").setLevel(logging.ERROR)


class Group(click.Group):
    """A group that suggests the command that was probably meant."""

    def resolve_command(self, context: click.Context, arguments: list[str]) -> Any:
        try:
            return super().resolve_command(context, arguments)
        except click.UsageError as error:
            close = difflib.get_close_matches(arguments[0], self.list_commands(context), n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.message} Did you mean {close[0]!r}?", context) from error


def with_settings(*groups: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of these groups of the table of settings."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(SETTINGS):
            if setting.group not in groups:
                continue
            flag = f"--{setting.name.replace('_', '-')}"
            default = "none" if setting.default is None else str(setting.default)
            if isinstance(setting.default, bool):
                option = click.option(flag, setting.name, is_flag=True, default=None, help=setting.help)
            else:
                option = click.option(flag, setting.name, metavar="VALUE", help=f"{setting.help}  [default: {default}]")
            function = option(function)
        function = click.option("--verbose", is_flag=True, help="log every request and step")(function)
        return click.option("--config", metavar="FILE", help="TOML file with settings (or ZEROG_CONFIG)")(function)

    return decorate


def load(
    config_file: str | None,
    verbose: bool,
    flags: Mapping[str, Any],
    application: str | None = None,
    **defaults: Any,
) -> Settings:
    """Read the settings of a command that has their flags, and set up logging.

    An ``application`` is added to those of the settings if it is not among them; ``defaults`` stand where nothing was
    said.
    """
    set_up_logging(verbose)
    settings = settings_of.load(config_file, flags, None, application, defaults)
    for warning in () if "ZEROG_UP_PARENT" in os.environ else settings.warnings:
        logging.getLogger(__name__).warning("%s", warning)
    return settings


def over_http(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command a client and ``--json``."""
    function = click.option("--json", "as_json", is_flag=True, help="print JSON")(function)
    function = click.option(
        "--ca",
        metavar="FILE",
        expose_value=False,
        help="PEM file with the certificates to trust  [ZEROG_CA]",
        callback=lambda context, _, value: context.meta.update({_CA: value}),
    )(function)
    function = click.option("--token", metavar="TOKEN", help="token to send  [ZEROG_TOKEN]")(function)
    return click.option("--server", metavar="URL", help="server to talk to  [ZEROG_SERVER, http://127.0.0.1:8888]")(
        function
    )


def make_client(server: str | None, token: str | None) -> Api:
    """Return a client for a command that has the flags of ``over_http``."""
    ca = click.get_current_context().meta.get(_CA)
    settings = settings_of.load(None, {"server": server, "token": token, "ca": ca})
    return Api(settings.server, settings.token, settings.ca, _PATIENCE)


@dataclass(frozen=True)
class Opened:
    """What a command of an application works on: the store and the queue that the settings name."""

    manager: Manager
    topics: Topics
    documents: Documents
    settings: Any


@contextmanager
def opened(application: str, config: str | None, flags: Mapping[str, Any], verbose: bool = False) -> Iterator[Opened]:
    """Open store and queue for a command of an application, which is added to the setting ``applications`` if it is
    not there; closes them at the end."""
    from zerog import bootstrap
    from zerog.documents import OwnDocuments

    settings = load(config, verbose, flags, application)
    parts = bootstrap.assemble(settings)
    try:
        own = parts.registry.settings.get(application)
        yield Opened(parts.manager, parts.manager.topics, OwnDocuments(parts.store, application), own)
    finally:
        parts.manager.close_queue()
        parts.store.close()


def examined(settings: Settings) -> list[dict[str, str]]:
    """Return what ``zerog doctor`` finds: ``{level, what, text}``, where the level is ok, warning or broken."""
    from zerog.doctor import examine

    logging.getLogger().setLevel(logging.ERROR)
    return [one.view() for one in examine(settings)]


def run_up(settings: Settings) -> None:
    """Start a server, an agent and the consumers that agents do not run, and end with them."""
    from zerog.daemons import run_up as up

    sys.exit(up(settings))


def run_consumer(settings: Settings, names: Sequence[str]) -> None:
    """Run consumers until a signal ends it."""
    from zerog.daemons import run_consumer as consumer

    consumer(settings, names)
