"""The finished message: what Celery would have handed to the broker, recorded instead.

First stop of a call that waits for a commit: ``outbox/outbox.py`` keeps the message,
``publisher.py`` sends it unchanged. The recording takes the place of the producer, the one object
through which every task message of Celery goes, so that chains, groups, chords, links, routes,
priorities, headers, stamps, the ``before_task_publish`` signal and custom serializers come through
as they are.
"""

from __future__ import annotations

import json as plain_json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from kombu import Exchange, Producer, Queue
from kombu.compression import compress
from kombu.serialization import dumps
from kombu.utils import json

from .callback_ids import body_with_fixed_ids
from .celery_types import App, Fields
from .declarations import Declaration, declared, entity_of, name_of

__all__ = [
    "Message",
    "Recorder",
    "install",
    "is_recording",
    "recording",
    "seconds_until",
]

_INSTALLED = "celery_alchemy_installed"

# Where RabbitMQ holds messages for quorum queues, and how a routing key says for how long: 28 bits,
# the highest first.
_DELAYED_EXCHANGE = "celery_delayed_27"
_DELAY_BITS = 28
_DELAY = re.compile(rf"(?:[01]\.){{{_DELAY_BITS}}}")

#: What ``publish`` is told of its own doing, which is no property of the message.
_OF_PUBLISH = ("retry", "retry_policy", "timeout", "confirm_timeout", "mandatory", "immediate")


