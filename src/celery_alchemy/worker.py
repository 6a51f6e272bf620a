"""What runs in the worker's parent process: checks at the start, and the failures that no child is left to report.

At the edge: Celery finds ``SessionStep`` and ``SessionRequest`` through the names that ``task.py`` registers.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from billiard.exceptions import WorkerLostError
from celery import bootsteps
from celery.exceptions import TimeLimitExceeded
from celery.worker.request import Request
from celery.worker.state import task_ready

from .engine import WorkerPool, pool_findings, set_worker_pool, worker_pool
from .errors import ConfigurationError
from .failure import failed_for_good
from .owed import count_lost_start, give_up
from .registry import homes_of
from .relay import RelayThread, relay_of
from .task import SessionTask, asks_in_vain
from .visibility import window_is_short

__all__ = ["RelayStep", "SessionRequest", "SessionStep"]

logger: logging.Logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: For how long a ``record_failure`` is run again in the worker's main loop, which does nothing else meanwhile.
RECORD_SECONDS = 1.0


class SessionStep(bootsteps.Step):
    """Runs once in the worker's parent, before any child is forked."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        pool = WorkerPool(_pool_name(worker.pool_cls), int(worker.concurrency or 1), getattr(worker, "time_limit", None))
        set_worker_pool(pool)
        _refuse_homeless_tasks(worker.app)
        _report_tasks_that_ask_in_vain(worker.app)
        _refuse_async_tasks(worker.app, pool)
        for home in homes_of(worker.app).values():
            _refuse_short_window(worker.app, home)
            _report_engine(home, pool)


def _pool_name(pool_class: Any) -> str:
    module = pool_class if isinstance(pool_class, str) else pool_class.__module__
    name = module.split(":")[0].rsplit(".", 1)[-1]
    return {"thread": "threads"}.get(name, name)


def _refuse_homeless_tasks(app: Any) -> None:
    """Refuse to start a worker in which a task with a session parameter would fail at its first request.

    Raises:
        SystemExit: It names the task.
    """
    for task in app.tasks.values():
        if isinstance(task, SessionTask) and task.injects_sessions:
            try:
                home = task.home()
                if not task.is_async:
                    task.of_asked_class(home.source)
            except ConfigurationError as exc:
                # Celery prints a SystemExit and stops; of any other exception it would go on without this step.
                raise SystemExit(f"celery-alchemy: {exc}") from exc


def _report_tasks_that_ask_in_vain(app: Any) -> None:
    """Report tasks whose class injects no session: not refused, since a class of the user's may have its own way to pass one."""
    for task in app.tasks.values():
        with suppress(ConfigurationError):
            found = asks_in_vain(task)
            if found is not None:
                logger.warning("%s %s", *found)


def _refuse_short_window(app: Any, home: Any) -> None:
    """Refuse to start a worker that would forget a completed ``once`` task before the broker delivers it for the last time."""
    timeout = window_is_short(app, home.once_window_seconds)
    if timeout is not None:
        raise SystemExit(
            f"celery-alchemy: once_window={home.once_window_seconds:g} s is shorter than the broker's visibility_timeout of"
            f" {timeout:g} s, after which it delivers a message again: the record that the task is done would be gone by then, and"
            " its work done twice. Make once_window longer (the default is 7 days), or visibility_timeout shorter."
        )


def _refuse_async_tasks(app: Any, pool: WorkerPool) -> None:
    """Refuse to start a worker that cannot run the app's ``async def`` tasks.

    Raises:
        SystemExit: It names a task, and says why.
    """
    tasks = [task for task in app.tasks.values() if isinstance(task, SessionTask) and task.is_async]
    if tasks and pool.name in ("gevent", "eventlet"):
        raise SystemExit(
            f"celery-alchemy: task {tasks[0].name!r} is an `async def`, which the {pool.name} pool cannot run: its threads"
            " are greenlets, and an asyncio event loop needs a real one. Use --pool=threads, prefork or solo."
        )
    for task in tasks:
        if task.injects_sessions or task.is_once:
            try:
                # Made here, so that a driver that is not installed is noticed now.
                task.of_asked_class(task.home().async_source)
            except ConfigurationError as exc:
                raise SystemExit(f"celery-alchemy: task {task.name!r}: {exc}") from exc


def _report_engine(home: Any, pool: WorkerPool) -> None:
    engine = home.source.engine()
    if engine is None:
        return
    for finding in pool_findings(engine, pool):
        logger.warning("%s", finding)


