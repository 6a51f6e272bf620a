"""What a session's connections do, written down: writes, statements in flight, counts.

Underneath the transaction: engines report into the ledger of the session that uses the connection; ``transaction.py`` and
``request.py`` read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from string import whitespace
from time import monotonic
from typing import Any, cast
from weakref import ref

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from .databases import database_of

__all__ = [
    "LEDGER",
    "NO_OPTIONS",
    "Ledger",
    "SessionOptions",
    "ask_after_failure",
    "has_sent_writes",
    "keep_ledger",
    "ledger_of",
    "listen",
    "observe",
]

#: Where a session, and a Connection that it uses, hold their ledger: a key of their __dict__.
LEDGER = "celery_alchemy.ledger"
_OBSERVED = "celery_alchemy.observed"
_COMMENTED = "celery_alchemy.commented"
_SEEN = "celery_alchemy.seen"

# What text() and exec_driver_sql() may send without changing a row. Anything else counts as a write: a false "write" asks for a
# commit too many, a false "read" loses a row.
_READS = re.compile(
    r"(?:\s|/\*.*?\*/|--[^\n]*\n)*(?:select|show|set|explain|describe|values|table|pragma|savepoint|release|rollback|begin|start)\b",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a task asks of its session.

    Attributes:
        isolation_level: A level of the dialect, such as ``"SERIALIZABLE"``; None for the engine's own.
        read_only: The transactions must not write.
        timeout_at: ``time.monotonic()`` seconds at which the task's time limit ends its statements; None for no limit.
        idle_limit_seconds: A transaction that is idle for longer is reported; None for never.
        application_name: What the server shows beside the transactions, where it can; None for the connection's own.
        comment: An SQL comment behind each statement; None for none.
        has_settings: There is something to do when a transaction begins.
    """

    isolation_level: str | None = None
    read_only: bool = False
    timeout_at: float | None = None
    idle_limit_seconds: float | None = None
    application_name: str | None = None
    comment: str | None = None
    has_settings: bool = field(init=False)

    def __post_init__(self) -> None:
        has_settings = self.read_only or (self.timeout_at, self.application_name, self.comment) != (None, None, None)
        object.__setattr__(self, "has_settings", has_settings)


NO_OPTIONS = SessionOptions()


class Ledger:
    """The running account of one session.

    Attributes:
        transaction: Weak reference to the outermost transaction that ``writes`` is about; None before the first one.
        writes: That transaction sent a statement that changes rows or tables.
        in_flight: A statement was sent whose end was not seen. At the end of a request this means that it was interrupted, and
            that nobody knows in what state its connection is.
        connections: Weak references to the connections of that transaction.
        failed_on: Weak reference to the connection whose statement failed in the open transaction; None if none did.
        statements: How many statements were sent since the session was made.
        options: What the task asks of its session.
        ended_at: ``time.monotonic()`` seconds at which the open transaction's last statement ended; None before its first.
        database_seconds: How long statements took in all.
        idle_seconds: How long open transactions waited for their next statement in all.
        idle_limit_seconds: An idle time over this is reported; None for never.
        last_statement: Its last statement.
        repeats: How often that one was sent in a row.
    """

    # Slots, all of them set: Python reads those at once, and searches for a default on the class, 60 ns each time.
    __slots__ = (
        "connections",
        "database_seconds",
        "ended_at",
        "failed_on",
        "idle_limit_seconds",
        "idle_seconds",
        "in_flight",
        "last_statement",
        "options",
        "repeats",
        "statements",
        "transaction",
        "writes",
    )

    def __init__(self, options: SessionOptions = NO_OPTIONS) -> None:
        self.transaction: Callable[[], SessionTransaction | None] | None = None
        self.connections: tuple[Callable[[], Connection | None], ...] = ()
        self.writes: bool = False
        self.in_flight: bool = False
        self.failed_on: Callable[[], Connection | None] | None = None
        self.statements: int = 0
        self.options: SessionOptions = options
        self.ended_at: float | None = None
        self.database_seconds: float = 0.0
        self.idle_seconds: float = 0.0
        self.idle_limit_seconds: float | None = options.idle_limit_seconds
        self.last_statement: str = ""
        self.repeats: int = 0

    def repeat(self) -> None:
        """Note that the last statement is sent again."""
        self.repeats += 1
        # Rows that a flush writes one by one, as it must on some databases, are nothing that the user could send otherwise.
        if self.repeats == REPEATS_REPORTED and _READS.match(self.last_statement):
            for report in repeat_reporters:
                report(self.last_statement)

    def goes_on(self, now: float) -> None:
        """Note that the transaction sends its next statement, or ends: since its last statement it was idle."""
        if self.ended_at is None:
            return
        seconds = now - self.ended_at
        self.ended_at = None
        self.idle_seconds += seconds
        if self.idle_limit_seconds is not None and seconds > self.idle_limit_seconds:
            for report in idle_reporters:
                report(seconds)


