"""What is said to all workers, or to whoever reads: remote control, its replies, events, gossip.

A log: one row for each message, however many read it, and nobody deletes what it has read. Each
reader remembers how far it has read. Rows expire, so that a reader that never comes back costs
nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from time import monotonic

from sqlalchemy import ColumnElement, Float, and_, bindparam, delete, func, insert, select

from ..databases.tables import Found, from_now
from ..messages.message import Message
from .claims import Delivery, payload_of
from .queues import Binding, declare, matches
from .tables import BrokerTables

__all__ = ["KEPT_SECONDS", "READER_SECONDS", "Log", "keep_reading", "prune", "say"]

#: Seconds for which a broadcast can be read.
KEPT_SECONDS = 60.0

#: Seconds for which a reader that shows no life gets what is said.
READER_SECONDS = 60.0

#: Broadcasts that are kept at most: the oldest go first.
KEPT_ROWS = 20_000

#: Seconds in which a transaction that writes one commits. Numbers are given before the commit, so
#: that a lower one may appear after a higher one.
SETTLED_SECONDS = 2.0

#: Broadcasts that are read at once.
BATCH_ROWS = 500


def say(tables: BrokerTables, messages: Iterable[Message]) -> None:
    """Write messages into the log."""
    rows = [
        {
            "exchange": message.exchange,
            "routing_key": message.routing_key,
            "body": message.body,
            "envelope": message.envelope(),
            "kept_seconds": _kept_seconds(message),
        }
        for message in messages
    ]
    if rows:
        until = from_now(bindparam("kept_seconds", type_=Float()))
        tables.run(insert(tables.broadcasts).values(expires_at=until), rows)


def _kept_seconds(message: Message) -> float:
    """Return how long a message can be read: no longer than it lives."""
    expiration = message.properties.get("expiration")
    return KEPT_SECONDS if expiration is None else min(KEPT_SECONDS, float(expiration))


def keep_reading(tables: BrokerTables, bindings: Iterable[Binding]) -> None:
    """Put off the time at which readers count as gone, and write rows again that are gone.

    Of two workers with one node name the one that ends takes the other's row along.
    """
    for binding in bindings:
        declare(tables, binding, READER_SECONDS)


def prune(tables: BrokerTables) -> None:
    """Delete what has expired, and the oldest of what is too much."""
    t = tables.broadcasts
    tables.run(delete(t).where(t.c.expires_at < from_now(0)))
    newest = tables.run(select(func.max(t.c.id))).scalar()
    if newest is not None:
        tables.run(delete(t).where(t.c.id <= newest - KEPT_ROWS))
    q = tables.queues
    gone = tables.run(select(q.c.queue, q.c.exchange).where(q.c.expires_at < from_now(0))).all()
    for queue in {row.queue for row in gone if row.exchange == ""}:
        # Of a client that waited for replies in a queue of its own.
        m = tables.messages
        tables.run(delete(m).where(m.c.queue == queue, m.c.due_at.is_not(None)))
    if gone:
        tables.run(delete(q).where(q.c.expires_at < from_now(0)))


class Log:
    """How far one connection has read."""

    def __init__(self) -> None:
        self._from: int | None = None
        self._seen: deque[tuple[float, int]] = deque()

    def begin(self, tables: BrokerTables) -> None:
        """Read from here on; does nothing the second time."""
        if self._from is None:
            newest = tables.run(select(func.max(tables.broadcasts.c.id))).scalar()
            self._from = newest or 0

    def is_unread(self, tables: BrokerTables, readers: Iterable[Binding]) -> ColumnElement[bool]:
        """Return what tells rows for readers that were not read.

        Also those whose number is lower than that of one which was.
        """
        c = tables.broadcasts.c
        known = [number for _, number in self._seen]
        now = select(from_now(0)).scalar_subquery()
        is_alive = and_(c.exchange.in_({b.exchange for b in readers}), c.expires_at > now)
        is_new = and_(c.id > (self._from or 0), is_alive)
        return and_(is_new, c.id.not_in(known)) if known else is_new

    def read(
        self, tables: BrokerTables, readers: Iterable[Binding]
    ) -> Sequence[tuple[Delivery, Binding]]:
        """Return what was said to readers since the last time, of priority 9 first."""
        self.begin(tables)
        t, now = tables.broadcasts, monotonic()
        while self._seen and self._seen[0][0] < now - SETTLED_SECONDS:
            self._from = max(self._from or 0, self._seen.popleft()[1])
        said = (
            select(t.c.id, t.c.exchange, t.c.routing_key, t.c.body, t.c.envelope)
            .where(self.is_unread(tables, readers))
            .order_by(t.c.id)
        )
        rows = tables.run(said.limit(BATCH_ROWS)).all()
        self._seen.extend((now, row.id) for row in rows)
        found = [pair for row in rows for pair in _deliveries(row, readers)]
        return sorted(found, key=lambda pair: -_priority(pair[0]))


def _priority(delivery: Delivery) -> int:
    given = delivery.payload["properties"].get("priority")
    return given if isinstance(given, int) else 0


def _deliveries(row: Found, readers: Iterable[Binding]) -> list[tuple[Delivery, Binding]]:
    found: dict[str, Binding] = {}
    for binding in readers:
        if binding.exchange == row.exchange and matches(binding, row.routing_key):
            found.setdefault(binding.queue, binding)
    if not found:
        return []
    message = Message.from_parts(row.body, row.envelope)
    return [
        (Delivery(queue, payload_of(message, f"{row.id}.{number}"), None), binding)
        for number, (queue, binding) in enumerate(found.items())
    ]
