"""Submitting many jobs that may wait for each other: parents are stored before those that wait for them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zerog.exceptions import CyclicParents, DuplicateName, ParentRefused, StoreUnavailable, UnknownParent, ZerogError
from zerog.manager.retrying import Retrying
from zerog.manager.submitting import Submission, Submitted

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)

Verdict = Submitted | ZerogError


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One job of a batch: what is to be submitted, or why it cannot be; the name that others may call it by; and its
    parents, each by such a name or by UUID."""

    submission: Submission | ZerogError
    name: str | None = None
    parents: tuple[str, ...] = ()


class Batching(Retrying):
    """The verb that submits many jobs."""

    def submit_batch(self, items: Sequence[BatchItem]) -> list[Verdict]:
        """Store many jobs; for each the stored job, or why it was refused.

        Refused are, beside what ``submit`` refuses: names that stand twice, parents that are neither a name nor a job,
        circles, and whatever waits for something that is refused.
        """
        batch = _Batch(items)
        while batch.ready:
            layer, batch.ready = batch.ready, []
            for index, verdict in zip(layer, self.submit_all([batch.submission(one) for one in layer]), strict=True):
                batch.note(index, verdict)
        return batch.all_verdicts()


class _Batch:
    """The items of one batch by their places: who waits for whom, and what has become of each."""

    def __init__(self, items: Sequence[BatchItem]) -> None:
        self._items = items
        self._verdicts: dict[int, Verdict] = {}
        self._submissions = {
            index: replace(item.submission, fixed=item.submission.uuid)
            for index, item in enumerate(items)
            if isinstance(item.submission, Submission)
        }
        self._places = {item.name: index for index, item in enumerate(items) if item.name is not None}
        self._parents = [self._parents_of(item) for item in items]
        self._children: dict[int, list[int]] = defaultdict(list)
        #: How many of its parents in the batch are not stored yet.
        self._open = [0] * len(items)
        for index, parents in enumerate(self._parents):
            for parent in parents:
                if isinstance(parent, int):
                    self._children[parent].append(index)
                    self._open[index] += 1
        #: What can be submitted now.
        self.ready: list[int] = []
        self._refuse_at_once()
        self.ready.extend(index for index, count in enumerate(self._open) if not count and index not in self._verdicts)

    def _parents_of(self, item: BatchItem) -> list[int | str]:
        """Return the parents of an item: places in the batch, and whatever else was written."""
        return [self._places.get(text, text) for text in dict.fromkeys(item.parents)]

    def _refuse_at_once(self) -> None:
        times = Counter(item.name for item in self._items)
        faults: dict[int, ZerogError] = {}
        for index, item in enumerate(self._items):
            strange = next((one for one in self._parents[index] if isinstance(one, str) and not _is_uuid(one)), None)
            if isinstance(item.submission, ZerogError):
                faults[index] = item.submission
            elif item.name is not None and times[item.name] > 1:
                faults[index] = DuplicateName(f"{times[item.name]} items have the name {item.name!r}")
            elif strange is not None:
                faults[index] = UnknownParent(strange[:100])
        self._verdicts.update(faults)  # each its own, before those that follow from another's
        for index in faults:
            self._refuse_followers(index)

    def note(self, index: int, verdict: Verdict) -> None:
        """Note what has become of an item: those that wait for it can be submitted, or are refused with it."""
        self._verdicts[index] = verdict
        if isinstance(verdict, ZerogError):
            self._refuse_followers(index)
            return
        for child in self._children[index]:
            self._open[child] -= 1
            if not self._open[child] and child not in self._verdicts:
                self.ready.append(child)

    def _refuse_followers(self, index: int) -> None:
        """Refuse what waits for a refused item, and what waits for that; after an outage they may come again too."""
        cause = self._verdicts[index]
        refused = [index]
        while refused:
            parent = refused.pop()
            for child in self._children[parent]:
                if child not in self._verdicts:
                    lost = isinstance(cause, StoreUnavailable)
                    of_parent = ParentRefused(f"its parent, item {parent} of the batch, was refused")
                    self._verdicts[child] = cause if lost else of_parent
                    refused.append(child)

    def submission(self, index: int) -> Submission:
        """Return what is to be submitted for an item, its parents by UUID."""
        submission = self._submissions[index]
        named = (one.lower() if isinstance(one, str) else self._submissions[one].uuid for one in self._parents[index])
        parents = tuple(dict.fromkeys(named))
        if not parents:
            return submission
        written = tuple(sorted((*submission.options.written, ("parent", ",".join(sorted(parents))))))
        return replace(submission, options=replace(submission.options, parents=parents, written=written))

    def all_verdicts(self) -> list[Verdict]:
        """Return the verdict on each item; what is left waits for itself, or for something that does."""
        left = {index for index in range(len(self._items)) if index not in self._verdicts}
        circling = self._on_circles(left)
        for index in circling:
            self._verdicts[index] = CyclicParents("it waits for itself, by way of its parents")
        for index in circling:
            self._refuse_followers(index)
        return [self._verdicts[index] for index in range(len(self._items))]

    def _on_circles(self, left: Iterable[int]) -> set[int]:
        """Return what is left when all go for which nobody waits: those on circles, and between two of them."""
        circling = set(left)
        followers = {index: sum(child in circling for child in self._children[index]) for index in circling}
        free = [index for index, count in followers.items() if not count]
        while free:
            index = free.pop()
            circling.discard(index)
            for parent in self._parents[index]:
                if isinstance(parent, int) and parent in circling:
                    followers[parent] -= 1
                    if not followers[parent]:
                        free.append(parent)
        return circling


def _is_uuid(text: str) -> bool:
    return bool(_UUID.fullmatch(text.lower()))
