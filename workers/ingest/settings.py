"""What ingest can be told: the table ``[ingest]``, or ``ZEROG_INGEST_VOLUME`` and the like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

import zerog


def _paths(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _absolute(paths: list[Path]) -> list[Path]:
    if not all(path.is_absolute() for path in paths):
        raise ValueError("absolute paths, comma separated")
    return paths


def _url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise ValueError("a URL that starts with http:// or https://")
    return value


def _named(value: object) -> object:
    if value == "":
        raise ValueError("the path of a folder")
    return value


Url = Annotated[str | None, AfterValidator(_url)]


class Settings(BaseModel):
    """The settings."""

    volume: Annotated[Path, BeforeValidator(_named)] = Field(
        Path("var/ingest"), description="folder of bundles and archive, shared by servers and agents"
    )
    sources: Annotated[list[Path], BeforeValidator(_paths), AfterValidator(_absolute)] = Field(
        [], description="folders from which /move may take files; none: /move is refused"
    )
    policy: str | None = Field(None, description="file with rules, or the URL of a service; everybody may without")
    archive: Url = Field(None, description="URL of an archive service; the volume without")
    metadata: Url = Field(None, description="URL of a metadata service; documents in the datastore without")
    ids: Url = Field(None, description="URL of a service that gives ids; a counter in the datastore without")
    user_header: str = Field(
        "X-Http-Authed-User", pattern=r"^[A-Za-z0-9-]{1,100}$", description="header that names the user"
    )
    default_user: str = Field("root", min_length=1, max_length=200, description="the user where nobody is named")
    upload_idle: zerog.Seconds = Field(60.0, gt=0, le=86_400, description="longest gap in an upload")
