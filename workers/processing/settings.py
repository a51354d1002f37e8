"""What processing can be told: the table ``[processing]``, or ``ZEROG_PROCESSING_SECONDS``."""

from __future__ import annotations

from pydantic import BaseModel, Field

import zerog


class Settings(BaseModel):
    """The settings."""

    seconds: zerog.Seconds = Field(10.0, ge=0, le=86_400, description="simulated time of an execution")
    max_failures: int = Field(3, ge=1, le=1000, description="failed executions after which a request has no others")