@dataclass(slots=True)
class Message:
    """A message as the broker gets it.

    Attributes:
        body: The serialised, perhaps compressed, body.
        content_type: Of the body, such as ``application/json``.
        content_encoding: Of the body, such as ``utf-8``.
        exchange: Name of the exchange; empty for the default exchange.
        routing_key: Routing key; the queue's name on the default exchange.
        queues: Names of the queues to declare before publishing.
        declare: What else to declare before, in full: queues and exchanges that a name alone does
            not describe.
        headers: Celery's message headers (protocol 2) and the user's own.
        properties: AMQP properties: correlation_id, reply_to, priority, expiration, delivery_mode
            and the like.
        is_sole: Its task's id was made for it, and it goes to one queue: there is another message
            of its task only if somebody sends that id again.
        arguments: The task's args and kwargs before they were serialised; not part of the message.
    """

    body: bytes
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    queues: list[str] = field(default_factory=list)
    declare: list[Declaration] = field(default_factory=list)
    headers: Fields = field(default_factory=dict)
    properties: Fields = field(default_factory=dict)
    is_sole: bool = False
    arguments: tuple[tuple[object, ...], dict[str, object]] = field(
        default=((), {}), repr=False, compare=False
    )

    @property
    def task_id(self) -> str | None:
        """The id of the task; None for a message that is no task, such as a task-sent event."""
        id_: str | None = self.headers.get("id")
        return id_

    @property
    def task_name(self) -> str | None:
        """The name of the task; None for a message that is no task."""
        name: str | None = self.headers.get("task")
        return name

    @property
    def priority(self) -> int:
        """From 0 to 9, of which 9 is delivered first; 0 for a message that does not say."""
        given = self.properties.get("priority")
        return min(max(given, 0), 9) if isinstance(given, int) else 0

    @property
    def has_route(self) -> bool:
        """True if there must be a queue that takes it.

        One is declared for it, or the default exchange names one.
        """
        return self.exchange == "" or bool(self.queue_names)

    @property
    def queue_names(self) -> list[str]:
        """The names of all queues that are declared for it."""
        if not self.declare:
            return self.queues
        names = (name_of(declaration) for declaration in self.declare)
        return [*self.queues, *(name for name in names if name is not None)]

    def properties_at_publish(self) -> Fields:
        """Return the properties with what is left of the time to live.

        A broker counts it from the publish.

        A message that has expired goes out without one: a worker reports it as revoked, a broker
        would drop it in silence.
        """
        left = seconds_until(self.headers.get("expires"))
        if "expiration" not in self.properties or left is None:
            return self.properties
        others = {name: value for name, value in self.properties.items() if name != "expiration"}
        return {**others, "expiration": left} if left > 0 else others

    def routing_key_at_publish(self) -> str:
        """Return the routing key with what is left of the delay.

        RabbitMQ counts the delay from the publish.

        For quorum queues Celery has the broker hold a message until its eta; the delay in seconds
        is the beginning of the routing key then, bit by bit. With no bit set the message goes
        straight through. Source:
        https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html,
        ``kombu.transport.native_delayed_delivery``.
        """
        if not self.exchange.endswith(_DELAYED_EXCHANGE):
            return self.routing_key
        delay = _DELAY.match(self.routing_key)
        left = seconds_until(self.headers.get("eta"))
        if delay is None or left is None:
            return self.routing_key
        return (
            ".".join(f"{max(0, int(left)):0{_DELAY_BITS}b}") + self.routing_key[delay.end() - 1 :]
        )

    def envelope(self) -> str:
        """Return everything but the body, as JSON."""
        parts: Fields = {
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "queues": self.queues,
            "headers": self.headers,
            "properties": self.properties,
        }
        if self.declare:
            parts["declare"] = self.declare
        if self.is_sole:
            parts["is_sole"] = True
        return str(json.dumps(parts))

    @classmethod
    def from_parts(cls, body: bytes | bytearray | memoryview, envelope: str) -> Message:
        """Make a message from what ``body`` and ``envelope()`` were.

        Raises:
            ValueError: The envelope is not one. Nothing in it is executed or imported.
        """
        try:
            # The hook that knows marked types is called for each mapping, which takes longer than
            # the parsing.
            parts = json.loads(envelope) if '"__type__"' in envelope else plain_json.loads(envelope)
            # A newer version of the library, beside which this one still runs, may say more.
            known = {name: part for name, part in parts.items() if name in cls.__slots__}
            message = cls(body=bytes(body), **known)
        except Exception as exc:
            raise ValueError(f"not an envelope: {exc}") from exc
        texts: tuple[object, ...] = (
            message.content_type,
            message.content_encoding,
            message.exchange,
            message.routing_key,
        )
        mappings: tuple[object, ...] = (message.headers, message.properties)
        queues: object = message.queues
        if not isinstance(queues, list) or not all(
            isinstance(text, str) for text in (*texts, *queues)
        ):
            raise ValueError("not an envelope: a text field is not a text")
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise ValueError("not an envelope: headers or properties are not a mapping")
        declare: object = message.declare
        if not isinstance(declare, list):
            raise ValueError("not an envelope: its declarations are no list")  # noqa: TRY004
        for declaration in declare:
            entity_of(declaration)
        return message


def seconds_until(time: object) -> float | None:
    """Return the seconds until a time of a message's headers, negative when it is over.

    None if it is not one.
    """
    if not isinstance(time, str):
        return None
    try:
        at = datetime.fromisoformat(time.replace("Z", "+00:00"))
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
    return (at - datetime.now(timezone.utc)).total_seconds()


