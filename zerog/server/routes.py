"""The table of URLs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from zerog.server import (
    agents,
    attempts,
    batch,
    commands,
    consumers,
    data,
    jobs,
    live,
    openapi,
    overview,
    progress,
    relationships,
    retries,
    run,
    status,
    topics,
    types,
)
from zerog.server.endpoint import Endpoint

ENDPOINTS: tuple[type[Endpoint], ...] = (
    status.Start,
    batch.RunBatch,  # before the next one, whose pattern covers it
    run.Run,
    jobs.Jobs,
    jobs.Job,
    progress.Progress,
    jobs.Info,
    progress.Events,
    data.Data,
    jobs.Cancel,
    retries.Retry,
    retries.Retries,
    jobs.Prune,
    jobs.Explain,
    relationships.Relationships,
    relationships.Parents,
    relationships.Children,
    types.Types,
    types.Type,
    types.PauseType,
    types.ResumeType,
    agents.Agents,
    commands.ManyCommands,  # before the next one, whose pattern covers it
    agents.Agent,
    attempts.AgentWork,
    attempts.AgentTurn,
    commands.AgentCommands,
    commands.AgentCommand,
    agents.AgentJobs,
    agents.AgentFailures,
    agents.AgentExceptions,
    agents.Assignments,
    attempts.Attempt,
    attempts.AttemptOutcome,
    attempts.AttemptData,
    attempts.AttemptQuestions,
    topics.Topic,
    consumers.Consumers,
    consumers.Consumer,
    openapi.Description,
    status.Health,
    status.Ready,
    overview.ViewStatus,
    overview.Metrics,
    status.Style,
    status.Script,
    status.Icon,
    live.Queue,
)


def pattern(url: str) -> str:
    """Return the regular expression of a URL template."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(url)) + "$"


def names(url: str) -> Iterable[str]:
    """Return the names of the parts of a URL template."""
    return re.findall(r"\{(\w+)\}", url)
