"""Makes the message of a task as Celery has made it before, with other ids and arguments.

Celery routes each message, merges its options, asks for its settings and makes a dozen mappings on
the way, all of which come to the same for two calls of one task with the same options. That is more
than half of what a recorded send costs beside its INSERT. Here the first message, which Celery has
made, is the template of the next ones.

A template is used once it has made the same message as Celery for a second call, as long as the
app's settings, routes and queues are what they were, and nobody listens to the signals of
publishing. Whatever else a call says, Celery makes its message.

Above ``recording.py``, whose recorder takes the message; ``requests/sends_by_name.py`` asks it for
each send.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

from celery import Celery
from celery.signals import after_task_publish, before_task_publish, task_sent
from celery.utils import uuid
from celery.utils.saferepr import saferepr

from .celery_types import App, Fields
from .message import Message
from .recording import Recorder, encoded, recorder_at_hand, recording_with

__all__ = ["Templates"]

#: Options that go into a message as they are, and those that are no part of it.
_CONSTANT = frozenset(
    {
        "delivery_mode",
        "exchange",
        "ignore_result",
        "immediate",
        "mandatory",
        "priority",
        "queue",
        "routing_key",
        "serializer",
        "shadow",
        "soft_time_limit",
        "time_limit",
    }
)
_OF_CALL = frozenset({"add_to_parent", "result_cls", "task_id", "task_type"})

#: Types of constant options; an exchange or a queue as an object is Celery's to look at.
_PLAIN = frozenset({bool, int, str})

#: Settings with which a message depends on more than its task and its options.
_DEPEND = ("task_always_eager", "task_inherit_parent_priority", "task_send_sent_event")

#: What hears of each message, and may change it.
_SIGNALS = (before_task_publish, after_task_publish, task_sent)

#: What a call carries along beside its arguments: nothing.
_CARRIED: Fields = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))

#: Templates of an app; then it begins anew. One that gives each message a time limit of its own
#: would keep one for each.
_MOST = 1000


class Templates:
    """The templates of one app.

    Args:
        app: The Celery app.
        send: Its ``send_task``.
    """

    def __init__(self, app: App, send: Callable[..., Any]) -> None:
        self._app = app
        self._send = send
        self._is_celerys = _is_celerys(send)
        self._templates: dict[tuple[object, ...], _Template] = {}

    def send_task(self, name: str, args: Any, kwargs: Any, options: Fields) -> Any:
        """Send a task as ``app.send_task`` does."""
        recorder = recorder_at_hand()
        key = None
        if recorder is not None and self._is_celerys and not any(s.receivers for s in _SIGNALS):
            key = _key_of(name, args, kwargs, options)
        if recorder is None or key is None:
            return self._send(name, args, kwargs, **options)
        template = self._templates.get(key)
        if template is None or not template.circumstances.are_those_of(self._app):
            return self._learn(key, recorder, name, args, kwargs, options)
        if template.is_refused:
            return self._send(name, args, kwargs, **options)
        if not template.is_proved:
            return self._prove(template, recorder, name, args, kwargs, options)
        return self._send_like(template, recorder, args, kwargs, options)

    def _send_like(
        self, template: _Template, recorder: Recorder, args: Any, kwargs: Any, options: Fields
    ) -> Any:
        """Do what ``Celery.send_task`` does for such a call."""
        app = self._app
        task_id: str = options.get("task_id") or uuid()
        root_id, parent_id = task_id, None
        parent = app.current_worker_task
        if parent:
            root_id, parent_id = parent.request.root_id or parent.request.id, parent.request.id
        ids = {"id": task_id, "root_id": root_id or task_id, "parent_id": parent_id}
        recorder.keep(template.message_for(app, ids, args, kwargs))
        result: Any = (options.get("result_cls") or app.AsyncResult)(task_id)
        result.ignored = options.get("ignore_result")
        if parent and options.get("add_to_parent", True):
            parent.add_trail(result)
        return result

    def _learn(
        self,
        key: tuple[object, ...],
        recorder: Recorder,
        name: str,
        args: Any,
        kwargs: Any,
        options: Fields,
    ) -> Any:
        """Have Celery make the message, and keep it as a template."""
        with _watched(self._app, recorder) as seen:
            result = self._send(name, args, kwargs, **options)
        if len(seen) == 1:
            if len(self._templates) >= _MOST:
                self._templates.clear()
            self._templates[key] = _Template(
                seen[0],
                options.get("serializer") or self._app.conf.task_serializer,
                _Circumstances.of(self._app, seen[0]),
                is_refused=not _is_constant(self._app, seen[0]),
            )
        return result

    def _prove(
        self,
        template: _Template,
        recorder: Recorder,
        name: str,
        args: Any,
        kwargs: Any,
        options: Fields,
    ) -> Any:
        """Have Celery make one message more, and see whether the template makes the same."""
        with _watched(self._app, recorder) as seen:
            result = self._send(name, args, kwargs, **options)
        for message in seen:
            ids = {name: message.headers.get(name) for name in ("id", "root_id", "parent_id")}
            made = template.message_for(self._app, ids, args or (), kwargs or {})
            template.is_proved = made == message
        template.is_refused = not template.is_proved
        return result


@contextmanager
def _watched(app: App, recorder: Recorder) -> Iterator[list[Message]]:
    """Pass on to a recorder what is sent in this block, and give copies of it."""
    seen: list[Message] = []

    def keep(message: Message) -> None:
        # Who takes it adds headers of its own.
        seen.append(
            replace(
                message,
                headers=dict(message.headers),
                properties=dict(message.properties),
                queues=[*message.queues],
                declare=[*message.declare],
            )
        )
        recorder.keep(message)

    with recording_with(Recorder(app, keep)):
        yield seen


def _is_celerys(send: Callable[..., Any]) -> bool:
    """Tell whether sending is Celery's own doing: no class of the app's, nobody's patch."""
    return isinstance(send, MethodType) and _is_written_beside(send.__func__, Celery)


