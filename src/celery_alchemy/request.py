"""The life of a request: one attempt of one task, with one session and one transaction policy.

``task.py`` opens a UnitOfWork around the task's body; here it commits or rolls back, closes, and only then lets messages out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from time import monotonic
from typing import Any, Protocol

from celery.app.task import Context
from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy import Connection, Row, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from .entities import is_entity
from .errors import EntityReturnedError
from .events import SessionListener, SessionReport, tell
from .ledger import LEDGER, Ledger, ledger_of
from .outcome import CommitOn, Outcome, outcome_of
from .sessions import DEFERRED, SessionOptions
from .transaction import WAITING, is_joined, set_owner

__all__ = ["PLAIN_TYPES", "AtHand", "UnitOfWork", "Works", "abandon", "at_hand", "close_quietly", "refuse_entities"]

logger: logging.Logger = logging.getLogger(__name__)


class AtHand(Protocol):
    """A session that ``delay_on_commit`` may use without being told: a running request's, or an ``alchemy.session()`` block's."""

    #: What was at hand before, None if nothing was.
    outer: AtHand | None

    @property
    def session(self) -> Session: ...


# A context variable follows the thread, the greenlet and the asyncio task, each of which is one request in its pool; it costs a
# third of Celery's request stack.
at_hand: ContextVar[AtHand | None] = ContextVar("celery_alchemy_at_hand", default=None)


class Works(Protocol):
    """What a unit of work asks of the task that it runs for."""

    name: str

    #: The session of the last request was used, so that of the next one very likely will be.
    uses_session: bool

    #: Set while the requests of a task leave their sessions alone; see ``SessionTask.deferred_class``.
    deferred_class: type[Session] | None

    @property
    def request(self) -> Context: ...

    def open_session(self, unit: UnitOfWork, *, deferred: bool = False) -> Session: ...

    def outcomes_to_commit(self) -> CommitOn: ...

    def session_listeners(self) -> Sequence[SessionListener]: ...

    @property
    def has_named_databases(self) -> bool: ...

    def in_database(self, database: str) -> Works: ...

    def home(self) -> Any: ...

    def unit_options(self, unit: UnitOfWork) -> SessionOptions: ...


class UnitOfWork:
    """One request's session and what becomes of it.

    Args:
        task: The task; it opens the session at the first use and says which outcomes commit.
        outer: What was at hand before this request began.
    """

    # Defaults on the class: a request that never touches its session sets four attributes and no more.
    #: The session if the request has touched it, or was offered it; reading this does not make one.
    used_session: Session | None = None
    _borrowed: bool = False
    _unsent: list[Callable[[], object]] | None = None

    #: There is something to end: an opened session, or a message to send. Else ``succeed()`` would do nothing.
    pending: bool

    #: The outcomes that commit, and who wants to know of the session's end; known once a session was opened.
    commit_on: CommitOn | None = None
    listeners: Sequence[SessionListener] | None = None

    #: True once COMMIT was sent: an error without an answer from the database does not say whether it was carried out.
    commit_is_uncertain: bool = False

    #: True if the session was bound to a Connection: its transaction is somebody else's to end.
    is_in_callers_transaction: bool = False

    #: True for a task with ``once``, whose sends always go through the outbox.
    is_once: bool = False

    #: The units of the app's other databases, by name.
    others: dict[str, UnitOfWork] | None = None

    #: True if whoever runs the unit sends what waits for its end.
    sends_elsewhere: bool = False

    #: True while ``self.retry()`` runs: the message it makes waits for the end of the transaction.
    deferring: bool = False

    def __init__(self, task: Works, outer: AtHand | None) -> None:
        self.task = task
        self.outer = outer
        self.pending = False
        #: ``time.monotonic()`` seconds.
        self.started: float = monotonic()

    def borrow(self, session: Session) -> None:
        """Use a session that the caller owns: it is neither committed, rolled back nor closed."""
        self.used_session = session
        self._borrowed = True

    def borrow_other(self, database: str, session: Session) -> None:
        """Use a session that the caller owns for another of the app's databases."""
        self.other(database).borrow(session)

    def use(self, session: Session) -> None:
        """Take a session that was made for this request."""
        self.used_session = session
        self.pending = True

    def owner(self) -> str:
        """Name the request as Celery's logs do."""
        return f"Task {self.task.name}[{self.task.request.id}]"

    @property
    def session(self) -> Session:
        """The session of this request, made at the first use."""
        session = self.used_session
        if session is None:
            session = self.used_session = self.task.open_session(self)
        return session

    def session_to_offer(self) -> Session:
        """Return the session for a parameter of a body that may return before it uses it.

        Deferring its ``__init__`` saves 5 us if it is not used and costs 3 us if it is; so it is done as the last request suggests.
        """
        session = self.used_session
        if session is None:
            task = self.task
            session = self.used_session = task.open_session(self, deferred=not task.uses_session)
        return session

    @property
    def is_borrowed(self) -> bool:
        """True if the session is the caller's."""
        return self._borrowed

    def other_session(self, database: str) -> Session:
        """Return the session of another of the app's databases: a transaction of its own, with the same outcome.

        It is committed before this one, whose commit lets the messages out. One transaction cannot span two databases: when this
        one's commit fails, the other's is done.
        """
        return self.other(database).session

    def other(self, database: str) -> UnitOfWork:
        """Return the unit of another of the app's databases."""
        others = self.others
        if others is None:
            others = self.others = {}
        if database not in others:
            others[database] = UnitOfWork(self.task.in_database(database), self.outer)
            self.pending = True
        return others[database]

    def session_options(self) -> SessionOptions:
        """What the session needs, asked when it is opened."""
        self.pending = True
        return self.task.unit_options(self)

    def send_after_end(self, send: Callable[[], object]) -> None:
        """Call ``send`` when the transaction has ended, whichever way: the message of ``self.retry()`` or ``self.replace()``."""
        self.pending = True
        if self._unsent is None:
            self._unsent = []
        self._unsent.append(send)

    def hand_over(self) -> None:
        """End the transaction as after a success, but keep the session: another task is about to run inside of this one.

        That of a ``once`` task goes on: its record and its writes are committed together, at its end.

        Raises:
            Exception: What the database raised at the commit.
        """
        for other in (self.others or {}).values():
            other.hand_over()
        session = self.used_session
        if session is None or self._borrowed or self.is_once or DEFERRED in session.__dict__:
            return
        if "success" in self.task.outcomes_to_commit():
            self._commit(session)
        else:
            session.rollback()

    def succeed(self) -> None:
        """End after the body returned: commit or roll back, close, send.

        Raises:
            Exception: What the database raised at the commit; the session is rolled back and closed then, and nothing is sent.
        """
        if self.others is not None:
            for other in self.others.values():
                other.succeed()
        session, self.used_session = self.used_session, None
        # As _take_session() asks, which every request that uses its session would call.
        if session is not None and not self._borrowed and DEFERRED not in session.__dict__:
            commit_on = self.task.outcomes_to_commit() if self.commit_on is None else self.commit_on
            try:
                ledger = self._end_and_close(session, "success" in commit_on)
            except BaseException as exc:
                self._tell(ledger_of(session), outcome_of(exc))
                raise
            task = self.task
            task.uses_session = ledger is not None and ledger.statements > 0
            task.deferred_class = None
            if self.listeners is None or self.listeners:
                self._tell(ledger, "success")
        if self._unsent is not None and not self.sends_elsewhere:
            self.send_unsent()

    def fail(self, exc: BaseException) -> None:
        """End after the body raised: by the policy for Retry, Ignore and Reject, else roll back; close, send.

        After a ``succeed()`` that raised there is nothing left to end.

        Raises:
            Exception: What the database raised at a commit that the policy asked for.
        """
        failed: BaseException | None = None
        for other in (self.others or {}).values():
            try:
                other.fail(failed or exc)
            except BaseException as commit_exc:  # noqa: BLE001 - raised below, when all sessions are closed.
                failed = commit_exc
                self._unsent = None
        session = self._take_session()
        if session is not None:
            failed = self._end_failed(session, failed or exc) or failed
        if failed is not None:
            raise failed
        if self._unsent is not None and not self.sends_elsewhere:
            self.send_unsent()

    def _end_failed(self, session: Session, exc: BaseException) -> BaseException | None:
        """Commit by the policy or roll back, and close; return what the commit raised."""
        outcome = outcome_of(exc)
        failed = None
        try:
            if outcome in self.task.outcomes_to_commit():
                self._end_and_close(session, commit=True)
            else:
                self._abandon(session, exc)
        except BaseException as commit_exc:  # noqa: BLE001 - fail() raises it.
            failed = commit_exc
            outcome = outcome_of(commit_exc)
        self._tell(ledger_of(session), outcome)
        return failed

    def _tell(self, ledger: Ledger | None, outcome: Outcome) -> None:
        listeners = self.task.session_listeners() if self.listeners is None else self.listeners
        if not listeners or ledger is None:
            return
        report = SessionReport(
            self.task.name,
            self.task.request.id,
            outcome,
            ledger.statements,
            ledger.database_seconds,
            ledger.idle_seconds,
            monotonic() - self.started,
        )
        tell(listeners, report)

    def _take_session(self) -> Session | None:
        """Return the session if this request has one of its own and used it; from here on it has none."""
        session, self.used_session = self.used_session, None
        if session is None or self._borrowed or DEFERRED in session.__dict__:
            return None
        return session

    def _end_and_close(self, session: Session, commit: bool) -> Ledger | None:
        ledger: Ledger | None = session.__dict__.get(LEDGER)
        if ledger is not None and ledger.ended_at is not None:
            ledger.goes_on(monotonic())
        # Without a commit, closing is the rollback: on a dead connection it fails, and the work is none the worse.
        if commit and (session.in_transaction() or session.new):
            try:
                self._commit(session)
            except BaseException as exc:
                self._unsent = None
                self._abandon(session, exc)
                raise
        try:
            session.close()
        except Exception:  # noqa: BLE001 - every error must be seen here.
            _drop(session, self.owner)
        return ledger

    def _commit(self, session: Session) -> None:
        if WAITING in session.__dict__:
            set_owner(session, self.owner())
        self.commit_is_uncertain = True
        session.commit()

    def _abandon(self, session: Session, exc: BaseException) -> None:
        self.is_in_callers_transaction = isinstance(session.bind, Connection)
        abandon(session, exc, self.owner)

    def send_unsent(self) -> None:
        """Send what waited for the end of the transaction.

        Raises:
            Reject: A message could not be sent.
        """
        unsent, self._unsent = self._unsent or [], None
        for send in unsent:
            try:
                send()
            except Exception as exc:
                # As Task.retry() does when its message cannot be sent: the request is rejected, not retried for ever.
                raise Reject(exc, requeue=False) from exc


