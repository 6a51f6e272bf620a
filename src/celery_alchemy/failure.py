"""A task's last failure: which one it is, and ``record_failure``, which writes it down in a transaction of its own.

Between ``body.py``, ``coroutines.py`` and ``worker.py``, which see failures, and ``request.py``, in whose unit of work they are
recorded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

from .arguments import Arguments, Keywords, caller, session_first
from .completion import State, look
from .events import SessionListener
from .injection import Injection, injection_of
from .outcome import SUCCESS, CommitOn, outcome_of
from .owed import Overtaken, error_text, in_session_of, record_death, set_aside
from .request import UnitOfWork, Works, at_hand
from .reruns import backoff_seconds, runs_of
from .sessions import SessionOptions
from .transient import is_transient

__all__ = ["failed_for_good", "is_final", "record_failure", "record_if_final"]

logger: logging.Logger = logging.getLogger(__name__)

#: How often, and for how many seconds, the ``record_failure`` of a ``once`` task is run again while its errors may pass. One that has
#: waited in vain for a lock is not.
RECORD_ATTEMPTS = 10
RECORD_SECONDS = 5

_FAILED = "record_failure of task %s failed; the task's own error stands"


def record_if_final(task: Any, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """Record a failure unless the task runs again after it."""
    if is_final(task, exc):
        record_failure(task, exc, args, kwargs)


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


def failed_for_good(
    task: Any,
    key: str | None,
    exc: BaseException,
    args: Arguments,
    kwargs: Keywords,
    *,
    reason: str | None = None,
    in_own_session: Callable[[Callable[[Session], Any]], Any] | None = None,
    seconds: float | None = None,
) -> State | None:
    """Record that a task has failed for good: a ``once`` task is dead, and its ``record_failure`` is part of the same transaction.

    Logged, never raised: the task's own error stands.

    Args:
        task: The task, with its request at hand.
        key: The row of a ``once`` task; None for any other.
        exc: Why it failed.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        reason: Why it failed, for people; left out, the error's text.
        in_own_session: Does something in a session and transaction of its own and commits it; left out, in one of the Alchemy's.
        seconds: For how long ``record_failure`` is run again while its errors may pass.

    Returns:
        The completed state if a ``once`` task's work turns out to have been committed; else None.
    """
    if key is None:
        record_failure(task, exc, args, kwargs)
        return None
    reason = reason or error_text(exc)
    in_own_session = in_own_session or functools.partial(in_session_of, task)
    record = task.failure_record()
    if record is not None:
        try:
            run = functools.partial(_run, task, record, exc, args, kwargs)
            state = _record_with_death(task, key, reason, run, in_own_session, RECORD_SECONDS if seconds is None else seconds)
        except Exception:
            logger.exception(_FAILED, task.name)
        else:
            return state if state.kind == "completed" else None
    return record_death(task, key, reason, in_own_session)


def record_failure(task: Any, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """Run a task's ``record_failure``, if it has one, in a session and transaction of its own; its failure is logged."""
    record = task.failure_record()
    if record is None:
        return
    try:
        _run(task, record, exc, args, kwargs)
    except Exception:
        logger.exception(_FAILED, task.name)


@dataclass(slots=True)
class _Attempt:
    """One run of the ``record_failure`` of a ``once`` task.

    Attributes:
        last: The last thing in the same transaction, which is rolled back if that is no ``fresh`` state.
        may_repeat: Nothing of it has been committed so far.
    """

    last: Callable[[Session], State]
    may_repeat: bool = True

    def run(self, unit: UnitOfWork, record: Callable[[], Any]) -> State:
        """Do everything but the end of the unit; return what ``last`` returned."""
        session = unit.session
        # What it sends is kept in the outbox, as what the task's body sends.
        unit.is_once = True
        event.listen(session, "before_commit", self._note_commit)
        record()
        event.remove(session, "before_commit", self._note_commit)
        # As the completion, so that the record_failure neither waits for the row nor has others wait for it.
        session.flush()
        state = self.last(session)
        # Another database's transaction is committed first, and would be once more.
        others = (other.used_session for other in (unit.others or {}).values())
        if any(other is not None and other.in_transaction() for other in others):
            self.may_repeat = False
        return state

    def _note_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self.may_repeat = False


def _record_with_death(
    task: Any,
    key: str,
    reason: str,
    run: Callable[[_Attempt], State],
    in_own_session: Callable[[Callable[[Session], Any]], Any],
    seconds: float,
) -> State:
    """Run a ``record_failure`` with the death as the last thing in its transaction, again after an error that may pass.

    Returns:
        A ``fresh`` death, or what another delivery, or a COMMIT of ours whose answer did not come, has written before.
    """
    number, until = 1, monotonic() + seconds
    while True:
        attempt = _Attempt(functools.partial(set_aside, task=task, key=key, error=reason))
        try:
            state: State = in_own_session(lambda session: look(session, key))
            return run(attempt) if state.kind in ("new", "owed") else state
        except Exception as exc:
            may_pass = isinstance(exc, Overtaken) or is_transient(exc)
            left = until - monotonic()
            if not (may_pass and attempt.may_repeat) or number == RECORD_ATTEMPTS or left <= 0:
                raise
        sleep(min(backoff_seconds(number), left))
        number += 1


def _run(
    task: Any, record: Callable[..., Any], exc: BaseException, args: Arguments, kwargs: Keywords, attempt: _Attempt | None = None
) -> Any:
    """Run ``record(session, exc, *args, **kwargs)`` in a unit of work of its own.

    Args:
        task: The task.
        record: Its ``record_failure``.
        exc: Why it failed.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        attempt: For a ``once`` task.

    Returns:
        What the attempt's ``last`` returned.
    """
    outer = at_hand.get()
    state = None
    try:
        injection = injection_of(record, bound=False, task_name=f"record_failure of {task.name}")
        call = caller(record, injection) if injection.parameters else session_first(record)
        unit = UnitOfWork(_FailureRecord(task, injection), outer)
        at_hand.set(unit)
        try:
            if attempt is None:
                call(unit, (exc, *args), kwargs)
            else:
                state = attempt.run(unit, lambda: call(unit, (exc, *args), kwargs))
            if state is None or state.fresh:
                unit.succeed()
            else:
                unit.fail(Overtaken(unit.owner()))
        except BaseException as record_exc:
            unit.fail(record_exc)
            raise
    finally:
        at_hand.set(outer)
    return state


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
