"""The making of a task with a session: its options, checked when Celery binds it, and its plan.

Beneath ``task.py``, which adds what bodies and callers use. The body's signature is read when the
task is made (``signatures/injection.py``); the body becomes a unit of work (``sync_body.py``),
inside of Celery's autoretry, so that a failing commit is retried like a failing body.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

from celery import Task, current_app

from ..errors import ConfigurationError, NotConfiguredError
from ..messages.celery_types import AnyTask, App
from ..sessions.coroutine_functions import is_coroutine_function
from ..sessions.sources import SessionOptions
from ..signatures.entities import Missing
from ..signatures.injection import Injection, caller_header, injection_of, without_placeholders
from ..signatures.options import (
    check_engines,
    check_once,
    check_options,
    needs_transaction,
    once_of,
    written_in,
)
from ..signatures.outcomes import CommitOn, commit_on_from
from .arguments import resolve_before_own_call
from .plan import Habit, OncePlan, Plan
from .registry import Home, home_of
from .request_class import REQUEST, combine_requests
from .session_factory import BoundFactory, FactoryHome, needs_task
from .sync_body import in_unit_of_work
from .tracer import Tracer, ends_what_it_raises

__all__ = ["PlannedTask"]

#: Called with a session; None for nothing.
_Around = Callable[..., object] | None


class PlannedTask(AnyTask):
    """A task whose body is a unit of work, with the options that say how."""

    abstract = True

    #: A sessionmaker, a scoped_session, one of their async twins, or a callable that returns a new
    #: Session or AsyncSession: makes an Alchemy unnecessary for this class. It may be a method,
    #: ``def session_factory(self)``, or a property that returns one of these.
    session_factory: ClassVar[Any] = None

    #: Outcomes that commit: any of ``"success"``, ``"retry"``, ``"ignore"``, ``"reject"``. None for
    #: the Alchemy's.
    commit_on: Any = None

    #: ``fn(session, exc, *args, **kwargs)``, run in a transaction of its own when the task has
    #: failed for good. In a class it may be a method: ``def record_failure(self, session, exc,
    #: ...)``, and of an ``async def`` task an ``async def``. Of a ``once`` task its death is part
    #: of the same transaction.
    record_failure: Any = None

    #: Isolation level of the transaction, such as ``"SERIALIZABLE"``. None for the engine's.
    isolation_level: str | None = None

    #: How often the whole body is run again, in a fresh session, when it or its commit fails with
    #: what ``is_transient`` says may pass; before Celery's own retry is considered.
    transient_retries: int = 0

    #: What to do when the row of an entity in the arguments is not there: ``"fail"``, ``"ignore"``
    #: or ``"retry"``.
    missing: Missing = "fail"

    #: The transaction must not write.
    read_only: bool = False

    #: Commit the writes once over any number of deliveries: True for one task id, or a callable
    #: that makes a key (str) of the task's arguments. Implies late acknowledgement and
    #: ``reject_on_worker_lost``. Without a value here: celery-once keeps its own settings, a dict,
    #: under this name in its class, and that class may stand behind this one.
    once: Any

    #: As Celery has it, also without a value here.
    reject_on_worker_lost: bool | None

    #: Seconds after which an owed ``once`` task is sent again. None for the Alchemy's; never
    #: shorter than the hard time limit.
    redeliver_after: float | None = None

    #: Starts without an end after which a ``once`` task is dead. None for the Alchemy's.
    max_deliveries: int | None = None

    #: True for an ``async def`` task.
    is_async: bool = False

    #: True for a task with ``once``.
    is_once: ClassVar[bool] = False

    #: The plan, once it has been made; ``session_plan`` makes it.
    found_plan: Plan | None

    # The parent process reports lost children and hard time limits through it.
    Request = REQUEST

    _tracer: Tracer | None = None
    _factory_home: FactoryHome | None = None
    _binds_factory: ClassVar[bool] = False
    _injection: Injection = Injection(None, inspect.Signature())
    _policy: CommitOn | None = None

    # Python 3.10 has no Self.
    def __new__(cls, *args: object, **kwargs: object) -> PlannedTask:  # noqa: PYI034
        # Here and not in __init__, which user's classes override without calling super(). It is
        # early enough to be inside of autoretry, which Celery wraps around task.run after the
        # instance is made.
        task = super().__new__(cls)
        # On the instance, where Python reads it faster than on one of the many classes of a task.
        task.found_plan = None
        if inspect.getattr_static(cls, "run") is not inspect.getattr_static(Task, "run"):
            task._wrap_body()
        return task

    def _wrap_body(self) -> None:
        body = self.run
        is_static = isinstance(inspect.getattr_static(type(self), "run"), staticmethod)
        bound = not inspect.ismethod(body) and not is_static
        name = str(self.name or type(self).__name__)
        self._injection = injection_of(body, bound=bound, task_name=name)
        if self._injection.session is not None:
            # inspect.signature() and what builds on it would follow __wrapped__ to the body's own.
            self.__signature__: inspect.Signature = self._injection.signature
            if hasattr(type(self), "__header__"):
                header = caller_header(body, self._injection)
                if header is not None:
                    self.__header__ = header
            dump = getattr(self, "_dump_pydantic_arguments", None)  # Celery 5.7
            if dump is not None:
                self._dump_pydantic_arguments = without_placeholders(dump, self._injection)
        if is_coroutine_function(inspect.unwrap(body)):
            # An optional extra: greenlet and an async driver are only there where it is used.
            from .async_body import in_async_unit_of_work, in_own_loop

            self.is_async = self._injection.is_async
            wrap = in_async_unit_of_work if self.is_async else in_own_loop
            self.__dict__["run"] = wrap(self, body, self._injection)
        else:
            self.__dict__["run"] = in_unit_of_work(self, body, self._injection)

    @classmethod
    def on_bound(cls, app: App) -> None:
        """Check the options, once Celery has applied ``task_annotations`` to the class."""
        super().on_bound(app)
        name = str(cls.name or cls.__name__)
        cls._policy = None
        if cls.commit_on is not None:
            cls._policy = commit_on_from(cls.commit_on, f"task {name!r}")
        factory = written_in(cls, "session_factory")
        cls._binds_factory = needs_task(cls)
        cls._factory_home = None
        if factory is not None and not cls._binds_factory:
            cls._factory_home = FactoryHome(factory, name)
        combine_requests(cls)
        resolve_before_own_call(cls)
        check_options(cls, name)
        _refuse_unfit_record(cls, name)
        cls.is_once = bool(once_of(cls))
        cls._refuse_unfit_engines(app)
        if cls.is_once:
            check_once(cls, name, cls._policy)
            # An acknowledgement before the end, or one for a child that died, would lose the task.
            cls.acks_late = True
            cls.reject_on_worker_lost = True
        app.steps["worker"].add("celery_alchemy.worker.boot_steps:SessionStep")
        app.steps["worker"].add("celery_alchemy.worker.boot_steps:RecordStep")

    @classmethod
    def _refuse_unfit_engines(cls, app: App) -> None:
        home = None if cls._binds_factory else cls._factory_home or home_of(app)
        if home is not None:
            check_engines(cls, str(cls.name or cls.__name__), home.engines_shown())

    def see_home(self) -> None:
        """Ask anew for what serves this task with sessions.

        Raises:
            ConfigurationError: The task's options cannot work with it.
        """
        self.found_plan = None
        if self._tied_app is not None:
            self._refuse_unfit_engines(self._tied_app)

    @property
    def __trace__(self) -> Tracer | None:
        """What Celery runs requests with; None until it has made that."""
        return self._tracer

    @__trace__.setter
    def __trace__(self, trace: Tracer | None) -> None:
        if trace is not None and home_of(self.app) is not None:
            trace = ends_what_it_raises(trace)
        self._tracer = trace

    @__trace__.deleter
    def __trace__(self) -> None:
        self._tracer = None

    # --- what is known of a task ------------------------------------------------------------------

    @property
    def session_plan(self) -> Plan:
        """What its units of work need of this task."""
        plan = self.found_plan
        if plan is None:
            plan = self._make_plan()
            # A class-based task may be bound later.
            self.found_plan = plan if self._tied_app is not None else None
        return plan

    def _make_plan(self) -> Plan:
        home = self._find_home()
        around, around_written = self._find_around(home)
        retries = hasattr(self, "_orig_run")
        options = SessionOptions(
            self.isolation_level,
            self.read_only,
            idle_limit_seconds=None if home is None else home.idle_transaction_seconds,
            needs_transaction=needs_transaction(type(self)),
        )
        return Plan(
            task=self,
            name=str(self.name),
            app=self._tied_app or current_app._get_current_object(),  # type: ignore[attr-defined]
            home=home,
            injection=self._injection,
            is_async=self.is_async,
            policy=self._policy,
            options=options,
            time_limit=self.time_limit,
            soft_time_limit=self.soft_time_limit,
            transient_retries=self.transient_retries,
            missing=self.missing,
            once=self._once_plan() if self.is_once else None,
            around=around,
            around_written=around_written,
            record=self._find_record(),
            autoretry_for=tuple(getattr(self, "autoretry_for", ())) if retries else (),
            dont_autoretry_for=tuple(getattr(self, "dont_autoretry_for", ())) if retries else (),
            sign_again=super().signature_from_request,
            is_body=True,
            habit=Habit(),
        )

    def _once_plan(self) -> OncePlan:
        return OncePlan(self.once_key, self.redeliver_after, self.max_deliveries)

    @property
    def _tied_app(self) -> App | None:
        # ``self.app`` would bind a class-based task to whatever app is current.
        app: App | None = getattr(self, "_app", None)
        return app

    def home(self) -> Home:
        """Return what serves this task: its class's ``session_factory``, or the app's Alchemy.

        Raises:
            NotConfiguredError: There is neither.
        """
        home = self._find_home()
        if home is None:
            app_name = None if self._tied_app is None else self._tied_app.main
            raise NotConfiguredError(str(self.name), app_name)
        return home

    def _find_home(self) -> Home | None:
        if self._binds_factory and self._factory_home is None:
            self._factory_home = FactoryHome(BoundFactory(self), str(self.name))
        if self._factory_home is not None:
            return self._factory_home
        return None if self._tied_app is None else home_of(self._tied_app)

    def _find_around(self, home: Home | None) -> tuple[_Around, _Around]:
        """Return what is around the body, and what the user wrote for it; None for nothing."""
        own = written_in(type(self), "around")
        of_home = None if home is None else home.around
        if own is not PlannedTask.around:
            # It may be anything that can be called; only a function would become a method.
            return (functools.partial(own, self), own) if callable(own) else (None, None)
        return (None, None) if of_home is None else (self.around, of_home)

    def _find_record(self) -> Callable[..., object] | None:
        """Return the ``record_failure``, ready to be called with a session and the error."""
        record = inspect.getattr_static(type(self), "record_failure")
        if isinstance(record, (staticmethod, classmethod)) or _is_method(record):
            record = record.__get__(self, type(self))
        ready: Callable[..., object] | None = record
        return ready

    @property
    def injection(self) -> Injection:
        """What the body's signature asks for."""
        return self._injection

    @property
    def once_key(self) -> Callable[..., object] | None:
        """The callable that makes the key of a ``once`` task; None where the key is the task id."""
        once = once_of(type(self))
        return once if callable(once) else None

    def around(self, session: Any) -> Any:
        """Return what is around each run of the body; to be overridden, or set to None for nothing.

        It is entered first in the transaction, before entities are loaded, and left before the
        commit, as a ``with`` statement in the body would be. What it raises ends the run as the
        body's own error would; an exit that returns true ends the body's error, and the task
        returns None and commits.

        Args:
            session: That of the running request, not connected yet. In an ``async def`` task the
                AsyncSession if this is an @asynccontextmanager function, or annotated so; else the
                Session behind it, which sync code may use here.

        Returns:
            What the Alchemy's ``around`` returns; ``super().around(session)`` asks for it.
        """
        around = self.home().around
        return nullcontext() if around is None else around(self, session)


