"""The statistics in the text format of Prometheus.  No label holds the id of a job or a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from zerog.statistics import BUCKETS, Totals

#: Metric → (what it says, member of the counts).
_COUNTERS = {
    "zerog_attempts_total": ("Attempts that were begun", "attempts"),
    "zerog_superseded_total": ("Attempts that found out that they were not the current ones any more", "superseded"),
    "zerog_sweeps_total": ("Walks over the open jobs", "sweeps"),
}


class _Everything(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._metrics


def exposition(
    totals: Totals | None,
    queues: Sequence[tuple[str, int | None, float | None]],
    agents: Mapping[str, int],
    sees: Callable[[str], bool] = lambda job_type: True,
) -> bytes:
    """Return all metrics, with those job types among the labels that ``sees`` lets pass.

    ``queues`` has for each type how many of its entries are ready or delayed, and the seconds for which the job that
    comes next has been due; None where nothing is known, as ``totals`` while the statistics are away: then the
    metrics are missing, which Prometheus shows as such.
    """
    metrics = [*_of_queues(queues), _gauge("zerog_agents", "Agents by state", "state", agents.items())]
    if totals is not None:
        metrics += _of_counts(totals, sees)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Everything(metrics))
    return bytes(generate_latest(registry))


def _of_queues(queues: Sequence[tuple[str, int | None, float | None]]) -> Iterator[Metric]:
    depths = [(name, depth) for name, depth, _ in queues if depth is not None]
    ages = [(name, age) for name, _, age in queues if age is not None]
    yield _gauge("zerog_queue_depth", "Jobs in the queue, ready or delayed", "type", depths)
    yield _gauge("zerog_queue_age_seconds", "Seconds for which the job that comes next has been due", "type", ages)


def _of_counts(totals: Totals, sees: Callable[[str], bool]) -> Iterator[Metric]:
    yield GaugeMetricFamily("zerog_leases", "Jobs that run under a lease", value=totals.gauges.get("leases", 0))
    for name, (what, member) in _COUNTERS.items():
        yield CounterMetricFamily(name, what, value=totals.counts.get(member, 0))
    requests = CounterMetricFamily("zerog_requests_total", "Answered requests", labels=["endpoint", "status"])
    for endpoint, statuses in sorted(totals.counts.get("requests", {}).items()):
        for status, count in sorted(statuses.items()):
            requests.add_metric([endpoint, status], count)
    yield requests
    durations = HistogramMetricFamily("zerog_job_seconds", "Durations of attempts", labels=["type"])
    for job_type, one in sorted(totals.counts.get("attemptSeconds", {}).items()):
        if not sees(job_type):
            continue
        durations.add_metric([job_type], _buckets(one["buckets"]), one["sum"])
    yield durations


def _buckets(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    """Return the counts as Prometheus wants them: each bucket holds those below it too."""
    bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
    growing = accumulate(counts.get(str(index), 0) for index in range(len(bounds)))
    return list(zip(bounds, map(float, growing), strict=True))


def _gauge(name: str, what: str, label: str, values: Iterable[tuple[str, Any]]) -> Metric:
    gauge = GaugeMetricFamily(name, what, labels=[label])
    for value, number in values:
        gauge.add_metric([value], number)
    return gauge
