"""The outbox: messages as rows of the caller's transaction, handed to the broker right after it, or later by the relay.

Between ``sending.py``, which gives it finished messages, and ``publisher.py``; ``relay.py`` takes what is left behind here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, bindparam, delete, insert, update
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, UnboundExecutionError
from sqlalchemy.orm import Session

from .errors import ConfigurationError, MessageTooLargeError, MissingTableError, UnsafeSerializerError
from .message import Message
from .publisher import Publisher, off_loop
from .tables import ID_MAX_LENGTH, from_now, outbox

__all__ = ["HandOver", "Outbox", "Row", "bind_of", "missing_table"]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds in which the process that committed a message hands it to the broker; then the relay takes it.
LEASE_SECONDS = 30.0

#: Bytes of a body that is kept; RabbitMQ 4 refuses messages over 16 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

# What a row must never hold: content that is code when it is read.
_UNSAFE_CONTENT_TYPES = frozenset({"application/x-python-serialize"})


@dataclass(slots=True)
class Row:
    """One message on its way into the table.

    Attributes:
        id: The row's key.
        message: The finished message.
        redeliver_seconds: For a ``once`` task: after how long it is sent again. None for any other message.
        max_deliveries: For a ``once`` task: how many starts without an end make it dead.
        may_exist: Its key was not made for this message: the table may hold it.
    """

    id: str
    message: Message
    redeliver_seconds: int | None = None
    max_deliveries: int | None = None
    may_exist: bool = False

    @property
    def once(self) -> bool:
        """True if the row stays until the task's own transaction completes it."""
        return self.redeliver_seconds is not None

    def values(self, claim: str | None) -> dict[str, Any]:
        """Return the row as parameters of its INSERT."""
        return {
            "id": self.id,
            # For people and for commands; one that is longer must not fail the sender's commit.
            "task_id": (self.message.task_id or "")[:ID_MAX_LENGTH] or None,
            "task_name": (self.message.task_name or "")[:ID_MAX_LENGTH] or None,
            "once": self.once,
            "redeliver_seconds": self.redeliver_seconds,
            "max_deliveries": self.max_deliveries,
            "body": self.message.body,
            "envelope": self.message.envelope(),
            "claim": claim,
        }


