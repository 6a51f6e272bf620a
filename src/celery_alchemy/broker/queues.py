"""Queues and their bindings, and the way of a message to them.

Above the tables, below the channel, which declares, and the outbox, which sends.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ..databases.column_types import QUEUE_MAX_LENGTH
from ..databases.tables import from_now
from ..errors import QueueNameError
from .tables import BrokerTables

__all__ = [
    "Binding",
    "bindings_of",
    "declare",
    "exists",
    "forget",
    "matches",
    "purge",
    "size",
    "unbind",
]


#: One word, and any number of them.
_WILDCARDS = {"*": "[^.]+", "#": ".*?"}


@dataclass(frozen=True, slots=True)
class Binding:
    """A queue, or its binding to an exchange.

    Attributes:
        queue: The queue's name.
        exchange: What it is bound to; empty for the queue itself.
        kind: The exchange's type: ``"direct"``, ``"topic"`` or ``"fanout"``.
        routing_key: What it is bound with.
        is_reader: Its messages are broadcasts.
    """

    queue: str
    exchange: str = ""
    kind: str = "direct"
    routing_key: str = ""
    is_reader: bool = False

    @property
    def id(self) -> str:
        """The key of its row."""
        parts = (self.queue, self.exchange, self.routing_key)
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def checked_name(name: str) -> str:
    """Return the name of a queue, an exchange or a routing key.

    Raises:
        QueueNameError: It is too long for the tables, or it has a NUL, which PostgreSQL refuses.
    """
    if len(name) > QUEUE_MAX_LENGTH or "\0" in name:
        raise QueueNameError(name[:80], len(name), QUEUE_MAX_LENGTH)
    return name


def declare(tables: BrokerTables, binding: Binding, seconds: float | None = None) -> None:
    """Write the row of a queue or of a binding, unless it is there.

    Args:
        tables: In a transaction.
        binding: What is declared.
        seconds: How long the row is kept from now on; None for ever.

    Raises:
        QueueNameError: A name cannot be kept.
    """
    for name in (binding.queue, binding.exchange, binding.routing_key):
        checked_name(name)
    t = tables.queues
    until = None if seconds is None else from_now(seconds)
    found = tables.run(select(t.c.kind, t.c.expires_at).where(t.c.id == binding.id)).one_or_none()
    if found is not None:
        if found.expires_at is not None or found.kind != binding.kind:
            changed = update(t).where(t.c.id == binding.id)
            tables.run(changed.values(expires_at=until, kind=binding.kind))
        return
    values = {
        "id": binding.id,
        "queue": binding.queue,
        "exchange": binding.exchange,
        "kind": binding.kind,
        "routing_key": binding.routing_key,
        "is_reader": binding.is_reader,
        "expires_at": until,
    }
    try:
        with tables.connection.begin_nested():
            tables.run(insert(t).values(**values))
    except IntegrityError:
        # Another process has declared it at the same time, as all workers do that start at once.
        return


def exists(tables: BrokerTables, queue: str) -> bool:
    """Tell whether a queue was declared."""
    t = tables.queues
    return tables.run(select(t.c.id).where(t.c.id == Binding(queue).id)).first() is not None


def bindings_of(tables: BrokerTables, exchange: str) -> list[Binding]:
    """Return what is bound to an exchange."""
    c = tables.queues.c
    alive = c.expires_at.is_(None) | (c.expires_at > from_now(0))
    rows = tables.run(
        select(c.queue, c.exchange, c.kind, c.routing_key, c.is_reader).where(
            c.exchange == exchange, alive
        )
    )
    return [Binding(*row) for row in rows]


def matches(binding: Binding, routing_key: str) -> bool:
    """Tell whether a message with a routing key goes to a binding's queue."""
    if binding.kind == "fanout":
        return True
    if binding.kind == "topic":
        return _pattern(binding.routing_key).match(routing_key) is not None
    return binding.routing_key == routing_key


@lru_cache(maxsize=1024)
def _pattern(routing_key: str) -> re.Pattern[str]:
    """Return what the words of a binding match, as kombu's virtual topic exchange has it.

    Source: ``TopicExchange.key_to_pattern`` of ``kombu.transport.virtual.exchange``. It is not
    imported: every process that sends would load kombu's virtual transport.
    """
    words = (_WILDCARDS.get(word, re.escape(word)) for word in routing_key.split("."))
    return re.compile(f"^{'[.]'.join(words)}$")


def size(tables: BrokerTables, queue: str) -> int:
    """Return how many messages of a queue can be taken now."""
    c = tables.messages.c
    now = select(from_now(0)).scalar_subquery()
    counted = select(func.count()).where(c.queue == queue, c.due_at <= now)
    return int(tables.run(counted).scalar_one())


def purge(tables: BrokerTables, queue: str) -> int:
    """Delete what waits in a queue, also what is not due yet, and return how much it was."""
    c = tables.messages.c
    waiting = delete(tables.messages).where(c.queue == queue, c.due_at.is_not(None))
    return int(tables.run(waiting).rowcount)


def unbind(tables: BrokerTables, bindings: Iterable[Binding]) -> None:
    """Delete the rows of bindings."""
    ids = [binding.id for binding in bindings]
    if ids:
        tables.run(delete(tables.queues).where(tables.queues.c.id.in_(ids)))


def forget(tables: BrokerTables, queue: str) -> None:
    """Delete a queue with its bindings and with what waits in it."""
    purge(tables, queue)
    tables.run(delete(tables.queues).where(tables.queues.c.queue == queue))
