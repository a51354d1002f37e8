"""The command line: commands as a table of click commands, one function each."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click

import zerog
from zerog import config
from zerog.client import Api
from zerog.commands import Group, load, make_client, over_http, with_settings
from zerog.console import AGENT_TITLES, EXIT, agent_row, as_values, follow_to_end, print_rows, safe, show_live
from zerog.exceptions import ConfigurationError, ServerUnreachable, ZerogError

_EXIT_REFUSED = 4
#: Seconds between two looks at an agent that is waited for, and for which its server is waited for meanwhile.
_LOOK_EVERY, _FOLLOWED = 0.2, 60.0


class _Main(Group):
    """ZeroG's own commands, and those of applications that are installed: entry points of the group zerog.commands."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*super().list_commands(context), *_of_applications()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        own = super().get_command(context, name)
        if own is not None or name not in _of_applications():
            return own
        try:
            found = _of_applications()[name].load()
        except Exception as error:  # whatever the module does when it is imported
            raise click.ClickException(
                f"the command {name} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, click.Command):
            raise click.ClickException(f"the command {name} cannot be loaded: it is no click command")
        return found


@lru_cache(maxsize=1)
def _of_applications() -> dict[str, EntryPoint]:
    """Return the commands of applications by name; of two with one name the first one found."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group="zerog.commands"):
        found.setdefault(point.name, point)
    return found


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(zerog.__version__, prog_name="zerog")
def main() -> None:
    """ZeroG runs long Python work behind HTTP.

    Start everything with "zerog up", run a job with "zerog run TYPE name=value --wait".
    """


# Daemons


@main.command()
@with_settings("everything", "server", "agent")
def up(config: str | None, verbose: bool, **flags: Any) -> None:
    """Start a server and an agent: everything that is needed."""
    from zerog.daemons import run_up

    sys.exit(run_up(load(config, verbose, flags)))


@main.command()
@with_settings("everything", "server")
def server(config: str | None, verbose: bool, **flags: Any) -> None:
    """Start the HTTP server."""
    from zerog.daemons import run_server

    run_server(load(config, verbose, flags))


@main.command()
@with_settings("everything", "agent")
@click.option("--token", metavar="TOKEN", help="token to send to the masters  [ZEROG_TOKEN]")
@click.option("--ca", metavar="FILE", help="PEM file with the certificates to trust  [ZEROG_CA]")
def worker(config: str | None, verbose: bool, **flags: Any) -> None:
    """Start an agent: the daemon that runs jobs.  SIGTERM drains it, a second one stops it now."""
    from zerog.daemons import run_worker

    run_worker(load(config, verbose, flags))


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@with_settings("everything", "agent")
def consumer(names: tuple[str, ...], config: str | None, verbose: bool, **flags: Any) -> None:
    """Run consumers of topics, by name: those that agents do not run, or any.  SIGTERM ends it in order."""
    from zerog.daemons import run_consumer

    run_consumer(load(config, verbose, flags), names)


@main.command()
@with_settings("everything", "server", "agent")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def doctor(config: str | None, verbose: bool, as_json: bool, **flags: Any) -> None:
    """Check settings, store and queue, and say what is unsafe."""
    from zerog.doctor import examine

    settings = load(config, verbose, flags)
    logging.getLogger().setLevel(logging.ERROR)
    findings = examine(settings)
    if as_json:
        click.echo(json.dumps({"findings": [finding.view() for finding in findings]}))
    else:
        for finding in findings:
            click.echo(f"{finding.level:<7} {finding.what}: {finding.text}")
    sys.exit(1 if any(finding.level == "broken" for finding in findings) else 0)


def _leave(number: int, _: object) -> None:
    """End by way of what ends the processes that were started, which a second signal must not interrupt."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


@main.command()
@click.argument("scenarios", nargs=-1, metavar="[SCENARIO]...")
@click.option("--datastore", default="sqlite", show_default=True, metavar="URL", help="sqlite, or a URL as in settings")
@click.option(
    "--queue",
    default="sqlite",
    show_default=True,
    type=click.Choice(["sqlite", "beanstalkd", "beanstalkd-durable"]),
    help="the queue that is started",
)
@click.option("--jobs", type=click.IntRange(1, 10**6), help="how many, instead of the scenario's number")
@click.option("--faults", type=click.IntRange(1, 10**6), help="how many, instead of the scenario's number")
@click.option("--lease", type=click.FloatRange(0.5, 600), default=5.0, show_default=True, help="seconds")
@click.option("--sweep", type=click.FloatRange(0.1, 600), default=5.0, show_default=True, help="seconds")
@click.option("--seed", type=int, help="of the choices; without it another each time")
@click.option("--campaign", is_flag=True, help="the large numbers of jobs and faults")
@click.option("--servers", type=click.IntRange(1, 8), default=1, show_default=True, help="behind nginx, if several")
@click.option(
    "--agents",
    type=click.Choice(["direct", "http", "both"]),
    default="direct",
    show_default=True,
    help="how the agents speak: to store and queue, to the servers alone, or half of them each",
)
@click.option("--server", metavar="URL", help="a deployment that serves zerog.chaos: only own agents are injured")
@click.option("--write", "document", type=click.Path(dir_okay=False), help="write the table into this document")
@click.option("--keep", is_flag=True, help="keep what the processes said")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def chaos(document: str | None, as_json: bool, **wanted: Any) -> None:
    """Injure processes while jobs run, and prove that nothing is lost and nothing finishes twice.

    Without names all scenarios run, with --server those that injure agents alone.

    Exit status: 0 nothing was found, 1 something was, 2 wrong usage.
    """
    from zerog.chaos import campaign
    from zerog.chaos.report import write

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)  # SIGINT, too, is ignored in what a script started in the background
    try:
        reports = campaign.run(campaign.Wanted(**wanted), lambda text: None if as_json else click.echo(text))
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    if document is not None:
        write(Path(document), reports)
    if as_json:
        click.echo(campaign.as_json(reports))
    sys.exit(1 if not all(report.clean for report in reports) else 0)


