"""The finished message: what Celery would have handed to the broker, recorded instead.

First stop of a call that waits for a commit: ``outbox.py`` keeps the message, ``publisher.py`` sends it unchanged. The recording
takes the place of the producer, the one object through which every task message of Celery goes, so that chains, groups, chords,
links, routes, priorities, headers, stamps, the ``before_task_publish`` signal and custom serializers come through as they are.
"""

from __future__ import annotations

import json as plain_json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, cast

from celery import Celery
from celery.utils import uuid
from kombu import Exchange, Queue
from kombu.compression import compress
from kombu.serialization import dumps
from kombu.utils import json

__all__ = ["Message", "Recorder", "install", "recording"]

_INSTALLED = "celery_alchemy_installed"

# Where RabbitMQ holds messages for quorum queues, and how a routing key says for how long: 28 bits, the highest first.
_DELAYED_EXCHANGE = "celery_delayed_27"
_DELAY_BITS = 28
_DELAY = re.compile(rf"(?:[01]\.){{{_DELAY_BITS}}}")


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
        headers: Celery's message headers (protocol 2) and the user's own.
        properties: AMQP properties: correlation_id, reply_to, priority, expiration, delivery_mode and the like.
        arguments: The task's args and kwargs before they were serialised; not part of the message.
    """

    body: bytes
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    queues: list[str] = field(default_factory=list)
    headers: dict[str, Any] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}), repr=False, compare=False)

    @property
    def task_id(self) -> str | None:
        """The id of the task; None for a message that is no task, such as a task-sent event."""
        return cast("str | None", self.headers.get("id"))

    @property
    def task_name(self) -> str | None:
        """The name of the task; None for a message that is no task."""
        return cast("str | None", self.headers.get("task"))

    @property
    def has_route(self) -> bool:
        """True if there must be a queue that takes it: one that is declared for it, or the one that the default exchange names."""
        return self.exchange == "" or bool(self.queues)

    def properties_at_publish(self) -> dict[str, Any]:
        """Return the properties with what is left of the time to live, which a broker counts from the publish.

        A message that has expired goes out without one: a worker reports it as revoked, a broker would drop it in silence.
        """
        left = _seconds_until(self.headers.get("expires"))
        if "expiration" not in self.properties or left is None:
            return self.properties
        others = {name: value for name, value in self.properties.items() if name != "expiration"}
        return {**others, "expiration": left} if left > 0 else others

    def routing_key_at_publish(self) -> str:
        """Return the routing key with what is left of the delay, which RabbitMQ counts from the publish.

        For quorum queues Celery has the broker hold a message until its eta; the delay in seconds is the beginning of the routing
        key then, bit by bit. With no bit set the message goes straight through.
        Source: https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html#native-delayed-delivery,
        ``kombu.transport.native_delayed_delivery``.
        """
        if not self.exchange.endswith(_DELAYED_EXCHANGE):
            return self.routing_key
        delay = _DELAY.match(self.routing_key)
        left = _seconds_until(self.headers.get("eta"))
        if delay is None or left is None:
            return self.routing_key
        return ".".join(f"{max(0, int(left)):0{_DELAY_BITS}b}") + self.routing_key[delay.end() - 1 :]

    def envelope(self) -> str:
        """Return everything but the body, as JSON."""
        parts = {
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "queues": self.queues,
            "headers": self.headers,
            "properties": self.properties,
        }
        return str(json.dumps(parts))

    @classmethod
    def from_parts(cls, body: bytes, envelope: str) -> Message:
        """Make a message from what ``body`` and ``envelope()`` were.

        Raises:
            ValueError: The envelope is not one. Nothing in it is executed or imported.
        """
        try:
            # The hook that knows marked types is called for each mapping, which takes longer than the parsing.
            parts = json.loads(envelope) if '"__type__"' in envelope else plain_json.loads(envelope)
            message = cls(body=bytes(body), **parts)
        except Exception as exc:
            raise ValueError(f"not an envelope: {exc}") from exc
        texts: tuple[object, ...] = (message.content_type, message.content_encoding, message.exchange, message.routing_key)
        mappings: tuple[object, ...] = (message.headers, message.properties)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(q, str) for q in message.queues):
            raise ValueError("not an envelope: a text field is not a text")
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise ValueError("not an envelope: headers or properties are not a mapping")
        return message


def _seconds_until(time: object) -> float | None:
    """Return the seconds until a time of a message's headers, negative when it is over; None if it is not one."""
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
    #: Asked of the producer's connection where Celery tries to send a callback again; there is nothing that fails.
    recoverable_connection_errors: tuple[type[Exception], ...] = ()

    def __init__(self, app: Celery[Any], keep: Callable[[Message], object]) -> None:
        self._app = app
        self._keep = keep

    @property
    def connection(self) -> Recorder:
        """Celery asks the producer's connection to translate errors; there are none to translate."""
        return self

    def _reraise_as_library_errors(self) -> AbstractContextManager[None]:
        return nullcontext()

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        exchange: Any = None,
        serializer: str | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        compression: str | None = None,
        headers: Mapping[str, Any] | None = None,
        declare: list[Any] | None = None,
        expiration: float | None = None,
        **properties: Any,
    ) -> None:
        """Take the arguments of ``kombu.Producer.publish`` and keep the message.

        Raises:
            kombu.exceptions.EncodeError: The body cannot be serialised.
        """
        for transient in ("retry", "retry_policy", "timeout", "confirm_timeout", "mandatory", "immediate"):
            properties.pop(transient, None)
        headers = dict(headers or {})
        arguments: Any = (body[0], body[1]) if isinstance(body, tuple) and len(body) == 3 else ((), {})
        if content_type is None:
            content_type, content_encoding, body = dumps(self._with_fixed_ids(body), serializer=serializer)
        serialised: Any = body
        if isinstance(serialised, str):
            content_encoding = content_encoding or "utf-8"
            serialised = serialised.encode(content_encoding)
        if compression:
            serialised, headers["compression"] = compress(serialised, compression)
        if expiration is not None:
            properties["expiration"] = expiration
        self._keep(
            Message(
                body=serialised,
                content_type=content_type,
                content_encoding=content_encoding or "binary",
                exchange=exchange.name if isinstance(exchange, Exchange) else exchange or "",
                routing_key=routing_key or "",
                queues=[entity.name for entity in declare or () if isinstance(entity, Queue)],
                headers=headers,
                properties=_plain(properties),
                arguments=(tuple(arguments[0] or ()), dict(arguments[1] or {})),
            )
        )

    def _with_fixed_ids(self, body: Any) -> Any:
        """Give every callback an id now, so that a parent that is delivered twice sends its callbacks under the same ids."""
        if not (isinstance(body, tuple) and len(body) == 3):
            return body
        args, kwargs, embedded = body
        embedded = dict(embedded)
        for name in ("callbacks", "errbacks", "chain"):
            if embedded.get(name):
                embedded[name] = [_fixed(signature) for signature in embedded[name]]
        if embedded.get("chord"):
            embedded["chord"] = _fixed(embedded["chord"])
        return args, kwargs, embedded