class RelayStep(bootsteps.StartStopStep):
    """Runs a relay in the worker's parent for each outbox of the app."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._threads: list[RelayThread] = []

    def start(self, parent: Any) -> None:
        """Start the relays, once the worker has forked its children."""
        homes: list[Any] = list(homes_of(parent.app).values())
        for home in homes:
            if getattr(home, "runs_relay", False) and _needs_relay(parent.app, home):
                thread = RelayThread(relay_of(home), home.relay_interval_seconds)
                thread.start()
                self._threads.append(thread)

    def stop(self, parent: Any) -> None:
        """Let each relay finish its step."""
        for thread in self._threads:
            thread.stop()
        self._threads.clear()

    def terminate(self, parent: Any) -> None:
        """Stop as for a warm shutdown: a step is short."""
        self.stop(parent)


def _needs_relay(app: Any, home: Any) -> bool:
    return bool(home.keeps_messages or any(getattr(task, "is_once", False) for task in app.tasks.values()))


class SessionRequest(Request):
    """Celery's request in the parent process, which also runs ``record_failure`` when the child cannot."""

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Record a hard time limit, whose child is killed, before the result is stored."""
        if not soft:
            self._kill_child()
            if self._in_request(lambda task: self._timed_out(task, TimeLimitExceeded(timeout))):
                # After the acknowledgement and the result nothing is left of it for Celery to fail.
                task_ready(cast("Any", self))
                self.acknowledge()
                return
        super().on_timeout(soft, timeout)

    def _timed_out(self, task: SessionTask, exc: TimeLimitExceeded) -> bool:
        """Record that a task has failed at its hard time limit; True for a ``once`` task that was killed after its commit.

        That one has done its work. Its result is stored here, in the place of the child.
        """
        state = failed_for_good(task, task.row_key(), exc, *self._arguments(), seconds=RECORD_SECONDS)
        if state is None:
            return False
        logger.warning("Task %s[%s] was killed at its hard time limit after its commit; it has succeeded", task.name, self.id)
        context = cast("Any", self)._context
        if state.ending == "returned":
            ignored = context.ignore_result or task.ignore_result
            task.backend.mark_as_done(self.id, state.value, request=context, store_result=not ignored)
        return True

    def _kill_child(self) -> None:
        """Kill the child that Celery will kill right after this.

        Its transaction holds its locks until then, and ``record_failure`` may wait for them, in the loop that would kill it.
        """
        pool = worker_pool()
        pid: Any = self.worker_pid
        if pool is not None and pool.name == "prefork" and pid not in (None, os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Record a child that died, unless the task runs again, before the result is stored."""
        lost = self._lost_child(getattr(exc_info.exception, "exc", exc_info.exception))
        if lost is not None and not self._succeeded_before():
            if self._runs_again():
                self._in_request(count_lost_start)
            else:
                self._in_request(lambda task: failed_for_good(task, task.row_key(), lost, *self._arguments(), seconds=RECORD_SECONDS))
        super().on_failure(exc_info, send_failed_event, return_ok)

    def _lost_child(self, exc: BaseException) -> WorkerLostError | None:
        """Return the error of a child that died or exited in the middle of the task; None if that is not what happened."""
        if isinstance(exc, WorkerLostError):
            return exc
        by_us = getattr(self, "_already_revoked", False) or getattr(self, "_already_cancelled", False)
        if isinstance(exc, (SystemExit, KeyboardInterrupt)) and not by_us:
            return WorkerLostError(f"Worker exited prematurely: {type(exc).__name__}.")
        return None

    def _succeeded_before(self) -> bool:
        """Tell whether the child was lost after it had stored its success; older Celery does not look."""
        stored = getattr(super(), "_success_was_stored", None)
        return stored is not None and bool(stored())

    def _runs_again(self) -> bool:
        """Tell whether Celery will requeue or retry the task of a lost child.

        Source: ``celery.worker.request.Request.on_failure``.
        """
        task = self.task
        retried = getattr(task, "retry_on_worker_lost", False)
        exhausted = retried and task.max_retries is not None and cast("Any", self)._context.retries >= task.max_retries
        if exhausted:
            return False
        return bool(retried or (task.acks_late and task.reject_on_worker_lost))

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Take a revoked or expired ``once`` task out of what is owed."""
        self._in_request(lambda task: give_up(task, reason))
        cast("Any", super())._announce_revoked(reason, terminated, signum, expired)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self.args or ()), dict(self.kwargs or {})

    def _in_request(self, act: Callable[[SessionTask], _T]) -> _T | None:
        """Do something for the task with its request at hand; logged, never raised: this is the worker's main loop."""
        task = self.task
        if not isinstance(task, SessionTask):
            return None
        task.request_stack.push(cast("Any", self)._context)
        try:
            return act(task)
        except Exception:
            logger.exception("The end of task %s[%s] could not be recorded", task.name, self.id)
            return None
        finally:
            task.request_stack.pop()
