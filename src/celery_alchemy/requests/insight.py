"""Warnings for those who write tasks.

They are about transactions left idle, connections left open, and a query for each row of another.

Above the request, which says whose session it is; the ledger measures. Imported by ``alchemy.py``,
which switches it on.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic
from types import FrameType
from weakref import ref

from celery import Task
from celery.signals import task_postrun
from sqlalchemy import Connection

from ..sessions.ledger import first_use_reporters
from ..sessions.state import REPEATS_REPORTED, idle_reporters, repeat_reporters
from .attempt import UnitOfWork, at_hand

__all__ = ["place", "switch_on"]

logger: logging.Logger = logging.getLogger("celery_alchemy.insight")

_NOT_THE_USERS = (
    "sqlalchemy.",
    "celery_alchemy.",
    "celery.",
    "kombu.",
    "contextlib",
    "functools",
    "asyncio.",
)
#: Who calls the task: no frame further out belongs to it.
_CALLERS = ("celery.app.trace", "asyncio.events")

#: What of a task runs after its body, and may close what the body has left open. Flask's documented
#: ``__call__`` does.
_HOOKS = ("__call__", "on_success", "on_failure", "on_retry", "after_return")
#: Hooks are over by then, also those that store something or tell somebody.
HOOKS_SECONDS = 1.0
#: When to look again at a connection that hooks may close, and what reports it.
_doubtful: deque[tuple[float, Callable[[], None]]] = deque()


def switch_on() -> None:
    """Report to the log ``celery_alchemy.insight`` from now on; does nothing the second time."""
    if _report_idle not in idle_reporters:
        idle_reporters.append(_report_idle)
        repeat_reporters.append(_report_repeat)
        first_use_reporters.append(_look_at_the_end)


def _report_idle(seconds: float) -> None:
    logger.warning(
        "%s left its transaction idle for %.1f s before %s: its connection, its locks and the"
        " vacuum horizon waited. Put the slow"
        " work into `with released(session):`.",
        _owner(),
        seconds,
        place(),
    )


def _report_repeat(statement: str) -> None:
    logger.warning(
        "%s sent the same statement %d times in a row at %s: %s ... Load the rows in one query,"
        " with selectinload() or IN.",
        _owner(),
        REPEATS_REPORTED,
        place(),
        " ".join(statement.split())[:200],
    )


def _look_at_the_end(connection: Connection) -> None:
    """Look at a connection that is not the session's when the running task ends.

    It is reported if it is open still.

    Known from its first statement on: to watch each checkout would cost every task, whose session
    takes a connection too.
    """
    held = at_hand.get()
    # Where nothing begins by itself it is SQLAlchemy's, which asks a server that it does not know
    # yet for its version.
    if not isinstance(held, UnitOfWork) or not getattr(connection, "_allow_autobegin", True):
        return
    place = _users_place()
    if place is None:  # The library's own, at the end of a task.
        return
    _look_again()
    unit, watched = held, ref(connection)

    def look() -> None:
        report = _reporter(watched, unit.owner(), place)
        if _has_hooks(unit.plan.task):
            _doubtful.append((monotonic() + HOOKS_SECONDS, report))
        else:
            report()

    unit.send_after_end(look)


def _reporter(
    watched: Callable[[], Connection | None], owner: str, place: str
) -> Callable[[], None]:
    def report() -> None:
        left = watched()
        if left is not None and not left.closed and not left.invalidated:
            logger.warning(
                "%s ended and left a connection open that it had used at %s: the pool goes"
                " without it. Write"
                " `with engine.connect() as connection:`, or use the task's session.",
                owner,
                place,
            )

    return report


def _has_hooks(task: object) -> bool:
    """Tell whether code of the user's runs between the end of the body and that of the task."""
    return bool(task_postrun.receivers) or any(
        getattr(type(task), hook, None) is not getattr(Task, hook) for hook in _HOOKS
    )


def _look_again() -> None:
    """Report what hooks have not closed.

    Asked by the next task that uses a connection of its own, so others pay nothing.
    """
    while _doubtful and _doubtful[0][0] <= monotonic():
        try:
            _, report = _doubtful.popleft()
        except IndexError:  # Another thread was faster.
            return
        report()


def _owner() -> str:
    held = at_hand.get()
    return held.owner() if isinstance(held, UnitOfWork) else "A session"


def place() -> str:
    """Return file, line and function of the innermost frame that is the user's.

    Where there is none, say so.
    """
    return _users_place() or "the end of the task"


def _users_place() -> str | None:
    """Return file, line and function of the innermost frame that is the user's.

    None if the task's body is not running.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in _CALLERS:
            break
        if not module.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back or _awaiting_frame(frame)
    return None


def _awaiting_frame(outermost: FrameType) -> FrameType | None:
    """Return the frame that awaits an AsyncSession.

    Its statements run in a greenlet, whose frames end at its start.
    """
    greenlet = sys.modules.get("greenlet")
    if greenlet is None:
        return None
    current = greenlet.getcurrent()
    # SQLAlchemy's own: the parent of a gevent greenlet is the hub, which awaits nothing.
    if type(current).__name__ != "_AsyncIoGreenlet" or current.parent is None:
        return None
    frame: FrameType | None = current.parent.gr_frame
    return None if frame is outermost else frame
