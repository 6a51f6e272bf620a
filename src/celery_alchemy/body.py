"""Running a task's body: filled with its sessions, in one unit of work, or in one of a ``once`` task.

Between ``task.py``, which wraps each body with it, and ``request.py`` and ``once.py``, which hold the transaction.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from celery.app.task import Context
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from .completion import State, key_of
from .entities import load
from .errors import DeadTaskError, EntityNotFoundError
from .events import SessionListener
from .injection import Injection, injection_of
from .once import OnceUnit, Overtaken, in_session_of, record_death
from .outcome import SUCCESS, CommitOn, Replaced, outcome_of
from .request import PLAIN_TYPES, UnitOfWork, Works, at_hand, refuse_entities
from .sessions import DEFERRED, SessionOptions
from .transient import is_lost_connection, is_transient

__all__ = ["began_at", "failed_for_good", "in_unit_of_work", "record_failure"]

logger: logging.Logger = logging.getLogger(__name__)

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Call = Callable[[UnitOfWork, Arguments, Keywords], Any]

#: How often a body runs again because another delivery changed the task's record while it ran.
MAX_OVERTAKEN = 5


def in_unit_of_work(task: Any, body: Callable[..., Any], injection: Injection) -> Callable[..., Any]:  # noqa: C901, PLR0915 - flat on purpose: this runs for every task.
    """Wrap a body so that each call of it is one unit of work."""
    call = _caller(body, injection)
    parameters = injection.parameters
    is_annotated = any(parameter.database is not None for parameter in parameters)
    session_first = len(parameters) == 1 and parameters[0].index == 0 and parameters[0].database is None and not injection.entities

    new = object.__new__

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: C901, PLR0912, PLR0915 - flat on purpose: this runs for every task.
        # Only set for a task that nothing special is asked of.
        deferred_class = task.deferred_class
        if deferred_class is None and task.may_run_again:
            if is_annotated:
                task.refuse_spanning()
            if task.transient_retries and not runs_again(task.request):
                return with_transient_retries(task, run, args, kwargs)
            if is_delivery_of_once(task, task.request, injection, kwargs):
                return _run_once(task, call, args, kwargs)
        outer = at_hand.get()
        # As UnitOfWork(task, outer), whose __init__ Python would have to find and call.
        unit = new(UnitOfWork)
        unit.task = task
        unit.outer = outer
        unit.pending = False
        unit.started = monotonic()
        session: Session | None = None
        if kwargs and parameters and injection.given(kwargs) is not None:
            session = borrow(unit, injection, kwargs)
        at_hand.set(unit)
        try:
            # The two usual shapes, without the calls of `call` and of session_to_offer(): this runs for every task, and each call
            # costs it a quarter of a microsecond.
            if session_first:
                if session is None:
                    if deferred_class is not None:
                        session = new(deferred_class)
                        session.__dict__[DEFERRED] = unit
                    elif task.uses_session:
                        session = task.open_session(unit)
                    else:
                        session = task.deferred_session(unit)
                    unit.used_session = session
                # The empty keywords of nearly every request would be copied.
                result = body(session, *args, **kwargs) if kwargs else body(session, *args)
            elif parameters or injection.entities:
                result = call(unit, args, kwargs)
            else:
                result = body(*args, **kwargs)
            if type(result) not in PLAIN_TYPES:
                refuse_entities(result, unit.owner)
            if unit.pending:
                unit.succeed()
            else:
                # A deferred session knows its unit: without this the garbage collector would have to free the two.
                unit.used_session = None
            return result
        except BaseException as exc:
            fail(task, unit, exc, args, kwargs)
            raise
        finally:
            at_hand.set(outer)

    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def borrow(unit: UnitOfWork, injection: Injection, kwargs: dict[str, Any]) -> Session | None:
    """Take the sessions that the caller passed out of its arguments, each for its database; return the default one."""
    named = is_named(unit, injection)
    for parameter in injection.parameters:
        session = kwargs.pop(parameter.name, None)
        if session is None:
            continue
        if named and parameter.database:
            unit.borrow_other(parameter.database, session)
        else:
            unit.borrow(session)
    return unit.used_session


def is_named(unit: UnitOfWork, injection: Injection) -> bool:
    """Tell whether the text in ``Annotated[Session, "text"]`` names a database.

    In an app with one database it is a comment; beside another session it is a name.
    """
    return len(injection.parameters) > 1 or unit.task.has_named_databases


def fail(task: Any, unit: UnitOfWork, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """End a unit of work whose body, or whose commit, raised, and record the failure if it is final."""
    try:
        end_failed(unit, exc)
    except Exception as commit_exc:
        record_if_final(task, commit_exc, args, kwargs)
        raise
    record_if_final(task, exc, args, kwargs)


def end_failed(unit: UnitOfWork, exc: BaseException) -> None:
    """End a unit of work whose body, or whose commit, raised.

    Raises:
        Exception: What the database raised at a commit that the policy asked for.
    """
    unit.fail(exc)
    runs = _runs.get()
    if runs is None or runs.request is not unit.task.request:
        return
    if unit.is_borrowed or unit.is_in_callers_transaction or (unit.commit_is_uncertain and is_lost_connection(exc)):
        # The caller's transaction is not ours to run again. And a COMMIT without an answer may have been carried out: a once task
        # can look, any other must not be run again by us.
        runs.left = 0


def record_if_final(task: Any, exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    if is_final(task, exc):
        task.run_record_failure(exc, args, kwargs)


def is_final(task: Any, exc: BaseException) -> bool:
    """Tell whether the task has failed for good with this."""
    if not isinstance(exc, Exception) or outcome_of(exc) != "failure":
        return False
    runs = _runs.get()
    if runs is not None and runs.request is task.request and runs.left and is_transient(exc):
        return False
    return not _autoretried(task, exc)


# --- transient errors ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Runs:
    """A request that ``transient_retries`` runs, how often it may still be run again, and since when it runs."""

    task: Any
    request: Context
    left: int
    began: float

    def seconds_until_next(self, exc: Exception) -> float | None:
        """Return how long to wait until the body runs again after this error; None if it does not."""
        if self.left <= 0 or not is_transient(exc):
            return None
        self.left -= 1
        wait = backoff_seconds(self.task.transient_retries - self.left)
        logger.info("Task %s failed with %s and runs again in %.2f s", self.task.name, type(exc).__name__, wait)
        return wait


_runs: ContextVar[_Runs | None] = ContextVar("celery_alchemy_runs", default=None)

BACKOFF_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 5.0


def runs_again(request: Context) -> bool:
    """Tell whether ``with_transient_retries`` runs this request."""
    runs = _runs.get()
    return runs is not None and runs.request is request


def began_at(unit: UnitOfWork, request: Context) -> float:
    """Return ``time.monotonic()`` seconds at which a request began: its time limit counts from its first run."""
    runs = _runs.get()
    return runs.began if runs is not None and runs.request is request else unit.started


@contextmanager
def transient_runs(task: Any, request: Context) -> Iterator[_Runs]:
    """Count the runs of a request, inside the block."""
    before = _runs.get()
    runs = _Runs(task, request, task.transient_retries, monotonic())
    _runs.set(runs)
    try:
        yield runs
    finally:
        _runs.set(before)


def with_transient_retries(task: Any, run: Callable[..., Any], args: Arguments, kwargs: dict[str, Any]) -> Any:
    """Run a body again, each time in a fresh session, while it fails with what may pass."""
    with transient_runs(task, task.request) as runs:
        while True:
            try:
                return run(*args, **kwargs)
            except Exception as exc:
                wait = runs.seconds_until_next(exc)
                if wait is None:
                    raise
            sleep(wait)


def backoff_seconds(tries: int) -> float:
    """Return how long to wait before another run: at random up to a bound that doubles, so that two rivals part."""
    return random.uniform(0, min(BACKOFF_SECONDS * 2**tries, BACKOFF_MAX_SECONDS))


def _autoretried(task: Any, exc: Exception) -> bool:
    """Tell whether Celery's autoretry, which wraps the unit of work, will ask for a retry; retry() knows if one is left."""
    wanted = tuple(getattr(task, "autoretry_for", ()))
    unwanted = tuple(getattr(task, "dont_autoretry_for", ()))
    return hasattr(task, "_orig_run") and isinstance(exc, wanted) and not isinstance(exc, unwanted)


