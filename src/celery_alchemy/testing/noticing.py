"""Makes a process notice when it comes to a point, by wrapping bodies, sessions, producers, results and acknowledgements.

Between the points and the faults. Wrapped only while a fault waits for its point: the library itself has no hooks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

from celery import Celery
from celery.app.trace import build_tracer
from celery.backends.base import Backend
from celery.worker.request import Request
from kombu import Producer
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from .. import publisher
from ..body import in_unit_of_work
from ..request import UnitOfWork, at_hand
from ..task import SessionTask
from .points import reach, replaced, running_request

__all__ = ["noticing"]

#: The unit of work whose body has returned: the next COMMIT in it is the task's own.
_returned: ContextVar[object] = ContextVar("celery_alchemy_returned", default=None)


@contextmanager
def noticing(app: Celery[Any]) -> Iterator[None]:
    """Have every point of an app's tasks, and every commit and send of this process, noticed inside of the block."""
    with ExitStack() as stack:
        for task in cast("Any", app).tasks.values():
            if isinstance(task, SessionTask):
                stack.enter_context(_noticing_body(task))
        stack.enter_context(_noticing_commits())
        _around(stack, Backend, "mark_as_done", _at_result)
        _around(stack, Request, "acknowledge", _at_acknowledge)
        _around(stack, Producer, "publish", _at_publish)
        _around(stack, publisher, "confirmed_together", _at_batch)
        yield


def _around(stack: ExitStack, owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original, *args, **kwargs), *args, **kwargs)

    stack.enter_context(replaced(owner, name, wrapper))


# --- bodies ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _noticing_body(task: Any) -> Iterator[None]:
    # Autoretry has put itself in the place of the unit of work.
    name = "_orig_run" if "_orig_run" in vars(task) else "run"
    run = vars(task).get(name)
    if run is None:  # A class without a body of its own.
        yield
        return
    if task.is_async:
        from ..coroutines import in_async_unit_of_work

        noticed = in_async_unit_of_work(task, _async_body(run.__wrapped__), task._injection)
    else:
        noticed = in_unit_of_work(task, _body(run.__wrapped__), task._injection)
    with replaced(task, name, noticed), _new_tracer(task):
        yield


@contextmanager
def _new_tracer(task: Any) -> Iterator[None]:
    """Let a worker of this process, which has read the task's body at its start, read it again."""
    before = task.__trace__
    if before is None:
        yield
        return
    task.__trace__ = build_tracer(task.name, task, task.app.loader, app=task.app)
    try:
        yield
    finally:
        task.__trace__ = before


def _body(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def noticed(*args: Any, **kwargs: Any) -> Any:
        reach("body, before")
        result = body(*args, **kwargs)
        _returned.set(at_hand.get())
        reach("body, after")
        return result

    return noticed


def _async_body(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    async def noticed(*args: Any, **kwargs: Any) -> Any:
        reach("body, before")
        result = await body(*args, **kwargs)
        _returned.set(at_hand.get())
        reach("body, after")
        return result

    return noticed


# --- commits ---------------------------------------------------------------------------------------------------------------


def _ends_its_task() -> bool:
    """Tell whether a commit here is the one that ends the running task; True where no task runs."""
    held = at_hand.get()
    return _returned.get() is held if isinstance(held, UnitOfWork) else running_request() is None


@contextmanager
def _noticing_commits() -> Iterator[None]:
    committed: list[SessionTransaction] = []

    def before_commit(session: Session) -> None:
        if not session.in_nested_transaction() and _ends_its_task():
            reach("COMMIT, before")

    def after_commit(session: Session) -> None:
        transaction = session.get_transaction()
        if transaction is not None and not session.in_nested_transaction() and _ends_its_task():
            committed.append(transaction)

    def after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
        if transaction in committed:
            committed.remove(transaction)
            reach("COMMIT, after")

    # The last one comes before the library's own listener, which lets messages out.
    listeners = (
        ("before_commit", before_commit, False),
        ("after_commit", after_commit, False),
        ("after_transaction_end", after_transaction_end, True),
    )
    for name, listener, first in listeners:
        event.listen(Session, name, listener, insert=first)
    try:
        yield
    finally:
        for name, listener, _ in listeners:
            event.remove(Session, name, listener)


# --- messages and results ----------------------------------------------------------------------------------------------------


def _at_result(mark: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
    reach("result, before")
    marked = mark()
    reach("result, after")
    return marked


def _at_acknowledge(acknowledge: Callable[[], Any], request: Any) -> Any:
    first = not request.acknowledged
    if first:
        reach("acknowledge, before", request._context)
    acknowledge()
    if first:
        reach("acknowledge, after", request._context)


def _at_publish(publish: Callable[[], Any], producer: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
    if "task" not in (kwargs.get("headers") or {}):
        return publish()
    reach("publish, before")
    published = publish()
    reach("publish, after")
    return published


def _at_batch(publish: Callable[[], set[int]], *args: Any, **kwargs: Any) -> set[int]:
    reach("publish, before")
    confirmed = publish()
    if confirmed:
        reach("publish, after")
    return confirmed
