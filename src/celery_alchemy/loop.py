"""The event loop of this process: one, in a thread of its own, for the whole life of the process.

Underneath async tasks (``coroutines.py``). One loop for all, because the connections of an async engine belong to the loop that
opened them: a loop for each task would leave a pool full of connections to loops that are closed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

__all__ = ["ProcessLoop", "process_loop"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ProcessLoop:
    """An event loop that runs in a daemon thread, started at first use and started anew after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._at_close: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def get(self) -> asyncio.AbstractEventLoop:
        """Return the loop, running."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="celery-alchemy-loop", daemon=True
                )
                self._thread.start()
            return self._loop

    def is_here(self) -> bool:
        """Tell whether the caller runs in this loop."""
        return self._thread is threading.current_thread()

    def at_close(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have a coroutine function awaited in the loop when the process ends."""
        self._at_close.append(close)

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in the loop, in the caller's context, and wait for it.

        What breaks into the waiting (a soft time limit, a shutdown) cancels the coroutine, waits until it has ended, and is raised.
        """
        done, tasks = self._start(make)
        try:
            return done.result()
        except BaseException:
            if not done.done():
                self._cancel(done, tasks)
            raise

    def submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine in the loop, in the caller's context."""
        return self._start(make)[0]

    def _start(
        self, make: Callable[[], Coroutine[Any, Any, T]]
    ) -> tuple[Future[T], list[asyncio.Task[T]]]:
        loop = self.get()
        done: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            task = loop.create_task(make())
            tasks.append(task)
            task.add_done_callback(finish)

        def finish(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                done.set_exception(asyncio.CancelledError())
                return
            exc = task.exception()
            if exc is not None:
                done.set_exception(exc)
            else:
                done.set_result(task.result())

        loop.call_soon_threadsafe(start, context=copy_context())
        return done, tasks

    def _cancel(self, done: Future[T], tasks: list[asyncio.Task[T]]) -> None:
        self.get().call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
        try:
            done.result()
        except (Exception, asyncio.CancelledError) as exc:
            logger.debug("A cancelled coroutine ended with %r", exc)

    def close(self) -> None:
        """Close what was registered, and end the loop; for the end of the process."""
        with self._lock:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is None or thread is None:
            return
        for close in self._at_close:
            try:
                asyncio.run_coroutine_threadsafe(close(), loop).result(5)
            except Exception:
                logger.warning("Closing an async engine failed", exc_info=True)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)

    def after_fork_in_child(self) -> None:
        """Forget the parent's loop; its thread does not exist here."""
        self._lock = threading.Lock()
        self._loop = self._thread = None


process_loop = ProcessLoop()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=process_loop.after_fork_in_child)
