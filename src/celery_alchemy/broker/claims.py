"""Taking messages for a worker, and reading what was taken.

Between the table and the channel, which delivers what comes from here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any

from sqlalchemy import ColumnElement, or_, select, update

from ..databases import database_of
from ..databases.tables import Found, from_now
from ..error_texts import error_text, storable
from ..messages.celery_types import Fields
from ..messages.message import Message
from ..outbox.outbox import TAKEN_HEADER, shown
from .floors import Floors
from .hold import moment
from .tables import BrokerTables

__all__ = ["BATCH_ROWS", "Claim", "Delivery", "has_due", "payload_of", "take"]

logger: logging.Logger = logging.getLogger(__name__)

#: Messages of one claim at most, where the worker sets no limit.
BATCH_ROWS = 500


@dataclass(frozen=True, slots=True)
class Claim:
    """One delivery of a row: what an acknowledgement must name, so that it ends no later delivery.

    Attributes:
        row_id: The row.
        number: How often it has been taken, with this time.
        once: It is a ``once`` task's, whose own transaction ends it.
        error: Why it goes back, if its database was cut: it is due after a while then. None where
            it is due at once.
        dies: It does not go back, but is set aside with its error.
        has_begun: Its row counts a start that has not ended.
        kept_id: The row that its message is kept in if a guest does its work meanwhile; None if
            none is.
    """

    row_id: str
    number: int
    once: bool
    error: str | None = None
    dies: bool = False
    has_begun: bool = False
    kept_id: str | None = None

    @property
    def delivery(self) -> tuple[str, int]:
        """The row and the number: which delivery it is, whatever becomes of it."""
        return self.row_id, self.number


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way to a consumer.

    Attributes:
        queue: Which it came from.
        payload: As kombu's virtual channels have it.
        claim: What ends it; None for a broadcast.
    """

    queue: str
    payload: Fields
    claim: Claim | None


class DueHeaders(dict[str, object]):
    """The headers of a message that is due: its task reads the ``eta``, its worker does not.

    A worker that looked at it again, by its own clock, would hold the message in memory. It asks
    for it by ``get()``, in a copy of the headers.
    """

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "eta" else super().get(key, default)

    def copy(self) -> DueHeaders:
        return DueHeaders(self)


def take(
    tables: BrokerTables,
    worker: str,
    queues: Sequence[str],
    limit: int,
    floors: Floors,
) -> list[Delivery]:
    """Take due messages for a worker, of priority 9 first, then those that wait longest.

    One that cannot be read is set aside with its error; one whose time to live is over is dropped.

    Args:
        tables: In a transaction.
        worker: The id of the worker's row.
        queues: Where from.
        limit: How many at most.
        floors: What the worker remembers of its looks.
    """
    database, taken_at = database_of(tables.connection.dialect.name), moment()
    began, since = monotonic(), floors.since()
    rows = database.take(tables.connection, tables.messages, worker, queues, limit, since)
    floors.note(rows, queues, limit, monotonic() - began)
    deliveries: list[Delivery] = []
    # RETURNING gives rows in any order.
    for row in sorted(rows, key=lambda row: (-(row.priority or 0), str(row.created_at))):
        try:
            delivery = _read(row, worker, taken_at)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is about this row alone.
            _set_aside(tables, row, worker, f"the row cannot be read: {error_text(exc)}")
            continue
        if delivery is None:
            tables.run(tables.messages.delete().where(tables.messages.c.id == row.id))
        else:
            deliveries.append(delivery)
    return deliveries


def has_due(
    tables: BrokerTables,
    queues: Sequence[str],
    is_unread: ColumnElement[bool] | None,
    floors: Floors,
) -> bool:
    """Tell in one statement whether a queue has a message that is due, or the log an unread one.

    Where that would take long, that there may be one: to take what is due since the last look costs
    no more.

    Args:
        tables: In a transaction.
        queues: The queues.
        is_unread: Tells broadcasts that were not read; None for no look.
        floors: What the worker remembers of its looks.
    """
    if queues and not floors.is_whole_due():
        return True
    database = database_of(tables.connection.dialect.name)
    looks = [database.is_any_due(tables.messages, queues)] if queues else []
    if is_unread is not None:
        looks.append(select(tables.broadcasts.c.id).where(is_unread).exists())
    began = monotonic()
    found = bool(looks) and bool(tables.run(select(or_(*looks))).scalar())
    if queues:
        floors.note_whole(monotonic() - began)
    if found:
        floors.forget()
    return found


def _read(row: Found, worker: str, taken_at: float) -> Delivery | None:
    """Make sense of a row; None for one whose time to live is over.

    Raises:
        ValueError: It is no message.
    """
    if not isinstance(row.body, (bytes, bytearray, memoryview)):
        # SQLite keeps whatever is written into a column.
        raise ValueError(f"its body is a {type(row.body).__name__}")  # noqa: TRY004 - as others.
    message = Message.from_parts(row.body, row.envelope or "")
    if _is_over(message, row):
        return None
    # Over that of an earlier delivery, which a retry has passed on.
    message.headers.pop(TAKEN_HEADER, None)
    if row.once and message.is_sole:
        message.headers[TAKEN_HEADER] = [worker, taken_at]
    task_id = shown(message.task_id) if row.once else None
    kept_id = None if task_id == row.id else task_id
    claim = Claim(row.id, int(row.sends), bool(row.once), kept_id=kept_id)
    payload = payload_of(message, f"{row.id}.{claim.number}", redelivered=bool(row.failures))
    return Delivery(row.queue, payload, claim)


def _is_over(message: Message, row: Found) -> bool:
    expiration = message.properties.get("expiration")
    if expiration is None or message.headers.get("expires") is not None:
        # Of a task that says itself when it expires: a worker reports it as revoked.
        return False
    age = (_moment(row.taken_at) - _moment(row.created_at)).total_seconds()
    return age > float(expiration)


def _moment(given: datetime | str) -> datetime:
    return datetime.fromisoformat(given) if isinstance(given, str) else given


def payload_of(message: Message, tag: str, *, redelivered: bool = False) -> Fields:
    """Return a message as kombu's virtual channels have it.

    It is due, by the database's clock.
    """
    headers = message.headers
    return {
        "body": message.body,
        "content-type": message.content_type,
        "content-encoding": message.content_encoding,
        "headers": DueHeaders(headers) if headers.get("eta") is not None else headers,
        "properties": {
            **message.properties,
            "delivery_tag": tag,
            "delivery_info": {
                "exchange": message.exchange,
                "routing_key": message.routing_key,
                "redelivered": redelivered,
            },
        },
    }


def _set_aside(tables: BrokerTables, row: Found, worker: str, error: str) -> None:
    reason = storable(error)
    logger.error("The message %s in the queue %r is set aside: %s", row.id, row.queue, reason)
    t = tables.messages
    tables.run(
        update(t)
        .where(t.c.id == row.id, t.c.claim == worker)
        .values(died_at=from_now(0), due_at=None, claim=None, error=reason)
    )
