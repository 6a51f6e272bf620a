"""A request in an event loop, as its unit of work sees it: which it is, and who waits for it.

Beneath the unit of work; ``event_loop.py`` has the loop, and is imported where a task needs one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from celery.app.task import Context
from sqlalchemy.util import await_only

__all__ = [
    "LoopCall",
    "Waiting",
    "aside",
    "cause_of",
    "loop_call",
    "pause",
    "waiting",
]

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LoopCall:
    """A request whose body runs in an event loop.

    Attributes:
        request: Celery's request, whose stack belongs to the thread that waits outside of the loop.
        is_awaited: A coroutine awaits it in its own loop: a cancellation is that one's affair.
    """

    request: Context
    is_awaited: bool


#: The innermost one of this asyncio task.
loop_call: ContextVar[LoopCall] = ContextVar("celery_alchemy_loop_call")


class Waiting(Protocol):
    """A thread that waits for a coroutine, as the coroutine sees it."""

    #: What broke into the waiting; None if nothing did.
    interrupted_by: BaseException | None

    @property
    def has_ended(self) -> bool: ...

    def ask(self, work: Callable[[], R]) -> Awaitable[R]: ...


#: The thread that waits for the coroutine of the running request; None in a loop that is not ours.
waiting: ContextVar[Waiting | None] = ContextVar("celery_alchemy_waiting", default=None)


def aside(work: Callable[[], R]) -> R:
    """Do work that waits for servers while the loop goes on; called in a greenlet of the loop.

    The thread that waits for the coroutine does it, where a request stack, an application context
    and a test's connection are as for a plain task; where no thread waits, one of asyncio's does.
    """
    carried = partial(copy_context().run, work)
    thread = waiting.get()
    if thread is None or thread.has_ended:
        return await_only(asyncio.get_running_loop().run_in_executor(None, carried))
    return await_only(thread.ask(carried))


def cause_of(exc: BaseException, owner: str) -> BaseException:
    """Return what a request ends with: for one that was cancelled, what cancelled it.

    A CancelledError of the body's own, such as that of an asyncio task which it awaits, is no
    Exception: Celery would take it for the end of the worker.

    Args:
        exc: What the body, or the commit, has raised.
        owner: The task's name and the request's id.
    """
    thread = waiting.get()
    if thread is None or loop_call.get().is_awaited or not isinstance(exc, asyncio.CancelledError):
        return exc
    return thread.interrupted_by or CancelledError(f"{owner} was cancelled: {exc}")


def pause(seconds: float) -> None:
    """Wait while the loop goes on; to be called in a greenlet of the loop."""
    await_only(asyncio.sleep(seconds))
