"""Running the body of a ``once`` task: one delivery of several, which take effect once.

Beneath ``sync_body.py``, which brings each call with a key here; above ``once.py``, which holds the
transaction, and ``failure.py``, which records the death.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from celery import _state
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded

from ..error_texts import note_step
from ..errors import DeadTaskError
from ..messages.celery_types import AnyTask
from ..outbox.step_records import last_step
from ..signatures.options import MAPS, may_be_once, refuse_map
from ..signatures.results import refuse_entities
from .arguments import Arguments, Call, Keywords
from .attempt import at_hand
from .deliveries import Overtaken
from .failure import Failure, cause_in, end_for_good, is_final
from .once import OnceUnit
from .once_keys import row_key
from .once_records import State
from .once_report import has_result
from .plan import Plan
from .put_back import is_cut_off, put_back
from .step_failures import refuse_unended
from .step_unit import SteppedUnit

__all__ = ["RECORD_STARTS", "key_of_delivery", "refuse_items", "run_once"]

logger: logging.Logger = logging.getLogger("celery_alchemy.once")

#: How many starts beyond ``max_deliveries`` may be spent on a ``record_failure`` that kills its
#: process.
RECORD_STARTS = 3

#: How often a body runs again because another delivery changed the task's record while it ran.
MAX_OVERTAKEN = 5


def key_of_delivery(plan: Plan, request: Context, args: Arguments, kwargs: Keywords) -> str | None:
    """Return the row of a call that is one delivery of several which must take effect once.

    None for any other.

    It is none in a direct call without a key, and none in the transaction of a session that the
    caller passed.

    Raises:
        ConfigurationError: As for ``refuse_items``.
        OnceKeyError: The task's key cannot be used.
    """
    if plan.once is None or plan.injection.is_given(kwargs):
        return None
    if not plan.is_async:
        refuse_items(plan, request)
    return row_key(plan, request, args, kwargs)


def refuse_items(plan: Plan, request: Context) -> None:
    """Refuse a direct call of a ``once`` task for one of many items.

    To be called in the thread of the caller.

    Raises:
        ConfigurationError: The caller is Celery's own ``celery.map`` or ``celery.starmap``.
    """
    if plan.once is None or request.id is not None:
        return
    calling = _calling_task(plan.task)
    if calling is not None and calling.name in MAPS and may_be_once(plan.task):
        refuse_map(plan.task, calling.name)


def _calling_task(task: AnyTask) -> AnyTask | None:
    """Return the task in whose body a task is called directly; None outside of any."""
    # Celery's __call__ has put the called one on top.
    stack: list[AnyTask] = vars(_state)["_task_stack"].stack
    return next((running for running in reversed(stack) if running is not task), None)


def run_once(
    plan: Plan, request: Context, key: str, call: Call, args: Arguments, kwargs: Keywords
) -> object:
    """Run a ``once`` task's body for one delivery, or report what another has committed.

    Raises:
        Overtaken: Other deliveries have changed the record again and again while it ran.
        DeadTaskError: The task is dead.
        Exception: What the body, or the database, raised.
    """
    for _ in range(MAX_OVERTAKEN):
        try:
            return _attempt_once(plan, request, key, call, args, kwargs)
        except Overtaken:
            logger.info(
                "Task %s (%s) was overtaken by another delivery of it and looks again",
                plan.name,
                key,
            )
    raise Overtaken(key)


def _attempt_once(
    plan: Plan, request: Context, key: str, call: Call, args: Arguments, kwargs: Keywords
) -> object:
    outer = at_hand.get()
    unit = SteppedUnit(plan, outer, request, key)
    at_hand.set(unit)
    try:
        state = unit.start()
        if state.kind in ("completed", "dead"):
            return _report(unit, state, args, kwargs)
        try:
            result = call(unit, args, kwargs)
            refuse_unended(unit)
            refuse_entities(result, unit.owner)
            return unit.replay(unit.succeed_with("returned", result))
        except Overtaken:
            unit.overtaken()
            raise
        except BaseException as exc:
            if _hides_overtaken(unit, exc):
                unit.overtaken()
                raise Overtaken(key) from exc
            return _fail_once(unit, exc, args, kwargs)
    except BaseException as exc:
        # By its own error, which may have broken into a statement of ours; a unit that has ended
        # stays so.
        unit.fail(exc)
        failure = Failure(plan, request, exc, args, kwargs)
        if is_final(failure) and is_cut_off(plan, request, exc):
            raise put_back(exc) from exc
        raise
    finally:
        unit.has_ended = True
        at_hand.set(outer)


def _hides_overtaken(unit: OnceUnit, exc: BaseException) -> bool:
    """Tell whether the body has made an error of its own out of being overtaken in a step.

    A run whose time is up is not begun again.
    """
    was_overtaken = unit.steps is not None and unit.steps.was_overtaken
    return (
        was_overtaken and isinstance(exc, Exception) and not isinstance(exc, SoftTimeLimitExceeded)
    )


def _report(unit: OnceUnit, state: State, args: Arguments, kwargs: Keywords) -> object:
    """End a delivery that has nothing to run, and return the result of the run that committed.

    Raises:
        DeadTaskError: The task is dead.
        Ignore: The run that committed returned nothing.
    """
    unit.succeed()
    if state.fresh:
        state = replace(state, error=state.error + _after_step(unit))
        state = _record_too_many_starts(unit, state, args, kwargs) or state
    return unit.replay(state)


def _after_step(unit: OnceUnit) -> str:
    """Say after which recorded step a task has died; nothing if it has none."""
    try:
        last = unit.in_own_session(lambda table: last_step(table, unit.key))
    except Exception:
        # The death must be recorded.
        logger.warning("%s: its last step could not be read", unit.owner(), exc_info=True)
        return ""
    return "" if last is None else f", after step {last!r}"


def _record_too_many_starts(
    unit: OnceUnit, state: State, args: Arguments, kwargs: Keywords
) -> State | None:
    """Record the death of a task that was started too often.

    Return the completed state if its work was committed meanwhile.
    """
    plan = unit.plan
    if state.starts >= plan.deliveries_allowed + RECORD_STARTS:
        text = (
            "Task %s (%s) is recorded as dead without its record_failure, which has not ended %d"
            " times"
        )
        logger.error(text, plan.name, unit.key, RECORD_STARTS)
        return unit.record_death(state.error)
    error = DeadTaskError(plan.name, unit.key, state.error)
    return end_for_good(unit, Failure(plan, unit.request, error, args, kwargs), state.error)


def _fail_once(unit: OnceUnit, raised: BaseException, args: Arguments, kwargs: Keywords) -> object:
    """End a once task whose body, or whose commit, raised.

    Return a result if its work turns out to have been committed.
    """
    plan = unit.plan
    exc = cause_in(unit, raised)
    if plan.is_async and unit.steps is not None and unit.steps.broken_off is not None:
        note_step(exc, unit.steps.broken_off)
    state = unit.fail_once(exc)
    failure = Failure(plan, unit.request, exc, args, kwargs)
    if state is None and is_final(failure) and not is_cut_off(plan, unit.request, exc):
        state = end_for_good(unit, failure)
    if state is not None and has_result(state, unit.request):
        return unit.replay(state)
    if exc is raised:
        raise exc
    raise exc from raised
