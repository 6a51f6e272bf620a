"""The event loop of this process: one, in a thread of its own, for the whole life of the process.

Underneath async tasks (``async_body.py``). One loop for all, because the connections of an async
engine belong to the loop that opened them: a loop for each task would leave a pool full of
connections to loops that are closed.
"""

from __future__ import annotations

import _thread
import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Generic, Literal, TypeVar

from celery.signals import worker_process_shutdown
from sqlalchemy.util import greenlet_spawn

from .loop_call import LoopCall, loop_call, waiting

__all__ = ["LOOP_THREAD", "ProcessLoop", "carry", "process_loop"]

#: The name of the thread that the event loop runs in.
LOOP_THREAD = "celery-alchemy-loop"

logger: logging.Logger = logging.getLogger("celery_alchemy.event_loop")

T = TypeVar("T")
R = TypeVar("R")

#: Seconds that each step of the loop's end may take: the process ends after it, with or without a
#: goodbye to the server.
CLOSE_SECONDS = 5


class _Work(Generic[T]):
    """A coroutine on its way through the loop, and what those outside of the loop know of it.

    Whoever waits may be interrupted at any instruction by a signal's exception: a soft time limit.
    So the loop takes no lock that the waiting side may hold, as it would with a Future, whose
    condition an exception can leave locked for ever: it only gives, into a queue whose ``put()``
    never waits.

    Args:
        make: Makes the coroutine, in the loop.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._task: asyncio.Task[None] | None = None
        self.interrupted_by: BaseException | None = None
        #: What the coroutine returned, in a tuple, or raised; None until its end.
        self.ending: tuple[T] | BaseException | None = None
        #: What the waiting thread is asked to do; None wakes it up at the end.
        self._asked: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    @property
    def has_ended(self) -> bool:
        """True when nobody waits any more."""
        return self.ending is not None

    def start(self) -> None:
        """Make a task of the coroutine; to be called in the loop."""
        self._task = asyncio.get_running_loop().create_task(self._carry())
        self._task.add_done_callback(self._ended)

    async def _carry(self) -> None:
        waiting.set(self)
        try:
            self._end((await self._make(),))
        except BaseException as exc:  # noqa: BLE001 - SystemExit would end the loop.
            self._end(exc)

    def _ended(self, task: asyncio.Task[None]) -> None:
        # Cancelled before its first step, unless _carry() has said how it ended.
        self._end(asyncio.CancelledError())

    def _end(self, ending: tuple[T] | BaseException) -> None:
        if self.ending is None:
            self.ending = ending
            self._asked.put(None)

    def wait(self) -> T:
        """Do what is asked for until the end.

        Return what the coroutine returned, or raise what it raised.
        """
        while self.ending is None:
            work = self._asked.get()
            if work is not None:
                work()
        if isinstance(self.ending, tuple):
            return self.ending[0]
        raise self.ending

    def ask(self, work: Callable[[], R]) -> Awaitable[R]:
        """Have the thread that waits do some work; to be called, and awaited, in the loop."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()

        def do() -> None:
            try:
                settle = partial(_set_result, answer, work())
            except BaseException as exc:  # noqa: BLE001 - as it would reach the caller of the work.
                settle = partial(_set_exception, answer, exc)
            loop.call_soon_threadsafe(settle)

        self._asked.put(do)
        return answer

    def interrupt(self, loop: asyncio.AbstractEventLoop, exc: BaseException) -> None:
        """Cancel the coroutine, because of an exception outside of the loop."""
        self.interrupted_by = exc
        loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            # The exception came before the loop was asked to start it.
            self._end(asyncio.CancelledError())


def _set_result(answer: asyncio.Future[R], result: R) -> None:
    # Whoever has asked may have been cancelled.
    if not answer.done():
        answer.set_result(result)


def _set_exception(answer: asyncio.Future[R], exc: BaseException) -> None:
    if not answer.done():
        answer.set_exception(exc)


class _Running:
    """A loop in a thread that serves it.

    Started without ``threading.Thread``, whose ``start()`` waits on a condition: an exception in
    there could leave it locked, and the new thread waiting for it for ever.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._has_ended = _thread.allocate_lock()
        self._has_ended.acquire()
        self.thread_id = _thread.start_new_thread(self._serve, ())

    def _serve(self) -> None:
        threading.current_thread().name = LOOP_THREAD
        try:
            _serve(self.loop)
        finally:
            self._has_ended.release()

    def stop(self, timeout_seconds: float) -> None:
        """Stop the loop, wait for its thread and close it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        if self._has_ended.acquire(timeout=timeout_seconds):
            self.loop.close()