class Outbox:
    """Writes messages in a caller's transaction and hands them over after it.

    Args:
        publisher: Reaches the broker.
        engine: Returns this process's engine, for what happens after the commit.
        max_message_bytes: The largest body that is accepted.
    """

    def __init__(self, publisher: Publisher, engine: Callable[[], Engine], max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.publisher = publisher
        #: Returns this process's engine.
        self.engine = engine
        self._max_message_bytes = max_message_bytes

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

        A ``once`` row whose key is there already, because the same task was sent before, is written as a plain message: it is
        delivered, and finds the work done.

        Raises:
            MissingTableError: The table has not been made.
        """
        try:
            for row in rows:
                if row.may_exist and not insert_unless_there(session, row.values(claim)):
                    row.id, row.may_exist = unique_id(), False
                    row.redeliver_seconds = None
            new = [row.values(claim) for row in rows if not row.may_exist]
            if new:
                session.execute(_INSERT, new)
        except (OperationalError, ProgrammingError) as exc:
            raise missing_table(exc) or exc from exc

    def hand_over(self, rows: Sequence[Row], claim: str) -> None:
        """Publish committed rows and settle those that the broker has confirmed; the relay takes the others.

        Never raises for a broker or a database that is down: the rows are safe.
        """
        if self.publisher.paused:
            return
        errors = self.publisher.publish([row.message for row in rows])
        failed = [error for error in errors if error is not None]
        if failed:
            logger.warning(
                "%d of %d messages could not be handed to the broker (%r); the relay sends them later",
                len(failed),
                len(rows),
                failed[0],
            )
        sent = [row for row, error in zip(rows, errors, strict=True) if error is None]
        if not sent:
            return
        try:
            with self.engine().begin() as connection:
                settle(connection, sent, claim)
        except Exception:
            # They are published. The relay publishes them again when the lease is over, with the same ids.
            logger.warning("%d published messages could not be settled in the outbox", len(sent), exc_info=True)


class HandOver:
    """What a transaction that sends does at its commit: write the rows in it, publish them after it."""

    def __init__(self, outbox: Outbox, rows: list[Row]) -> None:
        self._outbox = outbox
        self._rows = rows
        self._claim = uuid4().hex
        self.is_written: bool = False

    def join(self, other: Any) -> HandOver:
        """Return one for the rows of both: one INSERT, one publish, one settlement for each commit."""
        return HandOver(self._outbox, [*self._rows, *other._rows])

    def before_commit(self, session: Session) -> None:
        """Write the rows."""
        self._outbox.write(session, self._rows, self._claim)
        self.is_written = True

    def __call__(self) -> None:
        """Publish and settle the rows, which are committed now."""
        off_loop(self._hand_over)

    def _hand_over(self) -> None:
        if not self.is_written:
            # Sent by a listener after the COMMIT, where the session's transaction takes no more statements.
            with Session(self._outbox.engine()) as session, session.begin():
                self.before_commit(session)
        self._outbox.hand_over(self._rows, self._claim)


def settle(connection: Connection, rows: Sequence[Any], claim: str) -> None:
    """Take published rows out of the relay's way: delete a message, leave a ``once`` task owed.

    Only rows that still carry the claim are touched: after the lease is over they are another process's.

    Args:
        connection: In a transaction.
        rows: Rows or claimed rows, with ``id``, ``once``, ``message`` and ``redeliver_seconds``.
        claim: The fencing token that they were claimed with.
    """
    plain = sorted(row.id for row in rows if not row.once)
    owed: dict[float, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.id):
        if row.once:
            owed.setdefault(_redeliver_in(row), []).append(row.id)
    for ids in _in_batches(plain):
        connection.execute(_DELETE_SENT, {"row_ids": ids, "token": claim})
    for wait, waiting in owed.items():
        for ids in _in_batches(waiting):
            connection.execute(_KEEP_OWED, {"row_ids": ids, "token": claim, "wait": wait})


def _in_batches(ids: list[str]) -> Iterator[list[str]]:
    # SQLite before 3.32 takes 999 parameters: https://www.sqlite.org/limits.html
    for start in range(0, len(ids), 500):
        yield ids[start : start + 500]


def _redeliver_in(row: Any) -> float:
    """Return the seconds until an owed task is sent again: from its eta if it has one; longer after each time."""
    wait: float = float(row.redeliver_seconds) * min(2 ** getattr(row, "sends", 0), 4)
    eta = row.message.headers.get("eta")
    if isinstance(eta, str):
        try:
            at = datetime.fromisoformat(eta.replace("Z", "+00:00"))
        except ValueError:
            return wait
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        wait += max(0.0, (at - datetime.now(timezone.utc)).total_seconds())
    return wait


def end_of_lease() -> from_now:
    """Return the time until which a row that is written now belongs to the process that writes it."""
    return from_now(bindparam("lease_seconds", callable_=lambda: LEASE_SECONDS))


def unique_id() -> str:
    """Return the id of a row that stands for a message and not for a ``once`` task; no task id begins like it."""
    return f"~{uuid4().hex}"


def insert_unless_there(session: Session, values: dict[str, Any]) -> bool:
    """Insert a row; return False if one with its id is there.

    In a SAVEPOINT, because the statement fails on every database alike and must not take the caller's work with it; of the
    connection, because the session's own would flush, which it must not in the middle of a flush. Not INSERT IGNORE, which also
    shortens texts that are too long.
    """
    connection = session.connection({"clause": _INSERT})
    try:
        with connection.begin_nested():
            connection.execute(_INSERT, [values])
    except IntegrityError:
        return False
    return True


def missing_table(exc: Exception) -> MissingTableError | None:
    """Return the error that names a missing table and the command that makes it, if that is what a database error says.

    Sources: SQLSTATE 42P01 of PostgreSQL, error 1146 of MySQL and MariaDB, SQLite's "no such table".
    """
    original: Any = getattr(exc, "orig", exc)
    code = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None)
    number = original.args[0] if getattr(original, "args", None) else None
    if code == "42P01" or number == 1146 or "no such table" in str(original):
        return MissingTableError(outbox.name) if outbox.name in str(original) else None
    return None


def bind_of(session: Session) -> Engine | Connection:
    """Return where a session's transaction would write the rows; it may route them, or have ``binds``.

    Raises:
        ConfigurationError: It knows no database for the table.
    """
    try:
        return session.get_bind(clause=_INSERT)
    except UnboundExecutionError as exc:
        raise ConfigurationError(
            f"The session is bound to no database for the table {outbox.name!r}.",
            "Beside binds=, bind its sessionmaker to the engine that has this table: sessionmaker(engine, binds=...).",
        ) from exc


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
    created_at=from_now(0),
    due_at=end_of_lease(),
    sends=0,
    failures=0,
    deliveries=0,
)

_DELETE_SENT = delete(outbox).where(outbox.c.id.in_(bindparam("row_ids", expanding=True)), outbox.c.claim == bindparam("token"))

_KEEP_OWED = (
    update(outbox)
    .where(
        outbox.c.id.in_(bindparam("row_ids", expanding=True)),
        outbox.c.claim == bindparam("token"),
        outbox.c.completed_at.is_(None),
        outbox.c.died_at.is_(None),
    )
    .values(claim=None, due_at=from_now(bindparam("wait")), sends=outbox.c.sends + 1, failures=0, error=None)
)
