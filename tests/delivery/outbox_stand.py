"""A stand with an outbox: what its rows are, what a relay makes of them, and a broker that does not answer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy.outbox.relay import Relay, relay_of
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.stand import Stand


class Base(DeclarativeBase):
    """The tables of the stand."""


class Effect(Base):
    """What a transaction did; names repeat when something was done twice."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))


class OutboxStand(Stand):
    """A stand with the tables of the outbox, and one of its own.

    Args:
        database: The test's database.
        broker: The test's broker; left out, one in memory.
        options: Of Alchemy; the outbox is on, unless they say otherwise.
    """

    def __init__(self, database: Database, broker: Broker | None = None, **options: Any) -> None:
        super().__init__(database, broker, **{"outbox": True, **options})
        Base.metadata.create_all(database.engine)
        self.alchemy.create_tables()
        self.effect = self.task(name="effect")(add_effect)

    def in_caller(self) -> AbstractContextManager[None]:
        """Return a context manager inside of which whoever commits hands over itself."""
        outbox = self.alchemy.outbox
        assert outbox is not None
        return outbox.in_caller()

    def effects(self) -> list[str]:
        """Return the names of the committed effects in their order."""
        return [row[0] for row in self.database.rows("SELECT name FROM effect ORDER BY id")]

    def outbox(self, columns: str = "task_id") -> list[Any]:
        """Return columns of the outbox's rows, oldest first; one column as plain values."""
        self.handed_over()
        rows = self.database.rows(f"SELECT {columns} FROM celery_outbox ORDER BY created_at, id")
        return [row[0] if len(row) == 1 else row for row in rows]

    def relay(self) -> Relay:
        """Return a new relay, such as another process would have."""
        self.handed_over()
        return relay_of(self.alchemy)

    def relay_all(self) -> int:
        """Let a relay handle everything that is due; return how many rows it handled."""
        relay, handled = self.relay(), 0
        while claimed := relay.step():
            handled += claimed
        return handled

    def make_due(self, where: str = "due_at IS NOT NULL") -> None:
        """Let all leases and waiting times of rows pass."""
        self.handed_over()
        self.database.execute(f"UPDATE celery_outbox SET due_at = '2020-01-01 00:00:00' WHERE {where}")

    def broker_down(self) -> BrokerDown:
        """Return a context manager inside of which the broker does not answer."""
        return BrokerDown(self)


class BrokerDown:
    """The app's broker moves to a port where nobody listens, and back."""

    def __init__(self, stand: OutboxStand) -> None:
        self._stand = stand

    def __enter__(self) -> None:
        self._url = self._stand.app.conf.broker_url
        self._options = dict(self._stand.app.conf.broker_transport_options or {})
        self._move("redis://127.0.0.1:1/0", {"socket_connect_timeout": 0.5})

    def __exit__(self, *error: object) -> None:
        self._move(self._url, self._options)

    def _move(self, url: str, options: dict[str, Any]) -> None:
        self._stand.handed_over()
        app: Any = self._stand.app
        app.conf.update(broker_url=url, broker_write_url=url, broker_read_url=url)
        app.conf.broker_transport_options = options
        # The app's pools are made again at the next use, for the new address.
        app._pool = None
        app.amqp._producer_pool = None
        outbox = self._stand.alchemy.outbox
        if outbox is None:
            raise AssertionError("an Alchemy with an app has an outbox")
        outbox.publisher.close()
        outbox.publisher._paused_until = 0.0


def add_effect(session: Session, name: str) -> str:
    """Write one effect and return its name."""
    session.add(Effect(name=name))
    session.flush()
    return name
