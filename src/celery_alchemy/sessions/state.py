"""What the library keeps of a session: its account, what waits for its end, its isolation level.

One object, under one key of the session's ``__dict__``; beneath all that reads or fills it.
Sessions that celery-alchemy did not make have one too, once something is to be kept of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, SessionTransaction

from ..databases import database_of
from ..databases.statements import is_query
from .commits import Commits

__all__ = [
    "NO_OPTIONS",
    "REPEATS_REPORTED",
    "STATE",
    "Entry",
    "Ledger",
    "Level",
    "SessionOptions",
    "SessionState",
    "Waiting",
    "idle_reporters",
    "ledger_of",
    "repeat_reporters",
    "report_unsent",
    "state_for",
    "state_of",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.transaction")

#: Where a session has its state: a key of its __dict__. Not in .info, whose dict each session makes
#: for itself when it is first asked for: 1 us.
STATE = "_celery_alchemy_state"


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a task asks of its session.

    Attributes:
        isolation_level: A level of the dialect, such as ``"SERIALIZABLE"``; None for the engine's
            own.
        read_only: The transactions must not write.
        timeout_at: ``time.monotonic()`` seconds at which the task's time limit ends its statements;
            None for no limit.
        may_run_late: Nobody ends the task then: a transaction that begins later has no limit.
        idle_limit_seconds: A transaction that is idle for longer is reported; None for never.
        needs_transaction: What AUTOCOMMIT would break, for messages, such as ``"once"``; None for
            nothing.
        has_settings: There is something to do when a transaction begins.
    """

    isolation_level: str | None = None
    read_only: bool = False
    timeout_at: float | None = None
    may_run_late: bool = False
    idle_limit_seconds: float | None = None
    needs_transaction: str | None = None
    has_settings: bool = field(init=False)

    def __post_init__(self) -> None:
        asked = (self.isolation_level, self.timeout_at, self.needs_transaction)
        has_settings = self.read_only or any(value is not None for value in asked)
        object.__setattr__(self, "has_settings", has_settings)


NO_OPTIONS = SessionOptions()


@dataclass(slots=True)
class BeforeSavepoint:
    """What a transaction had done when a SAVEPOINT of it began.

    Attributes:
        writes: It had sent a statement that shows a change.
        changes: How far the databases of its connections had counted since it began, by the place
            of the connection in the ledger, of those that count.
    """

    writes: bool
    changes: dict[int, int] = field(default_factory=dict)


class Ledger:
    """The running account of one session.

    Attributes:
        transaction: Weak reference to the outermost transaction that ``writes`` is about; None
            before the first one.
        writes: That transaction sent a statement that changes rows or tables.
        in_flight: A statement was sent whose end was not seen. At the end of a request this means
            that it was interrupted, and that nobody knows in what state its connection is.
        locked_by: That transaction's last statement that locks the rows which it reads; empty if
            none does.
        connections: Weak references to the connections of that transaction.
        marks: What the databases of these connections said when it began, which shows later whether
            anything has changed; None for a database that needs no such comparison.
        savepoints: What that transaction had done when its open SAVEPOINTs began, by their own
            transactions; see ``savepoints.py``.
        failed_on: Weak reference to the connection whose statement failed in the open transaction;
            None if none did.
        statements: How many statements were sent since the session was made.
        options: What the task asks of its session.
        ended_at: ``time.monotonic()`` seconds at which the open transaction's last statement ended;
            None before its first.
        database_seconds: How long statements took in all.
        idle_seconds: How long open transactions waited for their next statement in all.
        idle_limit_seconds: An idle time over this is reported; None for never.
        last_statement: Its last statement.
        repeats: How often that one was sent in a row.
        once_owner: The ``once`` request whose end alone commits its writes; empty for none.
        commits: Those of the request that may run again, in which the open transaction began; None
            where there is none.
        is_watched: It matters if the body commits past the session.
    """

    # Slots, all of them set: Python reads those at once, and searches for a default on the class,
    # 60 ns each time.
    __slots__ = (
        "commits",
        "connections",
        "database_seconds",
        "ended_at",
        "failed_on",
        "idle_limit_seconds",
        "idle_seconds",
        "in_flight",
        "is_watched",
        "last_statement",
        "locked_by",
        "marks",
        "once_owner",
        "options",
        "repeats",
        "savepoints",
        "statements",
        "transaction",
        "writes",
    )

    def __init__(self, options: SessionOptions = NO_OPTIONS) -> None:
        self.transaction: Callable[[], SessionTransaction | None] | None = None
        self.connections: tuple[Callable[[], Connection | None], ...] = ()
        self.marks: tuple[int | None, ...] = ()
        self.savepoints: WeakKeyDictionary[SessionTransaction, BeforeSavepoint] | None = None
        self.writes: bool = False
        self.locked_by: str = ""
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
        self.once_owner: str = ""
        self.commits: Commits | None = None
        self.is_watched: bool = False

    def refuse_commits(self, owner: str) -> None:
        """Refuse commits of the body, of writes past the session, from the next transaction on.

        Args:
            owner: The ``once`` request, for messages.
        """
        self.once_owner = owner

    def repeat(self) -> None:
        """Note that the last statement is sent again."""
        self.repeats += 1
        # Rows that a flush writes one by one, as it must on some databases, are nothing that the
        # user could send otherwise.
        if self.repeats == REPEATS_REPORTED and is_query(self.last_statement):
            for report in repeat_reporters:
                report(self.last_statement)

    def goes_on(self, now: float) -> None:
        """Note that the transaction goes on, or ends: since its last statement it was idle."""
        if self.ended_at is None:
            return
        seconds = now - self.ended_at
        self.ended_at = None
        self.idle_seconds += seconds
        if self.idle_limit_seconds is not None and seconds > self.idle_limit_seconds:
            for report in idle_reporters:
                report(seconds)


