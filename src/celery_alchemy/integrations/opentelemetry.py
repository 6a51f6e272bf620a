"""OpenTelemetry metrics and span events of what tasks do with the database.

Needs ``pip install "celery-alchemy[opentelemetry]"``.

At the edge: listens to ``alchemy.on_session_closed`` and knows nothing else of the package.
"""

from __future__ import annotations

from importlib.metadata import version

from opentelemetry import metrics, trace
from opentelemetry.metrics import MeterProvider

from ..alchemy import Alchemy
from ..events import SessionReport

__all__ = ["instrument"]


def instrument(alchemy: Alchemy, *, meter_provider: MeterProvider | None = None) -> None:
    """Count and measure the sessions of an Alchemy's tasks.

    Note each in the span that its task runs in.

    The span is that of whoever traces Celery's tasks, opentelemetry-instrumentation-celery for
    example; without one nothing is noted.

    Args:
        alchemy: The Alchemy.
        meter_provider: Where the metrics go; left out, the global one, which may be set later.
    """
    alchemy.on_session_closed(_Instruments(meter_provider).add)


class _Instruments:
    """The instruments of one meter provider."""

    def __init__(self, provider: MeterProvider | None) -> None:
        meter = metrics.get_meter("celery_alchemy", version("celery-alchemy"), provider)
        self._sessions = meter.create_counter(
            "celery_alchemy.sessions", "{session}", "Sessions of tasks"
        )
        self._statements = meter.create_counter(
            "celery_alchemy.statements", "{statement}", "Statements sent by tasks"
        )
        self._database = meter.create_histogram(
            "celery_alchemy.database.duration", "s", "Time that the statements of a session took"
        )
        self._idle = meter.create_histogram(
            "celery_alchemy.idle.duration",
            "s",
            "Time that open transactions waited for their next statement or end",
        )
        self._session = meter.create_histogram(
            "celery_alchemy.session.duration",
            "s",
            "Time from the start of a task's body to the end of its session",
        )

    def add(self, report: SessionReport) -> None:
        """Add a closed session."""
        task = {"celery.task_name": report.task_name}
        self._sessions.add(1, {**task, "celery_alchemy.outcome": report.outcome})
        self._statements.add(report.statements, task)
        self._database.record(report.database_seconds, task)
        self._idle.record(report.idle_seconds, task)
        self._session.record(report.seconds, task)
        trace.get_current_span().add_event(
            "celery_alchemy.session_closed",
            {
                **task,
                "celery_alchemy.outcome": report.outcome,
                "celery_alchemy.statements": report.statements,
                "celery_alchemy.database_seconds": report.database_seconds,
                "celery_alchemy.idle_seconds": report.idle_seconds,
                "celery_alchemy.seconds": report.seconds,
            },
        )
