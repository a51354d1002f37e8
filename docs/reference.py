"""Writes docs/reference.rst from the tables of settings, routes and commands: ``python docs/reference.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
from pydantic import BaseModel

from zerog.cli import main
from zerog.config import SETTINGS
from zerog.server.endpoint import Endpoint
from zerog.server.problems import problems
from zerog.server.routes import ENDPOINTS

Problems = Mapping[int, Sequence[str]]


class _Body(Endpoint):
    """An operation that has nothing of its own but a body of JSON."""

    takes_json = ("POST",)


#: What operations answer that have nothing of their own.
_EVERYWHERE = problems(Endpoint, "GET")
_CHANGING = problems(Endpoint, "POST")
_WITH_BODY = problems(_Body, "POST")
_BOUNDS = {"minimum": "from", "maximum": "up to", "exclusiveMaximum": "below"}


def text() -> str:
    """Return the reference of settings, endpoints and commands."""
    return "\n".join([*_title("Reference", "="), "", *_settings(), *_endpoints(), *_commands(main, "zerog")])


def _title(words: str, line: str) -> tuple[str, str]:
    return words, line * len(words)


def _settings() -> Iterator[str]:
    yield from _title("Settings", "-")
    yield ""
    yield "In a TOML file at the top, in the environment as ``ZEROG_NAME``, as a flag ``--name``; the later wins."
    yield ""
    for setting in SETTINGS:
        default = "none" if setting.default is None else f"``{setting.default}``"
        yield f"``{setting.name}`` ({setting.group}; default {default})"
        yield f"    {setting.help}"
        yield ""


def _endpoints() -> Iterator[str]:
    yield from _title("Endpoints", "-")
    yield ""
    yield "Errors are problem documents (RFC 9457).  Every operation can answer these:"
    yield ""
    yield from _problems(_EVERYWHERE, {}, "* ")
    yield ""
    yield "Those that change something these too:"
    yield ""
    yield from _problems(_CHANGING, _EVERYWHERE, "* ")
    yield ""
    yield "Those with a body of JSON these too:"
    yield ""
    yield from _problems(_WITH_BODY, _CHANGING, "* ")
    yield ""
    yield "Each names below what it can answer beside them."
    yield ""
    for endpoint in ENDPOINTS:
        for method in endpoint.methods():
            yield f"``{method} {endpoint.url}``"
            yield f"    {(getattr(endpoint, method.lower()).__doc__ or '').splitlines()[0]}"
            yield ""
            roles = " or ".join(f"``{role}``" for role in endpoint.needed_roles(method))
            role = "nobody's token is needed" if endpoint.public else f"role {roles}"
            yield f"    * {role}; offers {', '.join(f'``{one}``' for one in endpoint.offers)}"
            for parameter in endpoint.query_parameters(method):
                yield f"    * query ``{parameter.name}``: {parameter.description}"
            body = endpoint.bodies.get(method) or endpoint.model(method)
            if body is not None:
                yield from _members(body)
            for status, (meaning, _) in endpoint.responses.get(method, {}).items():
                yield f"    * {status}: {meaning}"
            said = _WITH_BODY if endpoint.reads_json(method) else _EVERYWHERE if method == "GET" else _CHANGING
            yield from _problems(problems(endpoint, method), said, "    * ")
            yield ""


def _problems(found: Problems, said: Problems, start: str) -> Iterator[str]:
    for status, codes in found.items():
        own = [f"``{code}``" for code in codes if code not in said.get(status, ())]
        if own:
            yield f"{start}{status}: {', '.join(own)}"


def _members(body: type[BaseModel]) -> Iterator[str]:
    required = body.model_json_schema().get("required", ())
    for name, member in body.model_json_schema()["properties"].items():
        kinds = [one.get("type", "object") for one in member.get("anyOf", [member])] if name != "data" else ["JSON"]
        words = [" or ".join(kinds) if "enum" not in member else " or ".join(member["enum"])]
        words += [f"{word} {member[key]:,}" for key, word in _BOUNDS.items() if key in member]
        words.append("required" if name in required else f"default {json.dumps(member.get('default'))}")
        yield f"    * body ``{name}``: {', '.join(words)}"


def _commands(group: click.Group, name: str) -> Iterator[str]:
    if group is main:
        yield from _title("Commands", "-")
        yield ""
    for key, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{name} {key}")
            continue
        arguments = [one.human_readable_name for one in command.params if isinstance(one, click.Argument)]
        yield f"``{' '.join([name, key, *arguments])}``"
        yield f"    {(command.help or '').splitlines()[0]}"
        yield ""


if __name__ == "__main__":
    Path(__file__).with_name("reference.rst").write_text(text())