#: Told of a transaction that was idle for so many seconds, in the thread and at the place where it
#: goes on.
idle_reporters: list[Callable[[float], object]] = []

#: Told of a query that was sent REPEATS_REPORTED times in a row: one for each row of another.
repeat_reporters: list[Callable[[str], object]] = []
REPEATS_REPORTED = 50


class Level:
    """How the connections of one session begin, and its engines that begin so.

    Args:
        level: The isolation level; None for the engine's own.
        reads_only: It takes no lock for writing, where the database can do without.
    """

    __slots__ = ("_engines", "_level", "_reads_only")

    def __init__(self, level: str | None, *, reads_only: bool = False) -> None:
        self._level = level
        self._reads_only = reads_only
        # Kept, for the session's transaction has one connection for each Engine object.
        self._engines: dict[Engine, Engine] = {}

    def of(self, bind: Engine | Connection) -> Engine | Connection:
        """Return an engine of the same pool whose connections begin as the session asks for."""
        if isinstance(bind, Connection):
            return bind
        if self._reads_only:
            bind = database_of(bind.dialect.name).reading(bind)
        if self._level is None or level_of(bind) == self._level:
            return bind
        if bind not in self._engines:
            self._engines[bind] = bind.execution_options(isolation_level=self._level)
        return self._engines[bind]


def level_of(bind: Engine | Connection) -> object:
    """Return the level that the connections of a bind begin with; None for the server's."""
    return bind.get_execution_options().get("isolation_level")


@dataclass(slots=True)
class Entry:
    """A callable that waits for a commit.

    Attributes:
        transaction: The outermost transaction, or the SAVEPOINT, that it was given in.
        run: The callable.
        what: Its name in logs and errors.
        undo: Takes back what the caller of ``run`` has done before, if that is not run, or fails.
    """

    transaction: SessionTransaction
    run: Callable[[], object]
    what: str
    undo: Callable[[], object] | None = None


class Waiting:
    """The callables that wait for the end of a session's outermost transaction.

    Attributes:
        entries: Those that wait for its commit.
        ends: Those that wait for its end, with their names.
        was_rolled_back: Somebody has asked for a rollback.
    """

    __slots__ = ("ends", "entries", "was_rolled_back")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ends: list[tuple[Callable[[], object], str]] = []
        self.was_rolled_back: bool = False

    def __del__(self) -> None:
        # A session that nobody has closed; the garbage collector ends its transaction.
        if self.entries and not sys.is_finalizing():
            report_unsent(self.entries)


def report_unsent(entries: list[Entry]) -> None:
    """Warn of what waits for a commit that will not come, though nobody has rolled back."""
    if entries:
        names = "; ".join(entry.what for entry in entries)
        logger.warning(
            "A session was closed without a commit, and what waited for one does not happen: %s",
            names,
        )


class SessionState:
    """What is kept of one session.

    Attributes:
        ledger: Its account; None for a session that celery-alchemy neither made nor was given.
        waiting: What waits for the end of its outermost transaction; None for nothing.
        is_committing: The outermost transaction's COMMIT is under way.
        committed_now: The transaction, or SAVEPOINT, that has just been committed.
        flushed: The transaction in which the unit of work has flushed; for a session without a
            ledger.
        level: Its isolation level; None for that of its connections.
    """

    __slots__ = ("committed_now", "flushed", "is_committing", "ledger", "level", "waiting")

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger: Ledger | None = ledger
        self.waiting: Waiting | None = None
        self.is_committing: bool = False
        self.committed_now: SessionTransaction | None = None
        self.flushed: ref[SessionTransaction] | None = None
        self.level: Level | None = None


def state_of(session: Session) -> SessionState | None:
    """Return what is kept of a session; None for nothing so far."""
    state: SessionState | None = session.__dict__.get(STATE)
    return state


def state_for(session: Session) -> SessionState:
    """Return where something is kept of a session."""
    state: SessionState | None = session.__dict__.get(STATE)
    if state is None:
        state = session.__dict__[STATE] = SessionState()
    return state


def ledger_of(session: Session) -> Ledger | None:
    """Return a session's ledger; None if celery-alchemy neither made it nor was given it."""
    state: SessionState | None = session.__dict__.get(STATE)
    return None if state is None else state.ledger
