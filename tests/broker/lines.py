"""What the tests of the broker stand on: connections of kombu, and a broker for workers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kombu import Connection, Consumer, Producer, Queue

from celery_alchemy.databases.tables import metadata
from tests.services.brokers import Broker, results_in
from tests.services.databases import Database
from tests.waiting import eventually


class Line:
    """A connection to the broker, as a client or a worker has one.

    Attributes:
        connection: The connection of kombu.
        channel: Its channel.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.channel: Any = connection.channel()

    def send(self, queue: Queue | str, body: Any = "hello", **options: Any) -> None:
        """Send a message to a queue."""
        queue = Queue(queue) if isinstance(queue, str) else queue
        options.setdefault("declare", [queue])
        options.setdefault("routing_key", queue.name)
        Producer(self.channel).publish(body, **options)

    def take(self, queue: Queue | str, *, no_ack: bool = False) -> Any:
        """Take one message; None if there is none."""
        queue = Queue(queue) if isinstance(queue, str) else queue
        return queue(self.channel).get(no_ack=no_ack)

    @contextmanager
    def consuming(self, *queues: Queue, prefetch: int = 0, no_ack: bool = False) -> Iterator[Heard]:
        """Consume queues; what arrives is in the list that is given."""
        heard = Heard(self.connection)
        consumer = Consumer(self.channel, list(queues), no_ack=no_ack, on_message=heard.messages.append)
        consumer.qos(prefetch_count=prefetch)
        with consumer:
            yield heard


class Heard:
    """What a consumer was given."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.messages: list[Any] = []

    def wait_for(self, count: int, timeout: float = 10.0) -> list[Any]:
        """Wait until so many messages have come."""

        def come() -> bool:
            self.drain()
            return len(self.messages) >= count

        eventually(come, timeout=timeout, what=f"{count} messages have come")
        return self.messages

    def drain(self, seconds: float = 0.05) -> None:
        """Take what comes in a time."""
        try:
            while True:
                self._connection.drain_events(timeout=seconds)
        except TimeoutError:
            return


OpenLine = Callable[[], Line]


def database_broker(database: Database, folder: Path) -> Broker:
    """Return the database of a test as its broker, with its tables made."""
    metadata.create_all(database.engine)
    settings = {"broker_url": f"alchemy+{database.url}"} | results_in(folder)
    return Broker("alchemy", f"test-{secrets.token_hex(6)}", settings)
