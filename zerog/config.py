"""Settings: one table, read from a TOML file, the environment and flags, the later winning.

Every value remembers its source, so that an error can name it.  Times are in seconds, sizes in bytes; both take
suffixes (``ms s m h d``, ``KiB MiB GiB``).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from zerog.exceptions import BadSetting

_SERVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/=-]{0,99}", re.ASCII)
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
_PREFIX = "ZEROG_"
_MASK = "**********"
_SECRETS = ("datastore_password", "token")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text")
    return value.strip()


def _quantity(value: Any, units: Mapping[str, float], what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(what)
    match = _QUANTITY.fullmatch(str(value).strip())
    if match is None or match.group(2) not in units:
        raise ValueError(what)
    return float(match.group(1)) * units[match.group(2)]


def read_seconds(value: Any) -> float:
    """Read seconds with their suffixes; ``ValueError`` says what would be right."""
    return _quantity(value, _SECONDS, "seconds, such as 30, 500ms or 2h")


def _seconds(value: Any) -> float:
    seconds = read_seconds(value)
    if not 0.01 <= seconds <= 31_536_000 * 100:
        raise ValueError("at least 10ms")
    return seconds


def _optional_seconds(value: Any) -> float | None:
    return None if value in (None, "", "none") else _seconds(value)


def _bytes(value: Any) -> int:
    size = _quantity(value, _BYTES, "bytes, such as 1048576, 512KiB or 2GiB")
    if not 1 <= size < 2**53:
        raise ValueError("at least 1 byte")
    return int(size)


def _body(value: Any) -> int:
    size = _bytes(value)
    if size > 32 * 1024**2:
        raise ValueError("at most 32MiB: parameters are kept in one document")
    return size


def _count(value: Any) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if isinstance(value, (bool, float)) or not 1 <= number <= 1_000_000:
        raise ValueError("a whole number from 1 to 1,000,000")
    return number


def _processes(value: Any) -> int:
    number = _count(value)
    if number > 256:
        raise ValueError("a whole number from 1 to 256")
    return number


def _slots(value: Any) -> int | None:
    if value is None:
        return None
    number = _count(value)
    if number > 1000:  # each is a process; a slip of the finger must not fill the machine
        raise ValueError("a whole number from 1 to 1,000")
    return number


def _rate(value: Any) -> int:
    if str(value) == "0":
        return 0
    try:
        return _count(value)
    except ValueError as error:
        raise ValueError("a whole number from 0 to 1,000,000; 0 for no limit") from error


def _port(value: Any) -> int:
    if str(value).isascii() and str(value).isdigit() and 0 <= int(str(value)) <= 65535:
        return int(str(value))
    raise ValueError("a port, 0 to 65535 (0 takes a free one)")


def _flag(value: Any) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if str(value).lower() not in known:
        raise ValueError("true or false")
    return known[str(value).lower()]


def _list(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("a list of names")
    return tuple(part.strip() for part in parts if part.strip())


def _optional_list(value: Any) -> tuple[str, ...] | None:
    return None if value in (None, "all") else _list(value)


def _origins(value: Any) -> tuple[str, ...] | None:
    origins = _optional_list(value)
    if not all(re.fullmatch(r"https?://[^/\s,]+/?", origin, re.ASCII) for origin in origins or ()):
        raise ValueError("origins, comma separated, such as https://example.org")
    return origins


def _masters(value: Any) -> tuple[str, ...] | None:
    masters = _optional_list(value)
    if not masters or not all(re.fullmatch(r"https?://[^\s,/?#@]+(/[^\s,?#]*)?", one, re.ASCII) for one in masters):
        raise ValueError("URLs of servers, comma separated, such as http://127.0.0.1:8888")
    return masters


def _agent_name(value: Any) -> str:
    if not isinstance(value, str) or not _AGENT.fullmatch(value) or value == "commands":
        raise ValueError(f"a name that matches {_AGENT.pattern}, and not commands")
    return value


def _labels(value: Any) -> tuple[str, ...]:
    labels = _list(value)
    if len(labels) > 50 or not all(_LABEL.fullmatch(one) for one in labels):
        raise ValueError(f"at most 50 labels, comma separated, each of which matches {_LABEL.pattern}")
    return tuple(sorted(set(labels)))


def read_bytes(value: Any) -> int:
    """Read bytes with their suffixes; ``ValueError`` says what would be right."""
    return _bytes(value)


def read_cores(value: Any) -> float:
    """Read a number of cores; ``ValueError`` says what would be right."""
    cores = _optional_cores(value)
    if cores is None:
        raise ValueError("cores, such as 4 or 0.5, to a thousandth")
    return cores


def _optional_bytes(value: Any) -> int | None:
    return None if value in (None, "") else _bytes(value)


def _optional_cores(value: Any) -> float | None:
    if value in (None, ""):
        return None
    try:
        cores = float(str(value))
    except ValueError:
        cores = 0.0
    if isinstance(value, bool) or not 0.001 <= cores <= 100_000 or round(cores, 3) != cores:
        raise ValueError("cores, such as 4 or 0.5, to a thousandth")
    return cores


def _applications(value: Any) -> tuple[str, ...]:
    names = _list(value)
    if not names or not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ValueError("dotted names of packages, such as workers.examples,mywork")
    return names


def _service(value: Any) -> str:
    if not isinstance(value, str) or not _SERVICE.fullmatch(value):
        raise ValueError(f"a name that matches {_SERVICE.pattern}")
    return value


def _url(*schemes: str) -> Callable[[Any], str]:
    right = " or ".join(f"{scheme}://" for scheme in schemes)

    def parse(value: Any) -> str:
        if not isinstance(value, str) or urlsplit(value).scheme not in schemes:
            raise ValueError(f"a URL that starts with {right}")
        return value

    return parse


def _stats(value: Any) -> str:
    if value in ("datastore", "off"):
        return str(value)
    url = urlsplit(value) if isinstance(value, str) else urlsplit("")
    try:
        if url.scheme == "memcached" and url.hostname and not url.path.strip("/"):
            return f"memcached://{_host_and_port(url.hostname, url.port or 11211)}"
    except ValueError:
        pass  # the port is none
    raise ValueError("datastore, off, or memcached://host:port")


def _host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: its name, its default as it would be written, how it is read, and what it means."""

    name: str
    default: Any
    parse: Callable[[Any], Any]
    help: str
    group: str


