"""The endpoints of applications: every ``Endpoint`` with a ``url`` in ``<application>.endpoints``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType

from zerog.exceptions import BadSetting
from zerog.server.endpoint import Endpoint, RunParameter
from zerog.server.routes import ENDPOINTS, pattern
from zerog.server.run import Run


def endpoints(applications: Sequence[str]) -> list[type[Endpoint]]:
    """Return the endpoints of applications; ``BadSetting`` for what cannot be imported, or stands where another is."""
    taken = {pattern(one.url): one for one in ENDPOINTS}
    found: list[type[Endpoint]] = []
    for application in applications:
        for one in _of(application):
            other = taken.setdefault(pattern(one.url), one)
            if other is not one:
                raise BadSetting(
                    f"applications: {application}.endpoints has {one.__qualname__} at {one.url}, where "
                    f"{other.__module__}.{other.__qualname__} is"
                )
            found.append(one)
    return found


def run_parameters(applications: Sequence[str]) -> list[RunParameter]:
    """Return the parameters that applications add to submits; ``BadSetting`` if two have the same name."""
    found: dict[str, RunParameter] = {one.name: RunParameter() for one in Run.query_parameters("POST")}
    known = len(found)
    for application in applications:
        module = _imported(f"{application}.endpoints")
        for value in vars(module).values() if module is not None else ():
            if isinstance(value, type) and issubclass(value, RunParameter) and value.name:
                if value.name in found:
                    raise BadSetting(
                        f"applications: {application}.endpoints adds {value.name!r} to submits, which is there"
                    )
                found[value.name] = value()
    return list(found.values())[known:]


def _of(application: str) -> Iterator[type[Endpoint]]:
    module = _imported(f"{application}.endpoints")
    if module is None:
        return
    for value in vars(module).values():
        own = isinstance(value, type) and issubclass(value, Endpoint) and value.__module__ == module.__name__
        if not own or not value.url:
            continue
        if not value.url.startswith("/") or not value.name:
            place = f"{value.__module__}.{value.__qualname__}"
            raise BadSetting(f"applications: {place} needs a name, and a url that begins with /")
        yield value


def _imported(name: str) -> ModuleType | None:
    """Return a module of an application; None if it has none of this name."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        text = str(error).splitlines()
        raise BadSetting(
            f"applications: {name} cannot be imported: {type(error).__name__}: {text[0] if text else ''}"
        ) from error
