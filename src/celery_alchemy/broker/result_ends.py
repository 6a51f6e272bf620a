"""The ends of tasks, as the result backend writes them: a database that is away is waited for.

Beneath chords and results. Celery tries a result again only as often as a client may wait. The end
of a task is known once: what is not written by then is lost, and where the pool is one of threads,
so is the acknowledgement. So it is insisted on where that holds up nothing but its own task: in the
tracer, and in a thread of the parent process that records ends; never in the worker's main loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from celery import states
from celery.app.task import Context
from celery.backends.base import BaseBackend

from ..messages.celery_types import App
from ..requests import put_back as putting_back
from ..requests.put_back import PutBack, insist_on, is_recording_end, may_pass, put_back

__all__ = ["EndingBackend"]

_T = TypeVar("_T")

#: Until when the end is insisted on that is being written, in ``time.monotonic()`` seconds.
_until: ContextVar[float | None] = ContextVar("celery_alchemy_end_until", default=None)

#: Where a request says that its delivery goes back.
_PUT_BACK = "celery_alchemy_put_back"

#: Arguments of Celery's own helper, which are not the function's.
_OF_HELPER = ("fallback_exc", "fallback_msg", "max_retries")


class EndingBackend(BaseBackend):
    """A result backend that insists on the ends of tasks."""

    if TYPE_CHECKING:
        # What Celery's stubs leave out.
        app: App

    def mark_as_done(
        self,
        task_id: str,
        result: object,
        request: Context | None = None,
        store_result: bool = True,
        state: str = states.SUCCESS,
    ) -> None:
        """Write that a task has succeeded."""
        with self._insisting(task_id, request):
            super().mark_as_done(task_id, result, request, store_result, state)

    def mark_as_failure(
        self,
        task_id: str,
        exc: Exception,
        traceback: str | None = None,
        request: Context | None = None,
        store_result: bool = True,
        call_errbacks: bool = True,
        state: str = states.FAILURE,
    ) -> None:
        """Write that a task has failed."""
        with self._insisting(task_id, request):
            super().mark_as_failure(
                task_id, exc, traceback, request, store_result, call_errbacks, state
            )

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Context | None = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Write that a task was revoked."""
        with self._insisting(task_id, request):
            super().mark_as_revoked(task_id, reason, request, store_result, state)

    def mark_as_retry(
        self,
        task_id: str,
        exc: Exception,
        traceback: str | None = None,
        request: Context | None = None,
        store_result: bool = True,
        state: str = states.RETRY,
    ) -> None:
        """Write that a task is to run again."""
        with self._insisting(task_id, request):
            super().mark_as_retry(task_id, exc, traceback, request, store_result, state)

    @contextmanager
    def _insisting(self, task_id: str, request: Context | None) -> Iterator[None]:
        """Insist on what is written in the block, where the worker can wait for it.

        Raises:
            PutBack: The tracer's delivery is to go back: the database stays away.
        """
        is_traced = request is not None and self._is_traced(task_id)
        if not (is_traced or is_recording_end.get()):
            yield
            return
        gone_back: PutBack | None = getattr(request, _PUT_BACK, None)
        if gone_back is not None:
            # Older Celery comes again, to write that its tracer has failed.
            raise gone_back
        token = _until.set(monotonic() + putting_back.INSIST_SECONDS)
        try:
            yield
        except PutBack:
            raise
        except Exception as exc:
            if not (is_traced and may_pass(exc)):
                raise
            end = put_back(exc)
            setattr(request, _PUT_BACK, end)
            raise end from exc
        finally:
            _until.reset(token)

    def _is_traced(self, task_id: str) -> bool:
        """Tell whether this thread runs the task in Celery's tracer, for a worker."""
        task = self.app.current_worker_task
        return task is not None and task.request.id == task_id and not task.request.is_eager

    def _ensure_retryable(self, func: Callable[..., _T], *args: object, **kwargs: object) -> _T:
        """Do something with the database, again if its error may pass."""
        act = partial(func, *args, **{k: v for k, v in kwargs.items() if k not in _OF_HELPER})
        if _until.get() is not None:
            return self.insisted(act, "The end of a task")
        celerys = getattr(super(), "_ensure_retryable", None)  # Celery 5.6
        done: _T = act() if celerys is None else celerys(func, *args, **kwargs)
        return done

    def insisted(self, act: Callable[[], _T], what: str) -> _T:
        """Do something; insist on it where an end is being written."""
        until = _until.get()
        return act() if until is None else insist_on(act, what, until)
