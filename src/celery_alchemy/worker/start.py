"""What a worker refuses, or reports, when it starts: what would fail or get lost later.

Beneath ``boot_steps.py``, whose first step asks here before any child is forked.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from sqlalchemy import Engine

from ..alchemy import Alchemy
from ..broker.settings import refuse_other_broker
from ..errors import ConfigurationError
from ..messages.celery_types import App
from ..messages.visibility_timeout import window_is_short
from ..requests.registry import home_of
from ..sessions.engine import WorkerPool, pool_findings
from ..signatures.options import refuse_old_protocol
from ..task import SessionTask, asks_in_vain

__all__ = ["alchemy_of", "look", "report_engine"]

logger: logging.Logger = logging.getLogger("celery_alchemy.worker")


def look(app: App, pool: WorkerPool) -> None:
    """Refuse to start a worker that cannot keep what its app promises.

    Report what will hurt it.

    Args:
        app: Its app.
        pool: What pool it runs.

    Raises:
        SystemExit: It says why, and what to do.
    """
    _refuse_other_broker(app)
    _refuse_homeless_tasks(app)
    _report_tasks_that_ask_in_vain(app)
    _refuse_async_tasks(app, pool)
    alchemy = alchemy_of(app)
    if alchemy is not None:
        _refuse_short_window(app, alchemy)
        report_engine(alchemy, pool)


def alchemy_of(app: App) -> Alchemy | None:
    """Return the Alchemy of an app; None if it has none."""
    home = home_of(app)
    return home if isinstance(home, Alchemy) else None


def _refuse_other_broker(app: App) -> None:
    """Refuse to start a worker that would take its messages from elsewhere than they are sent to.

    Raises:
        SystemExit: It names both.
    """
    alchemy = alchemy_of(app)
    if alchemy is not None and alchemy.is_broker:
        try:
            refuse_other_broker(app)
        except ConfigurationError as exc:
            raise SystemExit(f"celery-alchemy: {exc}") from exc


def _refuse_homeless_tasks(app: App) -> None:
    """Refuse to start a worker in which a task with a session parameter would fail.

    It would fail at its first request.

    Raises:
        SystemExit: It names the task.
    """
    for task in app.tasks.values():
        if isinstance(task, SessionTask) and task.is_once:
            try:
                refuse_old_protocol(task)
            except ConfigurationError as exc:
                raise SystemExit(f"celery-alchemy: {exc}") from exc
        if isinstance(task, SessionTask) and task.injection.session is not None:
            try:
                task.session_plan.required_home  # noqa: B018
                if not task.is_async:
                    # The class of sessions that it asks for is checked.
                    task.session_plan.source  # noqa: B018
            except ConfigurationError as exc:
                # Celery prints a SystemExit and stops; of any other exception it would go on
                # without this step.
                raise SystemExit(f"celery-alchemy: {exc}") from exc


def _report_tasks_that_ask_in_vain(app: App) -> None:
    """Report tasks whose class injects no session.

    They are not refused, since a class of the user's may have its own way to pass one.
    """
    for task in app.tasks.values():
        with suppress(ConfigurationError):
            found = asks_in_vain(task)
            if found is not None:
                logger.warning("%s %s", *found)


def _refuse_short_window(app: App, alchemy: Alchemy) -> None:
    """Refuse to start a worker that would forget a completed ``once`` task too early.

    The broker may still deliver it after that.
    """
    timeout = window_is_short(app, alchemy.once_window_seconds)
    if timeout is not None:
        raise SystemExit(
            f"celery-alchemy: once_window={alchemy.once_window_seconds:g} s is shorter than the"
            f" broker's visibility_timeout of {timeout:g} s, after which it delivers a message"
            " again: the record that the task is done would be gone by then, and its work done"
            " twice. Make once_window longer (the default is 7 days), or visibility_timeout"
            " shorter."
        )


def _refuse_async_tasks(app: App, pool: WorkerPool) -> None:
    """Refuse to start a worker that cannot run the app's ``async def`` tasks.

    Raises:
        SystemExit: It names a task, and says why.
    """
    tasks = [task for task in app.tasks.values() if isinstance(task, SessionTask) and task.is_async]
    if tasks and pool.name in ("gevent", "eventlet"):
        raise SystemExit(
            f"celery-alchemy: task {tasks[0].name!r} is an `async def`, which the {pool.name} pool"
            " cannot run: its threads are greenlets, and an asyncio event loop needs a real one."
            " Use --pool=threads, prefork or solo."
        )
    for task in tasks:
        if task.injection.session is not None or task.is_once:
            try:
                # Made here, so that a driver that is not installed is noticed now.
                task.session_plan.async_source  # noqa: B018
            except ConfigurationError as exc:
                raise SystemExit(f"celery-alchemy: task {task.name!r}: {exc}") from exc


def report_engine(alchemy: Alchemy, pool: WorkerPool) -> None:
    """Report what is wrong with an engine in a worker of this shape."""
    try:
        engine: Engine = alchemy.engine_in(pool)
    except ConfigurationError as exc:
        # Here and not in the relay's thread, which has no application context that an engine could
        # be known in.
        if alchemy.keeps_messages:
            logger.warning("What the outbox keeps cannot be sent by this worker's relay: %s", exc)
        return
    for finding in pool_findings(engine, pool):
        logger.warning("%s", finding)
