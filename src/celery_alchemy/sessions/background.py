"""Threads that write to a database what a worker's main loop must not wait for.

Underneath what ends requests and what tells of them. While the main loop waits, no time limit of
any task goes on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from .fork_lock import fork_guard

__all__ = ["Background"]

logger: logging.Logger = logging.getLogger("celery_alchemy.background")

_all: WeakSet[Background] = WeakSet()


class Background:
    """Runs what it is given in a few threads, which end when there is nothing to do.

    Args:
        name: Of its threads, behind ``celery-alchemy-``.
        what: What they write, for the log.
        most_threads: How many there are at a time; what one of them does keeps its order.
    """

    def __init__(self, name: str, what: str, most_threads: int) -> None:
        self._name, self._what, self._most_threads = name, what, most_threads
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Begin as in a child that was forked, where no thread of the parent is, and no lock."""
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], object]] = deque()
        self._threads = 0
        self._here = threading.local()

    @contextmanager
    def here(self) -> Iterator[None]:
        """Do the work in the calling thread, in this block.

        It is for a test, which has no main loop and looks at what was recorded.
        """
        self._here.is_meant = True
        try:
            yield
        finally:
            self._here.is_meant = False

    def run(self, work: Callable[[], object]) -> None:
        """Have work done; returns at once. What it raises is logged.

        Where no thread can be started, and none is there, the caller does it.
        """
        if getattr(self._here, "is_meant", False):
            work()
            return
        with self._changed:
            self._waiting.append(work)
            if self._threads == self._most_threads:
                return
            self._threads += 1
        # A daemon: what waits for a lock does not keep the process from its end.
        name = f"celery-alchemy-{self._name}"
        thread = threading.Thread(target=self._serve, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter ends, or the machine has no room for another thread.
            logger.debug("No thread %s can be started", name, exc_info=True)
            self._serve_without_new_thread()

    def _serve_without_new_thread(self) -> None:
        with self._changed:
            if self._threads > 1:
                # One that is there already comes to it.
                self._threads -= 1
                return
        self._serve()

    def _serve(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                work = self._waiting.popleft()
            try:
                with fork_guard:
                    self.do(work)
            except BaseException:
                logger.exception("%s could not be written", self._what)

    def do(self, work: Callable[[], object]) -> None:
        """Do work, in one of the threads."""
        work()

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until all work is done; False if it is not done in time."""
        with self._changed:
            done = self._changed.wait_for(lambda: not self._threads, timeout_seconds)
            left = self._threads + len(self._waiting)
        if not done:
            logger.warning(
                "%s: %d are not written yet, they wait for the database", self._what, left
            )
        return done


def _after_fork_in_child() -> None:
    for background in list(_all):
        background.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
