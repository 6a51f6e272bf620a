"""A delivery that goes back to its queue because its database was cut.

The database is its broker.

Beneath the bodies, whose errors are judged here. Nothing of such a delivery was committed, and its
message is still in the table. The worker's parent makes that due again, a little later each time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import TypeVar

from celery.app.task import Context
from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy.exc import PendingRollbackError

from ..databases.transient import is_away, is_transient
from ..databases.trying_again import again
from ..error_texts import error_text
from .plan import Plan

__all__ = [
    "PutBack",
    "insist_on",
    "is_cut_off",
    "is_delivered_by_database",
    "is_recording_end",
    "may_pass",
    "put_back",
    "send_or_put_back",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.once")

#: Of SQLAlchemy's error for a session whose connection was lost before, and the body went on.
_LOST_BEFORE = "8s2b"

#: Seconds for which the end of a task is tried while its database is away: a result, a death, the
#: retry's message of a task that was acknowledged at its start.
INSIST_SECONDS = 60.0
INSIST_EVERY_SECONDS = 1.0

_T = TypeVar("_T")

#: True in a thread of the worker's parent that records ends, beside the main loop.
is_recording_end: ContextVar[bool] = ContextVar("celery_alchemy_recording_end", default=False)


class PutBack(Reject):
    """A delivery's end: its message is due again, after a while that grows."""

    @property
    def why(self) -> str:
        """What has cut it off, for people."""
        return str(self.args[0])


def put_back(exc: BaseException) -> PutBack:
    """Return the end of a delivery that an error has cut off."""
    return PutBack(error_text(exc), requeue=True)


def is_cut_off(plan: Plan, request: Context, exc: BaseException) -> bool:
    """Tell whether the delivery of a ``once`` task goes back, because its database was cut.

    Or only reads, as after a failover, which has let nothing of it be committed either.
    An error of the body's own counts too that was raised from that of the database, or while it was
    handled, unless it says ``from None``. A soft time limit stands for itself.
    """
    if plan.once is None or not is_delivered_by_database(plan, request):
        return False
    return not isinstance(exc, SoftTimeLimitExceeded) and _stands_for(exc, _is_lost)


def is_delivered_by_database(plan: Plan, request: Context) -> bool:
    """Tell whether the message of a request is a row, which can be made due again."""
    is_delivered = not (request.called_directly or request.is_eager)
    return is_delivered and plan.home is not None and plan.home.is_broker


def _is_lost(exc: BaseException) -> bool:
    lost_before = isinstance(exc, PendingRollbackError) and exc.code == _LOST_BEFORE
    return lost_before or is_away(exc)


def _stands_for(exc: BaseException, kind: Callable[[BaseException], bool]) -> bool:
    """Tell whether an error, or one that it was raised for, is of a kind."""
    one: BaseException | None = exc
    seen: set[int] = set()
    while one is not None and id(one) not in seen:
        if kind(one):
            return True
        seen.add(id(one))
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return False


def may_pass(exc: BaseException) -> bool:
    """Tell whether an error stands for one of the database's that may pass."""
    return _stands_for(exc, is_transient)


def insist_on(
    act: Callable[[], _T],
    what: str,
    until: float | None = None,
    rest: Callable[[float], object] | None = None,
) -> _T:
    """Do something, again and again while the database is away.

    Args:
        act: What is done, in a transaction of its own.
        what: What is done, for people.
        until: ``time.monotonic()`` seconds from which on it is tried no more; None for a minute.
        rest: Waits for seconds; None for a thread that may sleep.

    Raises:
        Exception: As ``act`` does, for anything that does not pass, or not in time.
    """
    is_said = False
    until = monotonic() + INSIST_SECONDS if until is None else until

    def seconds_until_next(exc: Exception) -> float | None:
        nonlocal is_said
        if not may_pass(exc) or monotonic() >= until:
            return None
        if not is_said:
            logger.warning("%s waits for the database: %s", what, error_text(exc))
        is_said = True
        return INSIST_EVERY_SECONDS

    return again(act, seconds_until_next, rest)


def send_or_put_back(plan: Plan, request: Context, send: Callable[[], object]) -> object:
    """Send the message of a retry; where the table cannot take it, the delivery goes back instead.

    A task that was acknowledged at its start has no delivery any more: its retry is tried again
    here for a minute. Its worker could do nothing else meanwhile without the database.

    Raises:
        PutBack: The delivery is to go back.
        Exception: As ``send`` does, for anything that does not pass.
    """
    if not is_delivered_by_database(plan, request):
        return send()
    if not plan.task.acks_late:
        return insist_on(send, f"The retry of {plan.name}[{request.id}]")
    try:
        return send()
    except Exception as exc:
        if not may_pass(exc):
            raise
        raise put_back(exc) from exc