# --- once ------------------------------------------------------------------------------------------------------------------


def is_delivery_of_once(task: Any, request: Context, injection: Injection, kwargs: Keywords) -> bool:
    """Tell whether a call is one delivery of several that must take effect once.

    It is none in a direct call without a key, and none in the transaction of a session that the caller passed.
    """
    has_key = request.id is not None or task.once_key is not None
    return task.is_once and has_key and injection.given(kwargs) is None


def key_of_call(task: Any, args: Arguments, kwargs: Keywords) -> str:
    """Return the id of the row of a once task that is about to run."""
    return key_of(task, task.request.id or "", task.request.replaced_task_nesting or 0, args, dict(kwargs))


def report(task: Any, unit: OnceUnit, state: State, args: Arguments, kwargs: Keywords) -> Any:
    """End a delivery that has nothing to run, and return the result of the run that committed.

    Raises:
        DeadTaskError: The task is dead.
        Ignore: The run that committed returned nothing.
    """
    unit.succeed()
    if state.fresh:
        task.run_record_failure(DeadTaskError(task.name, unit.key, state.error), args, kwargs)
    return unit.replay(state)


def _run_once(task: Any, call: Call, args: Arguments, kwargs: Keywords) -> Any:
    key = key_of_call(task, args, kwargs)
    for _ in range(MAX_OVERTAKEN):
        try:
            return _attempt_once(task, key, call, args, kwargs)
        except Overtaken:
            logger.info("Task %s (%s) was overtaken by another delivery of it and looks again", task.name, key)
    raise Overtaken(key)


