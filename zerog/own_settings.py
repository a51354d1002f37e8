"""Settings of an application's own: a model in its module ``settings``, read as ZeroG's own are.

::

    # mywork/settings.py
    class Settings(pydantic.BaseModel):
        volume: Path = Path("var/mywork")     # relative ones count from the configuration file
        patience: zerog.Seconds = 60.0        # also "2m"
        most: zerog.Bytes = 2**20             # also "1MiB"

    # zerog.toml                               # or ZEROG_MYWORK_VOLUME=/srv/mywork
    [mywork]
    volume = "/srv/mywork"

Endpoints and consumers have them as ``self.settings``, jobs as ``context.settings``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator

from zerog.config import read_bytes, read_seconds, table_of
from zerog.exceptions import BadSetting

#: Seconds and bytes with their suffixes, for the fields of such a model.
Seconds = Annotated[float, BeforeValidator(read_seconds)]
Bytes = Annotated[int, BeforeValidator(read_bytes)]


def read_own(
    applications: Sequence[str], own: Mapping[str, Mapping[str, Any]], base: Path, sources: Mapping[str, str]
) -> dict[str, BaseModel]:
    """Return the settings of each application that has any; ``BadSetting`` for the first that is not possible.

    ``own`` is what was written, by table and name; ``sources`` says where, by ``table.name``.
    """
    found: dict[str, BaseModel] = {}
    for application in applications:
        model = _model_of(application)
        table = table_of(application, own)
        written = own.get(table, {})
        if model is None:
            if written:
                name = next(iter(written))
                raise BadSetting(f"{table}.{name} ({sources.get(f'{table}.{name}')}): {application} has no settings")
            continue
        found[application] = _resolved(_validated(model, table, written, sources), base)
    return found


def _model_of(application: str) -> type[BaseModel] | None:
    name = f"{application}.settings"
    try:
        if importlib.util.find_spec(name) is None:
            return None
        model = importlib.import_module(name).Settings
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        text = str(error).splitlines()
        raise BadSetting(
            f"applications: {name} cannot be imported: {type(error).__name__}: {text[0] if text else ''}"
        ) from error
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise BadSetting(f"applications: {name}.Settings is no pydantic model")
    return model


def _validated(model: type[BaseModel], table: str, written: Mapping[str, Any], sources: Mapping[str, str]) -> BaseModel:
    try:
        return model.model_validate(dict(written), extra="forbid")
    except pydantic.ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        name = str(fault["loc"][0]) if fault["loc"] else ""
        if fault["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields) or "none"
            raise BadSetting(
                f"there is no setting {name!r} in [{table}] ({sources.get(f'{table}.{name}')}); there are: {known}"
            ) from None
        reason = fault["msg"].removeprefix("Value error, ")
        raise BadSetting(f"{table}.{name} ({sources.get(f'{table}.{name}', 'default')}): {reason}") from None


def _resolved(settings: BaseModel, base: Path) -> BaseModel:
    """Return settings with absolute paths: relative ones count from the configuration file, else from here."""
    paths = {
        name: (base / value.expanduser()).resolve() for name, value in vars(settings).items() if isinstance(value, Path)
    }
    return settings.model_copy(update=paths)


def shown_own(settings: Mapping[str, BaseModel], sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return settings of applications for whoever asks a server; secrets are masked by their types."""
    found: dict[str, dict[str, Any]] = {}
    for application, model in settings.items():
        for name, value in model.model_dump(mode="json").items():
            table = application.rsplit(".", 1)[-1]
            found[f"{table}.{name}"] = {"value": value, "source": sources.get(f"{table}.{name}", "default")}
    return found
