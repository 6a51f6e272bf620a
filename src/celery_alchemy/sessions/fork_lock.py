"""Keeps a fork out of the middle of another thread's call into a database library.

Beneath the threads that work in a worker's parent process, which forks its children while they do:
the relay, and those that record ends.
"""

from __future__ import annotations

import os
import threading
from types import TracebackType

__all__ = ["fork_guard"]

#: Seconds for which a fork waits. It is the worker's main loop that forks, and all time limits wait
#: with it. What goes on for longer waits for a server or for a lock, in which no library holds a
#: lock of its own that a child would inherit.
FORK_WAIT_SECONDS = 0.5


class ForkGuard:
    """Lets threads work side by side, and a fork in between.

    A child that is forked in the middle of a call into a database library inherits that library's
    locks as they are, for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._forking = False

    def __enter__(self) -> None:
        with self._changed:
            # One that comes in again and again would leave a fork no gap.
            self._changed.wait_for(lambda: not self._forking)
            self._inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def before_fork(self) -> None:
        """Keep threads from coming in, and wait a moment for those that are in."""
        self._changed.acquire()
        self._forking = True
        self._changed.wait_for(lambda: not self._inside, FORK_WAIT_SECONDS)

    def after_fork_in_parent(self) -> None:
        """Let them in again."""
        self._forking = False
        self._changed.notify_all()
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Begin anew: the threads do not exist here."""
        self._changed = threading.Condition()
        self._inside, self._forking = 0, False


fork_guard: ForkGuard = ForkGuard()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=fork_guard.before_fork,
        after_in_parent=fork_guard.after_fork_in_parent,
        after_in_child=fork_guard.after_fork_in_child,
    )