def _attempt_once(task: Any, key: str, call: Call, args: Arguments, kwargs: Keywords) -> Any:
    outer = at_hand.get()
    unit = OnceUnit(task, outer, key)
    at_hand.set(unit)
    try:
        state = unit.start()
        if state.kind in ("completed", "dead"):
            return report(task, unit, state, args, kwargs)
        try:
            result = call(unit, args, kwargs)
            refuse_entities(result, unit.owner)
            return unit.replay(unit.succeed_with("returned", result))
        except Overtaken:
            raise
        except BaseException as exc:  # noqa: BLE001 - every error must be seen here.
            return fail_once(task, unit, exc, args, kwargs)
    finally:
        unit.fail(Overtaken())
        at_hand.set(outer)


def fail_once(task: Any, unit: OnceUnit, exc: BaseException, args: Arguments, kwargs: Keywords) -> Any:
    """End a once task whose body, or whose commit, raised; return a result if its work turns out to have been committed."""
    final = is_final(task, exc)
    state: State | None = unit.fail_once(exc, final=final)
    if state is not None and not isinstance(exc, Replaced) and state.ending == "returned":
        return unit.replay(state)
    if final:
        task.run_record_failure(exc, args, kwargs)
    raise exc


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


# --- record_failure --------------------------------------------------------------------------------------------------------


def record_failure(task: Any, record: Callable[..., Any], exc: BaseException, args: Arguments, kwargs: Keywords) -> None:
    """Run ``record(session, exc, *args, **kwargs)`` in a session and transaction of its own; its failure is logged."""
    outer = at_hand.get()
    try:
        injection = injection_of(record, bound=False, task_name=f"record_failure of {task.name}")
        call = _caller(record, injection) if injection.parameters else _session_first(record)
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


# --- filling a body --------------------------------------------------------------------------------------------------------


def _caller(body: Callable[..., Any], injection: Injection) -> Call:
    """Return the call of a body with its sessions, in the shortest form that its signature allows."""
    parameters, entities = injection.parameters, injection.entities
    if not parameters and not entities:
        return lambda unit, args, kwargs: body(*args, **kwargs)

    def call(unit: UnitOfWork, args: Arguments, kwargs: Keywords) -> Any:
        if entities:
            args, kwargs = load_entities(unit, injection, args, kwargs)
        named = is_named(unit, injection)
        sessions = {p.name: unit.other_session(p.database) if named and p.database else unit.session_to_offer() for p in parameters}
        filled_args, filled_kwargs = injection.fill(args, kwargs, sessions)
        return body(*filled_args, **filled_kwargs)

    return call


def load_entities(unit: UnitOfWork, injection: Injection, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
    """Return the arguments with references replaced by rows of the unit's session.

    Raises:
        EntityNotFoundError, Ignore, Retry: A row is not there; which one is up to the task's ``missing``.
    """
    try:
        return load(unit.session, injection.entities, args, kwargs)
    except EntityNotFoundError as exc:
        task: Any = unit.task
        missing = getattr(task, "missing", "fail")
        if missing == "ignore":
            raise Ignore(str(exc)) from exc
        if missing == "retry":
            raise task.retry(exc=exc) from exc
        raise


def _session_first(record: Callable[..., Any]) -> Call:
    return lambda unit, args, kwargs: record(unit.session, *args, **kwargs)
