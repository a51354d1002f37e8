"""What the commands share: values from the command line, rows, the progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from zerog.client import Api
from zerog.exceptions import ServerUnreachable

#: Seconds for which a server that does not answer is waited for while a job is followed.
_PATIENCE = 60.0
#: Exit statuses by the state in which a job ended.
EXIT = {"succeeded": 0, "failed": 1, "cancelled": 3}


def safe(text: str) -> str:
    """Return text without control characters but line ends and tabs: what a job said must not drive a terminal."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def as_values(pairs: Sequence[str], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Read ``name=value`` pairs: as JSON where the schema wants no string, as text where it does."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise click.UsageError(f"{pair!r} is not NAME=VALUE")
        if name in values:
            raise click.UsageError(f"{name!r} is given twice")
        values[name] = _as_value(text, schema.get("properties", {}).get(name, {}))
    return values


def _as_value(text: str, schema: Mapping[str, Any]) -> Any:
    kinds = {schema.get("type")} | {one.get("type") for one in schema.get("anyOf", ())}
    if "string" in kinds and not kinds & {"integer", "number", "boolean"}:
        return text if not (text == "null" and "null" in kinds) else None
    try:
        return json.loads(text)
    except ValueError:
        return text  # the server says what is wrong with it


def print_rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns."""
    cells = [tuple(titles), *(tuple(safe(cell).replace("\n", " ") for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def follow_to_end(client: Api, view: dict[str, Any], as_json: bool) -> int:
    """Follow a job to its end, print its data, and return the exit status."""
    client.patience = _PATIENCE  # the job is under way: a server that starts anew is waited for
    try:
        last = _follow(client, view, as_json)
        if as_json:
            return EXIT[last["state"]]
        if last["state"] == "succeeded":
            client.download(last["uuid"], sys.stdout.buffer)
            sys.stdout.buffer.flush()
            if sys.stdout.isatty():
                click.echo()
        else:
            click.echo(f"{last['state']} ({last['resultCode']}): {safe(last['message'] or '')}", err=True)
        return EXIT[last["state"]]
    except KeyboardInterrupt:
        click.echo(f"\nthe job goes on: {view['uuid']}", err=True)
        return 130
    except ServerUnreachable as error:
        click.echo(f"zerog: {error.detail}; the job may go on: {view['uuid']}", err=True)
        return 4


def _follow(client: Api, view: dict[str, Any], as_json: bool) -> dict[str, Any]:
    if as_json:
        for last in client.follow(view["uuid"]):
            click.echo(json.dumps(last))
        return last
    if not sys.stderr.isatty():
        for last in client.follow(view["uuid"]):
            message = f" {safe(last['message'])}" if last["message"] else ""
            click.echo(f"{last['state']} {last['completeness']:.0%}{message}", err=True)
        return last
    return _follow_with_bar(client, view)


def _follow_with_bar(client: Api, view: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.fields[job]}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(view["state"], total=1.0, job=view["jobType"])
        for last in client.follow(view["uuid"]):
            text = safe(last["message"]) if last["message"] else last["state"]
            bar.update(task, completed=last["completeness"], description=text)
    return last


#: The columns of a table of agents.
AGENT_TITLES = ("AGENT", "STATE", "HOST", "JOBS", "CPU", "RAM", "ROOM", "ENDED", "FAILED", "HEARD")


def agent_row(view: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an agent as a row of a table."""
    usage, room = view["usage"] or {}, view["room"]
    cpu, ram = usage.get("cpu"), usage.get("ram")
    left = [_bytes(room["ram"])] if room["ram"] is not None else []
    left += [f"{room['cpus']:g} cores"] if room["cpus"] is not None else []
    heard = view["lastCommunication"] or ""
    return (
        view["id"],
        view["state"],
        view["hostname"],
        str(view["tasks"]["count"]),
        "" if cpu is None else f"{cpu:.2f}",
        "" if ram is None else _bytes(ram),
        ", ".join(left),
        str(view["processedJobs"]["count"]),
        str(view["lastFailures"]["count"]),
        heard[11:19],
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def show_live(rows: Callable[[], Sequence[Sequence[str]]], titles: Sequence[str], every: float = 1.0) -> None:
    """Show a table that is drawn anew again and again, until Ctrl-C."""
    from rich.live import Live
    from rich.markup import escape
    from rich.table import Table

    def drawn() -> Table:
        table = Table(*titles, box=None)
        for row in rows():
            table.add_row(*(escape(safe(cell)) for cell in row))
        return table

    with Live(drawn(), refresh_per_second=4) as live:
        while True:
            time.sleep(every)
            live.update(drawn())