def _refuse_unfit_record(cls: type[PlannedTask], name: str) -> None:
    """Refuse a ``record_failure`` that could not be called.

    It would be noticed only when the task has failed for good.

    Args:
        cls: The task class.
        name: The task's name, for messages.

    Raises:
        SessionParameterError: What its signature asks for cannot be given.
        ConfigurationError: It does not take the arguments that every call of the task has, or it is
            an ``async def`` of a plain task.
    """
    record = inspect.getattr_static(cls, "record_failure")
    run = inspect.getattr_static(cls, "run")
    if record is None or run is inspect.getattr_static(Task, "run"):
        return
    record_is_bound = isinstance(record, classmethod) or _is_method(record)
    of_record = injection_of(
        _function(record), bound=record_is_bound, task_name=f"record_failure of {name}"
    )
    of_run = injection_of(_function(run), bound=not isinstance(run, staticmethod), task_name=name)
    if of_record.is_async and not of_run.is_async:
        raise ConfigurationError(
            f"record_failure of task {name!r} is an `async def`, and the task a plain `def`.",
            "Make it a plain `def` with a Session, or make the task an `async def`.",
        )
    given = [one for one in of_run.signature.parameters.values() if one.default is one.empty]
    positional = [
        one for one in given if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    # The error comes first, and before it the session where none is injected.
    first = 1 if of_record.session is not None else 2
    try:
        of_record.signature.bind(
            *[None] * (first + len(positional)),
            **{one.name: None for one in given if one.kind is one.KEYWORD_ONLY},
        )
    except TypeError as exc:
        raise ConfigurationError(
            f"record_failure of task {name!r} cannot be called with the session, the error and"
            f" the task's arguments: {exc}.",
            "Give it the task's parameters behind them: def failed(session: Session, exc:"
            " Exception, *args, **kwargs).",
        ) from exc


def _function(written: Any) -> Callable[..., object]:
    function: Callable[..., object] = getattr(written, "__func__", written)
    return function


def _is_method(record: object) -> bool:
    """Tell whether a ``record_failure`` is a method, by the name of its first parameter."""
    if not inspect.isfunction(record):
        return False
    return next(iter(inspect.signature(record).parameters), None) == "self"
