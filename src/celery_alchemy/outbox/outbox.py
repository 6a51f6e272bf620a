"""The outbox: messages as rows of the caller's transaction.

They are handed to the broker right after it, or later by the relay.

Between ``requests/sending.py``, which gives it finished messages, and ``messages/publisher.py``;
``relay.py`` takes what is left behind here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from uuid import uuid4

from sqlalchemy import ColumnElement, Engine, bindparam, insert, literal_column
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from ..databases.tables import ID_MAX_LENGTH, from_now, outbox
from ..error_texts import storable
from ..errors import (
    ConfigurationError,
    MessageTooLargeError,
    MissingTableError,
    UnsafeSerializerError,
)
from ..messages.message import Message, seconds_until
from ..messages.publisher import Publisher
from ..sessions.engine import lends_two
from ..sessions.off_loop import off_loop
from ..sessions.state import ledger_of
from .delivery import Committed, KeptConnection, deliver
from .hand_over import HandOverThread
from .place import DEFAULT_PLACE, OutboxTable, Place
from .settlement import MAX_WAIT_SECONDS

__all__ = [
    "ROW_HEADER",
    "TAKEN_HEADER",
    "HandOver",
    "Outbox",
    "Queues",
    "Row",
    "missing_table",
    "shown",
]

logger: logging.Logger = logging.getLogger("celery_alchemy.outbox")

#: Seconds in which the process that committed a message hands it to the broker; then the relay
#: takes it.
LEASE_SECONDS = 30.0

#: Bytes of a body that is kept; RabbitMQ 4 refuses messages over 16 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

#: The message header that names the row of a task which was sent through the outbox.
ROW_HEADER = "celery_alchemy_row"

#: The header by which a worker says that it has taken the message out of the table, and when.
TAKEN_HEADER = "celery_alchemy_taken"

# What a row must never hold: content that is code when it is read.
_UNSAFE_CONTENT_TYPES = frozenset({"application/x-python-serialize"})


@dataclass(slots=True)
class Row:
    """One message on its way into the table.

    Attributes:
        id: The row's key.
        message: The finished message.
        redeliver_seconds: For a ``once`` task: after how long it is sent again. None for any other
            message.
        max_deliveries: For a ``once`` task: how many starts without an end make it dead.
        may_exist: Its key was not made for this message: the table may hold it.
        queue: Where it waits for a worker, if the database is the broker; None if it goes to
            another broker.
    """

    id: str
    message: Message
    redeliver_seconds: int | None = None
    max_deliveries: int | None = None
    may_exist: bool = False
    queue: str | None = None

    @property
    def once(self) -> bool:
        """True if the row stays until the task's own transaction completes it."""
        return self.redeliver_seconds is not None

    def values(self, claim: str | None) -> dict[str, object]:
        """Return the row as parameters of its INSERT."""
        return {
            "id": self.id,
            # For people and for commands: one that is too long, or strange, must not fail the
            # sender's commit.
            "task_id": shown(self.message.task_id),
            "task_name": shown(self.message.task_name),
            "once": self.once,
            "redeliver_seconds": self.redeliver_seconds,
            "max_deliveries": self.max_deliveries,
            "body": self.message.body,
            "envelope": self.message.envelope(),
            "claim": None if self.queue else claim,
            "queue": self.queue,
            "priority": None if self.queue is None else self.message.priority,
        }

    @property
    def due_in_seconds(self) -> float:
        """After how long it is due.

        A message in a queue is due at its eta, another one when its lease is over.
        """
        if self.queue is None:
            return LEASE_SECONDS
        return min(
            max(0.0, seconds_until(self.message.headers.get("eta")) or 0.0), MAX_WAIT_SECONDS
        )


