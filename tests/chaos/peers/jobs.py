"""ZeroG's job in the comparison: the same work, with the settings that a job type has by default."""

from __future__ import annotations

from pydantic import Field

import zerog
from tests.chaos.peers.systems import work


class PeersWork(zerog.Job):
    """Note the start, sleep, note the end."""

    job_type = "peers-work"

    ledger: str
    seconds: float = Field(ge=0, le=3600)

    def run(self, context: zerog.Context) -> None:
        """Do the work."""
        work.run(self.ledger, context.uuid, self.seconds)
