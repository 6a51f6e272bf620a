"""The way of a message: which queues take it, and whether anybody reads it as a broadcast.

Above the queues; the channel asks it for what kombu publishes, the outbox for what a transaction
sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Protocol

from kombu import Exchange

from ..errors import UnroutableError
from ..messages.message import Message
from ..outbox.outbox import Row, insert_rows, unique_id
from ..outbox.place import OutboxTable
from .broadcasts import say
from .homes import BrokerHome
from .queues import Binding, bindings_of, checked_name, matches
from .tables import BrokerTables, begun
from .waking import bell_of

__all__ = ["Routes", "post"]

#: Seconds for which the bindings of a topic exchange are remembered: each event of a worker would
#: ask for them.
REMEMBERED_SECONDS = 1.0


class NamedQueue(Protocol):
    """A queue of kombu: it may have no exchange, which the stubs leave out."""

    @property
    def name(self) -> str: ...

    @property
    def exchange(self) -> Exchange | None: ...

    @property
    def routing_key(self) -> str | None: ...


class Routes:
    """The way of messages through one broker; for each process, usable from many threads.

    Args:
        home: The broker's database.
        declared: Returns the queues that the app knows by their names, so that a message which is
            bound for one of them finds it before any worker has declared it.
    """

    def __init__(
        self, home: BrokerHome, declared: Callable[[], Mapping[str, NamedQueue]] = dict
    ) -> None:
        self._home = home
        self._declared = declared
        self._remembered: dict[str, tuple[float, list[Binding]]] = {}
        self._bell = bell_of(home)

    def routed(self, table: OutboxTable, rows: Sequence[Row]) -> list[Row]:
        """Return rows with the queues that they go to; a broadcast is written into its log here.

        Raises:
            UnroutableError: No queue takes a task's message.
            QueueNameError: The name of its queue cannot be kept.
        """
        placed: list[Row] = []
        for row in rows:
            queues, is_read = self.of(BrokerTables(table), row.message)
            row.message.is_sole &= len(queues) == 1 and not is_read
            if is_read:
                say(BrokerTables(table), [row.message])
            if not queues and not is_read and row.message.task_id is not None:
                raise UnroutableError(row.message.task_name or "message", row.message.routing_key)
            for number, queue in enumerate(queues):
                # Rows with one key are one message.
                another = row if number == 0 else Row(unique_id(), row.message)
                another.queue = queue
                placed.append(another)
        return placed

    def of(self, tables: BrokerTables, message: Message) -> tuple[list[str], bool]:
        """Return the queues that take a message, and whether somebody reads it as a broadcast."""
        if message.exchange == "":
            return [checked_name(message.routing_key)], False
        found = [
            binding
            for binding in (*self._bindings(tables, message.exchange), *self._by_name(message))
            if matches(binding, message.routing_key)
        ]
        queues = dict.fromkeys(binding.queue for binding in found if not binding.is_reader)
        return list(queues), any(binding.is_reader for binding in found)

    def _bindings(self, tables: BrokerTables, exchange: str) -> list[Binding]:
        asked_at, found = self._remembered.get(exchange, (0.0, []))
        if asked_at and monotonic() - asked_at < REMEMBERED_SECONDS:
            return found
        found = bindings_of(tables, exchange)
        is_topic = bool(found) and all(binding.kind == "topic" for binding in found)
        # Of any other exchange that nobody reads somebody may read the next message.
        if is_topic or exchange == self._home.event_exchange:
            self._remembered[exchange] = (monotonic(), found)
        return found

    def _by_name(self, message: Message) -> list[Binding]:
        """Return the bindings of the queues that a message was sent with."""
        known = self._declared()
        entities = [known[name] for name in message.queues if name in known]
        return [
            Binding(queue.name, queue.exchange.name, queue.exchange.type, queue.routing_key or "")
            for queue in entities
            if queue.exchange is not None and queue.exchange.name == message.exchange
        ]

    def wake(self) -> None:
        """Tell workers that something was sent."""
        self._bell.ring()

    def still_has(self, taken: object) -> bool:
        """Tell whether a message is still this worker's, by what its TAKEN_HEADER says.

        A heart that has not beaten for half of the time is one that stands still.
        """
        match taken:
            case [str(worker), float(taken_at)]:
                seconds = self._home.worker_lost_after_seconds / 2
                return self._home.hold.covers(worker, taken_at, seconds)
        return False


def post(home: BrokerHome, routes: Routes, message: Message, otherwise: str | None) -> None:
    """Write one message in a transaction of its own, and tell workers.

    Args:
        home: The broker's database.
        routes: Its routes in this process.
        message: The finished message.
        otherwise: The queue of a message that nobody takes; None to drop it, as AMQP does.
    """
    if message.exchange == "":
        # Its queue is named: there is nothing to look up.
        queues, is_read = [checked_name(message.routing_key)], False
        _insert(home, [Row(unique_id(), message, queue=queues[0])])
    else:
        with begun(home.place, home.engine()) as tables:
            queues, is_read = routes.of(tables, message)
            if is_read:
                say(tables, [message])
            elif not queues and otherwise is not None:
                queues = [otherwise]
            rows = [Row(unique_id(), message, queue=queue) for queue in queues]
            insert_rows(tables.outbox, rows, None)
    if queues or is_read:
        routes.wake()


def _insert(home: BrokerHome, rows: Sequence[Row]) -> None:
    """Insert rows in a transaction of their own; on PostgreSQL the statement itself is one."""
    engine = home.engine()
    if engine.dialect.name != "postgresql":
        with begun(home.place, engine) as tables:
            insert_rows(tables.outbox, rows, None)
        return
    with engine.connect() as connection:
        alone = connection.execution_options(isolation_level="AUTOCOMMIT")
        with begun(home.place, alone) as tables:
            insert_rows(tables.outbox, rows, None)
