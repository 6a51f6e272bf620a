"""The session of a request: made when it is first used, offered to the body and to the application.

Underneath ``attempt.py``, which ends it.
"""

from __future__ import annotations

from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from celery.app.task import Context
from sqlalchemy.orm import Session

from ..errors import ConfigurationError
from ..sessions.at_hand import AtHand
from ..sessions.commits import began_at
from ..sessions.engine import worker_pool
from ..sessions.scope import RequestRegistry
from ..sessions.sources import DEFERRED, is_open
from ..sessions.state import SessionOptions
from ..sessions.takeover import carry_over, pattern_of, refuse_removed, take_over, use_of
from .plan import Plan

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["RequestSession"]


class RequestSession:
    """One request's session, and what it is asked for.

    Args:
        plan: What it needs of its task.
        outer: What was at hand before this request began.
        request: Celery's request; None for the one on top of the task's stack.
        timeout_at: ``time.monotonic()`` seconds at which the database ends its statements; None for
            what the time limits say.
    """

    # Defaults on the class: a request that never touches its session sets a few attributes only.
    #: The session if the request has touched it, or was offered it; reading this does not make one.
    used_session: Session | None = None

    #: The AsyncSession around the session of an ``async def`` task.
    async_session: AsyncSession | None = None

    #: The session that is about to end, or has ended.
    ended_session: Session | None = None

    #: How the next session is set up, in a request whose session its application has removed from
    #: the registry.
    pattern: Session | None = None

    #: There is something to end: an opened session, or a message to send. Else ``succeed()`` would
    #: do nothing.
    pending: bool = False

    #: The body has returned or raised, and what follows its end is done.
    has_ended: bool = False

    #: True if the session is the caller's.
    is_borrowed: bool = False

    #: True for a task with ``once``, whose sends always go through the outbox.
    is_once: bool = False

    #: The registry of the application that hands out this request's session, until it has ended.
    registry: RequestRegistry | None = None

    #: The scope of that registry in which the request began.
    scope: object = None

    def __init__(
        self,
        plan: Plan,
        outer: AtHand | None,
        request: Context | None = None,
        timeout_at: float | None = None,
    ) -> None:
        self.plan: Plan = plan
        self.outer: AtHand | None = outer
        #: ``time.monotonic()`` seconds.
        self.started: float = monotonic()
        #: Celery's request, where the task's stack does not have it.
        self.given_request: Context | None = request
        self._timeout_at = timeout_at
        if plan.registry is not None:
            self.registry = plan.registry
            self.scope = plan.registry.scope()

    @property
    def request(self) -> Context:
        """Celery's request; an empty one where the body was called past Celery."""
        if self.given_request is not None:
            return self.given_request
        top: Context | None = self.plan.task.request_stack.top
        return Context() if top is None else top

    def borrow(self, session: Session | AsyncSession) -> None:
        """Use a session that the caller owns: it is neither committed, rolled back nor closed."""
        if isinstance(session, Session):
            self.used_session = session
        else:
            self.async_session, self.used_session = session, session.sync_session
        self.is_borrowed = True

    def owner(self) -> str:
        """Name the request as Celery's logs do."""
        return f"Task {self.plan.name}[{self.request.id}]"

    def owner_of(self, session: Session) -> str | None:
        """Return the name of the request if the session was made for it.

        Its work is the task's then, not a caller's.
        """
        is_used = session is self.used_session and not self.is_borrowed
        return self.owner() if is_used or session is self.ended_session else None

    @property
    def session(self) -> Session:
        """The session of this request, made at the first use.

        In callables that run after its commit, it is still that one.
        """
        session = self.used_session
        return (self.ended_session or self._open()) if session is None else session

    def session_to_offer(self) -> Session:
        """Return the session for a parameter of a body that may return before it uses it.

        Deferring its ``__init__`` saves 5 us if it is not used and costs 3 us if it is; so it is
        done as the last request suggests.
        """
        session = self.used_session or self.ended_session
        if session is None:
            plan = self.plan
            if plan.is_async or plan.habit.uses_session:
                return self._open()
            session = self.used_session = plan.deferred_session(self)
        return session

    def offered(self) -> Session | AsyncSession:
        """Return what the body's parameter gets."""
        deferred_class = self.plan.habit.deferred_class
        if deferred_class is not None and self.used_session is None:
            # For a task that nothing special is asked of; as session_to_offer(), with three calls
            # less.
            session = self.used_session = deferred_class()
            session.__dict__[DEFERRED] = self
            return session
        session = self.session_to_offer()
        return session if self.async_session is None else self.async_session

    def _open(self) -> Session:
        plan = self.plan
        options = self.session_options()
        if plan.is_async:
            self.async_session = plan.async_source.opened(options)
            session = self.async_session.sync_session
        else:
            session = plan.source.opened(options)
        self._follow(session)
        return session

    def _follow(self, session: Session) -> None:
        """Use a session, set up as the one whose place it takes."""
        self.used_session = session
        if self.pattern is not None:
            carry_over(self.pattern, session)
            self.pattern = None

    def _be_followed(self, session: Session) -> None:
        """Have the next session set up as one so far.

        What is around the body was told of that one only.
        """
        if self.plan.around is not None or self.is_once:
            self.pattern = pattern_of(session)

    def another_session(self) -> Session:
        """Return another session of the same kind, for what is committed by itself.

        The caller ends it.
        """
        plan = self.plan
        options = self.session_options()
        if plan.is_async:
            return plan.async_source.opened(options).sync_session
        return plan.source.opened(options)

    def session_options(self) -> SessionOptions:
        """Return what a session is asked for when it is opened.

        These are the task's options, and the end of its time limit.
        """
        self.pending = True
        options = self.plan.options
        if self._timeout_at is not None:
            return replace(options, timeout_at=self._timeout_at)
        request = self.request
        if request.called_directly or request.is_eager:
            return options
        limit = self.plan.limit_seconds(request.timelimit)
        if not limit:
            return options
        pool = worker_pool()
        return replace(
            options,
            timeout_at=began_at(request, self.started) + limit,
            may_run_late=pool is not None and not pool.enforces_limits,
        )

    # --- for the registry of the application, see ``sessions/scope.py`` ---------------------------

    def handed_out(self) -> Session | AsyncSession:
        """Return the session for the registry, made at the first use."""
        if self.async_session is not None:
            return self.async_session
        return self.offered() if self.plan.is_async else self.session

    def is_handed_out(self) -> bool:
        """Tell whether that session has been used."""
        session = self.used_session
        return session is not None and is_open(session)

    def take(self, session: Session | AsyncSession) -> None:
        """Use a session that the application has put into its registry, under the task's rules.

        Raises:
            ConfigurationError: The request's session is in use; its work would be lost.
        """
        sync = session if isinstance(session, Session) else session.sync_session
        used = self.used_session
        if used is sync:
            return
        if used is not None and is_open(used) and use_of(used) is not None:
            raise ConfigurationError(
                f"{self.owner()} has put another session into its registry while its own is in use,"
                f" {use_of(used)}: what that did would be lost.",
                "Commit or roll back and remove() first, or use the other session by its own name.",
            )
        take_over(sync, self.session_options())
        if used is not None:
            self._be_followed(used)
        self._follow(sync)
        self.async_session = None if isinstance(session, Session) else session

    def renew(self) -> None:
        """Have the next use make another session: the application has removed this one.

        What still holds the removed one is told so, for nobody would commit it.
        """
        session = self.used_session
        if session is None or self.is_borrowed or not is_open(session):
            return
        self._be_followed(session)
        refuse_removed(session, self.owner())
        self.used_session = self.async_session = None
