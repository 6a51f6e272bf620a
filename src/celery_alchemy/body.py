"""Running a task's body: filled with its sessions, in one unit of work, or in one of a ``once`` task.

Between ``task.py``, which wraps each body with it, and ``request.py`` and ``once.py``, which hold the transaction.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.app.task import Context
from sqlalchemy.orm import Session

from .arguments import Arguments, Call, Keywords, borrow, caller
from .completion import State, key_of
from .errors import DeadTaskError
from .failure import is_final, record_if_final
from .injection import Injection
from .once import OnceUnit
from .outcome import Replaced
from .owed import Overtaken, record_death
from .request import PLAIN_TYPES, UnitOfWork, at_hand, refuse_entities
from .reruns import runs_of, with_transient_retries
from .sessions import DEFERRED
from .transient import is_lost_connection

__all__ = ["MAX_OVERTAKEN", "end_failed", "fail_once", "in_unit_of_work", "is_delivery_of_once", "key_of_call", "report"]

logger: logging.Logger = logging.getLogger(__name__)

#: How many starts beyond ``max_deliveries`` may be spent on a ``record_failure`` that kills its process.
RECORD_STARTS = 3

#: How often a body runs again because another delivery changed the task's record while it ran.
MAX_OVERTAKEN = 5


def in_unit_of_work(task: Any, body: Callable[..., Any], injection: Injection) -> Callable[..., Any]:  # noqa: C901, PLR0915 - flat on purpose: this runs for every task.
    """Wrap a body so that each call of it is one unit of work."""
    call = caller(body, injection)
    parameters = injection.parameters
    is_annotated = any(parameter.database is not None for parameter in parameters)
    session_first = len(parameters) == 1 and parameters[0].index == 0 and parameters[0].database is None and not injection.entities

    new = object.__new__

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: C901, PLR0912, PLR0915 - flat on purpose: this runs for every task.
        # Only set for a task that nothing special is asked of.
        deferred_class = task.deferred_class
        if deferred_class is None and task.may_run_again:
            if is_annotated:
                task.refuse_spanning()
            if task.transient_retries and runs_of(task.request) is None:
                return with_transient_retries(task, run, args, kwargs)
            if is_delivery_of_once(task, task.request, injection, kwargs):
                return _run_once(task, call, args, kwargs)
        outer = at_hand.get()
        # As UnitOfWork(task, outer), whose __init__ Python would have to find and call.
        unit = new(UnitOfWork)
        unit.task = task
        unit.outer = outer
        unit.pending = False
        unit.started = monotonic()
        session: Session | None = None
        if kwargs and parameters and injection.given(kwargs) is not None:
            session = borrow(unit, injection, kwargs)
        at_hand.set(unit)
        try:
            # The two usual shapes, without the calls of `call` and of session_to_offer(): this runs for every task, and each call
            # costs it a quarter of a microsecond.
            if session_first:
                if session is None:
                    if deferred_class is not None:
                        session = new(deferred_class)
                        session.__dict__[DEFERRED] = unit
                    elif task.uses_session:
                        session = task.open_session(unit)
                    else:
                        session = task.deferred_session(unit)
                    unit.used_session = session
                # The empty keywords of nearly every request would be copied.
                result = body(session, *args, **kwargs) if kwargs else body(session, *args)
            elif parameters or injection.entities:
                result = call(unit, args, kwargs)
            else:
                result = body(*args, **kwargs)
            if type(result) not in PLAIN_TYPES:
                refuse_entities(result, unit.owner)
            if unit.pending:
                unit.succeed()
            else:
                # A deferred session knows its unit: without this the garbage collector would have to free the two.
                unit.used_session = None
            return result
        except BaseException as exc:
            fail(task, unit, exc, args, kwargs)
            raise
        finally:
            at_hand.set(outer)

    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def fail(task: Any, unit: UnitOfWork, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """End a unit of work whose body, or whose commit, raised, and record the failure if it is final."""
    try:
        end_failed(unit, exc)
    except Exception as commit_exc:
        record_if_final(task, commit_exc, args, kwargs)
        raise
    record_if_final(task, exc, args, kwargs)


def end_failed(unit: UnitOfWork, exc: BaseException) -> None:
    """End a unit of work whose body, or whose commit, raised.

    Raises:
        Exception: What the database raised at a commit that the policy asked for.
    """
    try:
        unit.fail(exc)
    except BaseException as commit_exc:
        _end_runs_if_uncertain(unit, commit_exc)
        raise
    _end_runs_if_uncertain(unit, exc)


def _end_runs_if_uncertain(unit: UnitOfWork, exc: BaseException) -> None:
    """Have the body not run again after an error that leaves open whether its work is done.

    The caller's transaction is not ours to run again. And a COMMIT without an answer may have been carried out: a once task can look,
    any other must not be run again by us.
    """
    runs = runs_of(unit.task.request)
    if runs is None:
        return
    if unit.is_borrowed or unit.is_in_callers_transaction or (unit.commit_is_uncertain and is_lost_connection(exc)):
        runs.left = 0


# --- once ------------------------------------------------------------------------------------------------------------------


def is_delivery_of_once(task: Any, request: Context, injection: Injection, kwargs: Keywords) -> bool:
    """Tell whether a call is one delivery of several that must take effect once.

    It is none in a direct call without a key, and none in the transaction of a session that the caller passed.
    """
    has_key = request.id is not None or task.once_key is not None
    return task.is_once and has_key and injection.given(kwargs) is None


def key_of_call(task: Any, args: Arguments, kwargs: Keywords) -> str:
    """Return the id of the row of a once task that is about to run."""
    return key_of(task, task.request.id or "", task.request.replaced_task_nesting or 0, args, dict(kwargs))


def report(task: Any, unit: OnceUnit, state: State, args: Arguments, kwargs: Keywords) -> Any:
    """End a delivery that has nothing to run, and return the result of the run that committed.

    Raises:
        DeadTaskError: The task is dead.
        Ignore: The run that committed returned nothing.
    """
    unit.succeed()
    if state.fresh:
        state = _record_too_many_starts(task, unit, state, args, kwargs) or state
    return unit.replay(state)


def _record_too_many_starts(task: Any, unit: OnceUnit, state: State, args: Arguments, kwargs: Keywords) -> State | None:
    """Record the death of a task that was started too often; return the completed state if its work was committed meanwhile."""
    if state.starts >= task.deliveries_allowed(task.home()) + RECORD_STARTS:
        text = "Task %s (%s) is recorded as dead without its record_failure, which has not ended %d times"
        logger.error(text, task.name, unit.key, RECORD_STARTS)
        return record_death(task, unit.key, state.error, unit.in_own_session)
    error = DeadTaskError(task.name, unit.key, state.error)
    found: State | None = task.fail_for_good(unit, error, args, kwargs, reason=state.error)
    return found


def _run_once(task: Any, call: Call, args: Arguments, kwargs: Keywords) -> Any:
    key = key_of_call(task, args, kwargs)
    for _ in range(MAX_OVERTAKEN):
        try:
            return _attempt_once(task, key, call, args, kwargs)
        except Overtaken:
            logger.info("Task %s (%s) was overtaken by another delivery of it and looks again", task.name, key)
    raise Overtaken(key)


def _attempt_once(task: Any, key: str, call: Call, args: Arguments, kwargs: Keywords) -> Any:
    outer = at_hand.get()
    unit = OnceUnit(task, outer, key)
    at_hand.set(unit)
    try:
        state = unit.start()
        if state.kind in ("completed", "dead"):
            return report(task, unit, state, args, kwargs)
        try:
            result = call(unit, args, kwargs)
            refuse_entities(result, unit.owner)
            return unit.replay(unit.succeed_with("returned", result))
        except Overtaken:
            raise
        except BaseException as exc:  # noqa: BLE001 - every error must be seen here.
            return fail_once(task, unit, exc, args, kwargs)
    finally:
        unit.fail(Overtaken())
        at_hand.set(outer)


def fail_once(task: Any, unit: OnceUnit, exc: BaseException, args: Arguments, kwargs: Keywords) -> Any:
    """End a once task whose body, or whose commit, raised; return a result if its work turns out to have been committed."""
    state = unit.fail_once(exc)
    if state is None and is_final(task, exc):
        state = task.fail_for_good(unit, exc, args, kwargs)
    if state is not None and not isinstance(exc, Replaced) and state.ending == "returned":
        return unit.replay(state)
    raise exc
