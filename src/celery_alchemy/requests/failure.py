"""A task's last failure: which one it is, and what writes it down.

``record_failure`` does so in a transaction of its own.

Between ``sync_body.py`` and ``worker/parent.py``, which see failures, and ``attempt.py``, in whose
unit of work they are recorded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic

from celery.app.task import Context
from celery.app.trace import task_has_custom
from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ..databases.transient import is_away, is_transient
from ..databases.trying_again import again, backoff_seconds
from ..error_texts import error_text
from ..outbox.place import OutboxTable
from ..sessions.off_loop import in_greenlet_of_loop
from ..signatures.outcomes import outcome_of
from .arguments import Arguments, Keywords, caller, session_first
from .around import enclosed
from .attempt import UnitOfWork, at_hand
from .deliveries import (
    InOwnSession,
    Overtaken,
    in_session_of,
    record_death,
    set_aside,
    waits_for_database,
)
from .loop_call import LoopCall, aside, cause_of, pause
from .once import OnceUnit
from .once_records import State, look
from .plan import Plan
from .put_back import INSIST_EVERY_SECONDS, INSIST_SECONDS
from .transient_retries import runs_of

__all__ = ["Failure", "cause_in", "end_for_good", "failed_elsewhere", "is_final", "record_if_final"]

logger: logging.Logger = logging.getLogger("celery_alchemy.failure")

#: How often, and for how many seconds, the ``record_failure`` of a ``once`` task is run again while
#: its errors may pass. One that has waited in vain for a lock is not.
RECORD_ATTEMPTS = 10
RECORD_SECONDS = 5

_FAILED = "%s failed; the task's own error stands"


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that has failed.

    Attributes:
        plan: What is known of its task.
        request: Celery's request.
        exc: Why it failed.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    plan: Plan
    request: Context
    exc: BaseException
    args: Arguments
    kwargs: Keywords


def record_if_final(failure: Failure) -> None:
    """Record the failure of a task that is not ``once``, unless the task runs again after it."""
    if failure.plan.record is None or not is_final(failure):
        return
    if _waits_outside(failure.plan):
        aside(functools.partial(_record, failure))
    else:
        _record(failure)


def _waits_outside(plan: Plan) -> bool:
    """Tell whether an async task has a plain ``record_failure``.

    Its session is a synchronous one, for which the loop must not wait.
    """
    return plan.is_async and plan.record_plan is not None and not plan.record_plan.is_async


def is_final(failure: Failure) -> bool:
    """Tell whether the task has failed for good with this."""
    exc = failure.exc
    if not isinstance(exc, Exception) or outcome_of(exc) != "failure":
        return False
    runs = runs_of(failure.request)
    if runs is not None and runs.follow(exc):
        return False
    # Celery's autoretry, which wraps the unit of work, will ask for a retry; retry() knows if one
    # is left.
    plan = failure.plan
    return not isinstance(exc, plan.autoretry_for) or isinstance(exc, plan.dont_autoretry_for)


def cause_in(unit: UnitOfWork, exc: BaseException) -> BaseException:
    """Return why a body ended.

    An error that has come out of an event loop may stand for another one.
    """
    return cause_of(exc, unit.owner()) if unit.plan.is_async else exc


def end_for_good(unit: OnceUnit, failure: Failure, reason: str | None = None) -> State | None:
    """Record that a ``once`` task has failed for good; as for ``failed_for_good()``.

    Args:
        unit: The unit of work in which it has failed, and which has ended.
        failure: How it has failed.
        reason: Why it failed, for people; left out, the error's text.
    """
    if _waits_outside(failure.plan):
        return aside(functools.partial(failed_for_good, failure, unit.key, reason))
    return failed_for_good(failure, unit.key, reason, unit.in_own_session)


def failed_for_good(
    failure: Failure,
    key: str | None,
    reason: str | None = None,
    in_own_session: InOwnSession | None = None,
    seconds: float | None = None,
) -> State | None:
    """Record that a task has failed for good.

    A ``once`` task is dead then, and its ``record_failure`` is part of the same transaction.

    Logged, never raised: the task's own error stands.

    Args:
        failure: How it has failed.
        key: The row of a ``once`` task; None for any other.
        reason: Why it failed, for people; left out, the error's text.
        in_own_session: Does something with the records in a session and transaction of its own and
            commits it; left out, in one of the Alchemy's.
        seconds: For how long ``record_failure`` may take, with all its attempts: the database ends
            its statements then, where it can. Left out, a ``once`` task's is run again for
            RECORD_SECONDS, and its statements are not limited.

    Returns:
        The completed state if a ``once`` task's work turns out to have been committed; else None.
    """
    timeout_at = None if seconds is None else monotonic() + seconds
    if key is None:
        _record(failure, timeout_at)
        return None
    plan, request = failure.plan, failure.request
    reason = reason or error_text(failure.exc)
    rest = pause if plan.is_async and in_own_session is not None else None
    in_own_session = in_own_session or functools.partial(in_session_of, plan, seconds=seconds)
    if plan.record is not None:
        try:
            run = functools.partial(_run, failure, timeout_at)
            state = _record_with_death(
                failure,
                key,
                reason,
                run,
                in_own_session,
                RECORD_SECONDS if seconds is None else seconds,
                rest,
            )
        except Exception:
            logger.exception(_FAILED, f"record_failure of task {plan.name}")
        else:
            return state if state.kind == "completed" else None
    return record_death(plan, request, key, reason, in_own_session, rest)


def failed_elsewhere(
    failure: Failure, key: str | None, *, seconds: float | None = None
) -> State | None:
    """Do as ``failed_for_good()`` for a task that ran in another process, which is gone.

    It happens inside of a ``__call__`` that the task's class has of its own, as the body would:
    that of a Flask application gives it the application context which its models need.
    """
    task = failure.plan.task
    act = functools.partial(failed_for_good, failure, key, seconds=seconds)
    if not task_has_custom(task, "__call__"):
        return act()
    ended: list[State | None] = []
    # Not the task itself: other threads of this process may run it.
    stand_in = object.__new__(type(task))
    vars(stand_in).update(vars(task), run=lambda *args, **kwargs: ended.append(act()))
    try:
        stand_in(*failure.args, **failure.kwargs)
    except Exception:
        logger.exception("__call__ of task %s failed around its record_failure", task.name)
    return ended[0] if ended else act()


def _record(failure: Failure, timeout_at: float | None = None) -> None:
    """Run a task's ``record_failure``, if it has one, in a session and transaction of its own.

    Its failure is logged.
    """
    if failure.plan.record is None:
        return
    try:
        _run(failure, timeout_at)
    except Exception:
        logger.exception(_FAILED, f"record_failure of task {failure.plan.name}")


class _LastUnit(UnitOfWork):
    """The unit of work of the ``record_failure`` of a ``once`` task.

    What it sends is kept in the outbox, as what the body sends.
    """

    is_once = True


@dataclass(slots=True)
class _Attempt:
    """One run of the ``record_failure`` of a ``once`` task.

    Attributes:
        last: The last thing in the same transaction, which is rolled back if that is no ``fresh``
            state.
        may_repeat: Nothing of it has been committed so far.
    """

    last: Callable[[OutboxTable], State]
    may_repeat: bool = True

    def run(self, unit: UnitOfWork, record: Callable[[], object]) -> State:
        """Do everything but the end of the unit; return what ``last`` returned."""
        session = unit.session
        event.listen(session, "before_commit", self._note_commit)
        record()
        event.remove(session, "before_commit", self._note_commit)
        # As the completion, so that the record_failure neither waits for the row nor has others
        # wait for it.
        session.flush()
        return self.last(unit.plan.required_home.place.within(session))

    def _note_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self.may_repeat = False


def _record_with_death(
    failure: Failure,
    key: str,
    reason: str,
    run: Callable[[_Attempt], State | None],
    in_own_session: InOwnSession,
    seconds: float,
    rest: Callable[[float], object] | None,
) -> State:
    """Run a ``record_failure`` with the death as the last thing in its transaction.

    It runs again after an error that may pass; a database that is away is waited for.

    Returns:
        A ``fresh`` death, or what another delivery, or a COMMIT of ours whose answer did not come,
        has written before.
    """
    plan, request = failure.plan, failure.request
    last = functools.partial(set_aside, plan=plan, request=request, key=key, error=reason)
    attempt = _Attempt(last)
    tries, until_by_itself = 1, monotonic() + seconds
    until = monotonic() + INSIST_SECONDS

    def act() -> State:
        nonlocal attempt
        attempt = _Attempt(last)
        state = in_own_session(lambda table: look(table, key))
        return (run(attempt) or state) if state.kind in ("new", "owed") else state

    def seconds_until_next(exc: Exception) -> float | None:
        nonlocal tries
        if not attempt.may_repeat or not (isinstance(exc, Overtaken) or is_transient(exc)):
            return None
        if is_away(exc) and waits_for_database(plan, request):
            left = until - monotonic()
            return min(INSIST_EVERY_SECONDS, left) if left > 0 else None
        left, tries = until_by_itself - monotonic(), tries + 1
        return (
            min(backoff_seconds(tries - 1), left) if left > 0 and tries <= RECORD_ATTEMPTS else None
        )

    return again(act, seconds_until_next, rest)


def _run(
    failure: Failure, timeout_at: float | None, attempt: _Attempt | None = None
) -> State | None:
    """Run ``record(session, exc, *args, **kwargs)`` in a unit of work of its own.

    One that is an ``async def`` runs in the event loop of the process: from a thread that waits for
    it, or in the greenlet in which the task's body has failed.

    Args:
        failure: How the task has failed.
        timeout_at: ``time.monotonic()`` seconds at which the database ends its statements; None for
            never.
        attempt: For a ``once`` task.

    Returns:
        What the attempt's ``last`` returned; None without an attempt.
    """
    record, plan = failure.plan.record, failure.plan.record_plan
    if record is None or plan is None:
        return None
    if not plan.is_async:
        return _run_here(failure, plan, record, timeout_at, attempt)
    act = functools.partial(
        _run_here, failure, plan, functools.partial(_awaited, record), timeout_at, attempt
    )
    if in_greenlet_of_loop():
        return act()
    # An optional extra: greenlet and an async driver are only there where it is used.
    from .event_loop import carry, process_loop

    call = LoopCall(failure.request, is_awaited=False)
    return process_loop.run(functools.partial(carry, call, act))


def _awaited(record: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Call an ``async def`` in a greenlet of a loop."""
    made = record(*args, **kwargs)
    return await_only(made) if isinstance(made, Awaitable) else made


def _run_here(
    failure: Failure,
    plan: Plan,
    record: Callable[..., object],
    timeout_at: float | None,
    attempt: _Attempt | None,
) -> State | None:
    injection, args = plan.injection, (failure.exc, *failure.args)
    call = session_first(record) if injection.session is None else caller(record, injection)
    if plan.around is not None:
        call = enclosed(call)
    outer = at_hand.get()
    kind = UnitOfWork if attempt is None else _LastUnit
    unit = kind(plan, outer, failure.request, timeout_at)
    at_hand.set(unit)
    state = None
    try:
        try:
            if attempt is None:
                call(unit, args, failure.kwargs)
            else:
                state = attempt.run(unit, lambda: call(unit, args, failure.kwargs))
            if state is None or state.fresh:
                unit.succeed()
            else:
                unit.fail(Overtaken(unit.owner()))
        except BaseException as record_exc:
            exc = cause_in(unit, record_exc)
            unit.fail(exc)
            if exc is not record_exc:
                raise exc from record_exc
            raise
    finally:
        unit.has_ended = True
        at_hand.set(outer)
    return state