SETTINGS: tuple[Setting, ...] = (
    Setting("datastore", "sqlite:///var/zerog.db", _url("sqlite", "couchbase", "couchbases"),
            "where jobs are kept: sqlite:///path or couchbase://user@host/bucket", "everything"),
    Setting("datastore_password_file", None, _text,
            "file with the password of the datastore (or ZEROG_DATASTORE_PASSWORD)", "everything"),
    Setting("durability", "none", _text,
            "Couchbase only: none, majority, majorityAndPersistActive or persistToMajority", "everything"),
    Setting("queue", "sqlite:///var/queue.db", _url("sqlite", "beanstalk"),
            "where job ids wait: sqlite:///path, beanstalk://host:11300 or beanstalk:///path/of/socket", "everything"),
    Setting("service", "zerog", _service, "prefix of keys and tubes, so that services can share a store", "everything"),
    Setting("applications", "workers.examples", _applications, "packages whose jobs are run, comma separated",
            "everything"),
    Setting("run_dir", "var/run", _text, "directory for locks and for the notices of the SQLite queue", "everything"),
    Setting("lease", 30, _seconds, "how long an agent may be silent before its jobs are taken over", "everything"),
    Setting("sweep", 30, _seconds, "time between two walks over the open jobs", "everything"),
    Setting("retention", "30d", _seconds, "how long a job is kept after its end, if its type says nothing else",
            "everything"),
    Setting("deadline", 5, _seconds, "longest wait for the store or the queue", "everything"),
    Setting("max_result", "16MiB", _bytes, "largest return value of a job; more goes through output", "everything"),
    Setting("stats", "datastore", _stats,
            "where requests and jobs are counted together: datastore, memcached://host:port, or off", "everything"),
    Setting("address", "127.0.0.1", _text, "address that the server binds to", "server"),
    Setting("port", 8888, _port, "port that the server binds to", "server"),
    Setting("processes", 1, _processes, "how many processes answer on that port", "server"),
    Setting("insecure", False, _flag, "allow a bind to other than loopback without tokens", "server"),
    Setting("allowed_hosts", None, _optional_list, "Host names that are answered for; * for any", "server"),
    Setting("max_body", "1MiB", _body, "largest body of a request", "server"),
    Setting("tls_certificate", None, _text, "PEM file with the certificate and its chain, for https", "server"),
    Setting("tls_key", None, _text, "PEM file with the key of tls_certificate", "server"),
    Setting("allowed_origins", None, _origins, "origins whose pages may use the API, such as https://example.org",
            "server"),
    Setting("rate_limit", 0, _rate, "requests a minute for each token; 0 for no limit", "server"),
    Setting("idle_timeout", 30, _seconds, "time for a complete header, and for an idle connection", "server"),
    Setting("slots", None, _slots,
            "how many jobs an agent runs at once; by default one for each CPU", "agent"),
    Setting("master", None, _masters,
            "URLs of servers, comma separated: the agent speaks HTTP alone, to any of them", "agent"),
    Setting("job_types", "all", _optional_list, "job types that the agent serves, comma separated", "agent"),
    Setting("name", None, _agent_name, "the agent's id; by default its host's name and the first number that is free",
            "agent"),
    Setting("labels", None, _labels, "what jobs can ask for that need certain agents, such as gpu,site:oslo", "agent"),
    Setting("ram", None, _optional_bytes, "memory that the agent's jobs may take together; by default the machine's",
            "agent"),
    Setting("cpus", None, _optional_cores, "cores that the agent's jobs may take together; by default the machine's",
            "agent"),
    Setting("heartbeat", None, _optional_seconds, "time between two signs of life of an agent; by default lease/3",
            "everything"),
    Setting("drain", 60, _seconds, "how long running jobs may go on after SIGTERM", "agent"),
    Setting("grace", 5, _seconds, "time between asking a job to stop, SIGTERM and SIGKILL", "agent"),
    Setting("time_limit", None, _optional_seconds, "limit of an attempt whose job type sets none", "agent"),
    Setting("max_jobs", 1000, _count, "jobs after which a child process is replaced", "agent"),
    Setting("max_memory", "512MiB", _bytes, "memory above which a child process is replaced after its job", "agent"),
    Setting("server", "http://127.0.0.1:8888", _url("http", "https"), "the server that commands talk to", "client"),
    Setting("token", None, _text, "token that commands send, and agents that speak HTTP alone", "client"),
    Setting("ca", None, _text, "PEM file with the certificates that commands trust, instead of the system's", "client"),
)  # fmt: skip

