"""A task's last failure: which one it is, and ``record_failure``, which writes it down in a transaction of its own.

Between ``body.py``, ``coroutines.py`` and ``worker.py``, which see failures, and ``request.py``, in whose unit of work they are
recorded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy.orm import Session

from .arguments import Arguments, Keywords, caller, session_first
from .completion import State
from .events import SessionListener
from .injection import Injection, injection_of
from .outcome import SUCCESS, CommitOn, outcome_of
from .owed import in_session_of, record_death
from .request import UnitOfWork, Works, at_hand
from .reruns import runs_of
from .sessions import SessionOptions
from .transient import is_transient

__all__ = ["failed_for_good", "is_final", "record_failure", "record_if_final"]

logger: logging.Logger = logging.getLogger(__name__)


def record_if_final(task: Any, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """Record a failure unless the task runs again after it."""
    if is_final(task, exc):
        task.run_record_failure(exc, args, kwargs)


def is_final(task: Any, exc: BaseException) -> bool:
    """Tell whether the task has failed for good with this."""
    if not isinstance(exc, Exception) or outcome_of(exc) != "failure":
        return False
    runs = runs_of(task.request)
    if runs is not None and runs.left and is_transient(exc):
        return False
    return not _autoretried(task, exc)


def _autoretried(task: Any, exc: Exception) -> bool:
    """Tell whether Celery's autoretry, which wraps the unit of work, will ask for a retry; retry() knows if one is left."""
    wanted = tuple(getattr(task, "autoretry_for", ()))
    unwanted = tuple(getattr(task, "dont_autoretry_for", ()))
    return hasattr(task, "_orig_run") and isinstance(exc, wanted) and not isinstance(exc, unwanted)


def failed_for_good(task: Any, exc: BaseException, args: Arguments, kwargs: Keywords) -> State | None:
    """Record a failure that was only found to be final after the unit of work had ended, or that no child is left to record.

    Returns:
        The completed state if a ``once`` task's work turns out to have been committed; else None.
    """
    key = task.row_key()
    state = None if key is None else record_death(task, key, exc, functools.partial(in_session_of, task))
    if state is None:
        task.run_record_failure(exc, args, kwargs)
    return state


def record_failure(task: Any, record: Callable[..., Any], exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """Run ``record(session, exc, *args, **kwargs)`` in a session and transaction of its own; its failure is logged."""
    outer = at_hand.get()
    try:
        injection = injection_of(record, bound=False, task_name=f"record_failure of {task.name}")
        call = caller(record, injection) if injection.parameters else session_first(record)
        unit = UnitOfWork(_FailureRecord(task, injection), outer)
        at_hand.set(unit)
        try:
            call(unit, (exc, *args), kwargs)
            unit.succeed()
        except BaseException as record_exc:
            unit.fail(record_exc)
            raise
    except Exception:
        logger.exception("record_failure of task %s failed; the task's own error stands", task.name)
    finally:
        at_hand.set(outer)


class _FailureRecord:
    """Runs a task's ``record_failure``: the task's sessions, but always committed, and without a time limit."""

    def __init__(self, task: Any, injection: Injection) -> None:
        self._task = task
        self._injection = injection
        self.request = task.request
        self.name = f"record_failure of {task.name}"
        self.uses_session = False
        self.deferred_class: type[Session] | None = None
        self.has_named_databases: bool = task.has_named_databases

    def open_session(self, unit: UnitOfWork, *, deferred: bool = False) -> Session:
        # Always deferred: a session that the task opens at once is given the task's own policy and limits.
        source = self._task.home().source
        class_ = self._injection.session_class(None, named=self.has_named_databases or len(self._injection.parameters) > 1)
        if class_ is not None:
            source = source.of_class(class_, self.name)
        session: Session = source.session(unit)
        return session

    def outcomes_to_commit(self) -> CommitOn:
        return SUCCESS

    def session_listeners(self) -> Sequence[SessionListener]:
        return ()

    def home(self) -> Any:
        return self._task.home()

    def in_database(self, database: str) -> Works:
        works: Works = self._task.in_database(database)
        return works

    def unit_options(self, unit: UnitOfWork) -> SessionOptions:
        return SessionOptions()
