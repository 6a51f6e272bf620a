"""What replaces a task that has run eagerly, and runs in its place when the task has ended.

Beneath ``SessionTask.apply()``. Celery itself runs it inside of the replaced task's body, where it
would meet the locks of that one's transaction and not see its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import format_exc
from typing import Any

from celery import _state, states
from celery.app.task import Context
from celery.result import EagerResult, allow_join_result

from ..errors import OnceResultError
from ..messages.celery_types import Eager
from ..signatures.outcomes import ReplacedHere
from .deliveries import in_session_of
from .once_records import keep_replacements_value, kept
from .plan import Plan
from .planned_task import PlannedTask

__all__ = ["replacement_applied"]

logger: logging.Logger = logging.getLogger("celery_alchemy.eager")


def replacement_applied(task: PlannedTask, result: Eager, *, throws: bool | None) -> Eager:
    """Run what has replaced a task, and return its result; the task's own if nothing has.

    Args:
        task: The task.
        result: How it has ended.
        throws: As ``apply()`` was given it.

    Raises:
        Exception: What the replacement raised, with ``throws`` or ``task_eager_propagates``.
    """
    replaced = result.result
    if not isinstance(replaced, ReplacedHere):
        return result
    raises = bool(task.app.either("task_eager_propagates", throws))
    ended = _applied(task, result.id, replaced, raises=raises)
    if raises and isinstance(ended.result, Exception) and ended.state in states.PROPAGATE_STATES:
        raise ended.result
    if replaced.key is not None and ended.state == states.SUCCESS:
        _keep_value(task.session_plan, replaced.key, ended.result)
    return ended


def _applied(task: PlannedTask, task_id: str, replaced: ReplacedHere, *, raises: bool) -> Eager:
    signature, request = replaced.signature, replaced.request
    if signature.get("subtask_type") == "chain":
        # Celery would give it to all tasks of the chain. Its last one has it.
        signature.options.pop("task_id", None)
    try:
        # A chain and a chord wait for results of their own, which an eager app refuses in tasks.
        with _as_parent(task, request), allow_join_result():
            return signature.apply()
    except Exception as exc:
        # A chain and a chord raise the error of a task that is not their last one.
        if raises:
            raise
        trace = format_exc()
        parts_have_them = task.app.conf.task_allow_error_cb_on_chord_header
        if signature.get("subtask_type") == "chord" and request.errbacks and not parts_have_them:
            # They are its body's, which has not run.
            backend: Any = task.backend
            backend._call_task_errbacks(request, exc, trace)
        return EagerResult(task_id, exc, states.FAILURE, trace, name=task.name)


@contextmanager
def _as_parent(task: PlannedTask, request: Context) -> Iterator[None]:
    """Have a request be the parent of the tasks that are applied in this block."""
    stack = vars(_state)["_task_stack"]
    stack.push(task)
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()
        stack.pop()


def _keep_value(plan: Plan, key: str, value: object) -> None:
    """Have other deliveries of a ``once`` task report what its replacement has returned.

    No message is left that would do so, and in eager mode results are not stored.
    """
    try:
        kept("returned", value, None, (), plan.name)
    except OnceResultError:
        # Only the replacement's own result is bound to what JSON holds, if it is once.
        logger.debug("The record of %s (%s) cannot keep %r", plan.name, key, type(value))
        return
    in_session_of(plan, lambda table: keep_replacements_value(table, key, value))
