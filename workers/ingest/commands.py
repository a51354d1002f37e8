"""``zerog ingest``, and the same under its old name, ``IngestCMD``."""

from __future__ import annotations

import hashlib
import json
import mimetypes
import os
import stat
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

import zerog
from workers.ingest.asking import ServiceError, asked, shown
from workers.ingest.metadata import DATA, MAX_METADATA, NAME
from workers.ingest.services import Rules
from workers.ingest.steps import JOB_TYPES, TASKS, set_by_hand, state_of
from workers.ingest.tar import BadBundle, Names, checked_path, show
from workers.ingest.volume import Volume
from zerog.server import iso

_APPLICATION = "workers.ingest"

_PIECE = 1024 * 1024

#: Seconds between two looks at an ingest that is waited for.
_LOOK = 0.3


@click.group()
def ingest() -> None:
    """Ingest: make bundles, look after the jobs that take them in."""


def entry() -> None:
    """Be ``IngestCMD``: exit status 0 done, 1 refused, 2 wrong usage."""
    try:
        ingest.main(prog_name="IngestCMD", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except zerog.ZerogError as error:
        click.echo(f"IngestCMD: {error}", err=True)
        sys.exit(1)


class _No(click.ClickException):
    """Something cannot be done: exit status 1."""

    exit_code = 1


# By hand


def _percent(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 100:
        raise click.BadParameter("a number from 0 to 100")
    return f"{number:.1f}"


@ingest.command()
@click.option("--job-id", type=click.IntRange(1, 2**53 - 1), required=True, help="number of the job")
@click.option("--state", type=click.Choice(["OK", "FAILED"]), required=True, help="what it is to be")
@click.option("--task", type=click.Choice(TASKS), required=True, help="at which task")
@click.option("--task-percent", callback=_percent, required=True, help="how far that is, 0 to 100")
@click.option("--exception", default="", help="what is to be said of it")
@zerog.commands.with_settings("everything")
def job(
    job_id: int,
    state: str,
    task: str,
    task_percent: str,
    exception: str,
    config: str | None,
    verbose: bool,
    **flags: Any,
) -> None:
    """Set the state of a job by hand; a job that goes on is cancelled, and nothing that it does changes that state."""
    with zerog.commands.opened(_APPLICATION, config, flags, verbose) as opened:
        record = _ingest_with(opened.manager, job_id)
        _refuse_retried(opened.manager, record)
        by_hand = {
            "state": state,
            "task": task,
            "task_percent": task_percent,
            "exception": exception,
            "updated": iso(opened.manager.clock.now()),
        }
        if not set_by_hand(opened.documents, opened.manager, record, by_hand):
            raise _No(f"job {job_id} was removed at this moment")
        _print(state_of(opened.manager.get(record.uuid), opened.documents, opened.manager, iso))


@ingest.command()
@click.option("--job-id", type=click.IntRange(1, 2**53 - 1), required=True, help="number of the job")
@zerog.commands.with_settings("everything")
def retry(job_id: int, config: str | None, verbose: bool, **flags: Any) -> None:
    """Try a job again that failed, from the bundle that was kept: as a new job."""
    with zerog.commands.opened(_APPLICATION, config, flags, verbose) as opened:
        manager = opened.manager
        record = _ingest_with(manager, job_id)
        _refuse_retried(manager, record)
        if str(record.state) not in ("failed", "cancelled"):
            raise _No(f"job {job_id} is {record.state}: only one that failed or was cancelled can be tried again")
        if not Volume(opened.settings.volume).bundle(str(record.parameters["bundle"])).exists():
            raise _No(f"the bundle of job {job_id} is not on the volume any more")
        try:
            made = manager.retry(record)
        except zerog.NotRetryable as error:
            raise _No(str(error)) from error
        _print(state_of(made, opened.documents, manager, iso))


def _ingest_with(manager: Any, number: int) -> Any:
    try:
        record = manager.by_number(number)
    except zerog.UnknownJob as error:
        raise _No(f"there is no job {number}") from error
    if record.job_type not in JOB_TYPES:
        raise _No(f"job {number} is no ingest: its type is {record.job_type}")
    return record


def _refuse_retried(manager: Any, record: Any) -> None:
    following = manager.successor(record.uuid)
    if following is not None:
        raise _No(f"job {record.number} was tried again already, as job {following.number}")


def _print(state: Mapping[str, Any]) -> None:
    click.echo(json.dumps(state))


# Checks


@ingest.command()
@click.option("--json", "as_json", is_flag=True, help="print JSON")
@zerog.commands.with_settings("everything", "server", "agent")
def check(as_json: bool, config: str | None, verbose: bool, **flags: Any) -> None:
    """See whether store, queue, volume and services can be reached, and are of the right version."""
    settings = zerog.commands.load(config, verbose, flags, _APPLICATION)
    findings = zerog.commands.examined(settings)
    if not any(one["level"] == "broken" for one in findings):
        with zerog.commands.opened(_APPLICATION, config, flags) as opened:
            findings += [_volume(opened.settings.volume), *_services(opened.settings)]
    if as_json:
        click.echo(json.dumps({"findings": findings}))
    else:
        for one in findings:
            click.echo(f"{one['level']:<7} {one['what']}: {one['text']}")
    if any(one["level"] == "broken" for one in findings):
        sys.exit(1)


def _finding(level: str, what: str, text: str) -> dict[str, str]:
    return {"level": level, "what": what, "text": text}


def _volume(root: Path) -> dict[str, str]:
    volume = Volume(root)
    try:
        part = volume.receive()
        try:
            part.write(b"x")
            part.sync()
        finally:
            part.discard()
        room = os.statvfs(root)
    except OSError as error:
        return _finding("broken", "volume", f"{root}: {error.strerror}")
    free = room.f_bavail * room.f_frsize
    return _finding("ok", "volume", f"{root} can be written; {free / 2**30:.1f} GiB are free")


def _services(settings: Any) -> Iterator[dict[str, str]]:
    for name in ("policy", "archive", "metadata", "ids"):
        url = getattr(settings, name)
        if url is None:
            yield _finding("ok", name, "local")
        elif not url.startswith(("http://", "https://")):
            try:
                yield _finding("ok", name, f"{len(Rules(Path(url)).read())} rules in {url}")
            except ServiceError as error:
                yield _finding("broken", name, str(error))
        else:
            yield _service(name, url)


def _service(name: str, url: str) -> dict[str, str]:
    """See whether a service answers, and what it says of its version."""
    try:
        status, content = asked("GET", url, refusals=True)
    except ServiceError as error:
        return _finding("broken", name, str(error))
    try:
        said = json.loads(content)
    except ValueError:
        said = None
    version = said.get("version") if isinstance(said, dict) else None
    text = f"{shown(url)} answers {status}" + (f", version {version}" if version else "")
    return _finding("warning" if status in (401, 403, 404) else "ok", name, text)


# Bundles


@dataclass(frozen=True)
class _Source:
    """A file of a folder that is to be in a bundle."""

    path: Path
    name: str
    size: int
    mtime: float
    ctime: float


@ingest.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--submitter", required=True, help="who submits it")
@click.option("--project", required=True, help="the project that it belongs to")
@click.option("--instrument", required=True, help="what it was measured with")
@click.option("--key", "pairs", multiple=True, metavar="K=V", help="a key and its value; may be repeated")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="write the bundle, do not send it")
@click.option("--wait", is_flag=True, help="wait until it is ingested")
@zerog.commands.over_http
def bundle(
    folder: Path,
    submitter: str,
    project: str,
    instrument: str,
    pairs: tuple[str, ...],
    output: Path | None,
    wait: bool,
    as_json: bool,
    server: str | None,
    token: str | None,
) -> None:
    """Make a valid bundle of a folder and upload it.

    Exit status: 0 accepted, and ingested with --wait; 1 it failed, or was refused; 2 the folder cannot be a bundle.
    """
    if output is not None and wait:
        raise click.UsageError("--output sends nothing that could be waited for: it excludes --wait")
    if output is not None and output.exists() and not output.is_file():
        raise click.UsageError(f"{show(os.fsencode(output))} is no regular file")
    sources = _sources(folder)
    head = [
        {"destinationTable": "Transactions.submitter", "value": submitter},
        {"destinationTable": "Transactions.project", "value": project},
        {"destinationTable": "Transactions.instrument", "value": instrument},
        *({"destinationTable": "TransactionKeyValue", "key": key, "value": value} for key, value in _pairs(pairs)),
    ]
    quiet = as_json or not sys.stderr.isatty()
    with _bar("hashing", sum(one.size for one in sources), quiet) as advance:
        listed = [_entry(one, advance) for one in sources]
    metadata = json.dumps([*head, *listed]).encode()
    if len(metadata) > MAX_METADATA:
        raise click.UsageError(f"the metadata would have {len(metadata):,} bytes, more than {MAX_METADATA:,}")
    if output is not None:
        with _written(output) as file:
            for piece in _tar(metadata, sources):
                file.write(piece)
        click.echo(json.dumps({"output": str(output), "files": len(sources)}) if as_json else str(output))
        return
    client = zerog.commands.make_client(server, token)
    size = sum(len(piece) for piece in _tar_frame(metadata, sources)) + sum(_padded(one.size) for one in sources)
    try:
        with _bar("uploading", size, quiet) as advance:
            state = client.upload(
                "/ingest", lambda: _counted(_tar(metadata, sources), advance), size, "application/x-tar"
            )
        if wait:
            state = _followed(client, state, quiet)
    except zerog.ZerogError as error:
        raise _No(f"{client.url}: {error}") from error
    _print(state)
    if state["state"] == "FAILED":
        sys.exit(1)


def _pairs(pairs: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{pair!r} is not K=V", param_hint="--key")
        yield key, value


def _sources(folder: Path) -> list[_Source]:
    """Return the files of a folder in the order of their names; links and special files are refused by name."""
    found: list[_Source] = []
    names = Names()
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        folders.sort()
        for name in sorted([*files, *(one for one in folders if (Path(place) / one).is_symlink())]):
            path = Path(place) / name
            state = path.lstat()
            if not stat.S_ISREG(state.st_mode):
                raise click.UsageError(
                    f"{show(os.fsencode(path))} is no regular file: links and special files cannot be in a bundle"
                )
            inside = path.relative_to(folder).as_posix()
            try:
                names.enter(checked_path(os.fsencode(DATA + inside)), False)
            except BadBundle as error:
                raise click.UsageError(f"it cannot be in a bundle: {error}") from error
            found.append(_Source(path, inside, state.st_size, state.st_mtime, state.st_ctime))
    if not found:
        raise click.UsageError(f"there are no files in {folder}")
    return found


def _unreadable(error: OSError) -> None:
    raise click.UsageError(f"{error.filename} cannot be read: {error.strerror}") from error


def _entry(source: _Source, advance: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    for piece in _bytes_of(source):
        digest.update(piece)
        advance(len(piece))
    subdir, _, name = source.name.rpartition("/")
    return {
        "destinationTable": "Files",
        "name": name,
        "subdir": subdir,
        "size": source.size,
        "hashsum": digest.hexdigest(),
        "hashtype": "sha256",
        "mimetype": mimetypes.guess_type(name)[0] or "application/octet-stream",
        "ctime": iso(source.ctime),
        "mtime": iso(source.mtime),
    }


def _bytes_of(source: _Source) -> Iterator[bytes]:
    """Yield the bytes of a file, which must not change while it is read."""
    left = source.size
    position = 0
    while left:
        try:
            with open(source.path, "rb") as file:
                file.seek(position)
                piece = file.read(min(_PIECE, left))
        except OSError as error:
            raise click.UsageError(f"{source.path} cannot be read: {error.strerror}") from error
        if not piece:
            raise _No(f"{source.path} has become shorter while it was read")
        left -= len(piece)
        position += len(piece)
        yield piece


def _header(name: str, size: int, mtime: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(mtime), 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _tar_frame(metadata: bytes, sources: list[_Source]) -> Iterator[bytes]:
    """Yield all of a bundle but the bytes of its files."""
    yield _header(NAME, len(metadata), time.time())
    yield metadata.ljust(_padded(len(metadata)), b"\0")
    for source in sources:
        yield _header(DATA + source.name, source.size, source.mtime)
    yield bytes(1024)


def _tar(metadata: bytes, sources: list[_Source]) -> Iterator[bytes]:
    """Yield a bundle."""
    yield _header(NAME, len(metadata), time.time())
    yield metadata.ljust(_padded(len(metadata)), b"\0")
    for source in sources:
        yield _header(DATA + source.name, source.size, source.mtime)
        yield from _bytes_of(source)
        yield bytes(_padded(source.size) - source.size)
    yield bytes(1024)


def _padded(size: int) -> int:
    return -(-size // 512) * 512


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Give a file that appears when it is whole."""
    making = path.with_name(f".{path.name}.part")
    try:
        with open(making, "wb") as file:
            yield file
        making.replace(path)
    except OSError as error:
        raise _No(f"{path} cannot be written: {error.strerror}") from error
    finally:
        making.unlink(missing_ok=True)


@contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Any]:
    """Give what moves a progress bar on a terminal."""
    if quiet:
        yield lambda size: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=None, transient=False) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


def _counted(pieces: Iterator[bytes], advance: Any) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        advance(len(piece))


def _followed(client: Any, state: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Wait until an ingest is over."""
    shown = ""
    while state["state"] == "OK" and (state["task"], state["task_percent"]) != (TASKS[-1], "100.0"):
        time.sleep(_LOOK)
        state = client.json(f"/get_state?job_id={state['job_id']}")
        now = f"{state['task']} {state['task_percent']}%"
        if not quiet and now != shown:
            click.echo(now, err=True)
            shown = now
    return state
