"""Hands committed messages to the broker behind the commit that wrote them, in groups.

Beneath ``outbox.py``, which gives it what a commit has left. Whoever commits does not wait for the
broker: a thread publishes what has gathered in one round trip and settles it in one transaction.
Their rows are leased to this process; what it does not come to, the relay sends.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from weakref import WeakSet

from ..sessions.fork_lock import fork_guard
from .delivery import Committed

__all__ = ["HandOverThread", "drain_at_exit", "wait_for_all"]

logger: logging.Logger = logging.getLogger("celery_alchemy.outbox")

#: Rows that are handed over together, at most.
GROUP_ROWS = 500

#: Seconds in which more may gather when a group went out so shortly before. Groups of one would
#: cost the sender, which shares the interpreter with this thread, as much as publishing by itself;
#: a process that sends now and then hands over at once.
BUSY_SECONDS = 0.02
GATHER_SECONDS = 0.002

#: Once a group has had more than one commit, more gather for as long as some groups take: handing
#: over is then a ninth of the work of a process that does nothing but send.
GATHER_GROUPS = 8
GATHER_MOST_SECONDS = 0.06

#: What may wait in memory while the broker hangs, in rows and in bytes of their bodies.
MOST_ROWS = 10_000
MOST_BYTES = 64 * 1024 * 1024

#: Seconds without work after which the thread gives its connection back.
REST_SECONDS = 0.2

#: Seconds without work after which the thread ends; the next commit starts another.
IDLE_SECONDS = 5.0

#: Seconds that a process which ends gives its messages.
EXIT_SECONDS = 10.0


class HandOverThread:
    """Takes what commits leave to the broker; one for each outbox, in each process.

    Args:
        deliver: Publishes and settles a group; returns False if something is left to the relay.
        rest: Called by the same thread when there is nothing more to do for the moment.
    """

    def __init__(
        self, deliver: Callable[[Sequence[Committed]], bool], rest: Callable[[], None]
    ) -> None:
        self._deliver = deliver
        self._rest = rest
        self._callers = 0
        self.begin_anew()
        _threads.add(self)

    def begin_anew(self) -> None:
        """Begin as in a child that was forked: the thread and its messages are the parent's."""
        lock = threading.Lock()
        self._arrived = threading.Condition(lock)
        self._done = threading.Condition(lock)
        self._waiting: deque[Committed] = deque()
        self._rows = 0
        self._bytes = 0
        self._is_running = False
        self._is_idle = False
        self._is_busy = False
        self._drains = 0
        self._handed_over_at = float("-inf")
        self._last_commits = 0
        self._last_seconds = 0.0
        self._is_complete = True
        self._is_full = False
        self._has_ended = False

    # --- those who commit ---------------------------------------------------------------------

    @property
    def is_in_caller(self) -> bool:
        """True while whoever commits hands over itself."""
        return self._callers > 0 or self._has_ended

    @contextmanager
    def in_caller(self) -> Iterator[None]:
        """Have whoever commits hand over itself inside of the block, in any thread.

        For tests, which look at what was sent right after the commit. What waits goes out first.
        """
        self.wait(EXIT_SECONDS)
        self._callers += 1
        try:
            yield
        finally:
            self._callers -= 1

    def put(self, committed: Committed) -> bool:
        """Have committed rows handed over; returns at once.

        Returns:
            False if no thread can do it and whoever commits must.
        """
        size = committed.size
        with self._arrived:
            if self._has_ended:
                return False
            if self._rows >= MOST_ROWS or self._bytes + size > MOST_BYTES:
                self._leave(committed)
                return True
            self._waiting.append(committed)
            self._rows += len(committed.rows)
            self._bytes += size
            if self._is_idle:
                self._arrived.notify()
            if self._is_running or self._start():
                return True
            self._waiting.clear()
            self._rows = self._bytes = 0
            return False

    def _start(self) -> bool:
        _start_resolver()
        # A daemon: a broker that hangs does not keep the process from its end.
        thread = threading.Thread(target=self._serve, name="celery-alchemy-hand-over", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter ends, or the machine has no room for another thread.
            logger.debug("No thread can be started: the caller hands over", exc_info=True)
            return False
        _drain_in_finalizers()
        self._is_running = True
        return True

    def _leave(self, committed: Committed) -> None:
        self._is_complete = False
        if not self._is_full:
            self._is_full = True
            logger.warning(
                "%d messages wait for the broker, which does not keep up; the relay sends what is"
                " committed from now on, when its lease is over",
                self._rows,
            )

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until everything that was committed so far is handed over.

        Returns:
            False if the time was over, or if something was left to the relay since the last call.
        """
        in_time = self.wait(timeout_seconds)
        with self._arrived:
            complete, self._is_complete = self._is_complete, True
        return in_time and complete

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the thread has nothing to do and its connection is given back.

        Returns:
            False if the time was over.
        """
        with self._arrived:
            self._drains += 1
            try:
                self._arrived.notify()
                return self._done.wait_for(self._is_empty, timeout_seconds)
            finally:
                self._drains -= 1

    def _is_empty(self) -> bool:
        return not self._waiting and not self._is_busy

    def end(self, timeout_seconds: float) -> None:
        """Hand over what waits, for at most so long; later commits do so themselves."""
        if self._has_ended:
            # Told by atexit and by a finalizer.
            return
        self.wait(timeout_seconds)
        with self._arrived:
            self._has_ended = True
            left = self._rows
        if left:
            logger.warning(
                "%d messages were committed and not handed to the broker when the process ended;"
                " the relay sends them when their lease is over",
                left,
            )

    # --- the thread ---------------------------------------------------------------------------

    def _serve(self) -> None:
        while (group := self._next_group()) is not None:
            since, complete = monotonic(), True
            try:
                with fork_guard:
                    if group:
                        complete = self._deliver(group)
                    else:
                        self._rest()
            except BaseException:
                complete = False
                logger.exception("The relay sends what could not be handed over")
            self._finish(group, since, complete=complete)

    def _next_group(self) -> list[Committed] | None:
        """Wait for work.

        Returns:
            The group; an empty one when the thread is to rest, None when it is to end.
        """
        with self._arrived:
            if not self._waiting:
                self._is_idle = True
                self._arrived.wait_for(
                    self._has_reason, REST_SECONDS if self._is_busy else IDLE_SECONDS
                )
                self._is_idle = False
            if self._waiting:
                self._is_busy = True
                self._gather()
                return self._take_group()
            self._is_running = self._is_busy
            return [] if self._is_busy else None

    def _gather(self) -> None:
        if monotonic() - self._handed_over_at < BUSY_SECONDS and not self._drains:
            # Those who commit do not wake it meanwhile; whoever drains does.
            seconds = min(GATHER_GROUPS * self._last_seconds, GATHER_MOST_SECONDS)
            self._arrived.wait(max(seconds if self._last_commits > 1 else 0, GATHER_SECONDS))

    def _has_reason(self) -> bool:
        """Tell whether a thread that waits has a group to do, or a rest that is asked for."""
        return bool(self._waiting) or (self._is_busy and self._drains > 0)

    def _take_group(self) -> list[Committed]:
        group: list[Committed] = []
        rows = 0
        while self._waiting and rows < GROUP_ROWS:
            group.append(self._waiting.popleft())
            rows += len(group[-1].rows)
        return group

    def _finish(self, group: list[Committed], since: float, *, complete: bool) -> None:
        with self._arrived:
            self._is_complete &= complete
            self._rows -= sum(len(committed.rows) for committed in group)
            self._bytes -= sum(committed.size for committed in group)
            self._is_full &= bool(self._rows)
            if group:
                self._handed_over_at, self._last_commits = monotonic(), len(group)
                self._last_seconds = self._handed_over_at - since
            else:
                self._is_busy = False
                self._done.notify_all()


def _start_resolver() -> None:
    """Have gevent start the thread in which it looks up the names of hosts.

    A script that ends right after its first commit needs it at its end, when Python 3.12 and later
    start no more threads.
    """
    gevent = sys.modules.get("gevent")
    monkey = sys.modules.get("gevent.monkey")
    if gevent is not None and monkey is not None and monkey.is_module_patched("socket"):
        gevent.get_hub().threadpool.spawn(int)


# --- the end of a process, and its forks ----------------------------------------------------------

_threads: WeakSet[HandOverThread] = WeakSet()
_has_finalizers = False


def wait_for_all(timeout_seconds: float) -> None:
    """Wait until everything that this process has committed so far is handed over."""
    deadline = monotonic() + timeout_seconds
    for thread in list(_threads):
        thread.wait(max(0.0, deadline - monotonic()))


def drain_at_exit() -> None:
    """Hand over what waits, in a process that ends; later commits do so themselves."""
    deadline = monotonic() + EXIT_SECONDS
    for thread in list(_threads):
        thread.end(max(0.0, deadline - monotonic()))


def _drain_in_finalizers() -> None:
    """Have it done too in children of multiprocessing and billiard, which end by ``os._exit``.

    They run the finalizers of their module, and nothing that is registered with ``atexit``.
    """
    global _has_finalizers  # noqa: PLW0603 - a fact about the process.
    if _has_finalizers:
        return
    _has_finalizers = True
    for name in ("multiprocessing.util", "billiard.util"):
        module = sys.modules.get(name)
        if module is not None:
            # Before those without a priority, which end pools and managers.
            module.Finalize(None, drain_at_exit, exitpriority=100)


def _after_fork_in_child() -> None:
    global _has_finalizers  # noqa: PLW0603 - as above; the modules forget them in a child.
    _has_finalizers = False
    for thread in list(_threads):
        thread.begin_anew()


# Registered after what closes connections, and so done before it.
atexit.register(drain_at_exit)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
