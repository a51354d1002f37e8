"""The keeper: ends what the jobs of an agent have started when the agent itself cannot any more.

A child dies with its agent (R13), but what its job has started would live on, beside the next attempt.  The keeper is a
shell that is no child of the agent and reads from a pipe which process groups there are.  At the end of the pipe,
however the agent came to its end, it kills them, and whatever else bears the agent's mark in its environment.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: The variable that everything a job starts inherits; no setting, so that it does not begin like one.
_VARIABLE = "_ZEROG_AGENT"

_SCRIPT = r"""
command -v grep >/dev/null && command -v tr >/dev/null || exit 1
# Who bears the mark: by one process for all, where that is possible; a machine may run thousands.
if command -v xargs >/dev/null && printf 'a\0b\0' | grep -qzFx b 2>/dev/null; then
    bearers() { printf '%s\n' /proc/[0-9]*/environ | xargs grep -lszFx -e "$1"; }
else
    bearers() {
        for one in /proc/[0-9]*/environ; do
            if tr '\0' '\n' <"$one" | grep -qFx -e "$1"; then echo "$one"; fi
        done
    }
fi
exec 3<&0
{
    trap '' TERM HUP INT  # an agent that drains is not gone yet
    groups=
    while read -r sign group; do
        others=
        for one in $groups; do [ "$one" = "$group" ] || others="$others $one"; done
        groups=$others
        [ "$sign" = - ] || groups="$groups $group"
    done
    for one in $groups; do kill -9 "-$one"; done
    pass=0
    while [ $((pass += 1)) -le 100 ]; do
        found=$(bearers "$1")
        [ "$found" ] || break
        for one in $found; do
            one=${one#/proc/}
            kill -9 "${one%/environ}"
        done
    done
} <&3 3<&- >/dev/null 2>&1 &
"""


class Keeper:
    """The keeper of one agent.  ``environment`` is what its children must inherit."""

    def __init__(self) -> None:
        self._warned = False
        mark = secrets.token_hex(12)
        self.environment: Mapping[str, str] = {_VARIABLE: mark}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # whatever becomes of the keeper, the agent goes on
        try:
            # It outlives the shell that starts it: so it is nobody's child, and no signal to the agent's group ends it.
            subprocess.run(
                ["/bin/sh", "-c", _SCRIPT, "zerog-keeper", f"{_VARIABLE}={mark}"],
                stdin=read,
                check=True,
                start_new_session=True,
                env={"PATH": os.defpath},
                cwd="/",
            )
        except (OSError, subprocess.SubprocessError) as error:
            self._warn(error)
        finally:
            os.close(read)

    def add(self, group: int) -> None:
        """Tell of a process group."""
        self._tell("+", group)

    def remove(self, group: int) -> None:
        """Tell of the end of a process group."""
        self._tell("-", group)

    def _tell(self, sign: str, group: int) -> None:
        try:
            os.write(self._write, f"{sign} {group}\n".encode())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Let it end what is left, and itself."""
        os.close(self._write)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("nobody will end what jobs have started if this agent is killed: %s", error)
        self._warned = True
