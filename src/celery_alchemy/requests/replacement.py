"""What replaces a task that has run eagerly, and runs in its place when the task has ended.

Beneath ``SessionTask.apply()``. Celery itself runs it inside of the replaced task's body, where it
would meet the locks of that one's transaction and not see its rows.
"""

from __future__ import annotations

import logging
from traceback import format_exc

from celery import states
from celery.result import EagerResult

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
    signature = replaced.signature
    if signature.get("subtask_type") == "chain":
        # Celery would give it to all tasks of the chain. Its last one has it.
        signature.options.pop("task_id", None)
    try:
        ended = signature.apply(throw=throws)
    except Exception as exc:
        # A chain and a chord raise the error of a task that is not their last one.
        if task.app.either("task_eager_propagates", throws):
            raise
        return EagerResult(result.id, exc, states.FAILURE, format_exc(), name=task.name)
    if replaced.key is not None and ended.state == states.SUCCESS:
        _keep_value(task.session_plan, replaced.key, ended.result)
    return ended


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