async def carry(call: LoopCall, run: Callable[[], T]) -> T:
    """Run plain code that uses an async driver, in a greenlet of the loop, for a request."""
    before = loop_call.set(call)
    try:
        return await greenlet_spawn(run)
    finally:
        loop_call.reset(before)


class ProcessLoop:
    """An event loop in a daemon thread, started at first use and anew after a fork."""

    def __init__(self) -> None:
        # Changed by one operation of a dict at a time, which nothing breaks into.
        self._current: dict[Literal["outer"], _Running] = {}
        self._inner: dict[Literal["inner"], ProcessLoop] = {}
        self._of_parents: list[_Running] = []

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop, running."""
        running = self._current.get("outer")
        if running is None:
            mine = _Running()
            # Without a lock, which an exception of a signal could leave locked: of two that start
            # at once the second one ends.
            running = self._current.setdefault("outer", mine)
            if running is not mine:
                mine.stop(CLOSE_SECONDS)
        return running.loop

    def is_here(self) -> bool:
        """Tell whether the caller runs in this loop, or in that of a task inside of its tasks."""
        running, inner = self._current.get("outer"), self._inner.get("inner")
        here = running is not None and running.thread_id == _thread.get_ident()
        return here or (inner is not None and inner.is_here())

    def run(self, make: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine in the loop, in the caller's context, and wait for it.

        What breaks into the waiting (a soft time limit, a shutdown) cancels the coroutine. Its end
        is waited for: it may still return, having dealt with a time limit, or raise an error of its
        own.

        Args:
            make: Makes the coroutine.
        """
        if self.is_here():
            # A task that is run eagerly in the coroutine of another: this thread waits for it, so
            # another one must run it.
            return self._get_inner().run(make)
        loop = self.get()
        work = _Work(make)
        try:
            loop.call_soon_threadsafe(work.start, context=copy_context())
            return work.wait()
        except BaseException as exc:
            if work.ending is exc:
                raise
            return self._end_interrupted(loop, work, exc)

    @staticmethod
    def _end_interrupted(loop: asyncio.AbstractEventLoop, work: _Work[T], exc: BaseException) -> T:
        work.interrupt(loop, exc)
        try:
            result = work.wait()
        except BaseException as ending:
            if isinstance(exc, Exception) and not isinstance(ending, asyncio.CancelledError):
                raise
            raise exc from ending
        if isinstance(exc, Exception):
            return result
        raise exc

    def _get_inner(self) -> ProcessLoop:
        return self._inner.setdefault("inner", ProcessLoop())

    def close(self) -> None:
        """Cancel what runs, dispose of the loop's engines, and end the loop.

        For the end of the process.
        """
        running, inner = self._current.pop("outer", None), self._inner.pop("inner", None)
        if inner is not None:
            inner.close()
        if running is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(_end_all(), running.loop).result(CLOSE_SECONDS)
        except Exception:
            logger.warning("The event loop of async tasks did not end in order", exc_info=True)
        running.stop(CLOSE_SECONDS)

    def after_fork_in_child(self) -> None:
        """Forget the parent's loop; its thread does not exist here."""
        running, inner = self._current.pop("outer", None), self._inner.get("inner")
        if running is not None:
            # Kept for ever: collecting it and its engines would speak to the parent's sockets and
            # to its epoll instance.
            self._of_parents.append(running)
        if inner is not None:
            inner.after_fork_in_child()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped.

    A SystemExit in a task that a body left running must not end it for all others.
    """
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as exc:
            logger.warning(
                "%r was raised in the event loop of async tasks, by a task that nobody awaits", exc
            )
        else:
            return


async def _end_all() -> None:
    """End tasks, then async generators.

    Among them are those that hold an engine open for as long as its loop lives.
    """
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


process_loop: ProcessLoop = ProcessLoop()


def _close_in_child(**_: object) -> None:
    process_loop.close()


# Celery's child processes end without running what is registered with atexit.
worker_process_shutdown.connect(_close_in_child)
atexit.register(process_loop.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_loop.after_fork_in_child)
