"""The stand of the tests: one app in the test's own process, that sends, looks into its broker and runs tasks as a worker does."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from celery import Celery
from celery.app.trace import build_tracer
from celery.utils import uuid
from kombu.serialization import loads

from celery_alchemy import Alchemy
from tests.services.brokers import Broker
from tests.services.databases import Database


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
    delivery_info: dict[str, Any]

    @classmethod
    def of(cls, message: Any) -> Sent:
        """Return what a message of kombu has."""
        return cls(
            message.body.encode() if isinstance(message.body, str) else bytes(message.body),
            message.content_type,
            message.content_encoding,
            dict(message.headers),
            dict(message.properties),
            dict(message.delivery_info),
        )

    @property
    def id(self) -> str:
        """The id of its task."""
        return str(self.headers["id"])

    @property
    def task(self) -> str:
        """The name of its task."""
        return str(self.headers["task"])

    @property
    def routing(self) -> tuple[str, str]:
        """The exchange that it went to, and its routing key."""
        return self.delivery_info["exchange"], self.delivery_info["routing_key"]

    def content(self) -> Any:
        """Return the deserialised body: args, kwargs, and what is embedded."""
        return loads(self.body, self.content_type, self.content_encoding, force=True)

    @property
    def args(self) -> list[Any]:
        """The positional arguments of its task."""
        return list(self.content()[0])

    def request(self) -> dict[str, Any]:
        """Return what a worker's tracer is told of it."""
        args, kwargs, embedded = self.content()
        return {
            **self.headers,
            **embedded,
            "args": args,
            "kwargs": kwargs,
            "is_eager": False,
            "hostname": "tests",
            "delivery_info": {"redelivered": False, **self.delivery_info},
        }


@dataclass(frozen=True)
class Ended:
    """What Celery's tracer made of a request.

    Attributes:
        state: How it ended.
        value: What it returned or raised.
        request: What the tracer was told of it.
        told: What a worker's parent would be told.
        runtime_seconds: How long it took.
    """

    state: str
    value: Any
    request: dict[str, Any] = field(repr=False)
    told: Any = field(repr=False)
    runtime_seconds: float = field(repr=False)

    @property
    def id(self) -> str:
        """The id of its task."""
        return str(self.request["id"])


def task_of(app: Celery, *function: Callable[..., Any], **options: Any) -> Any:
    """Make a function a task of one app, or return a decorator that does; it keeps no type, for the tests call it in every way.

    Not shared: Celery would make it a task of the apps of all later tests too.
    """
    make: Any = app.task
    return make(*function, shared=False, **options)


def tracer_of(app: Celery, task: Any) -> Callable[..., Any]:
    """Return the tracer that workers run a task in."""
    tracer: Callable[..., Any] = build_tracer(task.name, task, app=app)
    return tracer


def trace(app: Celery, task: Any, args: Sequence[Any], kwargs: dict[str, Any], request: dict[str, Any]) -> Ended:
    """Run a request in the tracer that workers run it in; what is no Exception comes through, as in a worker's child."""
    tracer = tracer_of(app, task)
    started = monotonic()
    traced = tracer(request["id"], args, kwargs, request)
    seconds = monotonic() - started
    if traced.info is not None:
        return Ended(traced.info.state, traced.info.retval, request, traced.retval, seconds)
    return Ended("SUCCESS", traced.retval, request, traced.retval, seconds)


class Stand:
    """An app whose tasks have sessions of one database.

    Args:
        database: The test's database.
        broker: The test's broker; True for the database itself, and left out, one in memory.
        settings: Of the app.
        options: Of Alchemy; the test's database is its bind, unless they say otherwise.

    Attributes:
        app: The Celery app.
        alchemy: What gives its tasks their sessions.
        database: The same database as the tests see it: only what is committed.
        prefix: The app's name, which no other stand has.
        queue: The name of the app's default queue; except where the database is the broker, no other stand has it.
    """

    def __init__(
        self, database: Database, broker: Broker | bool | None = None, *, settings: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.database = database
        self.prefix = f"stand-{secrets.token_hex(4)}"
        if isinstance(broker, Broker):
            self.app = broker.app(self.prefix)
        elif broker:
            self.app = Celery(self.prefix, set_as_current=False)
            options["broker"] = True
        else:
            self.app = Celery(self.prefix, broker="memory://", backend="cache+memory://", set_as_current=False)
            self.app.conf.task_default_queue = self.prefix
        if broker is not True:
            self.app.conf.update(task_publish_retry=False, broker_connection_timeout=1)
        self.app.conf.update(settings or {})
        self.alchemy = Alchemy(self.app, **{"bind": database.url, **options})
        self.queue: str = self.app.conf.task_default_queue

    def close(self) -> None:
        """Close every connection of the app and of the Alchemy."""
        self.handed_over()
        if self.alchemy.outbox is not None:
            self.alchemy.outbox.publisher.close()
        self.alchemy.engine.dispose()
        self.app.close()

    def task(self, *function: Callable[..., Any], **options: Any) -> Any:
        """Make a task of this app; see `task_of`."""
        return task_of(self.app, *function, **options)

    def checked_out(self) -> int:
        """Return how many connections of the tasks' pool are lent out now."""
        return int(self.alchemy.engine.pool.checkedout())  # type: ignore[attr-defined]

    def handed_over(self) -> bool:
        """Wait for what follows the commits so far; tell whether the broker has all of it."""
        return self.alchemy.drain(20)

    def sent(self, queue: str | None = None) -> list[Sent]:
        """Take everything out of a queue, in order."""
        self.handed_over()
        with self.app.connection_for_read() as connection, connection.channel() as channel:
            entity = self.app.amqp.queues[queue or self.queue](channel)
            entity.declare()
            taken = []
            while (message := entity.get(no_ack=True)) is not None:
                taken.append(Sent.of(message))
        return taken

    def trace(self, task: Any, *args: Any, request: dict[str, Any] | None = None, **kwargs: Any) -> Ended:
        """Run a task in the tracer that workers run it in, without a message."""
        described = {
            "id": uuid(),
            "task": task.name,
            "args": args,
            "kwargs": kwargs,
            "delivery_info": {"routing_key": self.queue},
            "retries": 0,
            "is_eager": False,
            **(request or {}),
        }
        return trace(self.app, task, args, kwargs, described)

    def deliver(self, sent: Sent, **request: Any) -> Ended:
        """Run a message in the tracer that workers run it in, and wait for what it sends.

        Not by the kit's `Sent.run()`, which is a whole worker: this is its child alone, whose every BaseException comes through,
        and a test may say what else the request has.
        """
        described = {**sent.request(), **request}
        ended = trace(self.app, self.app.tasks[sent.task], described["args"], described["kwargs"], described)
        self.handed_over()
        return ended

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
