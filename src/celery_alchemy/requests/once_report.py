"""What a delivery of a ``once`` task reports that has nothing to run: its work is done, or dead.

Beneath ``once.py``. The run that committed may be another task's with the same key, and may have
been replaced by ``self.replace()``. The replacement's result has the id of the task that it
replaced: that one has nothing more to report. Another task with the key has callbacks and a chord
of its own, which wait.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from celery import states
from celery.app.task import Context
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from ..error_texts import error_text
from ..errors import DeadTaskError, OnceReplacedError
from ..outbox.outbox import shown
from .continuation import drop_held
from .loop_call import aside
from .once_guests import end_guests_count, end_unreported, report_kept
from .once_keys import nesting_of
from .once_records import State
from .plan import Plan

__all__ = ["has_result", "report"]

_T = TypeVar("_T")

_SAME_KEY = "its once key is that of the task that it replaced, whose work is done"


class InOwnSession(Protocol):
    """Does something in a session and transaction of its own and commits it."""

    def __call__(self, work: Callable[[Session], _T]) -> _T: ...


def has_result(state: State, request: Context) -> bool:
    """Tell whether a completion has a result to report, of its run or of what replaced that."""
    return state.ending == "returned" or (
        state.ending == "replaced" and _is_done_by_another(state, request)
    )


def _is_done_by_another(state: State, request: Context) -> bool:
    """Tell whether another task with the key has done the work."""
    return state.by not in (None, request.id or "")


def report(
    plan: Plan,
    request: Context,
    outer: object,
    key: str,
    state: State,
    in_own_session: InOwnSession,
) -> object:
    """Report what the run that committed reported.

    Its callbacks and chain are in the outbox, not the tracer's to send. Those of another task with
    the same key, or of one that was sent again with the same id, are: they were not that run's.

    Args:
        plan: The task's.
        request: Its request.
        outer: What was at hand before it began.
        key: Its row.
        state: What the row says.
        in_own_session: Does something in a session and transaction of its own and commits it.

    Raises:
        Ignore: That run replaced itself or raised Ignore; there is nothing to report.
        DeadTaskError: The task is dead.
        OnceReplacedError: Another task with its key replaced itself, and there is no result.
    """
    is_queued = request.id is not None and not request.is_eager
    if state.kind == "dead":
        is_another = not state.fresh and state.of != shown(request.id)
        if is_queued and is_another and plan.once is not None and plan.once.make_key is not None:
            end_guests_count(plan, request, in_own_session)
        raise DeadTaskError(plan.name, key, state.error)
    if state.ending == "replaced":
        try:
            state = _with_replacements_value(plan, request, key, state)
        except OnceReplacedError as exc:
            if is_queued:
                end_unreported(plan, request, error_text(exc), in_own_session)
            raise
    if is_queued and _is_done_by_another(state, request):
        report_kept(plan, request, outer, key, state, in_own_session)
    if state.ending != "returned":
        raise Ignore(f"Task {plan.name}[{request.id}] was {state.ending} by the run that committed")
    drop_held(request, state.held)
    return state.value


def _with_replacements_value(plan: Plan, request: Context, key: str, state: State) -> State:
    """Return a completion with what the replacement of its run has returned.

    It is as it was for another delivery of the task that was replaced.

    Raises:
        OnceReplacedError: The replacement has failed, or no result of it is known; or it is this
            task.
    """
    by = state.by
    is_own = not _is_done_by_another(state, request)
    if by is None or (is_own and nesting_of(request) <= state.nesting):
        return state
    if is_own:
        raise OnceReplacedError(plan.name, key, by, _SAME_KEY)
    if not by:
        # A direct call has no id, and its replacement one that nobody has noted.
        raise OnceReplacedError(plan.name, key, by)
    look = partial(_look, plan, by)
    status, value = aside(look) if plan.is_async else look()
    if status == states.SUCCESS:
        return dataclasses.replace(state, ending="returned", value=value)
    failed = status in states.PROPAGATE_STATES and isinstance(value, BaseException)
    raise OnceReplacedError(plan.name, key, by, error_text(value) if failed else "")


def _look(plan: Plan, task_id: str) -> tuple[str, Any]:
    """Return what the task's result backend says of another task."""
    backend = plan.task.backend
    try:
        status = str(backend.get_state(task_id))
    except NotImplementedError:
        # No backend keeps results: disabled://.
        return states.PENDING, None
    return status, backend.get_result(task_id) if status in states.READY_STATES else None