@main.group(cls=Group)
def token() -> None:
    """Tokens: made, listed and revoked in the store itself, by whoever can reach it."""


def _tokens(config_file: str | None, verbose: bool, flags: dict[str, Any]) -> tuple[Any, Any]:
    """Return the tokens, and the store that they are in, which is to be closed."""
    from zerog.bootstrap import open_store
    from zerog.clock import Clock
    from zerog.tokens import Tokens

    settings = load(config_file, verbose, flags)
    store = open_store(settings, settings.deadline)
    return Tokens(store, Clock()), store


@token.command("create")
@click.argument("name")
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="submit, read, operate, agent, proxy or admin")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="only for jobs of this type; may be repeated")
@with_settings("everything")
def token_create(
    name: str, roles: tuple[str, ...], types: tuple[str, ...], config: str | None, verbose: bool, **flags: Any
) -> None:
    """Make a token and print it, once.  From the first one on, servers answer only who has one."""
    tokens, store = _tokens(config, verbose, flags)
    try:
        made, secret = tokens.create(name, roles, types)
    finally:
        store.close()
    shown = {"id": made.id, "name": made.name, "token": secret, "roles": list(made.roles), "types": list(made.types)}
    click.echo(json.dumps(shown))


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@with_settings("everything")
def token_list(as_json: bool, config: str | None, verbose: bool, **flags: Any) -> None:
    """List the tokens, without their secrets."""
    tokens, store = _tokens(config, verbose, flags)
    try:
        found = [one.view() for one in tokens.all()]
    finally:
        store.close()
    if as_json:
        click.echo(json.dumps(found))
        return
    print_rows(
        ("ID", "NAME", "ROLES", "TYPES", "CREATED"),
        [(t["id"], t["name"], ",".join(t["roles"]), ",".join(t["types"]) or "all", t["createdAt"]) for t in found],
    )


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@with_settings("everything")
def token_revoke(token_id: str, config: str | None, verbose: bool, **flags: Any) -> None:
    """Take a token back: within seconds no server accepts it any more."""
    tokens, store = _tokens(config, verbose, flags)
    try:
        revoked = tokens.revoke(token_id)
    finally:
        store.close()
    click.echo(f"revoked {revoked.id} ({safe(revoked.name)})")