class Queues(Protocol):
    """The queues of the database, where it is the broker."""

    def routed(self, table: OutboxTable, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with the queues that they go to.

        A message that several take is several rows.
        """
        ...

    def wake(self) -> None:
        """Tell workers that a transaction which sends has committed."""
        ...

    def still_has(self, taken: object) -> bool:
        """Tell whether a message is still this worker's, by what its TAKEN_HEADER says."""
        ...


def shown(name: str | None) -> str | None:
    """Return the id or the name of a task as the table holds it."""
    return storable(name, ID_MAX_LENGTH) if name else None


class Outbox:
    """Writes messages in a caller's transaction and hands them over after it.

    Args:
        publisher: Reaches the broker.
        engine: Returns this process's engine, for what happens after the commit.
        max_message_bytes: The largest body that is accepted.
        place: Where the table is.
        queues: The queues of the table, where it is the broker; None where messages are handed over
            to another one.
    """

    def __init__(
        self,
        publisher: Publisher,
        engine: Callable[[], Engine],
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        place: Place = DEFAULT_PLACE,
        queues: Queues | None = None,
    ) -> None:
        self.publisher = publisher
        #: Where the table is.
        self.place = place
        #: Returns this process's engine.
        self.engine = engine
        self._max_message_bytes = max_message_bytes
        self._kept = KeptConnection()
        self._thread = HandOverThread(self._deliver_behind, self._kept.release)
        #: The queues of the table; None where messages are handed over to a broker.
        self.queues = queues

    def routed(self, table: OutboxTable, rows: Sequence[Row]) -> list[Row]:
        """Return rows with their queues, where the database is the broker; else as they are."""
        return list(rows) if self.queues is None else self.queues.routed(table, rows)

    def check(self, message: Message) -> None:
        """Refuse what must not be kept, in the caller, before anything is written.

        Raises:
            MessageTooLargeError: The body is over the limit.
            UnsafeSerializerError: The body is a pickle.
        """
        name = message.task_name or "message"
        if message.content_type in _UNSAFE_CONTENT_TYPES:
            raise UnsafeSerializerError(name, message.content_type)
        if len(message.body) > self._max_message_bytes:
            raise MessageTooLargeError(name, len(message.body), self._max_message_bytes)

    def write(self, session: Session, rows: Sequence[Row], claim: str) -> None:
        """Write rows in the session's transaction, leased to this process.

        A ``once`` row whose key is there already, because the same task was sent before, is written
        as a plain message: it is delivered, and finds the work done.

        Raises:
            MissingTableError: The table has not been made.
        """
        table = self.place.within(session)
        try:
            rows = self.routed(table, rows)
            for row in rows:
                if row.may_exist and not insert_unless_there(table, _insert_values(row, claim)):
                    row.id, row.may_exist = unique_id(), False
                    row.redeliver_seconds = None
                    row.message.headers.pop(ROW_HEADER, None)
            insert_rows(table, [row for row in rows if not row.may_exist], claim)
        except (OperationalError, ProgrammingError) as exc:
            raise missing_table(exc) or exc from exc

    # --- behind the commit --------------------------------------------------------------------

    def hand_over(self, rows: Sequence[Row], claim: str) -> None:
        """Have committed rows published and settled; returns at once.

        Whoever commits does it itself where a second connection would be another database or would
        wait for the first one, and when the process ends.

        Never raises for a broker or a database that is down: the rows are safe.
        """
        if self.queues is not None:
            self.queues.wake()
            return
        try:
            committed = Committed(rows, claim, self.engine())
        except ConfigurationError as exc:
            # Sessions that know no database here and now; the caller's transaction is committed.
            logger.warning("%d messages are left to the relay: %s", len(rows), exc)
            return
        in_caller = self._thread.is_in_caller or not lends_two(committed.engine)
        if in_caller or not self._thread.put(committed):
            off_loop(partial(self._deliver_here, committed))

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until everything that was committed so far is handed over.

        Returns:
            False if the time was over, or if something was left to the relay since the last call.
        """
        return self._thread.drain(timeout_seconds)

    def in_caller(self) -> AbstractContextManager[None]:
        """Have whoever commits hand over itself inside of the block, in any thread: for tests."""
        return self._thread.in_caller()

    def _deliver_behind(self, group: Sequence[Committed]) -> bool:
        half = LEASE_SECONDS / 2
        return deliver(group, self.publisher, self.place, half, self._kept.begin)

    def _deliver_here(self, committed: Committed) -> None:
        deliver([committed], self.publisher, self.place, LEASE_SECONDS / 2)


class HandOver:
    """What a transaction that sends does at its commit.

    The rows are written in it, and published after it.

    Attributes:
        is_written: The rows are written, in the transaction.
        raises_its_own: What it raises after the commit is the caller's to see.
        fails_its_owner: In a task too, which fails with it.
    """

    def __init__(self, outbox: Outbox, rows: list[Row]) -> None:
        self._outbox = outbox
        self._rows = rows
        self._claim = ""
        self.is_written: bool = False
        self.raises_its_own: bool = False
        self.fails_its_owner: bool = False

    def join(self, other: HandOver) -> HandOver:
        """Return one for the rows of both.

        There is one INSERT, one publish and one settlement for each commit.
        """
        return HandOver(self._outbox, [*self._rows, *other._rows])

    def before_commit(self, session: Session) -> None:
        """Write the rows.

        Those of a transaction that must not write are written in one of their own right after it.
        """
        ledger = ledger_of(session)
        if ledger is not None and ledger.options.read_only:
            # Nothing of the task is committed: one whose messages cannot be written fails, and may
            # run again.
            self.raises_its_own = self.fails_its_owner = True
            return
        self._claim = uuid4().hex
        self._outbox.write(session, self._rows, self._claim)
        self.is_written = True

    def __call__(self) -> None:
        """Have the rows, which are committed now, published and settled."""
        if not self.is_written:
            off_loop(self._write_aside)
        self._outbox.hand_over(self._rows, self._claim)

    def _write_aside(self) -> None:
        # Sent by a listener after the COMMIT, where the session's transaction takes no more
        # statements, or from a transaction that must not write.
        with Session(self._outbox.engine()) as session, session.begin():
            self.before_commit(session)


def insert_rows(table: OutboxTable, rows: Sequence[Row], claim: str | None) -> None:
    """Insert rows with one statement."""
    if len(rows) == 1:
        table.change(_INSERT, _insert_values(rows[0], claim))
    elif rows:
        table.execute(_INSERT, [_insert_values(row, claim) for row in rows])


def _insert_values(row: Row, claim: str | None) -> dict[str, object]:
    return {**row.values(claim), "due_in": row.due_in_seconds}


def unique_id() -> str:
    """Return the id of a row that stands for a message and not for a ``once`` task.

    No task id begins like it.
    """
    return f"~{uuid4().hex}"


def insert_unless_there(table: OutboxTable, values: dict[str, object]) -> bool:
    """Insert a row; return False if one with its id is there.

    In a SAVEPOINT, because the statement fails on every database alike and must not take the
    caller's work with it; of the connection, because the session's own would flush, which it must
    not in the middle of a flush. Not INSERT IGNORE, which also shortens texts that are too long.
    """
    try:
        with table.connection.begin_nested():
            table.execute(_INSERT, [values])
    except IntegrityError:
        return False
    return True


def missing_table(exc: Exception) -> MissingTableError | None:
    """Return the error that names a missing table and the command that makes it.

    None if a database error says something else.

    Sources: SQLSTATE 42P01 of PostgreSQL, error 1146 of MySQL and MariaDB, SQLite's "no such
    table".
    """
    original = getattr(exc, "orig", exc)
    code = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    number = original.args[0] if getattr(original, "args", None) else None
    if code == "42P01" or number == 1146 or "no such table" in str(original):
        named = _QUALIFIED.search(str(original))
        return None if named is None else MissingTableError(named[0])
    return None


#: The table as a database's message has it, with its schema.
_QUALIFIED = re.compile(rf"(?:[\w$-]+\.)?(?:{'|'.join(outbox.metadata.tables)})\b")


_ZERO: ColumnElement[object] = literal_column("0")

_INSERT = insert(outbox).values(
    id=bindparam("id"),
    task_id=bindparam("task_id"),
    task_name=bindparam("task_name"),
    once=bindparam("once"),
    redeliver_seconds=bindparam("redeliver_seconds"),
    max_deliveries=bindparam("max_deliveries"),
    body=bindparam("body"),
    envelope=bindparam("envelope"),
    claim=bindparam("claim"),
    # In the text: a parameter would be sent each time.
    created_at=from_now(_ZERO),
    due_at=from_now(bindparam("due_in")),
    queue=bindparam("queue"),
    priority=bindparam("priority"),
    sends=_ZERO,
    failures=_ZERO,
    deliveries=_ZERO,
)
