"""The event loop of this process: one, in a thread of its own, for the whole life of the process.

Underneath async tasks (``coroutines.py``). One loop for all, because the connections of an async engine belong to the loop that
opened them: a loop for each task would leave a pool full of connections to loops that are closed.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from celery.signals import worker_process_shutdown

__all__ = ["ProcessLoop", "process_loop"]

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds that each step of the loop's end may take: the process ends after it, with or without a goodbye to the server.
CLOSE_SECONDS = 5


class _Work(Generic[T]):
    """A coroutine on its way through the loop, and what those outside of the loop know of it.

    Args:
        make: Makes the coroutine, in the loop.
        on_interrupt: Told what broke into the waiting, before the coroutine is cancelled.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]], on_interrupt: Callable[[BaseException], None] | None) -> None:
        self._make = make
        self._on_interrupt = on_interrupt
        self._task: asyncio.Task[None] | None = None
        self.done: Future[T] = Future()

    def start(self) -> None:
        """Make a task of the coroutine; to be called in the loop."""
        self._task = asyncio.get_running_loop().create_task(self._carry())
        self._task.add_done_callback(self._ended)

    async def _carry(self) -> None:
        try:
            result = await self._make()
        except BaseException as exc:  # noqa: BLE001 - a SystemExit that leaves an asyncio task ends the loop, and all other tasks.
            self.done.set_exception(exc)
        else:
            self.done.set_result(result)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not self.done.done():  # Cancelled before its first step.
            self.done.set_exception(asyncio.CancelledError())

    def interrupt(self, loop: asyncio.AbstractEventLoop, exc: BaseException) -> None:
        """Cancel the coroutine, because of an exception outside of the loop."""
        if self._on_interrupt is not None:
            self._on_interrupt(exc)
        loop.call_soon_threadsafe(lambda: self._task is not None and self._task.cancel())


class ProcessLoop:
    """An event loop that runs in a daemon thread, started at first use and started anew after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inner: ProcessLoop | None = None
        self._of_parents: list[asyncio.AbstractEventLoop] = []

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop, running."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=_serve, args=(self._loop,), name="celery-alchemy-loop", daemon=True)
                self._thread.start()
            return self._loop

    def is_here(self) -> bool:
        """Tell whether the caller runs in this loop, or in that of a task inside of one of its tasks."""
        return self._thread is threading.current_thread() or (self._inner is not None and self._inner.is_here())

    def run(
        self,
        make: Callable[[], Coroutine[Any, Any, T]],
        on_interrupt: Callable[[BaseException], None] | None = None,
    ) -> T:
        """Run a coroutine in the loop, in the caller's context, and wait for it.

        What breaks into the waiting (a soft time limit, a shutdown) cancels the coroutine. Its end is waited for: it may still
        return, having dealt with a time limit, or raise an error of its own.

        Args:
            make: Makes the coroutine.
            on_interrupt: Told what broke into the waiting, before the coroutine is cancelled.
        """
        if self.is_here():
            # A task that is run eagerly in the coroutine of another: this thread waits for it, so another one must run it.
            return self._get_inner().run(make, on_interrupt)
        loop = self.get()
        work = _Work(make, on_interrupt)
        try:
            loop.call_soon_threadsafe(work.start, context=copy_context())
            return work.done.result()
        except BaseException as exc:
            if work.done.done() and work.done.exception() is exc:
                raise
            return self._end_interrupted(loop, work, exc)

    @staticmethod
    def _end_interrupted(loop: asyncio.AbstractEventLoop, work: _Work[T], exc: BaseException) -> T:
        work.interrupt(loop, exc)
        try:
            result = work.done.result()
        except BaseException as ending:
            if isinstance(exc, Exception) and not isinstance(ending, asyncio.CancelledError):
                raise
            raise exc from ending
        if isinstance(exc, Exception):
            return result
        raise exc

    def _get_inner(self) -> ProcessLoop:
        with self._lock:
            if self._inner is None:
                self._inner = ProcessLoop()
            return self._inner

    def close(self) -> None:
        """Cancel what runs, dispose of the loop's engines, and end the loop; for the end of the process."""
        with self._lock:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
            inner, self._inner = self._inner, None
        if inner is not None:
            inner.close()
        if loop is None or thread is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(_end_all(), loop).result(CLOSE_SECONDS)
        except Exception:
            logger.warning("The event loop of async tasks did not end in order", exc_info=True)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_SECONDS)
        if not thread.is_alive():
            loop.close()

    def after_fork_in_child(self) -> None:
        """Forget the parent's loop; its thread does not exist here."""
        if self._loop is not None:
            # Kept for ever: collecting it and its engines would speak to the parent's sockets and to its epoll instance.
            self._of_parents.append(self._loop)
        self._lock = threading.Lock()
        self._loop = self._thread = None
        if self._inner is not None:
            self._inner.after_fork_in_child()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped; a SystemExit in a task that a body left running must not end it for all others."""
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt) as exc:
            logger.warning("%r was raised in the event loop of async tasks, by a task that nobody awaits", exc)
        else:
            return


async def _end_all() -> None:
    """End tasks, then async generators, among them those that hold an engine open for as long as its loop lives."""
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


process_loop: ProcessLoop = ProcessLoop()


def _close_in_child(**_: Any) -> None:
    process_loop.close()


# Celery's child processes end without running what is registered with atexit.
worker_process_shutdown.connect(_close_in_child)
atexit.register(process_loop.close)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_loop.after_fork_in_child)
