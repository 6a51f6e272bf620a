"""SessionTask: a Celery task class whose body runs in one SQLAlchemy session and transaction.

The entrance for calls and for requests: it reads a body's signature when the task is made (``injection.py``) and wraps the body
into a unit of work (``request.py``), inside of Celery's autoretry, so that a failing commit is retried like a failing body.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, cast

from celery import Celery, Task
from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import Reject, Retry
from celery.result import AsyncResult
from sqlalchemy.orm import Session

from .body import in_unit_of_work
from .completion import State, key_of
from .engine import worker_pool
from .entities import EntityParameter, Missing, encoded
from .errors import ConfigurationError, DeadTaskError, NoSessionError, NotConfiguredError, SessionArgumentError
from .events import SessionListener
from .failure import failed_for_good
from .injection import Injection, caller_header, injection_of, without_placeholders
from .message import recording
from .named_database import OtherDatabase
from .once import OnceUnit
from .options import check_once, check_options, once_of, written_in
from .outcome import ONCE_COMMITS_ON, SUCCESS, CommitOn, Replaced, commit_on_from
from .owed import resend_owed
from .registry import FactoryHome, Home, home_of, homes_of
from .request import UnitOfWork, at_hand
from .reruns import began_at
from .sending import enqueue, hold, session_at_hand
from .sessions import SessionOptions
from .transaction import AnySession

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["SessionTask", "asks_in_vain"]

#: Seconds that are left to a killed run to be gone before its task is sent again.
REDELIVER_MARGIN_SECONDS = 5

#: Seconds after a soft time limit for which statements may still run. The limit is an exception in the body; the server must
#: neither be faster, nor cut off what the body does about it.
SOFT_GRACE_SECONDS = 2


if TYPE_CHECKING:
    _Task = Task[Any, Any]
else:
    # Celery 5.5's takes no type arguments at run time.
    _Task = Task


#: What opens a task's sessions, the outcomes that commit, and who wants to know of the session's end: found once for each task.
Opening = tuple[Callable[[SessionOptions], Session], CommitOn, Sequence[SessionListener]]


class SessionTask(_Task):
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

    #: ``fn(session, exc, *args, **kwargs)``, run in a transaction of its own when the task has failed for good. In a class it may
    #: be a method: ``def record_failure(self, session, exc, ...)``. Of a ``once`` task its death is part of the same transaction.
    record_failure: Any = None

    #: Isolation level of the transaction, such as ``"SERIALIZABLE"``. None for the engine's.
    isolation_level: str | None = None

    #: How often the whole body is run again, in a fresh session, when it or its commit fails with what ``is_transient`` says may
    #: pass; before Celery's own retry is considered.
    transient_retries: int = 0

    #: What to do when the row of an entity in the arguments is not there: ``"fail"``, ``"ignore"`` or ``"retry"``.
    missing: Missing = "fail"

    #: The transaction must not write.
    read_only: bool = False

    #: Commit the writes once over any number of deliveries: True for one task id, or a callable that makes a key (str) of the
    #: task's arguments. Implies late acknowledgement and ``reject_on_worker_lost``. Without a value here: celery-once keeps its
    #: own settings, a dict, under this name in its class, and that class may stand behind this one.
    once: Any

    #: Seconds after which an owed ``once`` task is sent again. None for the Alchemy's; never shorter than the hard time limit.
    redeliver_after: float | None = None

    #: Starts without an end after which a ``once`` task is dead. None for the Alchemy's.
    max_deliveries: int | None = None

    #: The session of the last request was used; see ``UnitOfWork.session_to_offer``.
    uses_session: bool

    #: The class of the sessions of a task whose last request left its session alone, so that the next one need not ask for it;
    #: None for a task that uses them, or that may run again.
    deferred_class: type[Session] | None

    #: True for an ``async def`` task.
    is_async: bool = False

    #: True for a task with ``once``.
    is_once: ClassVar[bool] = False

    #: True for a task with ``once`` or ``transient_retries``: one question, for all other tasks, instead of two.
    may_run_again: ClassVar[bool] = False

    # The parent process reports lost children and hard time limits through it.
    Request = "celery_alchemy.worker:SessionRequest"

    _factory_home: FactoryHome | None = None
    _injection: Injection = Injection((), inspect.Signature())
    _asks_class: bool = False
    _options: SessionOptions | None = None
    _policy: CommitOn | None = None
    _opening: Opening | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> SessionTask:  # noqa: PYI034 - Python 3.10 has no Self.
        # Here and not in __init__, which user's classes override without calling super(). It is early enough to be inside of
        # autoretry, which Celery wraps around task.run after the instance is made.
        task = super().__new__(cls)
        # On the instance, where Python reads them faster than on one of the many classes of a task.
        task.uses_session = False
        task.deferred_class = None
        if inspect.getattr_static(cls, "run") is not inspect.getattr_static(Task, "run"):
            task._wrap_body()
        return task

    def refuse_spanning(self) -> None:
        """Refuse what cannot hold over two databases, each of which commits by itself.

        Raises:
            ConfigurationError: The task is ``once`` or has ``transient_retries``, and asks for a session of a named database.
        """
        # A class-based task has no app when it is made.
        has_app = "app" in vars(type(self)) or cast("Any", self).__bound__
        named = self.named_databases if has_app or len(self._injection.parameters) > 1 else ()
        promise = "once" if once_of(type(self)) else "transient_retries" if self.transient_retries else None
        if not named or promise is None:
            return
        raise ConfigurationError(
            f"Task {self.name!r} has {promise} and asks for a session of {named[0]!r}: a run that is repeated would"
            " commit its writes there again.",
            f"Remove {promise}, or write there in a task of its own that is sent on commit.",
        )

    def _wrap_body(self) -> None:
        body = self.run
        bound = not inspect.ismethod(body) and not isinstance(inspect.getattr_static(type(self), "run"), staticmethod)
        self._injection = injection_of(body, bound=bound, task_name=str(self.name or type(self).__name__))
        self._asks_class = any(parameter.class_ is not None for parameter in self._injection.parameters)
        self.refuse_spanning()
        if self._injection.parameters:
            # inspect.signature() and what builds on it would follow __wrapped__ to the body's own.
            self.__signature__: inspect.Signature = self._injection.signature
            if hasattr(type(self), "__header__"):
                header = caller_header(body, self._injection)
                if header is not None:
                    self.__header__ = header
            dump = getattr(self, "_dump_pydantic_arguments", None)  # Celery 5.7
            if dump is not None:
                self._dump_pydantic_arguments = without_placeholders(dump, self._injection)
        if inspect.iscoroutinefunction(inspect.unwrap(body)):
            # An optional extra: greenlet and an async driver are only there where it is used.
            from .coroutines import in_async_unit_of_work

            self.is_async = True
            self.__dict__["run"] = in_async_unit_of_work(self, body, self._injection)
        else:
            self.__dict__["run"] = in_unit_of_work(self, body, self._injection)

    @classmethod
    def on_bound(cls, app: Celery[Any]) -> None:
        """Check the options, once Celery has applied ``task_annotations`` to the class."""
        super().on_bound(app)
        name = str(cls.name or cls.__name__)
        cls._options = None
        cls._policy = None if cls.commit_on is None else commit_on_from(cls.commit_on, f"task {name!r}")
        factory = written_in(cls, "session_factory")
        cls._factory_home = None if factory is None else FactoryHome(factory, name)
        check_options(cls, name)
        cls.is_once = bool(once_of(cls))
        cls.may_run_again = cls.is_once or bool(cls.transient_retries)
        if cls.is_once:
            check_once(cls, name, cls._policy)
            # An acknowledgement before the end, or one for a child that died, would lose the task.
            cls.acks_late = True
            cast("Any", cls).reject_on_worker_lost = True
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
        # Of an async task this is its AsyncSession.
        return cast("Any", unit.task).session_of(unit) if self.is_async else unit.session

    @property
    def async_session(self) -> AsyncSession:
        """The session of the running request of an ``async def`` task; as ``session``, with its own type.

        Raises:
            NoSessionError: No request of this task runs in this asyncio task, or the task is a plain ``def``.
        """
        if not self.is_async:
            raise NoSessionError(
                f"self.async_session of task {self.name!r}", "The task is a plain `def`: use self.session, or make it an `async def`."
            )
        return cast("AsyncSession", self.session)

    @property
    def request(self) -> Context:
        """Celery's request; in the coroutine of an async task, whose thread has no request stack, the one it runs for."""
        request: Context | None = self.request_stack.top
        if request is not None:
            return request
        unit = self._unit() if self.is_async else None
        return cast("Any", self)._get_request() if unit is None else unit.task.request

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task as Celery does; the message is sent after the transaction has ended and its locks are gone."""
        unit = self._unit()
        if unit is not None:
            unit.deferring = True
            try:
                return super().retry(*args, **kwargs)
            finally:
                unit.deferring = False
        # Autoretry, from outside of the unit of work. A retry would bring a dead task back to life.
        exc = kwargs.get("exc")
        if isinstance(exc, DeadTaskError) and exc.key == self.row_key():
            raise exc
        try:
            return super().retry(*args, **kwargs)
        except (Retry, Reject):
            raise
        except Exception as exc:
            # Autoretry has no retries left: only now has the task failed for good.
            request = self.request
            failed_for_good(self, self.row_key(), exc, tuple(request.args or ()), request.kwargs or {})
            raise

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """Make the retry's message.

        One made by ``self.retry()`` in the body waits for the end of the transaction; one of a ``once`` task stays owed.
        """
        signature = self.plain_signature_from_request(*args, **kwargs)
        send: Callable[..., Any] = signature.apply_async
        key = self.row_key()
        if key is not None:
            send = functools.partial(resend_owed, self, key, send)
        unit = self._unit()
        if unit is not None and unit.deferring:
            send = functools.partial(unit.send_after_end, send)
        cast("Any", signature).apply_async = send
        return signature

    def plain_signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """Make the message of another attempt as Celery does."""
        return super().signature_from_request(*args, **kwargs)

    def on_replace(self, sig: Signature) -> Any:
        """Replace the task as Celery does; the replacement is sent after, or kept in the outbox by, the transaction's commit."""
        unit = self._unit()
        if unit is not None and self.request.is_eager and not self.is_async:
            # Celery runs the replacement in here, where it would meet the locks of this transaction and not see its rows.
            unit.hand_over()
        if unit is None or self.request.is_eager:
            return super().on_replace(sig)
        home = self._home()
        keeps = home is not None and home.outbox is not None and (self.is_once or home.keeps_messages)
        if home is not None and keeps and "success" in self.outcomes_to_commit():
            with recording(self.app) as messages:
                sig.delay()
            hold(self.app, home, unit.session, messages, chosen_id=True)
        else:
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
        return super().apply_async(self._encoded(args), self._encoded(kwargs), *more, **options)

    def apply(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Run the task here as Celery does; entities are loaded in the task's own session, as in a worker."""
        return super().apply(self._encoded(args), self._encoded(kwargs), *more, **options)

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Signature:
        """Make a signature as Celery does; entities in its arguments become references now.

        Raises:
            EntityReferenceError: An entity has no row yet; flush first.
        """
        signature = super().signature(args, *more, **options)
        for part in ("args", "kwargs"):
            signature[part] = self._encoded(signature[part])
        return signature

    def _encoded(self, arguments: Any) -> Any:
        return encoded(arguments, self._may_travel) if arguments else arguments

    def _may_travel(self, class_: type) -> bool:
        home = home_of(self.app)
        return home is None or home.allows_entity(class_)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> AsyncResult[Any]:
        """Send the task when the transaction at hand has committed, with these arguments; see ``apply_async_on_commit``."""
        return self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(
        self, args: Any = None, kwargs: Any = None, *, session: AnySession | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send the task when the outermost transaction of a session has committed; never if it rolls back.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            session: The session; left out, that of the running request, or of the ``alchemy.session()`` block around the call.
            **options: As for ``apply_async``.

        Returns:
            The result, with its final id.

        Raises:
            NoSessionError: No session was given and none is at hand; nothing is sent early.
        """
        if session is None:
            session = session_at_hand(f"{self.name}.apply_async_on_commit()")
        return cast("AsyncResult[Any]", enqueue(session, self.signature(args, kwargs), **options))

    # --- inside ------------------------------------------------------------------------------------------------------------

    def _unit(self) -> UnitOfWork | None:
        """Return the innermost unit of work of this task that runs in this thread, greenlet or asyncio task."""
        held = at_hand.get()
        while held is not None:
            if isinstance(held, UnitOfWork) and (held.task is self or getattr(held.task, "of", None) is self):
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
        home = self._home()
        if home is None:
            raise NotConfiguredError(self.name, getattr(cast("Any", self)._app, "main", None))
        return home

    def _home(self) -> Home | None:
        return self._factory_home or home_of(cast("Any", self)._app)

    @property
    def entity_parameters(self) -> tuple[EntityParameter, ...]:
        """The parameters of the body that are annotated with mapped classes."""
        return self._injection.entities

    @property
    def once_key(self) -> Callable[..., Any] | None:
        """The callable that makes the key of a ``once`` task; None where the key is the task id."""
        once = once_of(type(self))
        return None if once is True else cast("Callable[..., Any]", once)

    def row_key(self) -> str | None:
        """Return the id of the running request's row; None for a task without ``once``, or called without an id.

        Raises:
            OnceKeyError: The task's key cannot be used.
        """
        request = self.request
        if not self.is_once or (request.id is None and self.once_key is None):
            return None
        nesting = request.replaced_task_nesting or 0
        return key_of(self, request.id or "", nesting, tuple(request.args or ()), dict(request.kwargs or {}))

    def redeliver_seconds(self, home: Home, timelimit: Sequence[float | None] | None) -> int:
        """Return after how many seconds an owed task is sent again: never while its hard time limit lets it run.

        Args:
            home: What serves the task.
            timelimit: The hard and the soft limit of its request or message.
        """
        hard_limit, _ = timelimit or (None, None)
        wanted = home.redeliver_after if self.redeliver_after is None else self.redeliver_after
        # A worker's limit is known from the start of the run on, which puts the next sending off.
        pool = worker_pool()
        limit = hard_limit or self.time_limit or (pool and pool.time_limit) or 0
        return ceil(max(wanted, limit + REDELIVER_MARGIN_SECONDS))

    def deliveries_allowed(self, home: Home) -> int:
        """Return how many starts without an end make the task dead."""
        return home.max_deliveries if self.max_deliveries is None else self.max_deliveries

    @property
    def named_databases(self) -> tuple[str, ...]:
        """The names of the databases, beside the default one, that the body asks for sessions of.

        In an app with one database the text in ``Annotated[Session, "text"]`` is a comment, unless it stands beside another session.
        """
        parameters = self._injection.parameters
        names = tuple(parameter.database for parameter in parameters if parameter.database is not None)
        return names if names and (len(parameters) > 1 or self.has_named_databases) else ()

    @property
    def has_named_databases(self) -> bool:
        """True if the app has an Alchemy with a name."""
        return any(name is not None for name in homes_of(self.app))

    def session_listeners(self) -> Sequence[SessionListener]:
        """Return who wants to know of closed sessions."""
        return self.home().session_listeners

    def in_database(self, database: str) -> OtherDatabase:
        """Return this task as a unit of work on another of the app's databases sees it."""
        return OtherDatabase(self, database)

    def outcomes_to_commit(self) -> CommitOn:
        """Return the outcomes that commit: the task's own, or those of what serves it that end a ``once`` task."""
        if self._policy is not None:
            return self._policy
        commit_on = self.home().commit_on
        return commit_on & ONCE_COMMITS_ON | SUCCESS if self.is_once else commit_on

    def open_session(self, unit: UnitOfWork, *, deferred: bool = False) -> Session:
        """Return a session for a unit of work, ready for use or deferred until it is used."""
        if deferred:
            return self.deferred_session(unit)
        opened, unit.commit_on, unit.listeners = self._opening or self._find_opening()
        unit.pending = True
        return opened(self.unit_options(unit))

    def _find_opening(self) -> Opening:
        home = self.home()
        self._opening = (self.of_asked_class(home.source).opened, self.outcomes_to_commit(), home.session_listeners)
        return self._opening

    def deferred_session(self, unit: UnitOfWork) -> Session:
        """Return a session for a unit of work that may not use it."""
        source = self.of_asked_class(self.home().source)
        if not self.may_run_again:
            self.deferred_class = source.deferred_class
        session: Session = source.session(unit)
        return session

    def of_asked_class(self, source: Any, database: str | None = None) -> Any:
        """Return a source of sessions of the class that the body's parameter is annotated with.

        Raises:
            ConfigurationError: The source cannot give such sessions.
        """
        if not self._asks_class:
            return source
        named = len(self._injection.parameters) > 1 or self.has_named_databases
        class_ = self._injection.session_class(database, named=named)
        return source if class_ is None else source.of_class(class_, f"Task {self.name!r}")

    def forget_home(self) -> None:
        """Ask anew for what serves this task with sessions."""
        self.deferred_class = None
        self._opening = None

    def unit_options(self, unit: UnitOfWork) -> SessionOptions:
        """Return what a unit's session needs: the task's options, and when its time limit ends its statements.

        The hard limit if the task has one. At a soft limit the body is told, and may still clean up; without a hard one its
        statements end SOFT_GRACE_SECONDS later.
        """
        options = self._options
        if options is None:
            options = type(self)._options = SessionOptions(
                self.isolation_level, self.read_only, idle_limit_seconds=self.home().idle_transaction_seconds
            )
        # As self.request, which makes an empty one where no request runs.
        request: Context | None = self.request if self.is_async else self.request_stack.top
        if request is None or request.called_directly or request.is_eager:
            return options
        hard, soft = request.timelimit or (None, None)
        limit = hard or self.time_limit
        if limit is None and (soft := soft or self.soft_time_limit) is not None:
            limit = soft + SOFT_GRACE_SECONDS
        return replace(options, timeout_at=began_at(unit, request) + limit) if limit else options

    def failure_record(self) -> Callable[..., Any] | None:
        """Return the task's ``record_failure``, ready to be called with a session, the error and the task's arguments."""
        record: Any = inspect.getattr_static(type(self), "record_failure")
        if isinstance(record, (staticmethod, classmethod)) or _is_method(record):
            record = record.__get__(self, type(self))
        return cast("Callable[..., Any] | None", record)

    def fail_for_good(
        self, unit: OnceUnit, exc: BaseException, args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: str | None = None
    ) -> State | None:
        """Record that a ``once`` task has failed for good; see ``failed_for_good()``."""
        return failed_for_good(self, unit.key, exc, args, kwargs, reason=reason, in_own_session=unit.in_own_session)


def _is_method(record: Any) -> bool:
    """Tell whether a ``record_failure`` was written as a method of a task's class, by the name of its first parameter."""
    return inspect.isfunction(record) and next(iter(inspect.signature(record).parameters), None) == "self"


def asks_in_vain(task: Any) -> tuple[str, str] | None:
    """Return what is wrong with a task that asks for a session and has a class that injects none, and the fix; None if it is not so.

    Raises:
        SessionParameterError: Its session parameter could not be filled by any class.
    """
    if isinstance(task, SessionTask) or task.name.startswith("celery."):
        return None
    parameters = injection_of(task.run, bound=False, task_name=task.name).parameters
    if not parameters:
        return None
    # Between the task and its class stands the one that Celery makes of that for the app, named Task.
    given = next(class_ for class_ in type(task).__mro__[1:] if vars(class_).get("_app") is None)
    return (
        f"Task {task.name} asks for a session as {parameters[0].name!r}, but its class is {given.__name__}, which injects none.",
        "Give it base=SessionTask, or mix SessionTask into the class.",
    )
