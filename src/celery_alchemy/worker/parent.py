"""A request in the worker's parent process, which records the failures that no child can report.

At the edge: Celery finds ``SessionRequest`` through the name that ``requests/request_class.py``
gives the tasks.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from billiard.exceptions import WorkerLostError
from celery.app.task import Context
from celery.exceptions import TimeLimitExceeded
from celery.worker.request import Request
from celery.worker.state import task_ready

from ..broker.channel import Channel
from ..outbox.result_records import ResultKeeper
from ..requests.deliveries import count_lost_start, give_up
from ..requests.failure import Failure, failed_elsewhere
from ..requests.once_keys import row_key
from ..requests.once_records import State
from ..requests.put_back import PutBack, put_back
from ..sessions.engine import worker_pool
from ..task import SessionTask
from .record_threads import record_threads

__all__ = ["SessionRequest"]

logger: logging.Logger = logging.getLogger("celery_alchemy.worker")

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: How long recording an end may take: what waits for a lock for longer is given up, so that nothing
#: waits for it for ever.
RECORD_SECONDS = 30.0

#: How long a task that runs in the parent process waits for its start to be counted.
COUNT_SECONDS = 0.2


class ErrorInfo(Protocol):
    """What a pool tells of an error, a billiard.einfo.ExceptionInfo."""

    @property
    def exception(self) -> BaseException: ...


if TYPE_CHECKING:

    class CelerysRequest(Request):
        """Celery's request with what its stubs leave out."""

        _context: Context
        _already_revoked: bool

        def on_accepted(self, pid: int | str | None, time_accepted: float) -> None: ...

        def _announce_revoked(
            self, reason: str, terminated: bool, signum: object, expired: bool
        ) -> None: ...

else:
    CelerysRequest = Request


