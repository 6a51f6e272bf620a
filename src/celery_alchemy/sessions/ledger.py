"""What a session's connections do, written down: writes, statements in flight, counts.

Underneath the transaction: engines report into the ledger of the session that uses the connection;
``transaction.py`` and ``requests/attempt.py`` read it.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any
from weakref import ref

from billiard.exceptions import SoftTimeLimitExceeded
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import PoolProxiedConnection

from ..databases import Database, commits_each_statement, database_of
from ..databases.statements import shown_by
from ..databases.transient import is_lost_connection
from ..errors import ConfigurationError
from .commits import Commits, commits_under_way
from .commits_past_session import commit_of, refuse_or_count, watch
from .isolation import isolate, refuse_other_level
from .savepoints import note_savepoint, take_back
from .state import NO_OPTIONS, STATE, Ledger, SessionOptions, SessionState, ledger_of, state_for

__all__ = [
    "LEDGER",
    "NO_OPTIONS",
    "Ledger",
    "SessionOptions",
    "ask_after_failure",
    "failed_commit_reporters",
    "keep_ledger",
    "ledger_of",
    "listen",
    "locked_in",
    "observe",
    "sent_writes_in",
]

#: Where a Connection has the ledger of the session that uses it: a key of its __dict__.
LEDGER = "celery_alchemy.sessions.ledger"
_OBSERVED = "celery_alchemy.observed"
_SEEN = "celery_alchemy.seen"


#: Told of each connection, as the pool gives it, whose COMMIT has failed.
failed_commit_reporters: list[Callable[[PoolProxiedConnection], object]] = []

#: Told of each Connection that no session with a ledger uses, when its first statement is sent.
first_use_reporters: list[Callable[[Connection], object]] = []


def keep_ledger(session: Session, options: SessionOptions = NO_OPTIONS) -> None:
    """Give one session a ledger, and its isolation level.

    Its class, or it alone, must be listened to.
    """
    state = state_for(session)
    if options.isolation_level is not None or options.read_only:
        isolate(session, options.isolation_level, reads_only=options.read_only)
    state.ledger = Ledger(options)


def sent_writes_in(ledger: Ledger, transaction: SessionTransaction) -> bool:
    """Tell whether an outermost transaction has sent a statement that changes rows or tables."""
    return ledger.writes and _is_about(ledger, transaction)


def locked_in(ledger: Ledger, transaction: SessionTransaction) -> str:
    """Return the last statement of an outermost transaction that locks rows; empty if none does."""
    return ledger.locked_by if _is_about(ledger, transaction) else ""


def _is_about(ledger: Ledger, transaction: SessionTransaction) -> bool:
    return ledger.transaction is not None and ledger.transaction() is transaction


def ask_after_failure(ledger: Ledger) -> None:
    """Ask PostgreSQL whether a statement that failed has taken the transaction with it.

    It is asked before a COMMIT.

    It answers the COMMIT of an aborted transaction with ROLLBACK and no error: a body that caught
    the error of its statement would be a success, and its rows lost. Any statement but COMMIT and
    ROLLBACK is refused there, with an error that says why. Source:
    https://www.postgresql.org/docs/current/sql-commit.html, PQTRANS_INERROR of
    https://www.postgresql.org/docs/current/libpq-status.html

    Raises:
        DBAPIError: The transaction is aborted; nobody went back to a SAVEPOINT before the
            statement.
    """
    failed_on, ledger.failed_on = ledger.failed_on, None
    connection = failed_on() if failed_on is not None else None
    if connection is None or connection.dialect.name != "postgresql":
        return
    if connection.in_transaction() and not connection.invalidated:
        connection.exec_driver_sql("SELECT 1")


def listen(target: type[Session] | Session) -> None:
    """Have a Session class, or one session, keep its ledger."""
    event.listen(target, "after_begin", _after_begin)
    event.listen(target, "after_soft_rollback", take_back)


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    # As ledger_of(), without its call: this runs for every transaction.
    state: SessionState | None = session.__dict__.get(STATE)
    ledger = None if state is None else state.ledger
    if ledger is None:
        return
    database = connection.dialect.__dict__.get(_OBSERVED) or observe(connection.engine)
    if not transaction.nested:
        mark = None if database.mark is None else database.mark(connection)
        if ledger.transaction is None or ledger.transaction() is not transaction:
            # Weak: the transaction knows the session, and a circle would leave both to the garbage
            # collector.
            ledger.transaction = ref(transaction)
            ledger.writes = False
            ledger.locked_by = ""
            ledger.ended_at = None
            ledger.failed_on = None
            ledger.connections = (ref(connection),)
            ledger.marks = (mark,)
        else:
            ledger.connections += (ref(connection),)
            ledger.marks += (mark,)
        watch(ledger, connection)
        if ledger.options.has_settings:
            _apply_settings(ledger.options, connection)
    else:
        note_savepoint(ledger, transaction, connection)
    # On the Connection, which lives as long as the checkout: its .info is the driver connection's
    # and would follow that to its next user.
    connection.__dict__[LEDGER] = ledger


def _apply_settings(options: SessionOptions, connection: Connection) -> None:
    if options.isolation_level is not None:
        refuse_other_level(connection, options.isolation_level)
    if options.needs_transaction is not None and commits_each_statement(connection):
        raise ConfigurationError(
            f"The task has {options.needs_transaction}, and this connection of its session is in"
            " AUTOCOMMIT, in which each statement is a transaction of its own.",
            f"Remove {options.needs_transaction}, or give the task an engine without AUTOCOMMIT.",
        )
    left = None if options.timeout_at is None else options.timeout_at - monotonic()
    if left is not None and left <= 0 and options.may_run_late:
        left = None
    database = database_of(connection.dialect.name)
    for statement in database.begin_statements(connection, left, options.read_only):
        connection.exec_driver_sql(statement)


def observe(engine: Engine) -> Database:
    """Have an engine's statements reported into the ledgers of its sessions.

    Changes nothing the second time.

    The dialect's three ``do_execute`` methods are wrapped. SQLAlchemy's events would tell the same,
    at ten times the price: with ``before_cursor_execute`` every Connection makes a dispatcher of
    its own, 20 us a transaction, and with ``do_execute`` listeners a statement costs 3.5 us more,
    against 0.5 us.
    """
    dialect = engine.dialect
    if _OBSERVED not in dialect.__dict__:
        dialect.__dict__[_OBSERVED] = database_of(dialect.name)
        driver_error = dialect.loaded_dbapi.Error
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, _reporting(getattr(dialect, name), driver_error))
        for name in ("do_commit", "do_commit_twophase"):
            setattr(dialect, name, _committing(getattr(dialect, name), dialect))
    observed: Database = dialect.__dict__[_OBSERVED]
    return observed


def _note_aside(context: DefaultExecutionContext, statement: str) -> Commits | None:
    """Take note of a statement on a connection that no session of ours uses.

    Returns:
        Where its commit is to be noted, of a write that is its own transaction; else None.
    """
    connection: Connection = context.root_connection
    if _SEEN not in connection.__dict__:
        connection.__dict__[_SEEN] = True
        for first_use in first_use_reporters:
            first_use(connection)
    commits = commits_under_way.get()
    if commits is not None and shown_by(context, statement).writes:
        commits.has_written_aside = True
        return commits if commits_each_statement(connection) else None
    return None


def _execute_aside(
    execute: Callable[..., None],
    cursor: object,
    statement: str,
    rest: tuple[object, ...],
    context: DefaultExecutionContext | None,
) -> None:
    """Execute a statement for no session of ours, and take note of it."""
    commits = _note_aside(context, statement) if context else None
    execute(cursor, statement, *rest)
    if commits is not None:
        commits.note_committed(wrote=True)


def _counted(
    execute: Callable[..., None], ledger: Ledger, context: DefaultExecutionContext, statement: str
) -> Callable[..., None]:
    """Return what executes a statement of a watched session.

    It tells whether the statement has committed anything.

    Raises:
        OnceCommitError: It would commit writes of a ``once`` task.
    """
    committing = refuse_or_count(ledger, context, statement)
    if committing is None:
        return execute

    def run(*arguments: object) -> None:
        connection = context.root_connection.connection
        try:
            execute(*arguments)
        except Exception as exc:
            committing.has_failed(is_answered=_is_answer(exc, connection, context.dialect))
            raise
        committing.is_done()

    return run


def _reporting(execute: Callable[..., None], driver_error: type[Exception]) -> Callable[..., None]:
    def report(cursor: object, statement: str, *rest: object) -> None:
        # (cursor, statement, parameters, context), or without the parameters.
        context: Any = rest[-1]
        ledger: Ledger | None = context.root_connection.__dict__.get(LEDGER) if context else None
        if ledger is None:
            _execute_aside(execute, cursor, statement, rest, context)
            return
        ledger.statements += 1
        run = _counted(execute, ledger, context, statement) if ledger.is_watched else execute
        if not ledger.writes:
            # Rows that are locked beside rows that are changed need no word of their own.
            ledger.writes, locks = shown_by(context, statement)
            if locks:
                ledger.locked_by = statement
        ledger.in_flight = True
        started = monotonic()
        if ledger.ended_at is not None:
            ledger.goes_on(started)
        if statement == ledger.last_statement:
            ledger.repeat()
        else:
            ledger.last_statement = statement
            ledger.repeats = 1
        try:
            run(cursor, statement, *rest)
        except driver_error:
            # The driver says that the statement has ended. Anything else broke into it.
            ledger.in_flight = False
            ledger.failed_on = ref(context.root_connection)
            raise
        except SoftTimeLimitExceeded as exc:
            # SQLAlchemy would roll back on a connection in mid-statement, after a flush or to a
            # SAVEPOINT, and what the driver says to that would hide the limit.
            context.root_connection.invalidate(exc)
            raise
        ledger.in_flight = False
        ledger.ended_at = ended = monotonic()
        ledger.database_seconds += ended - started

    return report


def _committing(commit: Callable[..., None], dialect: Dialect) -> Callable[..., None]:
    def report(connection: PoolProxiedConnection, *rest: object) -> None:
        committing = commit_of(connection)
        try:
            commit(connection, *rest)
        except BaseException as exc:
            is_answered = _is_answer(exc, connection, dialect)
            commits = commits_under_way.get()
            if commits is not None and not is_answered:
                commits.note_unanswered()
            if committing is not None:
                committing.has_failed(is_answered=is_answered)
            for report_failure in failed_commit_reporters:
                report_failure(connection)
            raise
        commits = commits_under_way.get()
        if commits is not None and commits.has_written_aside:
            commits.note_committed(wrote=True)
        if committing is not None:
            committing.is_done()

    return report


def _is_answer(exc: BaseException, connection: PoolProxiedConnection, dialect: Dialect) -> bool:
    """Tell whether a COMMIT failed because the database said so: it has rolled back then."""
    if not isinstance(exc, dialect.loaded_dbapi.Error):
        return False
    is_lost: bool = dialect.is_disconnect(exc, connection, None)
    return not is_lost_connection(DBAPIError("COMMIT", None, exc, connection_invalidated=is_lost))