# Commands over HTTP


@main.command()
@click.argument("job_type", metavar="TYPE")
@click.argument("values", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--wait", is_flag=True, help="wait for the end, then print the data")
@click.option("--delay", type=float, metavar="SECONDS", help="run it so much later")
@click.option("--not-before", metavar="TIME", help="run it not before a time such as 2026-01-31T12:00:00Z")
@click.option("--priority", type=int, help="lower is more urgent  [default: 1000]")
@click.option("--parent", "parents", multiple=True, metavar="UUID", help="run it when this job has succeeded")
@over_http
def run(
    job_type: str,
    values: tuple[str, ...],
    wait: bool,
    delay: float | None,
    not_before: str | None,
    priority: int | None,
    parents: tuple[str, ...],
    as_json: bool,
    server: str | None,
    token: str | None,
) -> None:
    """Run a job.  Values are read as the type's schema says: width=640, path=a.png, 'tags=["a"]'.

    Exit status: 0 succeeded, 1 failed, 2 refused parameters, 3 cancelled, 4 no server, 130 after Ctrl-C.
    """
    client = make_client(server, token)
    schema = client.type(job_type)["schema"]
    view = client.submit(
        job_type,
        as_values(values, schema),
        delay=delay,
        not_before=not_before,
        priority=priority,
        parents=parents,
    )
    _say_accepted(client, view, wait, as_json)


def _say_accepted(client: Api, view: dict[str, Any], wait: bool, as_json: bool) -> None:
    """Print the UUID of a job that was accepted, or wait for its end and print its data."""
    if wait:
        sys.exit(follow_to_end(client, view, as_json))
    click.echo(json.dumps(view) if as_json else view["uuid"])


@main.group(cls=Group, invoke_without_command=True)
@click.option("--type", "job_type", help="only jobs of this type")
@click.option("--state", help="only jobs in this state")
@click.option("--limit", default=20, show_default=True, help="how many")
@over_http
@click.pass_context
def jobs(
    context: click.Context,
    job_type: str | None,
    state: str | None,
    limit: int,
    as_json: bool,
    server: str | None,
    token: str | None,
) -> None:
    """List jobs, newest first; or do something to many."""
    if context.invoked_subcommand is not None:
        return
    items = list(make_client(server, token).jobs(job_type, state, limit))
    if as_json:
        click.echo(json.dumps(items))
        return
    print_rows(
        ("UUID", "TYPE", "STATE", "DONE", "MESSAGE"),
        [(i["uuid"], i["jobType"], i["state"], f"{i['completeness']:.0%}", i["message"] or "") for i in items],
    )


@jobs.command("retry")
@click.option("--type", "job_type", required=True, help="jobs of this type")
@click.option("--state", type=click.Choice(["failed", "cancelled"]), default="failed", show_default=True)
@click.option("--limit", default=100, show_default=True, help="how many at most")
@over_http
def jobs_retry(job_type: str, state: str, limit: int, as_json: bool, server: str | None, token: str | None) -> None:
    """Try the newest jobs of a type that failed, or were cancelled, again: each once, as a new one."""
    items = make_client(server, token).retry_many(job_type, state, limit)
    if as_json:
        click.echo(json.dumps(items))
    else:
        rows = [(_uuid_of(i["job"]), _uuid_of(i["retried"]) if "retried" in i else i["detail"]) for i in items]
        print_rows(("JOB", "TRIED AGAIN AS"), rows)
    sys.exit(0 if all("retried" in item for item in items) else _EXIT_REFUSED)


@jobs.command("prune")
@click.option("--type", "job_type", help="only jobs of this type")
@click.option("--older-than", required=True, metavar="TIME", help="time since their end, such as 12h or 30d")
@over_http
def jobs_prune(job_type: str | None, older_than: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Remove jobs that have ended, with their data and events.  A job for which others wait is kept."""
    try:
        seconds = config.read_seconds(older_than)
    except ValueError as error:
        raise click.BadParameter(f"it must be {error}", param_hint="--older-than") from error
    removed = make_client(server, token).prune(seconds, job_type)
    click.echo(json.dumps({"pruned": removed}) if as_json else f"{removed} jobs removed")


def _uuid_of(reference: dict[str, str]) -> str:
    return reference["href"].rsplit("/", 1)[-1]


@main.group(cls=Group)
def job() -> None:
    """Look at one job, fetch its data, cancel it."""


@job.command("show")
@click.argument("uuid")
@over_http
def job_show(uuid: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Show the whole record."""
    _print_view(make_client(server, token).job(uuid), as_json)


@job.command("info")
@click.argument("uuid")
@over_http
def job_info(uuid: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Show progress and what happened so far."""
    _print_view(make_client(server, token).info(uuid), as_json)


@job.command("data")
@click.argument("uuid")
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="file to write  [default: stdout]")
@over_http
def job_data(uuid: str, output: str | None, as_json: bool, server: str | None, token: str | None) -> None:
    """Fetch the data of a job that has succeeded."""
    client = make_client(server, token)
    view = client.progress(uuid)
    if view["state"] != "succeeded":
        why = f": {safe(view['message'])}" if view["message"] else ""
        click.echo(f"zerog: there are no data, the job is {view['state']}{why}", err=True)
        sys.exit(EXIT.get(view["state"], 1))
    if output is None:
        client.download(uuid, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    with open(output, "wb") as file:
        size = client.download(uuid, file)
    click.echo(json.dumps({"file": output, "size": size}) if as_json else f"{size} bytes in {output}", err=not as_json)


@job.command("events")
@click.argument("uuid")
@click.option("--level", type=click.Choice(["event", "warning", "error"]), help="only entries of this level")
@over_http
def job_events(uuid: str, level: str | None, as_json: bool, server: str | None, token: str | None) -> None:
    """Show all that a job said."""
    for entry in make_client(server, token).events(uuid, level):
        if as_json:
            click.echo(json.dumps(entry))
        else:
            click.echo(f"{entry['at']} {entry.get('source') or entry['level']}: {safe(entry['message'])}")


@job.command("explain")
@click.argument("uuid")
@over_http
def job_explain(uuid: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Say why a job is not done."""
    view = make_client(server, token).explain(uuid)
    told = view["reason"] != "paused" or view["at"] in view["message"]
    who = "" if told else f" (by {view['by']} at {view['at']})"
    click.echo(json.dumps(view) if as_json else f"{view['reason']}: {safe(view['message'])}{who}")


@job.command("cancel")
@click.argument("uuid")
@over_http
def job_cancel(uuid: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Cancel a job."""
    view = make_client(server, token).cancel(uuid)
    click.echo(json.dumps(view) if as_json else "cancelling" if view["cancelling"] else view["state"])


@job.command("retry")
@click.argument("uuid")
@click.argument("values", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--wait", is_flag=True, help="wait for the end, then print the data")
@over_http
def job_retry(
    uuid: str, values: tuple[str, ...], wait: bool, as_json: bool, server: str | None, token: str | None
) -> None:
    """Try a failed or cancelled job again, as a new one; with values these are its parameters, all of them."""
    client = make_client(server, token)
    parameters = None
    if values:
        parameters = as_values(values, client.type(client.progress(uuid)["jobType"])["schema"])
    _say_accepted(client, client.retry(uuid, parameters), wait, as_json)


@main.command()
@click.argument("job_type", metavar="[TYPE]", required=False)
@over_http
def types(job_type: str | None, as_json: bool, server: str | None, token: str | None) -> None:
    """List the job types, or show one with its parameters and the curl that runs it."""
    client = make_client(server, token)
    if job_type is not None:
        view = client.type(job_type)
        if as_json:
            click.echo(json.dumps(view))
            return
        click.echo(f"{view['jobType']}: {safe(view['description'])}\n")
        required = view["schema"].get("required", [])
        rows = [(name, "required" if name in required else "", json.dumps(schema))
                for name, schema in view["schema"].get("properties", {}).items()]  # fmt: skip
        print_rows(("PARAMETER", "", "SCHEMA"), rows)
        click.echo(f"\n{view['curl']}")
        return
    items = client.types()
    if as_json:
        click.echo(json.dumps(items))
        return
    print_rows(("TYPE", "WHAT IT DOES"), [(i["jobType"], i["description"].split("\n")[0]) for i in items])


@main.group(cls=Group, invoke_without_command=True)
@over_http
@click.pass_context
def queue(context: click.Context, as_json: bool, server: str | None, token: str | None) -> None:
    """Show the queue of every job type; or hold one back."""
    if context.invoked_subcommand is not None:
        return
    items = [{name: one[name] for name in ("jobType", "queue", "paused")} for one in make_client(server, token).types()]
    if as_json:
        click.echo(json.dumps(items))
        return
    names = ("ready", "reserved", "delayed", "buried")
    print_rows(
        ("TYPE", *(name.upper() for name in names), "PAUSED"),
        [
            (
                i["jobType"],
                *(str(i["queue"][name]) if i["queue"] else "away" for name in names),
                f"by {i['paused']['by']}" + (f": {i['paused']['message']}" if i["paused"]["message"] else "")
                if i["paused"]
                else "",
            )
            for i in items
        ],
    )


@queue.command("pause")
@click.argument("job_type", metavar="TYPE")
@click.option("--message", "-m", help="why, for whoever asks")
@over_http
def queue_pause(job_type: str, message: str | None, as_json: bool, server: str | None, token: str | None) -> None:
    """Hold back the queued jobs of a type; its running jobs go on, and submits are accepted."""
    view = make_client(server, token).pause(job_type, message)
    click.echo(json.dumps(view) if as_json else f"{job_type} is paused by {view['paused']['by']}")


@queue.command("resume")
@click.argument("job_type", metavar="TYPE")
@over_http
def queue_resume(job_type: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Let the jobs of a type run again."""
    view = make_client(server, token).resume(job_type)
    click.echo(json.dumps(view) if as_json else f"{job_type} is not paused")


@main.command("agents")
@click.option(
    "--state",
    type=click.Choice(["running", "draining", "drained", "retired", "offline"]),
    help="only agents in this state",
)
@click.option("--type", "job_type", help="only agents that serve this type")
@click.option("--once", is_flag=True, help="show them once and end, also on a terminal")
@over_http
def list_agents(
    state: str | None, job_type: str | None, once: bool, as_json: bool, server: str | None, token: str | None
) -> None:
    """Show the agents: what they do, have and use.  On a terminal until Ctrl-C."""
    client = make_client(server, token)
    if as_json:
        click.echo(json.dumps(client.agents(state, job_type)))
    elif once or not sys.stdout.isatty():
        print_rows(AGENT_TITLES, [agent_row(one) for one in client.agents(state, job_type)])
    else:
        show_live(lambda: [agent_row(one) for one in client.agents(state, job_type)], AGENT_TITLES)


@main.group("agent", cls=Group)
def one_agent() -> None:
    """Look at one agent, and tell it what to do."""


@one_agent.command("show")
@click.argument("name")
@over_http
def agent_show(name: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Show all that is known of an agent."""
    _print_view(make_client(server, token).agent(name), as_json)


@one_agent.command("jobs")
@click.argument("name")
@over_http
def agent_jobs(name: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Show what an agent runs now."""
    items = make_client(server, token).assignments(name)
    if as_json:
        click.echo(json.dumps(items))
        return
    print_rows(("JOB", "ATTEMPT", "SINCE"), [(_uuid_of(i["job"]), str(i["attempt"]), i["since"]) for i in items])


def _tell(name: str, summary: str, reached: Sequence[str] = ()) -> None:
    """Make the command that gives an agent a command without members."""

    @one_agent.command(name, help=summary)
    @click.argument("agent", metavar="NAME")
    @click.option("--wait", is_flag=True, help="wait until it has")
    @over_http
    def command(agent: str, wait: bool, as_json: bool, server: str | None, token: str | None) -> None:
        client = make_client(server, token)
        before = client.agent(agent)["instance"]
        view = client.command(agent, name)
        if wait:
            view = _wait_for_agent(client, agent, view, reached, before if name == "restart" else None)
        click.echo(json.dumps(view) if as_json else f"{name}: {view['state']}")


def _wait_for_agent(
    client: Api, agent: str, view: dict[str, Any], reached: Sequence[str], former: str | None
) -> dict[str, Any]:
    """Wait until an agent has done what it was told, and is in one of some states; returns the command.

    ``former`` is the instance that it is not to be any more.
    """
    client.patience = _FOLLOWED
    while view["state"] == "pending":
        time.sleep(_LOOK_EVERY)
        view = client.json(view["href"])
        if view["state"] == "pending" and client.agent(agent)["state"] in ("offline", "retired"):
            raise click.ClickException(f"{agent} is offline; it hears of it when it comes back")
    while reached and view["state"] == "applied":
        now = client.agent(agent)
        if now["state"] in reached and now["instance"] != former:
            break
        if now["state"] == "offline":
            raise click.ClickException(f"{agent} is offline")
        time.sleep(_LOOK_EVERY)
    return view


_tell("drain", "Let it take no jobs; those that run go on for as long as its setting drain says.", ("drained",))
_tell("resume", "Let it take jobs again.", ("running",))
_tell("retire", "Let it end.", ("retired",))
_tell("restart", "Let it execute itself anew, under the same pid and name.", ("running",))


@one_agent.command("limits")
@click.argument("agent", metavar="NAME")
@click.option("--ram", metavar="BYTES", help="memory that its jobs may take together, such as 48GiB; none: no limit")
@click.option("--cpus", metavar="CORES", help="cores that its jobs may take together; none: no limit")
@over_http
def agent_limits(
    agent: str, ram: str | None, cpus: str | None, as_json: bool, server: str | None, token: str | None
) -> None:
    """Set how much an agent may give to jobs."""
    limits: dict[str, Any] = {}
    for name, text, read in (("ram", ram, config.read_bytes), ("cpus", cpus, config.read_cores)):
        if text is not None:
            try:
                limits[name] = None if text == "none" else read(text)
            except ValueError as error:
                raise click.BadParameter(f"it must be {error}", param_hint=f"--{name}") from error
    if not limits:
        raise click.UsageError("give --ram, or --cpus, or both")
    view = make_client(server, token).command(agent, "setLimits", limits=limits)
    click.echo(json.dumps(view) if as_json else f"limits: {view['state']}")


@one_agent.command("cancel")
@click.argument("agent", metavar="NAME")
@click.argument("uuid")
@over_http
def agent_cancel(agent: str, uuid: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Cancel a job that runs on an agent."""
    view = make_client(server, token).command(agent, "cancel", uuid=uuid)
    click.echo(json.dumps(view) if as_json else f"cancel: {view['state']}")


@one_agent.command("forget")
@click.argument("agent", metavar="NAME")
@over_http
def agent_forget(agent: str, as_json: bool, server: str | None, token: str | None) -> None:
    """Forget an agent; what it runs is given back, and goes on elsewhere."""
    make_client(server, token).forget_agent(agent)
    click.echo(json.dumps({"forgotten": agent}) if as_json else f"{agent} is forgotten")


def _print_view(view: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(view))
        return
    for name, value in view.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        click.echo(f"{name + ':':<14} {safe(text)}")


def entry() -> None:
    """Run the command line; errors are one line on stderr and a status."""
    try:
        main(standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigurationError as error:
        click.echo(f"zerog: {error}", err=True)
        sys.exit(1)
    except ZerogError as error:
        # Of a single fault the lines below say the same, and where it is.
        said = len(error.errors) == 1 and error.errors[0].get("detail") == error.detail
        click.echo(f"zerog: {safe(error.title() if said else error.detail)}", err=True)
        for fault in error.errors[:20]:
            where = fault.get("pointer") or fault.get("parameter") or "/"
            click.echo(f"  {safe(where)}: {safe(fault['detail'])}", err=True)
        sys.exit(2 if error.status in (400, 422) else _EXIT_REFUSED)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


__all__ = ["ServerUnreachable", "entry", "main"]

if __name__ == "__main__":
    entry()