_BY_NAME = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True)
class Settings:
    """The settings of this process; ``sources`` says for each where it came from."""

    datastore: str
    datastore_password_file: str | None
    durability: str
    queue: str
    service: str
    applications: tuple[str, ...]
    run_dir: str
    lease: float
    sweep: float
    retention: float
    deadline: float
    max_result: int
    stats: str
    address: str
    port: int
    processes: int
    insecure: bool
    allowed_hosts: tuple[str, ...] | None
    max_body: int
    tls_certificate: str | None
    tls_key: str | None
    allowed_origins: tuple[str, ...] | None
    rate_limit: int
    idle_timeout: float
    slots: int | None
    master: tuple[str, ...] | None
    job_types: tuple[str, ...] | None
    name: str | None
    labels: tuple[str, ...] | None
    ram: int | None
    cpus: float | None
    heartbeat: float | None
    drain: float
    grace: float
    time_limit: float | None
    max_jobs: int
    max_memory: int
    server: str
    token: str | None
    ca: str | None
    base: Path
    sources: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    #: What was written for applications, by table and name; where, stands in ``sources`` under ``table.name``.
    applications_own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: str | None = None

    def path(self, text: str) -> Path:
        """Return a path of a setting, absolute: relative ones count from the configuration file, else from here."""
        return (self.base / Path(text).expanduser()).resolve()

    def sqlite_path(self, url: str) -> Path:
        """Return the file that a ``sqlite:///path`` URL names; four slashes make it absolute."""
        return self.path(url.removeprefix("sqlite://").removeprefix("/"))

    def password(self) -> str:
        """Return the password of the datastore; ``BadSetting`` if its file cannot be read."""
        if self.datastore_password_file is None:
            return os.environ.get(f"{_PREFIX}DATASTORE_PASSWORD", "")
        try:
            return self.path(self.datastore_password_file).read_text().strip()
        except OSError as error:
            raise BadSetting(
                f"datastore_password_file ({self.sources['datastore_password_file']}): {error.strerror}: "
                f"{self.datastore_password_file}"
            ) from error