#: Told of a transaction that was idle for so many seconds, in the thread and at the place where it goes on.
idle_reporters: list[Callable[[float], object]] = []

#: Told of a query that was sent REPEATS_REPORTED times in a row: one for each row of another.
repeat_reporters: list[Callable[[str], object]] = []
REPEATS_REPORTED = 50

#: Told of each Connection that no session with a ledger uses, when its first statement is sent.
first_use_reporters: list[Callable[[Connection], object]] = []


def ledger_of(session: Session) -> Ledger | None:
    """Return the session's ledger; None for a session that celery-alchemy neither made nor was given."""
    ledger: Ledger | None = session.__dict__.get(LEDGER)
    return ledger


def keep_ledger(session: Session, options: SessionOptions = NO_OPTIONS) -> None:
    """Give one session a ledger. Its class, or it alone, must be listened to."""
    # Not in .info, whose dict each session makes for itself when it is first asked for: 1 us.
    session.__dict__[LEDGER] = Ledger(options)


def has_sent_writes(ledger: Ledger, transaction: SessionTransaction) -> bool:
    """Tell whether an outermost transaction has sent a statement that changes rows or tables."""
    return ledger.writes and ledger.transaction is not None and ledger.transaction() is transaction


def ask_after_failure(ledger: Ledger) -> None:
    """Ask PostgreSQL, before a COMMIT, whether a statement that failed has taken the transaction with it.

    It answers the COMMIT of an aborted transaction with ROLLBACK and no error: a body that caught the error of its statement would
    be a success, and its rows lost. Any statement but COMMIT and ROLLBACK is refused there, with an error that says why.
    Source: https://www.postgresql.org/docs/current/sql-commit.html, PQTRANS_INERROR of
    https://www.postgresql.org/docs/current/libpq-status.html

    Raises:
        DBAPIError: The transaction is aborted; nobody went back to a SAVEPOINT before the statement.
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


def _after_begin(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    ledger: Ledger | None = session.__dict__.get(LEDGER)
    if ledger is None:
        return
    if not transaction.nested:
        if ledger.transaction is None or ledger.transaction() is not transaction:
            # Weak: the transaction knows the session, and a circle would leave both to the garbage collector.
            ledger.transaction = ref(transaction)
            ledger.writes = False
            ledger.ended_at = None
            ledger.failed_on = None
            ledger.connections = (ref(connection),)
        else:
            ledger.connections += (ref(connection),)
        if ledger.options.has_settings:
            _apply_settings(ledger.options, connection)
    if _OBSERVED not in connection.dialect.__dict__:
        observe(connection.engine)
    # On the Connection, which lives as long as the checkout: its .info is the driver connection's and would follow that to its
    # next user.
    connection.__dict__[LEDGER] = ledger


def _apply_settings(options: SessionOptions, connection: Connection) -> None:
    left = None if options.timeout_at is None else options.timeout_at - monotonic()
    database = database_of(connection.dialect.name)
    for statement in database.begin_statements(connection, left, options.read_only, options.application_name):
        if isinstance(statement, str):
            connection.exec_driver_sql(statement)
        else:
            connection.execute(statement)
    if options.comment is not None and _COMMENTED not in connection.dialect.__dict__:
        observe(connection.engine)
        _comment(connection.dialect)


def observe(engine: Engine) -> None:
    """Have an engine's statements reported into the ledgers of its sessions; does nothing the second time.

    The dialect's three ``do_execute`` methods are wrapped. SQLAlchemy's events would tell the same, at ten times the price: with
    ``before_cursor_execute`` every Connection makes a dispatcher of its own, 20 us a transaction, and with ``do_execute``
    listeners a statement costs 3.5 us more, against 0.5 us.
    """
    dialect = cast("Any", engine.dialect)
    if _OBSERVED not in dialect.__dict__:
        dialect.__dict__[_OBSERVED] = True
        driver_error = dialect.loaded_dbapi.Error
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            setattr(dialect, name, _reporting(getattr(dialect, name), driver_error))


def _note_first_use(connection: Connection) -> None:
    connection.__dict__[_SEEN] = True
    for first_use in first_use_reporters:
        first_use(connection)


def _reporting(execute: Callable[..., None], driver_error: type[Exception]) -> Callable[..., None]:
    def report(cursor: Any, statement: str, *rest: Any) -> None:
        # (cursor, statement, parameters, context), or without the parameters.
        context: Any = rest[-1]
        ledger: Ledger | None = context.root_connection.__dict__.get(LEDGER) if context else None
        if ledger is None:
            if context and _SEEN not in context.root_connection.__dict__:
                _note_first_use(context.root_connection)
            execute(cursor, statement, *rest)
            return
        ledger.statements += 1
        # A SELECT is no write in either case, and the most frequent.
        if not ledger.writes and not statement.startswith("SELECT"):
            ledger.writes = _is_write(context, statement)
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
            execute(cursor, statement, *rest)
        except driver_error:
            # The driver says that the statement has ended. Anything else (a soft time limit, KeyboardInterrupt) broke into it.
            ledger.in_flight = False
            ledger.failed_on = ref(context.root_connection)
            raise
        ledger.in_flight = False
        ledger.ended_at = ended = monotonic()
        ledger.database_seconds += ended - started

    return report


def _is_write(context: Any, statement: str) -> bool:
    if context.compiled is None or context.is_text:
        return _READS.match(statement) is None
    if context.isinsert or context.isupdate or context.isdelete or context.isddl:
        return True
    # A SELECT from what an INSERT, UPDATE or DELETE in front of it returns.
    return any(getattr(cte.element, "is_dml", False) for cte in context.compiled.ctes or ())


def _comment(dialect: Any) -> None:
    """Have a dialect put the comments of sessions that have one behind their statements."""
    dialect.__dict__[_COMMENTED] = True
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        # pymysql and mysqlclient send many rows in one INSERT only if nothing stands behind its VALUES.
        if name != "do_executemany" or dialect.name not in ("mysql", "mariadb"):
            # Where parameters stand as %s, a % is written twice.
            doubles = dialect.paramstyle in ("format", "pyformat") and name != "do_execute_no_params"
            setattr(dialect, name, _commenting(getattr(dialect, name), "%%" if doubles else "%"))


def _commenting(execute: Callable[..., None], percent: str) -> Callable[..., None]:
    def comment(cursor: Any, statement: str, *rest: Any) -> None:
        context: Any = rest[-1]
        ledger: Ledger | None = context.root_connection.__dict__.get(LEDGER) if context else None
        if ledger is not None and ledger.options.comment is not None:
            statement = f"{statement.rstrip('; ' + whitespace)} {ledger.options.comment.replace('%', percent)}"
        execute(cursor, statement, *rest)

    return comment
