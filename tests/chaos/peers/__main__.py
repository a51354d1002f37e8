"""Run the kill test against other systems: ``python -m tests.chaos.peers [--jobs 40] [--write docs/proof.rst] [NAME…]``.

For each row of ``contenders.CONTENDERS`` jobs are submitted and run four at a time.  When a third is done, the whole
tree of the workers is killed and started again at once; the broker, or ZeroG's server, lives.  A ledger that only the
jobs write says what ran, the system is asked what it still holds (``systems`` says how), ``verdict.judge`` decides.

Needs redis-server, a Debian package; the peers are installed in ``.cache/peers``.  ``--write FILE`` puts the table
between the marks of that file.
"""

from __future__ import annotations

import argparse
import platform
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.peers import installation
from tests.chaos.peers.contenders import CONTENDERS, chosen
from tests.chaos.peers.trial import Result, Wanted, run
from zerog.chaos.report import grid, put

_COLUMNS = (
    "system", "settings", "done", "lost", "failed", "stuck", "started twice", "finished twice",
    "recovery first / last", "watched",
)  # fmt: skip


def main() -> None:
    """Run the chosen rows one after the other and say what was found."""
    options = _options()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)  # also when it was started in the background
    installation.prepare()
    wanted = Wanted(options.jobs, options.seconds, options.wait)
    results = []
    for contender in chosen(options.names):
        results.append(run(contender, wanted))
        print("  ".join(results[-1].row()), flush=True)
    text = report(results, wanted)
    print(f"\n{text}")
    if options.write is not None:
        put(options.write, "peers", lambda _: text)


def _stop(number: int, _: object) -> None:
    """Leave by way of what ends the processes."""
    raise SystemExit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each job runs")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds from the restart to the verdict")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of this document")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(sorted({one.system for one in CONTENDERS})))
    return parser.parse_args()


def report(results: Sequence[Result], wanted: Wanted) -> str:
    """Return the table, under the sentence that says what it was measured with."""
    said = (
        f"Measured {datetime.now(UTC):%Y-%m-%d}: {wanted.jobs} jobs of {wanted.seconds:g} s, judged "
        f"{wanted.wait:g} s after the restart; redis {installation.redis_version()}, kombu "
        f"{installation.version('kombu')}, redis-py {installation.version('redis')}, Python {platform.python_version()}."
    )
    return f"{said}\n\n{grid([_COLUMNS, *(result.row() for result in results)])}"


if __name__ == "__main__":
    main()
