"""Warnings for those who write tasks: transactions left idle, and a query for each row of another.

Above the request, which says whose session it is; the ledger measures. Imported by ``alchemy.py``, which switches it on.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

from .ledger import REPEATS_REPORTED, idle_reporters, repeat_reporters
from .request import UnitOfWork, at_hand

__all__ = ["switch_on"]

logger = logging.getLogger(__name__)

_NOT_THE_USERS = ("sqlalchemy.", "celery_alchemy.", "celery.", "kombu.", "contextlib", "functools", "asyncio.")
#: Who calls the task: no frame further out belongs to it.
_CALLERS = ("celery.app.trace", "asyncio.events")


def switch_on() -> None:
    """Report to the log ``celery_alchemy.insight`` from now on; does nothing the second time."""
    if _report_idle not in idle_reporters:
        idle_reporters.append(_report_idle)
        repeat_reporters.append(_report_repeat)


def _report_idle(seconds: float) -> None:
    logger.warning(
        "%s left its transaction idle for %.1f s before %s: its connection, its locks and the vacuum horizon waited. Put the slow"
        " work into `with released(session):`.",
        _owner(),
        seconds,
        _place(),
    )


def _report_repeat(statement: str) -> None:
    logger.warning(
        "%s sent the same statement %d times in a row at %s: %s ... Load the rows in one query, with selectinload() or IN.",
        _owner(),
        REPEATS_REPORTED,
        _place(),
        " ".join(statement.split())[:200],
    )


def _owner() -> str:
    held = at_hand.get()
    return held.owner() if isinstance(held, UnitOfWork) else "A session"


def _place() -> str:
    """Return file, line and function of the innermost frame that is the user's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module in _CALLERS:
            break
        if not module.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back or _awaiting_frame(frame)
    return "the end of the task"


def _awaiting_frame(outermost: FrameType) -> FrameType | None:
    """Return the frame that awaits an AsyncSession: its statements run in a greenlet, whose frames end at its start."""
    greenlet: Any = sys.modules.get("greenlet")
    if greenlet is None:
        return None
    current = greenlet.getcurrent()
    # SQLAlchemy's own: the parent of a gevent greenlet is the hub, which awaits nothing.
    if type(current).__name__ != "_AsyncIoGreenlet" or current.parent is None:
        return None
    frame: FrameType | None = current.parent.gr_frame
    return None if frame is outermost else frame
