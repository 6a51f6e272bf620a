"""The end of a delivery whose end Celery's tracer could not write down.

Beneath ``planned_task.py``, which has each tracer of a task enclosed here. What a tracer raises is
dropped by the pools of threads and greenlets: nobody would acknowledge the delivery then, or give
it back, and it would stay the worker's for as long as that lives.
"""

from __future__ import annotations

from collections.abc import Callable

from billiard.einfo import ExceptionInfo
from celery.app.trace import TraceInfo, trace_ok_t
from celery.exceptions import Reject
from celery.states import REJECTED

from ..sessions.engine import worker_pool
from .put_back import PutBack, may_pass, put_back

__all__ = ["Tracer", "ends_what_it_raises"]

#: Runs a request of a task, and tells the pool how it has ended.
Tracer = Callable[..., object]


def ends_what_it_raises(trace: Tracer) -> Tracer:
    """Have a tracer tell the pool of an error that it would raise.

    One that came of a database which is away puts the delivery back. Of any other one Celery's
    parent process hears in the prefork pool alone: it is left to that there.
    """

    def traced(*args: object, **kwargs: object) -> object:
        try:
            return trace(*args, **kwargs)
        except Exception as exc:
            if not isinstance(exc, PutBack) and may_pass(exc):
                exc = put_back(exc).with_traceback(exc.__traceback__)
            if not isinstance(exc, PutBack) and _tells_its_parent():
                raise
            return _told(exc)

    return traced


def _tells_its_parent() -> bool:
    pool = worker_pool()
    return pool is None or pool.name == "prefork"


def _told(exc: Exception) -> object:
    """Return what a tracer returns of a request that has ended with an error."""
    state = REJECTED if isinstance(exc, Reject) else "FAILURE"
    try:
        raise exc
    except Exception:  # noqa: BLE001 - it is the one of above, with what ExceptionInfo reads.
        info = ExceptionInfo(internal=True)
    return trace_ok_t(info, TraceInfo(state, exc), 0.0, None)