def shown(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return every setting, its value and its source, without secrets, for whoever asks a server."""
    found: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        value = getattr(settings, setting.name)
        if setting.name in _SECRETS and value is not None:
            value = _MASK
        elif isinstance(value, str) and "://" in value:
            value = _without_password(value)
        elif isinstance(value, tuple):
            value = list(value)
        found[setting.name] = {"value": value, "source": settings.sources[setting.name]}
    return found


def _without_password(url: str) -> str:
    """Return a URL without a password that somebody wrote into it."""
    scheme, _, rest = url.partition("://")
    where, slash, path = rest.partition("/")
    user, at, host = where.rpartition("@")
    name, colon, _ = user.partition(":")
    return f"{scheme}://{name}{f':{_MASK}' if colon else ''}{at}{host}{slash}{path}"


def load(
    config: str | None = None,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    application: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings; ``BadSetting`` names the first wrong one, its source, and what would be right.

    An ``application`` is added to the others, or stands alone where nothing was said of any; ``defaults`` stand for
    ZeroG's own.
    """
    environment = os.environ if environment is None else environment
    config = config or environment.get(f"{_PREFIX}CONFIG")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    own: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        value = setting.default
        _accept(values, sources, setting, value, "default")
    base = Path.cwd()
    if config is not None:
        base = Path(config).expanduser().resolve().parent
        own = _from_file(config, values, sources)
    others = _from_environment(environment, values, sources)
    for name, value in (flags or {}).items():
        if value is not None:
            _accept(values, sources, _BY_NAME[name], value, f"--{name.replace('_', '-')}")
    _of_command(values, sources, application, defaults or {})
    _check_tables(own, values["applications"], config)
    warnings = _own_from_environment(others, own, values["applications"], sources)
    return Settings(**values, base=base, sources=sources, warnings=tuple(warnings), applications_own=own, config=config)


def _of_command(
    values: dict[str, Any], sources: dict[str, str], application: str | None, defaults: Mapping[str, Any]
) -> None:
    """Take what a command of an application says; it reaches the processes that are started, as flags do."""
    for name, value in defaults.items():
        if sources[name] == "default":
            _accept(values, sources, _BY_NAME[name], value, f"--{name.replace('_', '-')}")
    if application is not None and application not in values["applications"]:
        said = values["applications"] if sources["applications"] != "default" else ()
        _accept(values, sources, _BY_NAME["applications"], (*said, application), "--applications")


def _accept(values: dict[str, Any], sources: dict[str, str], setting: Setting, value: Any, source: str) -> None:
    if value is None and source == "default":
        values[setting.name], sources[setting.name] = None, source
        return
    try:
        values[setting.name] = setting.parse(value)
    except ValueError as error:
        written = _MASK if setting.name in _SECRETS else repr(value)
        raise BadSetting(f"{setting.name} ({source}) is {written}; it must be {error}") from error
    sources[setting.name] = source


def _from_file(config: str, values: dict[str, Any], sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    try:
        with open(Path(config).expanduser(), "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise BadSetting(f"--config {config}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadSetting(f"{config} is no TOML: {error}") from error
    own: dict[str, dict[str, Any]] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            own[name] = dict(value)  # the table of an application
            sources.update({f"{name}.{key}": config for key in value})
        elif name in _BY_NAME:
            _accept(values, sources, _BY_NAME[name], value, config)
        else:
            raise BadSetting(f"{config}: there is no setting {name!r}{_suggestion(name)}")
    return own


def _check_tables(own: Mapping[str, Any], applications: tuple[str, ...], config: str | None) -> None:
    """Refuse a table that belongs to no application; its name is the application's, or the last part of it."""
    for name in own:
        if not any(name in (one.split(".")[0], one.rsplit(".", 1)[-1]) for one in applications):
            raise BadSetting(f"{config}: there is no application {name!r} for this table{_suggestion(name)}")


def table_of(application: str, own: Mapping[str, Any]) -> str:
    """Return the name of an application's table: the last part of its own, or the first if that is written."""
    first, last = application.split(".")[0], application.rsplit(".", 1)[-1]
    return first if first in own and last not in own else last


def _own_from_environment(
    others: Mapping[str, str], own: dict[str, dict[str, Any]], applications: tuple[str, ...], sources: dict[str, str]
) -> list[str]:
    """Take the variables that are settings of applications, ``ZEROG_INGEST_VOLUME``; warn of the others."""
    tables = {table_of(one, own) for one in applications}
    warnings = []
    for variable, value in others.items():
        name = variable[len(_PREFIX) :].lower()
        fitting = [one for one in tables if name.startswith(f"{one.lower()}_")]
        table = max(fitting, key=len, default=None)
        if table is None:
            warnings.append(f"{variable} is no setting{_suggestion(name)}")
            continue
        key = name[len(table) + 1 :]
        own.setdefault(table, {})[key] = value
        sources[f"{table}.{key}"] = variable
    return warnings


def _from_environment(
    environment: Mapping[str, str], values: dict[str, Any], sources: dict[str, str]
) -> dict[str, str]:
    """Take the variables that are settings; return those that are none of ZeroG's own."""
    others = {"CONFIG", "DATASTORE_PASSWORD", "FAILPOINT", "STORE_FAULTS", "UP_PARENT", "SOCKETS"}
    left: dict[str, str] = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith(_PREFIX) or variable[len(_PREFIX) :] in others:
            continue
        name = variable[len(_PREFIX) :].lower()
        if name in _BY_NAME:
            _accept(values, sources, _BY_NAME[name], value, variable)
        else:
            left[variable] = value
    return left


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, _BY_NAME, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
