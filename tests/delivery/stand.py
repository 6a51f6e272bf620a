"""One app with an outbox in the test's own process: it sends, looks into the broker, and delivers as a worker does."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from kombu.serialization import loads
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy
from celery_alchemy.relay import Relay, relay_of
from tests.services.brokers import Broker
from tests.services.databases import Database


class Base(DeclarativeBase):
    """The tables of the stand."""


class Effect(Base):
    """What a transaction did; names repeat when something was done twice."""

    __tablename__ = "effect"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))


class Crash(BaseException):
    """The end of a process, as far as one process can play it: nothing that follows in the body runs."""


@dataclass(frozen=True)
class Sent:
    """A message that was taken out of the broker."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    routing: tuple[str, str]

    @property
    def id(self) -> str:
        """The id of its task."""
        return str(self.headers["id"])

    @property
    def task(self) -> str:
        """The name of its task."""
        return str(self.headers["task"])

    def content(self) -> Any:
        """Return the deserialised body: args, kwargs, and what is embedded."""
        return loads(self.body, self.content_type, self.content_encoding, force=True)

    @property
    def args(self) -> list[Any]:
        """The positional arguments of its task."""
        return list(self.content()[0])


@dataclass(frozen=True)
class Ended:
    """What Celery's tracer made of one delivery."""

    state: str
    value: Any
    request: dict[str, Any] = field(repr=False)


class Stand:
    """An app on one database and one broker.

    Args:
        database: The test's database.
        broker: The test's broker; left out, one in memory.
        options: Of Alchemy; the outbox is on unless they say otherwise.

    Attributes:
        app: The Celery app.
        alchemy: Its Alchemy.
        queue: The name of the app's default queue, which no other stand has.
        prefix: Part of every task's name.
    """

    def __init__(self, database: Database, broker: Broker | None = None, **options: Any) -> None:
        self.database = database
        self.prefix = f"stand-{secrets.token_hex(4)}"
        if broker is None:
            self.app = Celery(self.prefix, broker="memory://", backend="cache+memory://", set_as_current=False)
            self.app.conf.task_default_queue = self.prefix
        else:
            self.app = broker.app(self.prefix)
        self.app.conf.update(task_publish_retry=False, broker_connection_timeout=1)
        self.queue: str = self.app.conf.task_default_queue
        self.alchemy = Alchemy(self.app, database.url, **{"outbox": True, **options})
        Base.metadata.create_all(database.engine)
        self.alchemy.create_tables()
        self.effect = self.task(name="effect")(add_effect)

    def close(self) -> None:
        """Close every connection of the app and of the Alchemy."""
        if self.alchemy.outbox is not None:
            self.alchemy.outbox.publisher.close()
        self.alchemy.engine.dispose()
        self.app.close()

    def task(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """Decorate a function as a task of this app only."""
        decorate: Any = self.app.task
        decorator: Callable[[Callable[..., Any]], Any] = decorate(shared=False, **options)
        return decorator

    # --- what is committed, and what the broker has ---------------------------------------------------------

    def effects(self) -> list[str]:
        """Return the names of the committed effects in their order."""
        return [row[0] for row in self.database.rows("SELECT name FROM effect ORDER BY id")]

    def outbox(self, columns: str = "task_id") -> list[Any]:
        """Return columns of the outbox's rows, oldest first; one column as plain values."""
        rows = self.database.rows(f"SELECT {columns} FROM celery_outbox ORDER BY created_at, id")
        return [row[0] if len(row) == 1 else row for row in rows]

    def sent(self, queue: str | None = None) -> list[Sent]:
        """Take everything out of a queue, in order."""
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            entity = self.app.amqp.queues[queue or self.queue](channel)
            entity.declare()
            taken = []
            while (got := entity.get(no_ack=True)) is not None:
                message: Any = got
                info = message.delivery_info
                taken.append(
                    Sent(
                        message.body.encode() if isinstance(message.body, str) else bytes(message.body),
                        message.content_type,
                        message.content_encoding,
                        dict(message.headers),
                        dict(message.properties),
                        (info["exchange"], info["routing_key"]),
                    )
                )
        return taken

    # --- acts -------------------------------------------------------------------------------------------------

    def deliver(self, sent: Sent, **request: Any) -> Ended:
        """Run a message in the tracer that workers run it in; a BaseException of the body comes through."""
        task: Any = self.app.tasks[sent.task]
        args, kwargs, embedded = sent.content()
        described = {
            **sent.headers,
            **embedded,
            "args": args,
            "kwargs": kwargs,
            "is_eager": False,
            "hostname": "tests",
            "delivery_info": {"exchange": sent.routing[0], "routing_key": sent.routing[1], "redelivered": False},
            **request,
        }
        traced = build_tracer(task.name, task, app=self.app)(sent.id, args, kwargs, described)
        if traced.info is not None:
            return Ended(traced.info.state, traced.info.retval, described)
        return Ended("SUCCESS", traced.retval, described)

    def run_all(self, limit: int = 50) -> list[str]:
        """Deliver what the broker has, and what that sends, until it is empty; return the names of the tasks."""
        names: list[str] = []
        while batch := self.sent():
            for sent in batch:
                names.append(sent.task)
                self.deliver(sent)
            if len(names) > limit:
                raise AssertionError(f"no end of messages: {names}")
        return names

    def relay(self) -> Relay:
        """Return a new relay, such as another process would have."""
        return relay_of(self.alchemy)

    def relay_all(self) -> int:
        """Let a relay handle everything that is due; return how many rows it handled."""
        relay, handled = self.relay(), 0
        while claimed := relay.step():
            handled += claimed
        return handled

    def make_due(self, where: str = "due_at IS NOT NULL") -> None:
        """Let all leases and waiting times of rows pass."""
        self.database.execute(f"UPDATE celery_outbox SET due_at = '2020-01-01 00:00:00' WHERE {where}")

    def broker_down(self) -> BrokerDown:
        """Return a context manager inside of which the broker does not answer."""
        return BrokerDown(self)


class BrokerDown:
    """The app's broker moves to a port where nobody listens, and back."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand

    def __enter__(self) -> None:
        self._url = self._stand.app.conf.broker_url
        self._options = dict(self._stand.app.conf.broker_transport_options or {})
        self._move("redis://127.0.0.1:1/0", {"socket_connect_timeout": 0.5})

    def __exit__(self, *error: object) -> None:
        self._move(self._url, self._options)

    def _move(self, url: str, options: dict[str, Any]) -> None:
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
