"""Running a task's body: filled with its session, in one unit of work.

Between ``planned_task.py``, which wraps each body with it, and ``attempt.py``, which holds the
transaction. The body of a ``once`` task is run by ``once_body.py``; that of an ``async def`` task
runs through here too, in a greenlet of its event loop: ``async_body.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from celery.app.task import Context

from ..signatures.injection import Body, Injection
from ..signatures.results import PLAIN_TYPES, refuse_entities
from .arguments import Arguments, Call, Keywords, borrow, caller
from .around import enclosed
from .attempt import UnitOfWork, at_hand
from .failure import Failure, cause_in, record_if_final
from .loop_call import loop_call
from .once_body import key_of_delivery, run_once
from .own_result import own_result
from .plan import Plan, Planned
from .transient_retries import runs_of, with_transient_retries

__all__ = ["in_unit_of_work"]


def in_unit_of_work(
    task: Planned, body: Body, injection: Injection, *, is_async: bool = False
) -> Callable[..., object]:
    """Wrap a body so that each call of it is one unit of work.

    Args:
        task: Whose body it is.
        body: The body.
        injection: What its signature asks for.
        is_async: It runs in a greenlet of an event loop.
    """
    filled = caller(body, injection)
    inside = enclosed(filled)
    asks = injection.asks

    @functools.wraps(body)
    def run(*args: object, **kwargs: object) -> object:
        plan = task.found_plan or task.session_plan
        call = filled if asks else None
        if plan.asks_more:
            call = filled if plan.around is None else inside
            runs = _several_runs(plan, run, call, args, kwargs)
            if runs is not None:
                return runs()
        outer = at_hand.get()
        unit = UnitOfWork(plan, outer, loop_call.get().request if is_async else None)
        if kwargs and injection.is_given(kwargs):
            borrow(unit, injection, kwargs)
        at_hand.set(unit)
        try:
            # A body that asks for nothing needs no call in between.
            result = body(*args, **kwargs) if call is None else call(unit, args, kwargs)
            if type(result) not in PLAIN_TYPES and (asks or unit.used_session is not None):
                refuse_entities(result, unit.owner)
            if unit.pending:
                unit.own_result = own_result(plan, unit.request, outer, result)
                unit.succeed()
            # A deferred session knows its unit: without this the garbage collector would have to
            # free the two.
            unit.used_session = None
            return result
        except BaseException as exc:
            _fail(unit, exc, args, kwargs)
            raise
        finally:
            unit.has_ended = True
            at_hand.set(outer)

    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def _several_runs(
    plan: Plan,
    run: Callable[..., object],
    call: Call,
    args: Arguments,
    kwargs: Keywords,
) -> Callable[[], object] | None:
    """Return what runs the body more than once, or as one delivery of several; None for neither."""
    request = _request_of(plan)
    if plan.transient_retries and runs_of(request) is None:
        return functools.partial(with_transient_retries, plan, request, run, args, kwargs)
    key = key_of_delivery(plan, request, args, kwargs)
    if key is None:
        return None
    return functools.partial(run_once, plan, request, key, call, args, kwargs)


def _request_of(plan: Plan) -> Context:
    """Return Celery's request.

    In an event loop, whose thread has no request stack, the one that was brought there.
    """
    top: Context | None = loop_call.get().request if plan.is_async else plan.task.request_stack.top
    return Context() if top is None else top


def _fail(unit: UnitOfWork, raised: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """End a unit of work whose body or commit raised, and record a failure that is final.

    Raises:
        BaseException: What the request ends with, if that is not what was raised.
    """
    plan, request = unit.plan, unit.request
    exc = cause_in(unit, raised)
    try:
        _end_failed(unit, exc)
    except Exception as commit_exc:
        record_if_final(Failure(plan, request, commit_exc, args, kwargs))
        raise
    record_if_final(Failure(plan, request, exc, args, kwargs))
    if exc is not raised:
        raise exc from raised


def _end_failed(unit: UnitOfWork, exc: BaseException) -> None:
    """End a unit of work whose body, or whose commit, raised.

    Raises:
        Exception: What the database raised at a commit that the policy asked for.
    """
    try:
        unit.fail(exc)
    finally:
        runs = runs_of(unit.request)
        if runs is not None and (unit.is_borrowed or unit.is_in_callers_transaction):
            # A caller's transaction is not ours to run again.
            runs.end()
