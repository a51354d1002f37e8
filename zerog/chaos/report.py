"""The report of a scenario: its figures as text, as JSON, and as a table for the documentation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Report:
    """What happened in one run of a scenario; times in seconds.

    ``findings`` are the promises that did not hold, ``late`` those about time: a machine that is too busy for the
    scenario misses them as well.
    """

    scenario: str
    store: str
    queue: str
    seed: int
    attempted: int = 0
    acknowledged: int = 0
    terminal: int = 0
    lost: int = 0
    double_result: int = 0
    stale_write: int = 0
    executed_twice: int = 0
    overlapping: int = 0
    not_succeeded: int = 0
    faults: int = 0
    superseded: int = 0
    seconds: float = 0.0
    #: Times that the fault that counts happened, if that is not ``faults``: in S1 those are single calls.
    trials: int | None = None
    #: ``campaign`` or ``day``: which numbers of jobs and faults were asked for.
    size: str = "day"
    #: What was waited for in vain is none of the recoveries.
    unrecovered: int = 0
    recoveries: list[float] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    #: What the events of the job say that waited longest after an injury, each with the seconds since then.
    longest: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether all promises held."""
        return not self.findings and not self.late

    def quantile(self, share: float) -> float | None:
        """Return the recovery time that ``share`` of all recoveries did not exceed."""
        if not self.recoveries:
            return None
        ordered = sorted(self.recoveries)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]

    def view(self) -> dict[str, Any]:
        """Return the report as JSON, recovery times as quantiles."""
        members = asdict(self)
        del members["recoveries"]
        members["recovery"] = {
            "count": len(self.recoveries),
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max": self.quantile(1.0),
        }
        return members

    def text(self) -> str:
        """Return the report for people."""
        trials = self.faults if self.trials is None else self.trials
        clean = trials >= 3 and not (self.lost or self.double_result or self.stale_write)
        bound = f" (0 in {trials} faults: below {3 / trials:.2%} at 95 %)" if clean else ""
        lines = [
            f"{self.scenario} on {self.store} + {self.queue}, seed {self.seed}, {self.seconds:.1f} s",
            f"  attempted {self.attempted}, acknowledged {self.acknowledged}, terminal {self.terminal}, "
            f"not succeeded {self.not_succeeded}, faults {self.faults}",
            f"  lost {self.lost}, double result {self.double_result}, stale write {self.stale_write}{bound}",
            f"  executed twice {self.executed_twice}, overlapping {self.overlapping}, superseded {self.superseded}",
            f"  recovery: {self.times()}",
            *(f"  FOUND: {finding}" for finding in self.findings),
            *(f"  LATE: {finding}" for finding in self.late),
            *(f"    longest: {line}" for line in self.longest),
        ]
        return "\n".join(lines)

    def times(self) -> str:
        """Return the recovery times in one line."""
        never = f", {self.unrecovered} not in time" if self.unrecovered else ""
        if not self.recoveries:
            return never.removeprefix(", ") or "–"
        p50, p99, most = (self.quantile(share) or 0.0 for share in (0.5, 0.99, 1.0))
        return f"{p50:.2f} / {p99:.2f} / {most:.2f} s (n = {len(self.recoveries)}{never})"


_COLUMNS = (
    "scenario", "store + queue", "size", "seed", "jobs", "faults", "lost", "double", "stale", "not succeeded",
    "executed twice", "overlapping", "superseded", "recovery p50 / p99 / max", "found", "late", "took",
)  # fmt: skip


def table(reports: Sequence[Report]) -> str:
    """Return the reports as a table in reStructuredText."""
    return grid([_COLUMNS, *(_row(report) for report in reports)])


def grid(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of cells as a table in reStructuredText; the first row is its head."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    line = "  ".join("=" * width for width in widths)
    written = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([line, written[0], line, *written[1:], line])


def _rows(text: str) -> list[tuple[str, ...]]:
    """Return the rows of a table that was written here before."""
    rows = [tuple(re.split(" {2,}", line.strip())) for line in text.splitlines() if line[:1] not in ("", "=")]
    return [row for row in rows if len(row) == len(_COLUMNS) and row != _COLUMNS]


def _row(report: Report) -> tuple[str, ...]:
    return (
        report.scenario,
        f"{report.store} + {report.queue}",
        report.size,
        str(report.seed),
        str(report.acknowledged),
        str(report.faults),
        str(report.lost),
        str(report.double_result),
        str(report.stale_write),
        str(report.not_succeeded),
        str(report.executed_twice),
        str(report.overlapping),
        str(report.superseded),
        report.times(),
        str(len(report.findings)),
        str(len(report.late)),
        f"{report.seconds:.0f} s",
    )


def write(path: Path, reports: Sequence[Report]) -> None:
    """Put the reports into the table between the marks of a document, which is added at its end if there is none.

    A row of the same scenario and size over the same store and queue is replaced, all others stay.
    """

    def merged(old: str) -> str:
        rows = {row[:3]: row for row in [*_rows(old), *map(_row, reports)]}
        return grid([_COLUMNS, *(rows[name] for name in sorted(rows))])

    put(path, "chaos", merged)


def put(path: Path, name: str, change: Callable[[str], str]) -> None:
    """Change the text between the marks ``.. NAME begin`` and ``.. NAME end``; without them it is added at the end."""
    begin, end = f".. {name} begin", f".. {name} end"
    text = path.read_text() if path.exists() else ""
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    head, _, rest = text.partition(begin)
    old, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n\n{change(old)}\n\n{end}{tail}")
