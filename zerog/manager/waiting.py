"""Jobs that wait for others: released once when all parents have succeeded, cancelled when one cannot any more (R8)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from zerog import codec, failpoints
from zerog.exceptions import (
    Conflict,
    CorruptDocument,
    NewerVersion,
    StoreAmbiguous,
    UnknownJob,
    UnknownParent,
)
from zerog.manager.records import CONFLICTS, Held, too_busy
from zerog.manager.settling import Settling
from zerog.record import JobRecord, State

#: States of a parent after which its children cannot run, in words.
_HOPELESS = {State.FAILED: "has failed", State.CANCELLED: "was cancelled"}

#: Entries of the log of a job's children that are read in one go.
_CHILDREN = 200


#: Why a job was cancelled that a parent has taken along.
PARENT_FAILED = "parent_failed"


class Waiting(Settling):
    """The verbs of parents and children."""

    @staticmethod
    def children_log(uuid: str) -> str:
        """Return the log that names the jobs which wait for this one."""
        return f"children.{uuid}"

    def check_parents(self, parents: Sequence[str]) -> None:
        """Raise ``UnknownParent`` for a parent that there is not."""
        known = self.read_many(parents)
        for parent in parents:
            if parent not in known:
                raise UnknownParent(codec.printable(parent, 100))

    def tie(self, child: str, parents: Iterable[str]) -> None:
        """Tell parents of a child that is about to be stored.

        A parent that ends afterwards sees the mark in its own record, and then the log.  One that has ended before is
        seen by whoever stores the child.
        """
        for parent in parents:
            self.store.append(self.children_log(parent), codec.dumps({"uuid": child}))
            self._mark(parent)

    def _mark(self, uuid: str) -> None:
        for _ in range(CONFLICTS):
            try:
                held = self.read(uuid)
            except (UnknownJob, CorruptDocument, NewerVersion):
                return  # gone, or not to be touched: whoever stores the child looks at its parents once more
            if held.record.terminal or held.record.children:
                return
            try:
                self.write(held, held.record.evolve(children=True))
                return
            except (Conflict, StoreAmbiguous):
                continue
        raise too_busy(uuid)

    def decide(self, held: Held) -> JobRecord:
        """Release or cancel a waiting job if its parents say so, and put it into the queue; returns it as it is then.

        Whichever process decides first wins; the others find the job decided.
        """
        for _ in range(CONFLICTS):
            record = held.record
            if record.state is not State.WAITING:
                return record
            try:
                after = self._decided(held, self.read_many(record.parents))
            except (Conflict, StoreAmbiguous):
                held = self.read(record.uuid)
                continue
            if after is None:
                return record
            if after.record.state is State.QUEUED:
                failpoints.hit("release.after_write")
                self.enqueue([after.record])
            return after.record
        raise too_busy(held.record.uuid)

    def _decided(self, held: Held, parents: Mapping[str, Held]) -> Held | None:
        """Write what the parents' states mean for a child; None if that is open."""
        record = held.record
        for uuid in record.parents:
            parent = parents.get(uuid)
            if parent is None or parent.record.state in _HOPELESS:
                what = _HOPELESS[parent.record.state] if parent is not None else "is not there any more"
                return self._end_seen(held, partial(self._bereft, message=f"its parent {uuid} {what}"))
        if not all(parents[uuid].record.state is State.SUCCEEDED for uuid in record.parents):
            return None
        failpoints.hit("release.before_write")
        return self.write(held, record.after("release"))

    def _bereft(self, record: JobRecord, message: str) -> JobRecord:
        return record.after(
            "cancel", result_code=410, reason=PARENT_FAILED, message=message, finished_at=self.clock.now()
        )

    def release_pending(self) -> None:
        """Decide the children of the jobs whose ends this process has written, and theirs where that ended them too.

        Doing it twice is doing it once; what a crash leaves undone the sweep does.
        """
        for _ in range(len(self.ended_parents)):
            uuid, until = self.ended_parents[0]
            try:
                # The write may not be committed yet, or never be.
                open_still = not self.read(uuid).record.terminal
            except (UnknownJob, CorruptDocument, NewerVersion):
                open_still = False
            for child in () if open_still else self._children(uuid):
                self.decide(child)
            self.ended_parents.popleft()
            if open_still and self.clock.monotonic() < until:
                self.ended_parents.append((uuid, until))

    def _children(self, uuid: str) -> Iterator[Held]:
        """Yield the children of a job that wait now."""
        after = 0
        while entries := self.store.read(self.children_log(uuid), after=after, limit=_CHILDREN):
            after = entries[-1].number
            held = self.read_many([codec.loads(entry.body)["uuid"] for entry in entries])
            yield from (one for one in held.values() if one.record.state is State.WAITING)