def abandon(session: Session, exc: BaseException, owner: Callable[[], str]) -> None:
    """Roll back and close, or drop the connection where it may be in the middle of a statement. Never raises.

    A soft time limit and the BaseExceptions of shutdown and of greenlets are raised in the middle of whatever runs, a COMMIT
    included; then nobody knows what the server will send next on that connection.
    """
    ledger = ledger_of(session)
    # A GeneratorExit is only raised where a generator waits.
    interrupted = isinstance(exc, SoftTimeLimitExceeded) or not isinstance(exc, (Exception, GeneratorExit))
    # SQLAlchemy sends no ROLLBACK after a COMMIT that failed, and SQLite's transaction is still open then. Of all that the
    # driver is asked for, only COMMIT and ROLLBACK have no statement.
    commit_failed = isinstance(exc, DBAPIError) and exc.statement is None
    if interrupted or commit_failed or (ledger is not None and ledger.in_flight):
        _invalidate(session, owner)
    else:
        close_quietly(session, owner)


def close_quietly(session: Session, owner: Callable[[], str]) -> None:
    """Close a session; on any error log it and drop the connection. Never raises, so that it never hides another error."""
    try:
        session.close()
    except Exception:  # noqa: BLE001 - every error must be seen here.
        _drop(session, owner)


