"""One run of one system: submit, kill the whole tree of its workers, start them again at once, watch."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.peers.contenders import Contender, System
from tests.chaos.peers.processes import kill_trees
from tests.chaos.peers.verdict import Answer, Verdict, judge
from zerog.chaos import ledger
from zerog.chaos.site import until

#: Seconds within which a third of the jobs must be done.
_THIRD = 60.0
#: Seconds between two questions to the system while only it can tell whether more will come.
_QUESTIONS = 5.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """``jobs`` of ``seconds`` each; judged ``wait`` seconds after the restart."""

    jobs: int
    seconds: float
    wait: float


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict after ``Wanted.wait``, and the last one with the seconds from the restart until then."""

    contender: Contender
    verdict: Verdict
    last: Verdict
    watched: float

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table."""
        judged, last = self.verdict, self.last
        return (
            self.contender.title, self.contender.settings,
            *(str(count) for count in (judged.done, judged.lost, judged.failed, judged.stuck)),
            str(last.started_twice), str(last.finished_twice), recovery(last), f"{self.watched:.0f} s: {last.done} done",
        )  # fmt: skip


def recovery(verdict: Verdict) -> str:
    """Return the time from the kill to the first and to the last restart of what it interrupted."""
    times = verdict.recoveries
    share = f"({len(times)} of {verdict.interrupted})"
    return f"{times[0]:.1f} / {times[-1]:.1f} s {share}" if times else f"– {share}"


def run(contender: Contender, wanted: Wanted) -> Result:
    """Run one row; whatever happens, nothing that it started runs after it."""
    folder = Path(tempfile.mkdtemp(prefix="zerog-peers-"))
    system = contender.make(folder)
    with ExitStack() as stack:
        stack.callback(system.close)
        stack.callback(lambda: kill_trees(system.workers))
        try:
            result = _run(system, contender, wanted, folder / "ledger")
        except BaseException:
            print(f"{contender.title}: what its processes said is kept in {folder}")
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _run(system: System, contender: Contender, wanted: Wanted, path: Path) -> Result:
    system.start()
    names = system.submit(wanted.jobs, path, wanted.seconds)
    system.start_workers()
    until(lambda: 3 * _ended(path) >= wanted.jobs, _THIRD + wanted.jobs * wanted.seconds, "a third of the jobs")
    time.sleep(wanted.seconds / 2)  # slots that started together end together: the kill is to fall between their ends
    kill_trees(system.workers)
    killed = time.monotonic()
    system.start_workers()
    watch = _Watch(system, names, path, killed)
    watch.until(wanted.wait)
    verdict = watch.verdict()
    if verdict.stuck:
        watch.until(max(wanted.wait, contender.longest))
    return Result(contender, verdict, watch.verdict(), watch.seconds)


def _ended(path: Path) -> int:
    return sum(one.ended is not None for one in ledger.read(path))


class _Watch:
    """Looks at the ledger until a time has passed, or nothing more can happen."""

    def __init__(self, system: System, names: list[str], path: Path, killed: float) -> None:
        self._system, self._names, self._path, self._killed = system, names, path, killed
        self._started = time.monotonic()
        self.seconds = 0.0

    def until(self, seconds: float) -> None:
        """Wait until ``seconds`` after the restart; less if all are done and the system holds none of them."""
        asked = 0.0
        while self.seconds < seconds:
            time.sleep(0.2)  # between two looks
            self.seconds = time.monotonic() - self._started
            if self._verdict(Answer()).done == len(self._names) and self.seconds >= asked:
                if not self._system.ask(self._names).held:
                    return
                asked = self.seconds + _QUESTIONS

    def verdict(self) -> Verdict:
        """Return what has become of the jobs."""
        return self._verdict(self._system.ask(self._names))

    def _verdict(self, answer: Answer) -> Verdict:
        return judge(self._names, ledger.read(self._path), answer, self._killed)