class Recorder:
    """Stands in for a kombu Producer and keeps what it is asked to publish.

    Args:
        app: The Celery app.
        keep: Takes each finished message.
    """

    serializer: str | None = None
    channel = None
    #: Asked of the producer's connection where Celery tries to send a callback again; there is
    #: nothing that fails.
    recoverable_connection_errors: tuple[type[Exception], ...] = ()

    def __init__(self, app: App, keep: Callable[[Message], object]) -> None:
        self._app = app
        self._keep = keep

    @property
    def connection(self) -> Recorder:
        """Celery asks the producer's connection to translate errors.

        There are none to translate.
        """
        return self

    def _reraise_as_library_errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        exchange: Exchange | str | None = None,
        serializer: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        compression: str | None = None,
        headers: Mapping[str, object] | None = None,
        declare: Iterable[Exchange | Queue] | None = None,
        expiration: float | None = None,
        **properties: object,
    ) -> None:
        """Take the arguments of ``kombu.Producer.publish`` and keep the message.

        Raises:
            kombu.exceptions.EncodeError: The body cannot be serialised.
        """
        for name in _OF_PUBLISH:
            properties.pop(name, None)
        headers = dict(headers or {})
        arguments = _arguments_of(body)
        if content_type is None:
            content_type, content_encoding, body = dumps(
                body_with_fixed_ids(body), serializer=serializer
            )
        if isinstance(body, str):
            content_encoding = content_encoding or "utf-8"
            body = body.encode(content_encoding)
        if compression:
            body, headers["compression"] = compress(body, compression)
        if expiration is not None:
            properties["expiration"] = expiration
        queues, in_full = declared(self._app, declare or ())
        self._keep(
            Message(
                body=body,
                content_type=content_type,
                content_encoding=content_encoding or "binary",
                exchange=exchange.name if isinstance(exchange, Exchange) else exchange or "",
                routing_key=routing_key or "",
                queues=queues,
                declare=in_full,
                headers=headers,
                properties=_plain(properties),
                arguments=arguments,
            )
        )


def _arguments_of(body: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the args and the kwargs of a task's body that is not serialised yet.

    Any other body has none.
    """
    args, kwargs, _ = body if isinstance(body, tuple) and len(body) == 3 else ((), {}, {})
    return tuple(args or ()), dict(kwargs or {})


def _plain(properties: Mapping[str, object]) -> Fields:
    """Leave out what is not set, and name entities by their names.

    A priority of None stays: kombu takes a message without one for one of priority 0.
    """
    return {
        name: value.name if isinstance(value, (Queue, Exchange)) else value
        for name, value in properties.items()
        if value is not None or name == "priority"
    }


# --- taking the producer's place ------------------------------------------------------------------

_recorder: ContextVar[Recorder | None] = ContextVar("celery_alchemy_recorder", default=None)

#: Asked before every send of an app that is not recorded; may answer with a recorder of its own, or
#: raise.
Interceptor = Callable[[App], "Recorder | None"]


def install(app: App, intercept: Interceptor | None = None) -> None:
    """Let sends of an app be recorded; does nothing the second time.

    Args:
        app: The Celery app; its ``producer_or_acquire`` is wrapped.
        intercept: Asked before each send that nobody records.
    """
    if _INSTALLED in app.__dict__:
        return
    acquire = app.producer_or_acquire

    def producer_or_acquire(
        producer: Producer | Recorder | None = None,
    ) -> AbstractContextManager[object]:
        recorder = _recorder.get()
        if recorder is None:
            if isinstance(producer, Recorder):
                # As Celery does with any producer that it is given.
                return nullcontext(producer)
            recorder = None if intercept is None else intercept(app)
            if recorder is None:
                return acquire(producer)
        _let_backend_ignore_recorders(app)
        return nullcontext(recorder)

    app.__dict__[_INSTALLED] = True
    app.__dict__["producer_or_acquire"] = producer_or_acquire


def _let_backend_ignore_recorders(app: App) -> None:
    """Keep the result backend from contacting its server for a message that is not sent yet.

    Celery tells the backend of each call: the Redis backend subscribes to the result then, which
    fails while Redis is down, and the RPC backend declares its reply queue. Both do so again when
    the result is asked for.
    """
    backend = app.backend
    if _INSTALLED in backend.__dict__:
        return
    told: Callable[[object, str], object] = backend.on_task_call

    def on_task_call(producer: object, task_id: str) -> object:
        return {} if isinstance(producer, Recorder) else told(producer, task_id)

    backend.__dict__[_INSTALLED] = True
    backend.__dict__["on_task_call"] = on_task_call


def is_recording() -> bool:
    """Tell whether what is sent now is recorded."""
    return _recorder.get() is not None


@contextmanager
def recording(app: App) -> Iterator[list[Message]]:
    """Record every task message that the app sends in this block, instead of sending it."""
    install(app)
    messages: list[Message] = []
    token = _recorder.set(Recorder(app, messages.append))
    try:
        yield messages
    finally:
        _recorder.reset(token)
