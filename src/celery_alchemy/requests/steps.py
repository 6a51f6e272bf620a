"""``step``: a part of a long ``once`` task, committed with what it returns and never run again.

Above ``step_unit.py``, which holds the transaction: wherever a run ends, the next one finds in the
records what is done, and goes on from there.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar, overload

from sqlalchemy.exc import DBAPIError

from ..databases.tables import ID_MAX_LENGTH
from ..databases.transient import is_lost_connection, is_read_only, is_transient
from ..error_texts import storable
from ..errors import StepError
from ..outbox.step_records import StepLog, kept_value, read_value
from ..sessions.at_hand import at_hand
from ..sessions.callables import refuse_uncallable
from ..sessions.coroutine_functions import is_coroutine_function
from ..sessions.off_loop import in_greenlet_of_loop
from ..signatures.results import refuse_entities
from .attempt import UnitOfWork
from .deliveries import Overtaken
from .step_failures import failed, log_of, warn_of_look
from .step_functions import called
from .step_unit import SteppedUnit

__all__ = ["begin", "keep", "step"]

logger: logging.Logger = logging.getLogger("celery_alchemy.steps")

_T = TypeVar("_T")

#: How often a record is written that has nothing else to commit with it.
RECORD_TRIES = 3


@overload
def step(
    name: str,
    function: Callable[..., Awaitable[_T]],
    /,
    *args: object,
    **kwargs: object,
) -> Coroutine[Any, Any, _T]: ...


@overload
def step(name: str, function: Callable[..., _T], /, *args: object, **kwargs: object) -> _T: ...


def step(name: str, function: Callable[..., object], /, *args: object, **kwargs: object) -> object:
    """Do a part of a ``once`` task that is never done again once it is committed.

    Returns what the task has recorded for this name, if an earlier run of it has done the step.
    Else runs the function and commits, in one transaction, what was written through the task's
    session since the last step, together with the step's record. Objects stay loaded. After it no
    transaction is open.

    In an ``async def`` task it returns a coroutine: ``await step(...)``.

    Args:
        name: Unique within the task; in a loop with the number, or the key, of the round.
        function: Runs if the step is not recorded. A parameter annotated with Session, or
            AsyncSession, gets the task's session.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returned, as JSON gives it back: a list for a tuple.

    Raises:
        CallableError: The function is none.
        StepError: The name was used in this run or cannot be one, there is no ``once`` task here,
            another step is running, or a SAVEPOINT is open.
        StepValueError: The value is no JSON, or larger than a megabyte.
        Exception: What the function raised. What was written since the last step is rolled back.
            Where it ended a COMMIT, such as a soft time limit, the step may have been committed:
            then its next call returns the value.

    Guarantees: Over retries, redeliveries, kills and ``alchemy revive`` a committed step is never
        run again. A process that dies before the COMMIT leaves nothing in the database, and the
        function runs again: what it did elsewhere may then have been done twice.
    """
    unit = _unit(name)
    way = f"step({name!r}, lambda: ...)"
    refuse_uncallable(function, f"The step {name!r} of {unit.owner()}", way)
    while isinstance(function, functools.partial):
        args, kwargs = (*function.args, *args), {**function.keywords, **kwargs}
        function = function.func
    work = functools.partial(called, unit, name, function, args, kwargs)
    if unit.plan.is_async and not in_greenlet_of_loop():
        return _awaited(unit, name, function, work)
    return _plain(unit, name, work)


_MAKE_ASYNC = "Make the task an `async def` and `await step(...)`, or give it a plain function."
_NOT_ONCE = "Give the task once=True: then each of its deliveries finds the records."


def _unit(name: str) -> UnitOfWork:
    """Return the innermost request that runs here.

    Raises:
        StepError: It is not that of a ``once`` task, or there is none.
    """
    held = at_hand.get()
    while held is not None and not isinstance(held, UnitOfWork):
        held = held.outer
    if held is None:
        raise StepError(
            name,
            "the code that runs here",
            "is outside of a task",
            "Call it in the body of a task with once=True, in the thread of that body.",
        )
    if held.plan.once is None:
        raise StepError(name, held.owner(), "is in a task without `once`", _NOT_ONCE)
    return held


def _plain(unit: UnitOfWork, name: str, work: Callable[[], object]) -> object:
    """Do a step in a plain task, or where a greenlet lets plain code use an async driver."""
    text = begin(unit, name)
    if text is not None:
        return read_value(text)
    try:
        value = work()
        if inspect.iscoroutine(value):
            value.close()
            what = "is an `async def` function in a plain task, which cannot await it"
            raise StepError(name, unit.owner(), what, _MAKE_ASYNC)
        return keep(unit, name, value)
    except BaseException as exc:
        failed(unit, name, exc)
        raise
    finally:
        log_of(unit).running = None


async def _awaited(
    unit: UnitOfWork,
    name: str,
    function: Callable[..., object],
    work: Callable[[], object],
) -> object:
    """Do a step in an ``async def`` task; of several at once one after the other."""
    # An optional extra: greenlet is only there where async tasks are.
    from sqlalchemy.util import greenlet_spawn

    log = log_of(unit)
    if _inside.get() is log:
        raise _nested(unit, log, name)
    if log.lock is None:
        log.lock = asyncio.Lock()
    async with log.lock:
        text = await greenlet_spawn(begin, unit, name)
        if text is not None:
            return read_value(text)
        token = _inside.set(log)
        try:
            # A plain function may use the Session behind the AsyncSession.
            is_coroutine = is_coroutine_function(inspect.unwrap(function))
            value = work() if is_coroutine else await greenlet_spawn(work)
            if inspect.isawaitable(value):
                value = await value
            return await greenlet_spawn(keep, unit, name, value)
        except BaseException as exc:
            await greenlet_spawn(failed, unit, name, exc)
            raise
        finally:
            log.running = None
            _inside.reset(token)


#: The steps in one of which this code runs; asyncio tasks that a step begins have it too.
_inside: ContextVar[StepLog | None] = ContextVar("celery_alchemy_inside", default=None)


def _nested(unit: UnitOfWork, log: StepLog, name: str) -> StepError:
    return StepError(
        name,
        unit.owner(),
        f"begins while the step {log.running!r} runs, and would commit half of that one's work",
        "Do one after the other: a step cannot be inside of another one's function.",
    )


# --- the record ----------------------------------------------------------------------------------


def begin(unit: UnitOfWork, name: str) -> str | None:
    """Return the recorded value of a step, as JSON; None if its function runs now.

    If it is recorded, what was written since the last step was committed with it, by the run that
    did it; here that is undone, and the transaction ended.

    Raises:
        StepError: The step cannot be done here.
    """
    _refuse_name(unit, name)
    _refuse_end(unit, name)
    log = log_of(unit)
    if log.running is not None:
        raise _nested(unit, log, name)
    _refuse_savepoint(unit, name)
    if log.was_overtaken:
        raise Overtaken(unit.owner())
    if name in log.done:
        raise StepError(
            name,
            unit.owner(),
            "has been done in this run: a second one of this name could not be told from it",
            'Give each step its own name; in a loop put the number or key into it: f"embed {n}".',
        )
    log.running = name
    text = None
    try:
        text = _recorded(unit, log, name)
    except BaseException as exc:
        log.running = None
        failed(unit, name, exc)
        raise
    if text is not None:
        log.running = None
        log.done[name] = None
    return text


def _recorded(unit: UnitOfWork, log: StepLog, name: str) -> str | None:
    """Return what is recorded for a step; one SELECT for all steps of a run, at its first one."""
    if not isinstance(unit, SteppedUnit):
        return None
    if not log.is_loaded:
        unit.load_steps(log)
    text = log.recorded.get(name)
    if text is not None:
        unit.leave_to_record()
    return text


def _refuse_name(unit: UnitOfWork, name: object) -> None:
    is_kept = isinstance(name, str) and name == name.strip() and name == storable(name)
    if not is_kept or not 0 < len(str(name)) <= ID_MAX_LENGTH:
        raise StepError(
            repr(name)[:ID_MAX_LENGTH],
            unit.owner(),
            "has a name that cannot be kept",
            f"Give it a str of 1 to {ID_MAX_LENGTH} characters, without white space at its ends.",
        )


def _refuse_savepoint(unit: UnitOfWork, name: str) -> None:
    session = unit.used_session
    if session is not None and session.in_nested_transaction():
        raise StepError(
            name,
            unit.owner(),
            "is inside of an open SAVEPOINT, which cannot be committed by itself",
            "Leave `with session.begin_nested():` first; the step's function may hold all of it.",
        )


def _refuse_end(unit: UnitOfWork, name: str) -> None:
    """Refuse a step of a coroutine that outlives its task's run: its session has ended.

    Raises:
        StepError: It has.
    """
    if unit.ended_session is not None:
        raise StepError(
            name,
            unit.owner(),
            "comes after the end of the run that it belongs to",
            "Await every step in the task's body.",
        )


def keep(unit: UnitOfWork, name: str, value: object) -> object:
    """Commit what was written since the last step, and the record; return the value that stands.

    Raises:
        StepValueError: The value cannot be kept; nothing is committed.
        Overtaken: Another delivery has got on meanwhile, and this one's work is rolled back.
        Exception: What the database raised.
    """
    refuse_entities(value, unit.owner)
    text, value = kept_value(name, value, unit.owner())
    _refuse_end(unit, name)
    _refuse_savepoint(unit, name)
    log = log_of(unit)
    if isinstance(unit, SteppedUnit):
        # With nothing to lose in a rollback, the record can be written again.
        tries_left = 0 if unit.session.in_transaction() else RECORD_TRIES - 1
        unit.session.flush()
        while not _commit(unit, name, text, can_repeat=tries_left > 0):
            recorded = log.recorded.get(name)
            if recorded is not None:
                value = read_value(recorded)
                break
            if tries_left == 0:
                raise Overtaken(unit.owner())
            tries_left -= 1
    log.done[name] = None
    return value


def _commit(unit: SteppedUnit, name: str, text: str, *, can_repeat: bool) -> bool:
    """Write the record and commit.

    Returns:
        False if that did not come about; what other deliveries have recorded is known now.
    """
    try:
        if unit.commit_step(name, text):
            return True
    except DBAPIError as exc:
        # An error that the database sent is an answer: it has rolled back.
        is_lost = is_lost_connection(exc)
        if not is_lost and not (can_repeat and is_transient(exc) and not is_read_only(exc)):
            raise
        log_of(unit).committing = None
        try:
            unit.look_for_steps()
        except Exception:  # noqa: BLE001 - the database's first error is raised.
            warn_of_look(unit, name)
            raise exc from None
        if name not in log_of(unit).recorded and not can_repeat:
            raise
        return False
    unit.look_for_steps()
    return False
