"""Prometheus metrics of what tasks do with the database.

Needs ``pip install "celery-alchemy[prometheus]"``.

At the edge: listens to ``alchemy.on_session_closed`` and knows nothing else of the package.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

from ..alchemy import Alchemy
from ..events import SessionReport

__all__ = ["instrument"]

#: Seconds: a lookup by key takes less than one millisecond, a report a minute.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def instrument(alchemy: Alchemy, *, registry: CollectorRegistry = REGISTRY) -> None:
    """Count and measure the sessions of an Alchemy's tasks.

    Several Alchemy objects may share a registry. Counters and histograms only, so that nothing has
    to be cleaned up after a process that ends in prometheus_client's multiprocess mode.

    Args:
        alchemy: The Alchemy.
        registry: Where the metrics are registered.
    """
    metrics = _metrics.get(registry)
    if metrics is None:
        metrics = _metrics[registry] = _Metrics(registry)
    alchemy.on_session_closed(metrics.add)


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._sessions = Counter(
            "celery_alchemy_sessions", "Sessions of tasks", ["task", "outcome"], registry=registry
        )
        self._statements = Counter(
            "celery_alchemy_statements", "Statements sent by tasks", ["task"], registry=registry
        )
        self._database = _histogram(
            "database", "Time that the statements of a session took", registry
        )
        self._idle = _histogram(
            "idle",
            "Time that open transactions of a session waited for their next statement or end",
            registry,
        )
        self._session = _histogram(
            "session", "Time from the start of a task's body to the end of its session", registry
        )

    def add(self, report: SessionReport) -> None:
        """Add a closed session."""
        task = report.task_name
        self._sessions.labels(task, report.outcome).inc()
        self._statements.labels(task).inc(report.statements)
        self._database.labels(task).observe(report.database_seconds)
        self._idle.labels(task).observe(report.idle_seconds)
        self._session.labels(task).observe(report.seconds)


def _histogram(name: str, text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(
        f"celery_alchemy_{name}_seconds", text, ["task"], registry=registry, buckets=BUCKETS
    )


_metrics: WeakKeyDictionary[CollectorRegistry, _Metrics] = WeakKeyDictionary()