def _fixed(signature: Any) -> Any:
    """Return a copy of a serialised signature in which every task, at any depth, has an id."""
    if not isinstance(signature, Mapping) or "task" not in signature:
        return signature
    fixed = dict(signature)
    options = fixed["options"] = dict(fixed.get("options") or {})
    inner = fixed["kwargs"] = dict(fixed.get("kwargs") or {})
    if fixed.get("subtask_type") is None:
        options.setdefault("task_id", uuid())
    else:
        for name in ("tasks", "header"):
            if isinstance(inner.get(name), (list, tuple)):
                inner[name] = [_fixed(member) for member in inner[name]]
            elif isinstance(inner.get(name), Mapping):
                inner[name] = _fixed(inner[name])
        if inner.get("body"):
            inner["body"] = _fixed(inner["body"])
    for name in ("link", "link_error"):
        if options.get(name):
            linked = options[name] if isinstance(options[name], (list, tuple)) else [options[name]]
            options[name] = [_fixed(member) for member in linked]
    return fixed


def _plain(properties: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not set, and name entities by their names.

    A priority of None stays: kombu takes a message without one for one of priority 0.
    """
    return {
        name: value.name if isinstance(value, (Queue, Exchange)) else value
        for name, value in properties.items()
        if value is not None or name == "priority"
    }


# --- taking the producer's place ---------------------------------------------------------------------------------------

_recorder: ContextVar[Recorder | None] = ContextVar("celery_alchemy_recorder", default=None)

#: Asked before every send of an app that is not recorded; may answer with a recorder of its own, or raise.
Interceptor = Callable[["Celery[Any]"], "Recorder | None"]


def install(app: Celery[Any], intercept: Interceptor | None = None) -> None:
    """Let sends of an app be recorded; does nothing the second time.

    Args:
        app: The Celery app; its ``producer_or_acquire`` is wrapped.
        intercept: Asked before each send that nobody records.
    """
    if _INSTALLED in app.__dict__:
        return
    acquire = cast("Any", app).producer_or_acquire

    def producer_or_acquire(producer: Any = None) -> AbstractContextManager[Any]:
        recorder = _recorder.get()
        if recorder is None and intercept is not None and not isinstance(producer, Recorder):
            recorder = intercept(app)
        if recorder is not None:
            _let_backend_ignore_recorders(app)
            return nullcontext(recorder)
        return cast("AbstractContextManager[Any]", acquire(producer))

    app.__dict__[_INSTALLED] = True
    cast("Any", app).producer_or_acquire = producer_or_acquire


def _let_backend_ignore_recorders(app: Celery[Any]) -> None:
    """Keep the result backend from contacting its server for a message that is not sent yet.

    Celery tells the backend of each call: the Redis backend subscribes to the result then, which fails while Redis is down, and
    the RPC backend declares its reply queue. Both do so again when the result is asked for.
    """
    backend: Any = app.backend
    if _INSTALLED in backend.__dict__:
        return
    told = backend.on_task_call

    def on_task_call(producer: Any, task_id: str) -> Any:
        return {} if isinstance(producer, Recorder) else told(producer, task_id)

    backend.__dict__[_INSTALLED] = True
    backend.on_task_call = on_task_call


@contextmanager
def recording(app: Celery[Any]) -> Iterator[list[Message]]:
    """Record every task message that the app sends in this block, instead of sending it."""
    install(app)
    messages: list[Message] = []
    token = _recorder.set(Recorder(app, messages.append))
    try:
        yield messages
    finally:
        _recorder.reset(token)