def _is_written_beside(function: object, class_: type) -> bool:
    """Tell whether a function is written in the file of a class; a wrapper around it is not."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == vars(class_)["__init__"].__code__.co_filename


def _key_of(name: str, args: Any, kwargs: Any, options: Fields) -> tuple[object, ...] | None:
    """Return what calls whose messages are alike have in common.

    None for a call that Celery has to look at.
    """
    if options.get("task_type") is None or not isinstance(args, (list, tuple, type(None))):
        return None
    if kwargs is not None and type(kwargs) is not dict:
        return None
    key: list[object] = [name]
    for option, value in options.items():
        if value is None or option in _OF_CALL:
            continue
        if option not in _CONSTANT or type(value) not in _PLAIN:
            return None
        key += (option, type(value), value)
    return tuple(key)


def _is_constant(app: App, message: Message) -> bool:
    """Tell whether the messages of like calls are like this one."""
    # Celery has loaded them for the message; a process that sends none does without.
    from celery.app.amqp import AMQP
    from celery.app.routes import MapRoute, Router

    if any(app.conf.get(setting) for setting in _DEPEND):
        return False
    router: Any = app.amqp.router
    routes = vars(router)["routes"] if type(router) is Router else [router]
    if any(type(route) is not MapRoute for route in routes):
        # The application's own, which may look at the arguments.
        return False
    amqp = app.amqp
    makers = (amqp.create_task_message, amqp.send_task_message)
    if not all(_is_written_beside(maker, AMQP) for maker in makers):
        return False
    headers = message.headers
    varies = headers.get("eta") or headers.get("expires") or "expiration" in message.properties
    return "argsrepr" in headers and "compression" not in headers and not varies


@dataclass(frozen=True, slots=True)
class _Circumstances:
    """What Celery makes a message by, beside the task, the options and the arguments."""

    pid: int
    conf: object
    changes: Mapping[str, object]
    amqp: Mapping[str, object]
    queues: tuple[tuple[str, object], ...]
    repr_levels: int

    @classmethod
    def of(cls, app: App, message: Message) -> _Circumstances:
        """Take down those of an app's message."""
        amqp, queues = vars(app.amqp), app.amqp.queues
        names = ("create_task_message", "send_task_message", "router", "queues")
        return cls(
            os.getpid(),
            app.conf,
            dict(app.conf.changes or {}),
            {name: amqp.get(name) for name in names},
            tuple((name, queues.get(name)) for name in message.queue_names),
            # Celery 5.7; the default of saferepr before.
            app.conf.get("task_repr_maxlevels", 3),
        )

    def are_those_of(self, app: App) -> bool:
        """Tell whether the app's are the same still, in this process."""
        conf, amqp, queues = app.conf, vars(app.amqp), app.amqp.queues
        return (
            conf is self.conf
            and os.getpid() == self.pid
            and conf.changes == self.changes
            and all(amqp.get(name) is value for name, value in self.amqp.items())
            and all(queues.get(name) is queue for name, queue in self.queues)
        )


@dataclass(slots=True)
class _Template:
    """A message that Celery has made, and what it was made by.

    Attributes:
        message: The message.
        serializer: The name of the serializer of its body.
        circumstances: What it was made by.
        is_refused: Celery makes all messages of such calls.
        is_proved: It has made the same message as Celery.
    """

    message: Message
    serializer: str | None
    circumstances: _Circumstances
    is_refused: bool
    is_proved: bool = False

    def message_for(self, app: App, ids: Fields, args: Any, kwargs: Any) -> Message:
        """Return the message of another call.

        Args:
            app: The Celery app.
            ids: The headers ``id``, ``root_id`` and ``parent_id``.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Raises:
            kombu.exceptions.EncodeError: The arguments cannot be serialised.
        """
        args, kwargs, amqp, mine = args or (), kwargs or {}, app.amqp, self.message
        levels = self.circumstances.repr_levels
        content_type, content_encoding, body = encoded((args, kwargs, _CARRIED), self.serializer)
        shown = {
            "argsrepr": saferepr(args, amqp.argsrepr_maxsize, maxlevels=levels),
            "kwargsrepr": "{}"
            if kwargs == {}
            else saferepr(kwargs, amqp.kwargsrepr_maxsize, maxlevels=levels),
        }
        told = {"correlation_id": ids["id"], "reply_to": app.thread_oid}
        return replace(
            mine,
            body=body,
            content_type=content_type,
            content_encoding=content_encoding,
            queues=[*mine.queues],
            declare=[*mine.declare],
            headers={**mine.headers, **ids, **shown},
            properties={**mine.properties, **told},
            arguments=(tuple(args), dict(kwargs)),
        )
