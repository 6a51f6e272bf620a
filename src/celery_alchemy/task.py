"""SessionTask: a Celery task class whose body runs in one SQLAlchemy session and transaction.

The entrance for calls and for requests: it reads a body's signature when the task is made (``injection.py``) and wraps the body
into a unit of work (``request.py``), inside of Celery's autoretry, so that a failing commit is retried like a failing body.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

from celery import Celery, Task
from celery.canvas import Signature
from celery.exceptions import Reject, Retry
from sqlalchemy.orm import Session

from .errors import NoSessionError, NotConfiguredError, SessionArgumentError
from .injection import Injection, caller_header, injection_of
from .outcome import SUCCESS, CommitOn, Replaced, commit_on_from, outcome_of
from .registry import FactoryHome, Home, home_of
from .request import PLAIN_TYPES, UnitOfWork, at_hand, refuse_entities
from .sessions import SessionOptions

__all__ = ["SessionTask"]

logger = logging.getLogger(__name__)



class SessionTask(Task):  # type: ignore[misc]  # Celery has no annotations.
    """A task with a session.

    ``Alchemy`` makes it the app's default task class; ``base=SessionTask`` asks for it by hand, and it mixes with other bases. The
    session is the parameter annotated with ``Session``, or ``self.session`` of a bound task: one for each request, opened at its
    first use, committed or rolled back by ``commit_on`` when the body ends, and always closed.
    """

    abstract = True

    #: A sessionmaker, or a callable that returns a new Session: makes an Alchemy unnecessary for this class.
    session_factory: ClassVar[Any] = None

    #: Outcomes that commit: any of ``"success"``, ``"retry"``, ``"ignore"``, ``"reject"``. None for the Alchemy's.
    commit_on: Any = None

    #: ``fn(session, exc, *args, **kwargs)``, run in a transaction of its own when the task has failed for good.
    record_failure: Any = None

    #: Isolation level of the transaction, such as ``"SERIALIZABLE"``. None for the engine's.
    isolation_level: str | None = None

    #: The transaction must not write.
    read_only: bool = False

    # The parent process reports lost children and hard time limits through it.
    Request = "celery_alchemy.worker:SessionRequest"

    _factory_home: FactoryHome | None = None
    _injection: Injection = Injection((), inspect.Signature())
    _options: SessionOptions | None = None
    _policy: CommitOn | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SessionTask:
        # Here and not in __init__, which user's classes override without calling super(). It is early enough to be inside of
        # autoretry, which Celery wraps around task.run after the instance is made.
        task = super().__new__(cls)
        if inspect.getattr_static(cls, "run") is not inspect.getattr_static(Task, "run"):
            task._wrap_body()
        return cast("SessionTask", task)

    def _wrap_body(self) -> None:
        body = self.run
        bound = not inspect.ismethod(body) and not isinstance(inspect.getattr_static(type(self), "run"), staticmethod)
        self._injection = injection_of(body, bound=bound, task_name=self.name or type(self).__name__)
        if self._injection.parameters:
            if hasattr(type(self), "__header__"):
                header = caller_header(body, self._injection)
                if header is not None:
                    self.__header__ = header
            if self._dump_pydantic_arguments is not None:
                self._dump_pydantic_arguments = _without_placeholders(
                    self._dump_pydantic_arguments, self._injection
                )
        self.run = _in_unit_of_work(self, body, self._injection)

    @classmethod
    def on_bound(cls, app: Celery) -> None:
        """Check the options, once Celery has applied ``task_annotations`` to the class."""
        super().on_bound(app)
        name = cls.name or cls.__name__
        cls._options = None
        cls._policy = None if cls.commit_on is None else commit_on_from(cls.commit_on, f"task {name!r}")
        factory = _static(cls, "session_factory")
        cls._factory_home = None if factory is None else FactoryHome(factory, name)
        app.steps["worker"].add("celery_alchemy.worker:SessionStep")

    # --- what bodies use -------------------------------------------------------------------------------------------------

    @property
    def session(self) -> Session:
        """The session of the running request.

        Raises:
            NoSessionError: No request of this task runs in this thread or greenlet.
        """
        unit = self._unit()
        if unit is None:
            raise NoSessionError(
                f"self.session of task {self.name!r}",
                "It exists while the task's body runs; elsewhere use `with alchemy.session() as session:`.",
            )
        return unit.session

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task as Celery does; the message is sent after the transaction has ended and its locks are gone."""
        unit = self._unit()
        if unit is not None:
            unit.deferring = True
            try:
                return super().retry(*args, **kwargs)
            finally:
                unit.deferring = False
        try:
            return super().retry(*args, **kwargs)
        except (Retry, Reject):
            raise
        except Exception as exc:
            # Autoretry, from outside of the unit of work, has no retries left: only now has the task failed for good.
            request = self.request
            self.run_record_failure(exc, tuple(request.args or ()), request.kwargs or {})
            raise

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """Make the retry's message; one made by ``self.retry()`` in the body waits for the end of the transaction."""
        signature = super().signature_from_request(*args, **kwargs)
        unit = self._unit()
        if unit is not None and unit.deferring:
            signature.apply_async = functools.partial(unit.send_after_end, signature.apply_async)
        return signature

    def on_replace(self, sig: Signature) -> Any:
        """Replace the task as Celery does; the replacement is sent after the transaction has committed."""
        unit = self._unit()
        if unit is None or self.request.is_eager:
            return super().on_replace(sig)
        unit.send_after_end(sig.delay)
        raise Replaced("Replaced by new task")

    # --- what callers use ------------------------------------------------------------------------------------------------

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Send the task as Celery does.

        Raises:
            SessionArgumentError: A session was passed; it cannot travel in a message.
        """
        if self._injection.parameters:
            given = self._injection.given(kwargs or {})
            if given is None and any(isinstance(arg, Session) for arg in args or ()):
                given = self._injection.parameters[0].name
            if given is not None:
                raise SessionArgumentError(self.name, given)
        return super().apply_async(args, kwargs, *more, **options)

    # --- inside ------------------------------------------------------------------------------------------------------------

    def _unit(self) -> UnitOfWork | None:
        """Return the innermost unit of work of this task that runs in this thread, greenlet or asyncio task."""
        held = at_hand.get()
        while held is not None:
            if isinstance(held, UnitOfWork) and held.task is self:
                return held
            held = held.outer
        return None

    @property
    def injects_sessions(self) -> bool:
        """True if the body's signature asks for a session."""
        return bool(self._injection.parameters)

    def home(self) -> Home:
        """Return what serves this task with sessions: its class's ``session_factory``, or the app's Alchemy.

        Raises:
            NotConfiguredError: There is neither.
        """
        home = self._factory_home or home_of(self._app)
        if home is None:
            raise NotConfiguredError(self.name, getattr(self._app, "main", None))
        return home

    def outcomes_to_commit(self) -> CommitOn:
        """Return the outcomes that commit: the task's own, or those of what serves it."""
        return self.home().commit_on if self._policy is None else self._policy

    def open_session(self, unit: UnitOfWork) -> Session:
        """Return a session for a unit of work."""
        return self.home().source.session(unit)

    def unit_options(self, unit: UnitOfWork) -> SessionOptions:
        """Return what a unit's session needs: the task's options, and when its time limit ends its statements.

        The hard limit if the task has both: at the soft one the body is told, and may still clean up.
        """
        options = self._options
        if options is None:
            options = type(self)._options = SessionOptions(self.isolation_level, self.read_only)
        request = self.request
        if request.called_directly or request.is_eager:
            return options
        hard, soft = request.timelimit or (None, None)
        limit = hard or self.time_limit or soft or self.soft_time_limit
        return replace(options, timeout_at=unit.started + limit) if limit else options

    def run_record_failure(self, exc: BaseException, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the task's ``record_failure`` in a session and transaction of its own; its failure is logged, never raised."""
        record = _static(type(self), "record_failure")
        if record is None:
            return
        try:
            injection = injection_of(record, bound=False, task_name=f"record_failure of {self.name}")
            call = _caller(record, injection) if injection.parameters else _session_first(record)
            outer = at_hand.get()
            unit = UnitOfWork(_FailureRecord(self), outer)
            at_hand.set(unit)
            try:
                call(unit, (exc, *args), kwargs)
                unit.succeed()
            except BaseException as record_exc:
                unit.fail(record_exc)
                raise
            finally:
                at_hand.set(outer)
        except Exception:
            logger.exception("record_failure of task %s failed; the task's own error stands", self.name)


def _static(cls: type, name: str) -> Any:
    """Return a class attribute that may be a function, without making a method of it."""
    value = inspect.getattr_static(cls, name)
    return value.__func__ if isinstance(value, staticmethod) else value


Call = Callable[[UnitOfWork, tuple[Any, ...], Mapping[str, Any]], Any]


def _in_unit_of_work(task: SessionTask, body: Callable[..., Any], injection: Injection) -> Callable[..., Any]:
    """Wrap a body so that each call of it is one unit of work."""
    call = _caller(body, injection)
    parameters = injection.parameters

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        outer = at_hand.get()
        unit = UnitOfWork(task, outer)
        if kwargs and parameters and (given := injection.given(kwargs)) is not None:
            unit.borrow(kwargs[given])
        at_hand.set(unit)
        try:
            result = call(unit, args, kwargs)
            if type(result) not in PLAIN_TYPES:
                refuse_entities(result, unit.owner)
            unit.succeed()
            return result
        except BaseException as exc:
            _fail(task, unit, exc, args, kwargs)
            raise
        finally:
            at_hand.set(outer)

    run.__signature__ = injection.signature  # type: ignore[attr-defined]
    return run


def _fail(
    task: SessionTask, unit: UnitOfWork, exc: BaseException, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """End a unit of work whose body, or whose commit, raised."""
    try:
        unit.fail(exc)
    except Exception as commit_exc:
        _record_if_final(task, commit_exc, args, kwargs)
        raise
    _record_if_final(task, exc, args, kwargs)


def _record_if_final(
    task: SessionTask, exc: BaseException, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if isinstance(exc, Exception) and outcome_of(exc) == "failure" and not _autoretried(task, exc):
        task.run_record_failure(exc, args, kwargs)


class _FailureRecord:
    """Runs a task's ``record_failure``: the task's sessions, but always committed, and without a time limit."""

    def __init__(self, task: SessionTask) -> None:
        self._task = task
        self.request = task.request
        self.name = f"record_failure of {task.name}"

    def open_session(self, unit: UnitOfWork) -> Session:
        return self._task.open_session(unit)

    def outcomes_to_commit(self) -> CommitOn:
        return SUCCESS

    def unit_options(self, unit: UnitOfWork) -> SessionOptions:
        return SessionOptions()


def _caller(body: Callable[..., Any], injection: Injection) -> Call:
    """Return the call of a body with its sessions, in the shortest form that its signature allows."""
    parameters = injection.parameters
    if not parameters:
        return lambda unit, args, kwargs: body(*args, **kwargs)
    only = parameters[0]
    if len(parameters) == 1 and only.index == 0:
        name = only.name

        def call_first(unit: UnitOfWork, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            return body(*args, **kwargs) if name in kwargs else body(unit.session, *args, **kwargs)

        return call_first

    def call(unit: UnitOfWork, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        filled_args, filled_kwargs = injection.fill(args, kwargs, {p.name: unit.session for p in parameters})
        return body(*filled_args, **filled_kwargs)

    return call


def _session_first(record: Callable[..., Any]) -> Call:
    return lambda unit, args, kwargs: record(unit.session, *args, **kwargs)


def _autoretried(task: SessionTask, exc: Exception) -> bool:
    """Tell whether Celery's autoretry, which wraps the unit of work, will ask for a retry; retry() knows if one is left."""
    wanted = tuple(getattr(task, "autoretry_for", ()))
    unwanted = tuple(getattr(task, "dont_autoretry_for", ()))
    return hasattr(task, "_orig_run") and isinstance(exc, wanted) and not isinstance(exc, unwanted)


def _without_placeholders(dump: Callable[..., Any], injection: Injection) -> Callable[..., Any]:
    """Let Celery's pydantic dump, which binds arguments to the whole signature, see something in the sessions' places."""
    placeholder = object()

    def dump_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
        places = {parameter.name: placeholder for parameter in injection.parameters}
        filled_args, filled_kwargs = injection.fill(tuple(args or ()), kwargs or {}, places)
        dumped_args, dumped_kwargs = dump(filled_args, filled_kwargs)
        return (
            tuple(value for value in dumped_args if value is not placeholder),
            {key: value for key, value in dumped_kwargs.items() if value is not placeholder},
        )

    return dump_arguments
