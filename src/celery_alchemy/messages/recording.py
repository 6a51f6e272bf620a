"""Recording: what Celery would publish is kept as finished messages instead.

First stop of a call that waits for a commit; ``outbox/outbox.py`` keeps the messages. The recorder
takes the place of the producer, the one object through which every task message of Celery goes, so
that chains, groups, chords, links, routes, priorities, headers, stamps, the ``before_task_publish``
signal and custom serializers come through as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from kombu import Exchange, Producer, Queue
from kombu.compression import compress
from kombu.serialization import dumps

from .callback_ids import body_with_fixed_ids
from .celery_types import App, Fields
from .declarations import declared
from .message import Message

__all__ = [
    "Recorder",
    "install",
    "is_recording",
    "let_backend_ignore_recorders",
    "recording",
]

_INSTALLED = "celery_alchemy_installed"

#: What ``publish`` is told of its own doing, which is no property of the message.
_OF_PUBLISH = ("retry", "retry_policy", "timeout", "confirm_timeout", "mandatory", "immediate")


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
        let_backend_ignore_recorders(app)
        return nullcontext(recorder)

    app.__dict__[_INSTALLED] = True
    app.__dict__["producer_or_acquire"] = producer_or_acquire


def let_backend_ignore_recorders(app: App) -> None:
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
