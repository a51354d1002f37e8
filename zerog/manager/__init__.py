"""Manager: every operation on jobs, in the order of a job's life; the sole author of records.

One module a group of verbs: ``records`` (reading and guarded writing, which all others use), ``submitting``,
``retrying``, ``batching``, ``waiting`` (parents), ``running`` (claim, renew, report, output), ``settling`` (how an
attempt ends), ``needing`` (what jobs need, and who has it), ``modifying``, ``cancelling``, ``pausing``,
``explaining``, ``pruning``, ``reading``.
"""

from __future__ import annotations

from zerog.manager.batching import Batching, BatchItem
from zerog.manager.cancelling import Cancelling
from zerog.manager.explaining import Explaining
from zerog.manager.pausing import Pause
from zerog.manager.pruning import Pruned, Pruning
from zerog.manager.reading import Page, Reading
from zerog.manager.records import Held
from zerog.manager.running import Claimant, Claimed, Drop, GiveBack, Missing, Running, Verdict
from zerog.manager.submitting import Options, Submission, Submitted, check_retryable, uuid_of

__all__ = [
    "BatchItem",
    "Claimant",
    "Claimed",
    "Drop",
    "GiveBack",
    "Held",
    "Manager",
    "Missing",
    "Options",
    "Page",
    "Pause",
    "Pruned",
    "Submission",
    "Submitted",
    "Verdict",
    "check_retryable",
    "uuid_of",
]


class Manager(Batching, Pruning, Running, Cancelling, Explaining, Reading):
    """Every operation on jobs.  Synchronous, and safe to use from many threads."""
