"""The pages: the same view as the JSON, for people, from templates, without a script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tornado.template

from zerog import codec

_HERE = Path(__file__).parent

STYLE = (_HERE / "style.css").read_bytes()
ICON = (_HERE / "icon.svg").read_bytes()
SCRIPT = (_HERE / "live.js").read_bytes()

#: What is shown of a long text of a member.
_MAX_TEXT = 20_000

#: Name of a page → its template.  Every other name is shown by the general one.
_TEMPLATES: Mapping[str, str] = {
    "start": "start.html",
    "job": "job.html",
    "info": "job.html",
    "jobs": "jobs.html",
    "events": "events.html",
    "types": "types.html",
    "type": "type.html",
    "view_status": "view_status.html",
    "queue": "queue.html",
    "agents": "agents.html",
    "agent": "agent.html",
    "assignments": "list.html",
    "history": "list.html",
    "commands": "list.html",
    "messages": "list.html",
    "consumers": "consumers.html",
    "problem": "problem.html",
}

_LOADER = tornado.template.Loader(str(_HERE), autoescape="xhtml_escape")


def render(page: str, view: Any, path: str, host: str, aside: Mapping[str, Any] | None = None) -> bytes:
    """Return the page of a view, and of what stands beside it; everything in it is escaped."""
    template = _LOADER.load(_TEMPLATES.get(page, "general.html"))
    return template.generate(
        view=view, path=path, host=host, aside=aside or {}, show=show, percent=percent, link=link, size=size
    )


def show(value: Any) -> str:
    """Return a member of a view as text: control characters are shown, not sent."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return "\n".join(codec.printable(line, _MAX_TEXT) for line in value[:_MAX_TEXT].split("\n"))
    if isinstance(value, (dict, list)):
        return codec.dumps(value).decode()
    return str(value)


def percent(completeness: float) -> str:
    """Return completeness as people read it."""
    return f"{100 * completeness:.0f} %"


def size(count: float | None) -> str:
    """Return bytes as people read them."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def link(value: Any) -> str | None:
    """Return where a member leads, if it is a reference within this server."""
    if isinstance(value, dict):
        value = value.get("href")
    if isinstance(value, str) and value.startswith("/") and not value.startswith("//"):
        return value
    return None
