"""Makes a process notice when it comes to a point.

It wraps bodies, sessions, producers, results and acknowledgements.

Between the points and the faults. Wrapped only while a fault waits for its point: the library
itself has no hooks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Protocol

from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.backends.base import Backend
from celery.worker.request import Request
from kombu import Producer
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransaction

from ..messages import publisher
from ..messages.celery_types import App
from ..requests import steps
from ..requests.attempt import UnitOfWork, at_hand
from ..requests.registry import home_of
from ..requests.sync_body import in_unit_of_work
from ..task import SessionTask
from .points import reach, replaced, running_request

__all__ = ["noticing"]

#: The unit of work whose body has returned: the next COMMIT in it is the task's own.
_returned: ContextVar[object] = ContextVar("celery_alchemy_returned", default=None)


@contextmanager
def noticing(app: App) -> Iterator[None]:
    """Have every point of an app's tasks noticed inside of the block.

    So is every commit and send of this process.
    """
    with ExitStack() as stack:
        home = home_of(app)
        if home is not None and home.outbox is not None:
            # A fault strikes in whoever commits, as if the process had died there.
            stack.enter_context(home.outbox.in_caller())
        for task in app.tasks.values():
            if isinstance(task, SessionTask):
                stack.enter_context(_noticing_body(task))
        stack.enter_context(_noticing_commits())
        _around(stack, steps, "begin", _at_begin_of_step)
        _around(stack, steps, "keep", _at_commit_of_step)
        _around(stack, Backend, "mark_as_done", _at_result)
        _around(stack, Request, "acknowledge", _at_acknowledge)
        _around(stack, Producer, "publish", _at_publish)
        _around(stack, publisher, "confirmed_together", _at_batch)
        yield


def _around(stack: ExitStack, owner: object, name: str, around: Callable[..., object]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: object, **kwargs: object) -> object:
        return around(functools.partial(original, *args, **kwargs), *args, **kwargs)

    stack.enter_context(replaced(owner, name, wrapper))


# --- bodies ---------------------------------------------------------------------------------------


@contextmanager
def _noticing_body(task: SessionTask) -> Iterator[None]:
    # Autoretry has put itself in the place of the unit of work.
    name = "_orig_run" if "_orig_run" in vars(task) else "run"
    run = vars(task).get(name)
    if run is None:  # A class without a body of its own.
        yield
        return
    if task.is_async:
        from ..requests.async_body import in_async_unit_of_work

        noticed = in_async_unit_of_work(task, _async_body(run.__wrapped__), task.injection)
    else:
        noticed = in_unit_of_work(task, _body(run.__wrapped__), task.injection)
    with replaced(task, name, noticed), _new_tracer(task):
        yield


@contextmanager
def _new_tracer(task: SessionTask) -> Iterator[None]:
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


def _body(body: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(body)
    def noticed(*args: object, **kwargs: object) -> object:
        reach("body, before")
        result = body(*args, **kwargs)
        _returned.set(at_hand.get())
        reach("body, after")
        return result

    return noticed


def _async_body(
    body: Callable[..., Awaitable[object]],
) -> Callable[..., Coroutine[object, object, object]]:
    @functools.wraps(body)
    async def noticed(*args: object, **kwargs: object) -> object:
        reach("body, before")
        result = await body(*args, **kwargs)
        _returned.set(at_hand.get())
        reach("body, after")
        return result

    return noticed


# --- commits --------------------------------------------------------------------------------------


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


# --- steps ----------------------------------------------------------------------------------------


def _at_begin_of_step(begin: Callable[[], str | None], unit: UnitOfWork, name: str) -> str | None:
    text = begin()
    if text is None:
        reach(f"step {name}, before", unit.request)
    return text


def _at_commit_of_step(
    keep: Callable[[], object], unit: UnitOfWork, name: str, value: object
) -> object:
    reach(f"step {name}", unit.request)
    kept = keep()
    reach(f"step {name}, after", unit.request)
    return kept


# --- messages and results -------------------------------------------------------------------------


def _at_result(mark: Callable[[], object], *args: object, **kwargs: object) -> object:
    reach("result, before")
    marked = mark()
    reach("result, after")
    return marked


class _Acknowledged(Protocol):
    """A request of a worker, and what its task will know of it."""

    acknowledged: bool
    _context: Context


def _at_acknowledge(acknowledge: Callable[[], object], request: _Acknowledged) -> None:
    first = not request.acknowledged
    if first:
        reach("acknowledge, before", request._context)
    acknowledge()
    if first:
        reach("acknowledge, after", request._context)


def _at_publish(
    publish: Callable[[], object],
    *args: object,
    headers: Mapping[str, object] | None = None,
    **kwargs: object,
) -> object:
    if "task" not in (headers or {}):
        return publish()
    reach("publish, before")
    published = publish()
    reach("publish, after")
    return published


def _at_batch(publish: Callable[[], set[int]], *args: object, **kwargs: object) -> set[int]:
    reach("publish, before")
    confirmed = publish()
    if confirmed:
        reach("publish, after")
    return confirmed
