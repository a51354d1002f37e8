"""What the application can be told."""

from __future__ import annotations

from pathlib import Path

import pydantic

import zerog


class Settings(pydantic.BaseModel):
    """The settings."""

    ledger: Path = Path("ledger")
    pause: zerog.Seconds = 0.0
    most: zerog.Bytes = 1024
    password: pydantic.SecretStr | None = None
