"""What the units of work of a task need of it: one object for each task, made at its first request.

Between ``planned_task.py``, which has the options and makes the plan, and ``attempt.py`` and its
neighbours, which ask nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Protocol

from celery.canvas import Signature
from sqlalchemy.orm import Session

from ..errors import NotConfiguredError
from ..events import SessionListener
from ..messages.celery_types import AnyTask, App
from ..sessions.engine import worker_pool
from ..sessions.ledger import SessionOptions
from ..sessions.scope import RequestRegistry
from ..sessions.sources import Asks, AsyncSessionSource, SessionSource
from ..signatures.entities import Missing
from ..signatures.injection import Injection, injection_of
from ..signatures.outcomes import ONCE_COMMITS_ON, SUCCESS, CommitOn
from .registry import Home

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["Habit", "OncePlan", "Plan", "Planned", "Timelimit"]

#: Seconds that are left to a killed run to be gone before its task is sent again.
REDELIVER_MARGIN_SECONDS = 5

#: Seconds after a soft time limit for which statements may still run. The limit is an exception in
#: the body; the server must neither be faster, nor cut off what the body does about it.
SOFT_GRACE_SECONDS = 2

#: The hard and the soft limit of a request or a message.
Timelimit = Sequence[float | None]


class Habit:
    """What the last request of a task did with its session: the next one very likely does the same.

    Attributes:
        uses_session: It sent statements.
        deferred_class: The class of the sessions of a task whose last request left its session
            alone, so that the next one need not ask for it; None for a task that uses them, or that
            may run again.
    """

    __slots__ = ("deferred_class", "uses_session")

    def __init__(self) -> None:
        self.uses_session: bool = False
        self.deferred_class: type[Session] | None = None

    def note(self, *, uses_session: bool) -> None:
        """Note how a request has ended that had its session opened."""
        self.uses_session = uses_session
        self.deferred_class = None


@dataclass(frozen=True, slots=True)
class OncePlan:
    """What a ``once`` task asks for.

    Attributes:
        make_key: Makes the key of the task's arguments; None where the key is the task id.
        redeliver_after: Seconds after which it is sent again; None for the Alchemy's.
        max_deliveries: Starts without an end after which it is dead; None for the Alchemy's.
    """

    make_key: Callable[..., object] | None
    redeliver_after: float | None
    max_deliveries: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What the units of work of a task need of it.

    Attributes:
        task: Whose plan it is: given to the application's own callables, never asked.
        name: What the task is called in logs and reports.
        app: The Celery app.
        home: What serves the task with sessions; None for a task that has nothing of the kind.
        injection: What the body's signature asks for.
        is_async: The body is a coroutine function, its session an AsyncSession.
        policy: The task's own outcomes that commit; None for those of its home.
        options: What each session is asked for, but for its time limit.
        time_limit: The hard time limit of requests that have none, in seconds; None for none.
        soft_time_limit: The same for the soft one.
        transient_retries: How often the body is run again.
        missing: What becomes of a request when the row of an entity is not there.
        once: For a ``once`` task; None for any other.
        around: Returns what is around the body, for a session; None for nothing.
        around_written: The function whose annotations say for which kind of session that is.
        record: The task's ``record_failure``, ready to be called; None if it has none.
        autoretry_for: The errors after which Celery's autoretry runs the task again.
        dont_autoretry_for: Those among them after which it does not.
        sign_again: Makes the message of another attempt, as Celery does.
        is_body: It is the body's, whose sessions listeners are told of; False for that of
            ``record_failure``.
        habit: What the last request did.
    """

    task: AnyTask
    name: str
    app: App
    home: Home | None
    injection: Injection
    is_async: bool
    policy: CommitOn | None
    options: SessionOptions
    time_limit: float | None
    soft_time_limit: float | None
    transient_retries: int
    missing: Missing
    once: OncePlan | None
    around: Callable[[Session | AsyncSession], object] | None
    around_written: Callable[..., object] | None
    record: Callable[..., object] | None
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    sign_again: Callable[..., Signature]
    is_body: bool
    habit: Habit

    @cached_property
    def asks_more(self) -> bool:
        """True for ``once``, ``transient_retries`` or ``around``: one question instead of three."""
        return self.once is not None or self.around is not None or bool(self.transient_retries)

    @cached_property
    def required_home(self) -> Home:
        """What serves the task with sessions.

        Raises:
            NotConfiguredError: Nothing does.
        """
        if self.home is None:
            raise NotConfiguredError(self.name, self.app.main)
        return self.home

    @cached_property
    def registry(self) -> RequestRegistry | None:
        """The application's registry that hands out the sessions of the requests; None for none."""
        registry = None if self.home is None else self.home.registry
        return registry if registry is not None and registry.is_async == self.is_async else None

    @cached_property
    def commit_on(self) -> CommitOn:
        """The outcomes that commit: the task's own, or those of its home that end a ``once`` task.

        Raises:
            NotConfiguredError: As for ``required_home``.
        """
        if self.policy is not None:
            return self.policy
        of_home = self.required_home.commit_on
        return of_home if self.once is None else of_home & ONCE_COMMITS_ON | SUCCESS

    @cached_property
    def listeners(self) -> Sequence[SessionListener]:
        """Those who want to know of each closed session; the list is its home's own."""
        return self.home.session_listeners if self.is_body and self.home is not None else ()

    @cached_property
    def source(self) -> SessionSource:
        """Where the sessions come from, of the class that the body's parameter is annotated with.

        Raises:
            ConfigurationError: Nothing serves the task, or what does cannot give such sessions.
        """
        source = self.required_home.source
        class_ = self._asked_class
        return source if class_ is None else source.of_class(class_, f"Task {self.name!r}")

    @cached_property
    def async_source(self) -> AsyncSessionSource:
        """Where the AsyncSessions of an ``async def`` task come from.

        Raises:
            ConfigurationError: As for ``source``.
        """
        source = self.required_home.async_source
        class_ = self._asked_class
        return source if class_ is None else source.of_class(class_, f"Task {self.name!r}")

    @property
    def _asked_class(self) -> type | None:
        return None if self.injection.session is None else self.injection.session.class_

    def deferred_session(self, unit: Asks) -> Session:
        """Return a session for a unit of work that may not use it."""
        source = self.source
        if not self.asks_more:
            self.habit.deferred_class = source.deferred_class
        return source.session(unit)

    def limit_seconds(self, timelimit: Timelimit | None) -> float | None:
        """Return after how many seconds the database ends a request's statements; None for never.

        The hard limit if there is one. At a soft limit the body is told, and may still clean up;
        without a hard one its statements end SOFT_GRACE_SECONDS later.
        """
        hard, soft = timelimit or (None, None)
        limit = hard or self.time_limit
        if limit is not None:
            return limit
        soft = soft or self.soft_time_limit
        return None if soft is None else soft + SOFT_GRACE_SECONDS

    @cached_property
    def record_plan(self) -> Plan | None:
        """The plan of the task's ``record_failure``: always committed, told to no listener.

        Raises:
            SessionParameterError: What its signature asks for cannot be given.
        """
        if self.record is None:
            return None
        name = f"record_failure of {self.name}"
        injection = injection_of(self.record, bound=False, task_name=name)
        return replace(
            self,
            name=name,
            injection=injection,
            is_async=injection.is_async,
            policy=SUCCESS,
            options=SessionOptions(),
            time_limit=None,
            soft_time_limit=None,
            transient_retries=0,
            missing="fail",
            once=None,
            is_body=False,
            habit=Habit(),
        )

    # --- once -------------------------------------------------------------------------------------

    def redeliver_seconds(self, timelimit: Timelimit | None) -> int:
        """Return after how many seconds an owed task is sent again.

        Never while its hard time limit lets it run.

        Args:
            timelimit: The hard and the soft limit of its request or message.
        """
        hard_limit, _ = timelimit or (None, None)
        own = None if self.once is None else self.once.redeliver_after
        wanted = self.required_home.redeliver_after if own is None else own
        # A worker's limit is known from the start of the run on, which puts the next sending off.
        pool = worker_pool()
        limit = hard_limit or self.time_limit or (pool and pool.time_limit) or 0
        return ceil(max(wanted, limit + REDELIVER_MARGIN_SECONDS))

    @property
    def deliveries_allowed(self) -> int:
        """How many starts without an end make the task dead."""
        own = None if self.once is None else self.once.max_deliveries
        return self.required_home.max_deliveries if own is None else own


class Planned(Protocol):
    """A task that has a plan.

    Attributes:
        found_plan: The plan, if it has been made: asked first, for it costs less than
            ``session_plan``.
    """

    found_plan: Plan | None

    @property
    def session_plan(self) -> Plan: ...
