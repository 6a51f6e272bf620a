"""Publishes what commits have left, in one round trip, and settles it in one transaction.

Beneath ``outbox.py``, which has it done behind the commit; the relay does the same for what is
left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import Pool

from ..databases import database_of
from ..databases.transient import is_transient
from ..messages.publisher import Publisher
from ..sessions.engine import is_own
from .place import OutboxTable, Place
from .settlement import Leased, give_back, in_transaction, settle

__all__ = ["Committed", "KeptConnection", "deliver"]

logger: logging.Logger = logging.getLogger("celery_alchemy.outbox")


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit has left.

    Attributes:
        rows: The rows, in the order in which they were sent.
        claim: The fencing token that they were written with.
        engine: The database that they are in.
        at: When they were committed, by this process's monotonic clock.
    """

    rows: Sequence[Leased]
    claim: str
    engine: Engine
    at: float = field(default_factory=monotonic)

    @property
    def size(self) -> int:
        """The bytes of the messages' bodies."""
        return sum(len(row.message.body) for row in self.rows)


class KeptConnection:
    """A connection that is kept from one settlement to the next, for one thread.

    The pool of a worker's child holds one connection, and its task has it: one that is lent beside
    it is closed when it is given back, and the next settlement would connect again, which takes
    longer than all of it. Of a user's own engine nothing is kept, for its pool may have no more.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._pool: Pool | None = None
        self._connection: Connection | None = None
        self._pid = 0

    @contextmanager
    def begin(self, engine: Engine) -> Iterator[Connection]:
        """Give a connection in a transaction, which ends with the block."""
        if not is_own(engine):
            with engine.begin() as connection:
                yield connection
            return
        if self._pid != os.getpid():
            # After a fork: it is in use in the parent.
            self._connection, self._pid = None, os.getpid()
        if engine is not self._engine or self._connection is None:
            self.release()
            self._engine, self._pool, self._connection = engine, engine.pool, engine.connect()
        try:
            with self._connection.begin():
                yield self._connection
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the connection back."""
        connection, engine = self._connection, self._engine
        self._connection = self._engine = None
        if connection is None or engine is None:
            return
        if engine.pool is not self._pool:
            # The engine was disposed of meanwhile: nobody would close what its old pool gets back.
            connection.invalidate()
        connection.close()


def _begin(engine: Engine) -> AbstractContextManager[Connection]:
    return engine.begin()


def deliver(
    group: Sequence[Committed],
    publisher: Publisher,
    place: Place,
    within_seconds: float,
    begin: Callable[[Engine], AbstractContextManager[Connection]] = _begin,
) -> bool:
    """Publish committed rows and settle those that the broker has confirmed.

    The others are the relay's, at once. Never raises for a broker or a database that is down: the
    rows are safe.

    Args:
        group: The rows, in the order of their commits.
        publisher: Reaches the broker.
        place: Where the table is.
        within_seconds: For how long after their commit rows are published; then they are the
            relay's.
        begin: Gives a connection of an engine in a transaction.

    Returns:
        False if something is left to the relay.
    """
    complete = True
    for engine in dict.fromkeys(committed.engine for committed in group):
        mine = [committed for committed in group if committed.engine is engine]
        sent, unsent = _publish(mine, publisher, within_seconds)
        claims = [committed.claim for committed in mine]
        settled = _end(partial(begin, engine), place, sent, unsent, claims)
        complete = complete and settled and not unsent
    return complete


def _publish(
    group: Sequence[Committed], publisher: Publisher, within_seconds: float
) -> tuple[list[Leased], list[Leased]]:
    """Publish the rows; return those that the broker has, and the others."""
    rows = [row for committed in group for row in committed.rows]
    left = within_seconds - (monotonic() - group[0].at)
    if publisher.paused or left <= 0:
        return [], rows
    errors = publisher.publish([row.message for row in rows], left)
    failed = [error for error in errors if error is not None]
    if failed:
        logger.warning(
            "%d of %d messages could not be handed to the broker (%r); the relay sends them later",
            len(failed),
            len(rows),
            failed[0],
        )
    # A once task that has sent its retry meanwhile is in one row twice: its last message counts.
    outcomes: dict[str, tuple[Leased, bool]] = {}
    for number, row in enumerate(rows):
        # publish() may stop early.
        outcomes[row.id] = row, number < len(errors) and errors[number] is None
    sent = [row for row, is_sent in outcomes.values() if is_sent]
    return sent, [row for row, is_sent in outcomes.values() if not is_sent]


def _end(
    begin: Callable[[], AbstractContextManager[Connection]],
    place: Place,
    sent: Sequence[Leased],
    unsent: Sequence[Leased],
    claims: Sequence[str],
) -> bool:
    """Settle what is published, and let the relay have what is not; False if that failed."""

    @contextmanager
    def begun() -> Iterator[OutboxTable]:
        with begin() as connection:
            # What a server forgets that loses its power is published again, with the same id.
            database_of(connection.dialect.name).hasten(connection)
            yield place.on(connection)

    def work(table: OutboxTable) -> None:
        settle(table, sent, claims)
        give_back(table, unsent, claims)

    try:
        # Again also after a lost connection: it may be settled twice.
        in_transaction(begun, work, passes=is_transient)
    except Exception:
        # The relay publishes all of them when the lease is over: those that are published for the
        # second time, with the same ids.
        logger.warning(
            "%d published messages could not be settled in the outbox, %d others not handed to"
            " the relay",
            len(sent),
            len(unsent),
            exc_info=True,
        )
        return False
    return True