def _gives_back(
    end: Callable[Concatenate[SessionRequest, _P], None],
) -> Callable[Concatenate[SessionRequest, _P], None]:
    """Have the delivery go back of a request whose end cannot be written: else nobody ends it."""

    @functools.wraps(end)
    def ended(request: SessionRequest, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            end(request, *args, **kwargs)
        except Exception as exc:
            text = "The end of task %s[%s] could not be written"
            logger.exception(text, request.name, request.id)
            request._put_off(put_back(exc))
            request.reject(requeue=True)

    return ended


class SessionRequest(CelerysRequest):
    """Celery's request in the parent process.

    It also runs ``record_failure`` when the child cannot.

    What it does with the database is done in a thread, and Celery's own end of the request after
    it, in the same thread: as in the threads pool, whose tasks end in threads too. The main loop
    goes on meanwhile, with the time limits of all other tasks.
    """

    #: What Celery does of its own at a hard time limit, until ``on_timeout()`` has it done.
    _failed_at_limit: Callable[[], object] | None = None

    def on_accepted(self, pid: int | str | None, time_accepted: float) -> None:
        """Have a start counted whose message is kept until its end.

        It may be what its worker is lost with. One that was delivered before waits for that, a
        moment, in a pool of this process: what runs next may be what has ended the process then. To
        wait for all would take 20 ms for each.
        """
        super().on_accepted(pid, time_accepted)
        message = self.message
        if self.task.acks_late and isinstance(message.channel, Channel):
            came_before = bool(message.delivery_info.get("redelivered"))
            is_counted = message.channel.deliveries.begin(message.delivery_tag, at_once=came_before)
            pool = worker_pool()
            is_here = pool is not None and pool.name != "prefork"
            if is_counted is not None and is_here and came_before:
                is_counted.wait(COUNT_SECONDS)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Record a hard time limit, whose child is killed, before the result is stored."""
        if soft or not self._has_record():
            super().on_timeout(soft, timeout)
            return
        self._kill_child()
        failed, self._failed_at_limit = self._failed_at_limit, None
        record_threads.run(lambda: self._end_timed_out(timeout, failed))

    @_gives_back
    def _end_timed_out(self, timeout: float, failed: Callable[[], object] | None) -> None:
        if self._in_request(lambda task: self._timed_out(task, TimeLimitExceeded(timeout))):
            # After the acknowledgement and the result nothing is left of it for Celery to fail.
            task_ready(self)
            self.acknowledge()
            return
        if failed is not None:
            failed()
        super().on_timeout(soft=False, timeout=timeout)

    def _timed_out(self, task: SessionTask, exc: TimeLimitExceeded) -> bool:
        """Record that a task has failed at its hard time limit.

        True for a ``once`` task that was killed after its commit.

        That one has done its work. Its result is stored here, in the place of the child.
        """
        state = self._record(task, exc)
        if state is None:
            return False
        logger.warning(
            "Task %s[%s] was killed at its hard time limit after its commit; it has succeeded",
            task.name,
            self.id,
        )
        context = self._context
        if state.ending == "returned":
            ignored = context.ignore_result or task.ignore_result
            task.backend.mark_as_done(
                self.id, state.value, request=context, store_result=not ignored
            )
        return True

    def _record(self, task: SessionTask, exc: Exception) -> State | None:
        if not (task.is_once or task.session_plan.record is not None):
            return None
        failure = Failure(
            task.session_plan, task.request, exc, tuple(self.args or ()), dict(self.kwargs or {})
        )
        return failed_elsewhere(
            failure, row_key(task.session_plan, task.request), seconds=RECORD_SECONDS
        )

    def _kill_child(self) -> None:
        """Kill the child that Celery will kill right after this.

        Its transaction holds its locks until then, and ``record_failure`` may wait for them.
        """
        pool = worker_pool()
        # The stubs take it for a text.
        pid: int | None = getattr(self, "worker_pid", None)
        if pool is not None and pool.name == "prefork" and pid is not None and pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def on_failure(
        self, exc_info: ErrorInfo, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """Record a child that died, unless the task runs again, before the result is stored.

        At a hard time limit the pool calls this first and ``on_timeout()`` right after it, which
        does both: the child still holds its locks here, and a success may have been committed.
        Source: ``billiard.pool.TimeoutHandler.on_hard_timeout``.
        """
        exc = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(exc, TimeLimitExceeded) and self._has_record():
            self._failed_at_limit = functools.partial(
                super().on_failure, exc_info, send_failed_event, return_ok
            )
            return
        self._put_off(exc)
        lost = self._lost_child(exc)
        if lost is None or not self._has_record():
            super().on_failure(exc_info, send_failed_event, return_ok)
            return
        record_threads.run(lambda: self._end_lost(lost, exc_info, send_failed_event, return_ok))

    def _put_off(self, exc: BaseException) -> None:
        """Have a delivery that its database has cut off be due after a while only."""
        message = self.message
        if isinstance(exc, PutBack) and isinstance(message.channel, Channel):
            message.channel.deliveries.put_off(message.delivery_tag, exc.why)

    @_gives_back
    def _end_lost(
        self,
        lost: WorkerLostError,
        exc_info: ErrorInfo,
        send_failed_event: bool,
        return_ok: bool,
    ) -> None:
        if self._succeeded_before():
            if self._is_part():
                # What has committed reports itself again, and notes its part if that is missing: a
                # little later each time, for that may be what has ended the child.
                task_ready(self)
                self._put_off(put_back(lost))
                self.reject(requeue=True)
                return
        elif self._runs_again():
            self._in_request(
                lambda task: count_lost_start(task.session_plan, task.request, RECORD_SECONDS)
            )
        else:
            self._in_request(lambda task: self._record(task, lost))
        super().on_failure(exc_info, send_failed_event, return_ok)

    def _has_record(self) -> bool:
        """Tell whether the end of the task is something to be recorded in the database."""
        task = self.task
        return isinstance(task, SessionTask) and (
            task.is_once
            or task.session_plan.record is not None
            or isinstance(task.backend, ResultKeeper)
        )

    def _lost_child(self, exc: BaseException) -> WorkerLostError | None:
        """Return the error of a child that died or exited in the middle of the task.

        None if that is not what happened.
        """
        if isinstance(exc, WorkerLostError):
            return exc
        by_us = getattr(self, "_already_revoked", False) or getattr(
            self, "_already_cancelled", False
        )
        if isinstance(exc, (SystemExit, KeyboardInterrupt)) and not by_us:
            return WorkerLostError(f"Worker exited prematurely: {type(exc).__name__}.")
        return None

    def _succeeded_before(self) -> bool:
        """Tell whether the child was lost after it had stored its success.

        Older Celery does not look.
        """
        stored = getattr(super(), "_success_was_stored", None)
        return stored is not None and bool(stored())

    def _is_part(self) -> bool:
        """Tell whether it is a ``once`` task that is a part of a chord."""
        return (
            isinstance(self.task, SessionTask) and self.task.is_once and bool(self._context.chord)
        )

    def _runs_again(self) -> bool:
        """Tell whether Celery will requeue or retry the task of a lost child.

        Source: ``celery.worker.request.Request.on_failure``.
        """
        task = self.task
        retried = getattr(task, "retry_on_worker_lost", False)
        exhausted = (
            retried and task.max_retries is not None and self._context.retries >= task.max_retries
        )
        if exhausted:
            return False
        return bool(retried or (task.acks_late and task.reject_on_worker_lost))

    def _announce_revoked(
        self, reason: str, terminated: bool, signum: object, expired: bool
    ) -> None:
        """Take a revoked or expired ``once`` task out of what is owed."""
        announce = functools.partial(super()._announce_revoked, reason, terminated, signum, expired)
        if not self._has_record():
            announce()
            return
        # Celery asks for this when the child that it terminates has ended.
        self._already_revoked = True
        record_threads.run(lambda: self._end_revoked(reason, announce))

    @_gives_back
    def _end_revoked(self, reason: str, announce: Callable[[], object]) -> None:
        self._in_request(
            lambda task: give_up(task.session_plan, task.request, reason, RECORD_SECONDS)
        )
        announce()

    def _in_request(self, act: Callable[[SessionTask], _T]) -> _T | None:
        """Do something for the task with its request at hand.

        Errors are logged, never raised: the request must come to its end.
        """
        task = self.task
        if not isinstance(task, SessionTask):
            return None
        task.request_stack.push(self._context)
        try:
            return act(task)
        except Exception:
            logger.exception("The end of task %s[%s] could not be recorded", task.name, self.id)
            return None
        finally:
            task.request_stack.pop()
