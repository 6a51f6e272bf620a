"""SessionTask: a Celery task class whose body runs in one SQLAlchemy session and transaction.

The entrance for bodies and callers: what a body asks of its running request, and the ways to send a
task. ``requests/planned_task.py`` has its options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from celery import canvas
from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import Reject, Retry
from sqlalchemy.orm import Session

from .errors import DeadTaskError, NoSessionError, SessionArgumentError
from .messages.celery_types import AnyTask, Eager, Result
from .messages.recording import recording
from .requests.attempt import UnitOfWork, at_hand
from .requests.deliveries import resend_owed
from .requests.eager import noted_errors
from .requests.failure import Failure, failed_for_good
from .requests.once_keys import nesting_of, row_key, with_nesting
from .requests.planned_task import PlannedTask
from .requests.put_back import PutBack, send_or_put_back
from .requests.registry import home_of
from .requests.replacement import replacement_applied
from .requests.sending import enqueue, hold, session_at_hand
from .sessions.any_session import AnySession
from .sessions.at_hand import alive
from .signatures.entities import encoded
from .signatures.injection import injection_of
from .signatures.options import refuse_map, refuse_old_protocol
from .signatures.outcomes import Replaced, ReplacedHere

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["SessionTask", "asks_in_vain"]

#: What asks for a session at hand.
_ON_COMMIT = "apply_async_on_commit()"


class SessionTask(PlannedTask):
    """A task with a session.

    ``Alchemy`` makes it the app's default task class; ``base=SessionTask`` asks for it by hand, and
    it mixes with other bases. The session is the parameter annotated with ``Session``, or
    ``self.session`` of a bound task: one for each request, opened at its first use, committed or
    rolled back by ``commit_on`` when the body ends, and always closed.
    """

    abstract = True

    # --- what bodies use --------------------------------------------------------------------------

    def _unit(self) -> UnitOfWork | None:
        """Return the innermost unit of work of this task.

        It is one that runs in this thread, greenlet or asyncio task.
        """
        plan, held = self.session_plan, alive(at_hand.get())
        while held is not None:
            # A plan that was made anew while the request runs is of the same task.
            if isinstance(held, UnitOfWork) and held.plan.task is plan.task and held.plan.is_body:
                return held
            held = held.outer
        return None

    @property
    def session(self) -> Session:
        """The session of the running request.

        What the application's own code assigns to it, as a ``before_start`` of its class does, is
        what it returns from then on.

        Raises:
            NoSessionError: No request of this task runs in this thread or greenlet.
        """
        own: Session | None = vars(self).get("session")
        if own is not None:
            return own
        unit = self._unit()
        if unit is None:
            raise NoSessionError(
                f"self.session of task {self.name!r}",
                "It exists while the task's body runs; elsewhere use `with alchemy.session() as"
                " session:`.",
            )
        # Of an async task this is its AsyncSession.
        return cast("Session", unit.handed_out()) if self.is_async else unit.session

    @session.setter
    def session(self, session: Session | None) -> None:
        vars(self)["session"] = session

    @property
    def async_session(self) -> AsyncSession:
        """The session of the running request of an ``async def`` task.

        As ``session``, with its own type.

        Raises:
            NoSessionError: No request of this task runs in this asyncio task, or the task is a
                plain ``def``.
        """
        if not self.is_async:
            raise NoSessionError(
                f"self.async_session of task {self.name!r}",
                "The task is a plain `def`: use self.session, or make it an `async def`.",
            )
        return cast("AsyncSession", self.session)

    @property
    def request(self) -> Context:
        """Celery's request.

        In the coroutine of an async task, whose thread has no request stack, the one it runs for;
        Celery's default outside of any.
        """
        request: Context | None = self.request_stack.top
        if request is not None:
            return request
        unit = self._unit() if self.is_async else None
        default: Context = super().request if unit is None else unit.request
        return default

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task as Celery does.

        The message is sent after the transaction has ended and its locks are gone.
        """
        retry: Callable[..., Retry] = super().retry
        unit = self._unit()
        if unit is not None:
            with unit.deferring():
                return retry(*args, **kwargs)
        # Autoretry, from outside of the unit of work. A retry would bring a dead task back to life.
        exc = kwargs.get("exc")
        if isinstance(exc, DeadTaskError) and exc.key == row_key(self.session_plan, self.request):
            raise exc
        try:
            return retry(*args, **kwargs)
        except Retry:
            raise
        except Reject as rejected:
            # Celery rejects what could not be sent, for good.
            reason = rejected.args[0]
            if isinstance(reason, PutBack):
                raise reason from rejected
            raise
        except Exception as exc:
            # Autoretry has no retries left: only now has the task failed for good.
            request = self.request
            failure = Failure(
                self.session_plan, request, exc, tuple(request.args or ()), request.kwargs or {}
            )
            failed_for_good(failure, row_key(self.session_plan, request))
            raise

    def signature_from_request(self, *args: Any, **kwargs: Any) -> Signature:
        """Make the retry's message.

        One made by ``self.retry()`` in the body waits for the end of the transaction; one of a
        ``once`` task stays owed.
        """
        make: Callable[..., Signature] = super().signature_from_request
        signature = make(*args, **kwargs)
        send: Callable[..., object] = signature.apply_async
        key = row_key(self.session_plan, self.request)
        if key is not None:
            send = functools.partial(resend_owed, self.session_plan, key, send)
        if self.session_plan.home is not None and self.session_plan.home.is_broker:
            send = functools.partial(send_or_put_back, self.session_plan, self.request, send)
        unit = self._unit()
        if unit is not None and unit.is_deferring:
            send = functools.partial(unit.send_after_end, send)
        vars(signature)["apply_async"] = send
        return signature

    def replace(self, sig: Signature) -> Any:
        """Replace the task as Celery does; one that runs eagerly knows its depth too."""
        self.request.replaced_task_nesting = nesting_of(self.request)
        return super().replace(sig)

    def on_replace(self, sig: Signature) -> Any:
        """Replace the task as Celery does.

        The replacement is sent after, or kept in the outbox by, the transaction's commit. In eager
        mode it runs when the task has ended.
        """
        unit = self._unit()
        if unit is None:
            return super().on_replace(sig)
        if self.request.is_eager:
            raise ReplacedHere(sig, self.request, row_key(self.session_plan, self.request))
        home = self.session_plan.home
        keeps = (
            home is not None and home.outbox is not None and (self.is_once or home.keeps_messages)
        )
        if home is not None and keeps and "success" in self.session_plan.commit_on:
            with recording(self.app) as messages:
                sig.delay()
            hold(self.app, home, unit.session, messages, chosen_id=True)
        else:
            unit.send_after_end(sig.delay)
        raise Replaced("Replaced by new task")

    # --- what callers use -------------------------------------------------------------------------

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Send the task as Celery does.

        Raises:
            SessionArgumentError: A session was passed; it cannot travel in a message.
            ConfigurationError: A ``once`` task in an app with ``task_protocol=1``.
        """
        if self.is_once:
            refuse_old_protocol(self)
        asked = self._injection.session
        if asked is not None and (
            asked.name in (kwargs or {}) or any(isinstance(arg, Session) for arg in args or ())
        ):
            raise SessionArgumentError(str(self.name), asked.name)
        send: Callable[..., Result] = super().apply_async
        return send(self._encoded(args), self._encoded(kwargs), *more, **options)

    def apply(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        """Run the task here as Celery does.

        Entities are loaded in the task's own session, as in a worker.

        Raises:
            Exception: With ``throw``, or ``task_eager_propagates``: the task's own error, or that
                of a task which it has sent on commit in an eager app.
        """
        run: Callable[..., Eager] = super().apply
        with noted_errors() as (errors, is_outermost):
            result = run(self._encoded(args), self._encoded(kwargs), *more, **with_nesting(options))
            result = replacement_applied(self, result, throws=options.get("throw"))
            if (
                is_outermost
                and errors
                and self.app.either("task_eager_propagates", options.get("throw"))
            ):
                raise errors[0]
            return result

    def signature(self, args: Any = None, *more: Any, **options: Any) -> Signature:
        """Make a signature as Celery does; entities in its arguments become references now.

        Raises:
            EntityReferenceError: An entity has no row yet; flush first.
        """
        make: Callable[..., Signature] = super().signature
        signature = make(args, *more, **options)
        for part in ("args", "kwargs"):
            signature[part] = self._encoded(signature[part])
        return signature

    def map(self, it: Iterable[Any]) -> canvas.xmap:
        """Make the signature of one task for many arguments as Celery does.

        Raises:
            ConfigurationError: The task is ``once=True``: its items would be done again with each
                delivery.
        """
        refuse_map(self, "map")
        return super().map(it)

    def starmap(self, it: Iterable[Any]) -> canvas.xstarmap:
        """Make the signature of one task for many argument lists; as for ``map``."""
        refuse_map(self, "starmap")
        return super().starmap(it)

    def chunks(self, it: Iterable[Any], n: int) -> canvas.chunks:
        """Make the signature of a few tasks for many argument lists; as for ``map``."""
        refuse_map(self, "chunks")
        return super().chunks(it, n)

    def _encoded(self, arguments: object) -> object:
        return encoded(arguments, self._may_travel) if arguments else arguments

    def _may_travel(self, class_: type) -> bool:
        home = home_of(self.app)
        return home is None or home.allows_entity(class_)

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> Result:
        """Send the task when the transaction at hand has committed, with these arguments.

        See ``apply_async_on_commit``.
        """
        try:
            return self.apply_async_on_commit(args, kwargs)
        except NoSessionError as error:
            if error.what != f"{self.name}.{_ON_COMMIT}":
                raise
            raise NoSessionError(f"{self.name}.delay_on_commit()", error.remedy) from None

    def apply_async_on_commit(
        self,
        args: Any = None,
        kwargs: Any = None,
        *,
        session: AnySession | None = None,
        **options: Any,
    ) -> Result:
        """Send the task when the outermost transaction of a session has committed.

        Never if it rolls back.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
            session: The session; left out, that of the running request, or of the
                ``alchemy.session()`` block around the call.
            **options: As for ``apply_async``.

        Returns:
            The result, with its final id.

        Raises:
            NoSessionError: No session was given and none is at hand; nothing is sent early.
        """
        if session is None:
            session = session_at_hand(f"{self.name}.{_ON_COMMIT}")
        # Its entities become references in apply_async(), for which an eager app does not wait:
        # large arguments are walked once.
        make = self.signature if self.app.conf.task_always_eager else super().signature
        result: Result = enqueue(session, make(args, kwargs), **options)
        return result


#: Options that say what they mean in any class; the others may be something else in a class of the
#: user's.
_UNMISTAKABLE = (
    "commit_on",
    "isolation_level",
    "once",
    "read_only",
    "record_failure",
    "transient_retries",
)
_OPTIONS = (*_UNMISTAKABLE, "around", "missing")


def asks_in_vain(task: AnyTask) -> tuple[str, str] | None:
    """Return what is wrong with a task that asks for what its class does not give, and the fix.

    None if it is not so.

    It may ask for a session by a parameter, or have options of SessionTask.

    Raises:
        SessionParameterError: Its session parameter could not be filled by any class.
    """
    if isinstance(task, SessionTask) or task.name.startswith("celery."):
        return None
    asked = injection_of(task.run, bound=False, task_name=task.name).session
    options = _options_in_vain(type(task))
    if asked is None and not options:
        return None
    asks = [] if asked is None else [f"asks for a session as {asked.name!r}"]
    lacks = [] if asked is None else ["injects none"]
    if options:
        asks.append(f"has {', '.join(options)}")
        lacks.append("knows nothing of such options: they have no effect")
    # Between the task and its class stands the one that Celery makes of that for the app, named
    # Task.
    given = next(class_ for class_ in type(task).__mro__[1:] if vars(class_).get("_app") is None)
    fix = (
        "Give it base=SessionTask, or mix SessionTask into the class. A class that is assigned to"
        " app.Task is mixed when that is done before Alchemy(app, ...)."
    )
    problem = (
        f"Task {task.name} {' and '.join(asks)}, but its class is {given.__name__}, which"
        f" {' and '.join(lacks)}."
    )
    return problem, fix


def _options_in_vain(cls: type) -> list[str]:
    """Return the options of SessionTask that a class has which is none.

    Celery-once's dict ``once`` is its own.
    """
    own = vars(cls)
    found = [name for name in _OPTIONS if name in own or name in _UNMISTAKABLE]
    return sorted(
        name
        for name in found
        if (value := inspect.getattr_static(cls, name, None)) is not None
        and not isinstance(value, dict)
    )
