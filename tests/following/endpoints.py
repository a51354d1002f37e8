"""An endpoint that shows the settings of its application."""

from __future__ import annotations

from typing import Any

import zerog.server


class ToldToo(zerog.server.Endpoint):
    """What the settings say."""

    name = "told"
    url = "/told"

    def get(self) -> dict[str, Any]:
        """Show them."""
        return {"pause": self.settings.pause, "most": self.settings.most, "href": "/told"}
