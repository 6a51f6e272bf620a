"""What a request did with its session, told to listeners when the session is closed.

Underneath the request, which makes the report; logs, Prometheus and OpenTelemetry listen
(``integrations/``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .errors import ConfigurationError
from .sessions.coroutine_functions import is_coroutine_function
from .sessions.state import Ledger
from .signatures.outcomes import Outcome

__all__ = ["SessionListener", "SessionReport", "listener_of", "report_of", "tell"]

logger: logging.Logger = logging.getLogger("celery_alchemy.events")


@dataclass(frozen=True, slots=True)
class SessionReport:
    """One request's use of the database.

    Attributes:
        task_name: The task's registered name.
        task_id: The request's id; None in a direct call.
        outcome: ``"success"``, ``"retry"``, ``"ignore"``, ``"reject"`` or ``"failure"``.
        statements: How many statements were sent.
        database_seconds: How long they took in all.
        idle_seconds: How long open transactions waited for their next statement, or for their end,
            in all.
        seconds: From the start of the body to the end of the session.
    """

    task_name: str
    task_id: str | None
    outcome: Outcome
    statements: int
    database_seconds: float
    idle_seconds: float
    seconds: float


SessionListener = Callable[[SessionReport], object]


def listener_of(listener: SessionListener) -> SessionListener:
    """Return what is told of closed sessions.

    Raises:
        ConfigurationError: It cannot be called, or nobody would await it.
    """
    given: object = listener
    is_coroutine = is_coroutine_function(given)
    if is_coroutine or not callable(given):
        problem = "is an `async def`, which nobody awaits" if is_coroutine else "cannot be called"
        raise ConfigurationError(
            f"on_session_closed={listener!r} {problem}.",
            "Give a plain function that takes a SessionReport.",
        )
    return listener


def report_of(
    task_name: str, task_id: str | None, outcome: Outcome, ledger: Ledger, seconds: float
) -> SessionReport:
    """Return the report of a request whose session has been closed.

    Args:
        task_name: The task's registered name.
        task_id: The request's id.
        outcome: How the request has ended.
        ledger: The account of its session.
        seconds: From the start of the body to the end of the session.
    """
    return SessionReport(
        task_name,
        task_id,
        outcome,
        ledger.statements,
        ledger.database_seconds,
        ledger.idle_seconds,
        seconds,
    )


def tell(listeners: Iterable[SessionListener], report: SessionReport) -> None:
    """Call each listener; what one raises is logged and does not touch the task."""
    for listener in listeners:
        try:
            listener(report)
        except Exception:
            logger.exception("A listener to closed sessions failed for task %s", report.task_name)