def _drop(session: Session, owner: Callable[[], str]) -> None:
    logger.warning("%s: closing the session failed, its connection is dropped", owner(), exc_info=True)  # noqa: LOG014 - called by handlers.
    _invalidate(session, owner)


def _invalidate(session: Session, owner: Callable[[], str]) -> None:
    try:
        if is_joined(session):
            # Its connection is that of the whole test, and nothing runs on it meanwhile.
            session.close()
        else:
            session.invalidate()
            _drop_connections(session)
    except Exception:
        logger.warning("%s: dropping the session's connection failed", owner(), exc_info=True)


def _drop_connections(session: Session) -> None:
    """Drop the connections that a close which failed has left with the session's transaction, out of the session's own reach.

    The garbage collector would find them; until then the pool goes without.
    """
    ledger = ledger_of(session)
    if ledger is None or isinstance(session.bind, Connection):
        return
    for reference in ledger.connections:
        connection = reference()
        if connection is not None and not connection.closed:
            connection.invalidate()
            connection.close()


PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})

_CONTAINERS = (list, tuple, set, frozenset, Mapping, Row)


def refuse_entities(result: object, owner: Callable[[], str]) -> None:
    """Raise if a task's result is an ORM object, or holds one: in lists, tuples, sets, dicts and rows, however deep.

    Raises:
        EntityReturnedError: It names the class and the primary key.
    """
    # Without recursion: what a task returns may be nested deeper than Python's stack is.
    waiting = [result]
    seen: set[int] = set()
    while waiting:
        value: Any = waiting.pop()
        if is_entity(value):
            state = inspect(value)
            key = state.identity if state.identity is not None else "not saved yet"
            raise EntityReturnedError(owner(), f"{type(value).__name__}({key})")
        # The type, for a mock with a spec gives its spec out for its class.
        kind = type(value)
        if not issubclass(kind, _CONTAINERS) or id(value) in seen:
            continue
        seen.add(id(value))
        inside = value.values() if issubclass(kind, Mapping) else value
        waiting.extend(item for item in inside if type(item) not in PLAIN_TYPES)
