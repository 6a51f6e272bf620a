"""Makes the message of a task as Celery has made it before, with other ids and arguments.

Celery routes each message, merges its options, asks for its settings and makes a dozen mappings on
the way, all of which come to the same for two calls of one task with the same options. That is more
than half of what a recorded send costs beside its INSERT. Here the first message, which Celery has
made, is the template of the next ones.

A template is used once it has made the same message as Celery for a second call. Settings and
routes are asked for each time, as Celery asks for them: with another answer, or with other queues,
Celery makes the message anew. It makes each where somebody listens to the signals of publishing,
where a router, a class or a patch is not Celery's, and for calls that say more.

Above ``recording.py``, whose recorder takes the message; ``requests/sends_by_name.py`` asks it for
each send.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any

from celery.app import base
from celery.signals import after_task_publish, before_task_publish, task_sent
from kombu import Queue

from .celery_types import App, Fields
from .message import Message
from .recording import Recorder, encoded, is_recorders, recorder_at_hand, recording_with

__all__ = ["Templates"]

logger: logging.Logger = logging.getLogger(__name__)

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

#: Options by which a message is routed.
_ROUTES = ("exchange", "priority", "queue", "routing_key")

#: What of Celery makes messages and keeps what it has found out for them.
_MAKERS = ("create_task_message", "default_queue", "queues", "router", "send_task_message")

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
        self._is_celerys = _is_written_in(base, send)
        self._templates: dict[tuple[object, ...], _Template] = {}

    def send_task(self, name: str, args: Any, kwargs: Any, options: Fields) -> Any:
        """Send a task as ``app.send_task`` does."""
        recorder = recorder_at_hand()
        key = _key_of(name, args, kwargs, options) if self._may_use(recorder) else None
        if recorder is None or key is None:
            return self._send(name, args, kwargs, **options)
        call = _Call(name, args, kwargs, options)
        template = self._templates.get(key)
        if template is None or not template.made_by.is_there_still(self._app):
            return self._learn(key, recorder, call)
        if template.is_refused:
            return self._send(name, args, kwargs, **options)
        if template.made_by.route != call.route_in(self._app):
            return self._learn(key, recorder, call)
        if not template.is_proved:
            return self._prove(template, recorder, call)
        return self._send_like(template, recorder, call)

    def _may_use(self, recorder: Recorder | None) -> bool:
        app = self._app
        return (
            recorder is not None
            and recorder.app is app
            and self._is_celerys
            and not any(signal.receivers for signal in _SIGNALS)
            and is_recorders(vars(app).get("producer_or_acquire"))
            and not app.conf.task_send_sent_event
        )

    def _send_like(self, template: _Template, recorder: Recorder, call: _Call) -> Any:
        """Do what ``Celery.send_task`` does for such a call."""
        app, options = self._app, call.options
        parent = app.current_worker_task
        if parent and app.conf.task_inherit_parent_priority:
            return self._send(call.name, call.args, call.kwargs, **options)
        task_id: str = options.get("task_id") or vars(base)["uuid"]()
        root_id, parent_id = task_id, None
        if parent:
            root_id, parent_id = parent.request.root_id or parent.request.id, parent.request.id
        ids = {"id": task_id, "root_id": root_id or task_id, "parent_id": parent_id}
        recorder.keep(template.message_for(app, ids, call))
        result: Any = (options.get("result_cls") or app.AsyncResult)(task_id)
        result.ignored = options.get("ignore_result")
        if parent and options.get("add_to_parent", True):
            parent.add_trail(result)
        return result

    def _learn(self, key: tuple[object, ...], recorder: Recorder, call: _Call) -> Any:
        """Have Celery make the message, and keep it as a template."""
        with _watched(self._app, recorder) as seen:
            result = self._send(call.name, call.args, call.kwargs, **call.options)
        if len(seen) == 1:
            if len(self._templates) >= _MOST:
                self._templates.clear()
            self._templates[key] = _template_of(self._app, seen[0], call)
        return result

    def _prove(self, template: _Template, recorder: Recorder, call: _Call) -> Any:
        """Have Celery make one message more, and see whether the template makes the same."""
        with _watched(self._app, recorder) as seen:
            result = self._send(call.name, call.args, call.kwargs, **call.options)
        for message in seen:
            ids = {name: message.headers.get(name) for name in ("id", "root_id", "parent_id")}
            try:
                template.is_proved = template.message_for(self._app, ids, call) == message
            except Exception as exc:  # noqa: BLE001 - the message is made; arguments may not be twice.
                logger.debug("No template for %s: %r", call.name, exc)
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
                headers=deepcopy(message.headers),
                properties=dict(message.properties),
                queues=[*message.queues],
                declare=[*message.declare],
            )
        )
        recorder.keep(message)

    with recording_with(Recorder(app, keep)):
        yield seen


def _is_written_in(module: ModuleType, function: object) -> bool:
    """Tell whether a plain function or method is written in a module; a wrapper around it is not.

    By their types: a proxy gives out the class and the code of what it stands for.
    """
    inner = function.__func__ if type(function) is MethodType else function
    return type(inner) is FunctionType and inner.__code__.co_filename == module.__file__


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


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of ``send_task``."""

    name: str
    args: Any
    kwargs: Any
    options: Fields

    def route_in(self, app: App) -> Fields:
        """Return where the app's router sends it."""
        given = {name: self.options[name] for name in _ROUTES if self.options.get(name) is not None}
        router: Any = app.amqp.router
        route: Fields = router.route(
            given, self.name, self.args, self.kwargs, self.options["task_type"]
        )
        return route


def _template_of(app: App, message: Message, call: _Call) -> _Template:
    # Celery has loaded it for the message; a process that sends none does without.
    from celery.app import amqp

    makers = _Makers.of(app)
    is_constant = _is_constant(app, message, amqp)
    if is_constant:
        makers = replace(makers, route=call.route_in(app))
        is_constant = all(type(value) in _ROUTED for value in makers.route.values())
    return _Template(
        replace(message, body=b"", arguments=((), {})),
        call.options.get("serializer") or app.conf.task_serializer,
        [name for name, value in message.headers.items() if isinstance(value, (dict, list))],
        makers,
        amqp,
        is_refused=not is_constant,
    )


def _is_constant(app: App, message: Message, amqp: ModuleType) -> bool:
    """Tell whether the messages of like calls are like this one."""
    from celery.app import routes

    router: Any = app.amqp.router
    is_celerys = (
        type(router) is routes.Router
        and vars(router).keys() <= {"app", "create_missing", "queues", "routes"}
        and all(_is_written_in(routes, getattr(routes.Router, name)) for name in _ROUTING)
        # Not a function of the application's, which may look at the arguments.
        and all(type(route) is routes.MapRoute for route in vars(router)["routes"])
        and _is_written_in(routes, routes.MapRoute.__call__)
        and _is_written_in(amqp, app.amqp.create_task_message)
        and _is_written_in(amqp, app.amqp.send_task_message)
    )
    headers = message.headers
    varies = headers.get("eta") or headers.get("expires") or "expiration" in message.properties
    return is_celerys and "argsrepr" in headers and "compression" not in headers and not varies


#: The methods of Celery's router.
_ROUTING = ("expand_destination", "lookup_route", "query_router", "route")

#: Types of what a route says that is there once and for all.
_ROUTED = frozenset({*_PLAIN, float, type(None), Queue})


@dataclass(frozen=True, slots=True)
class _Makers:
    """What of an app has made a message, and where that went."""

    conf: object
    amqp: Mapping[str, object]
    route: Fields

    @classmethod
    def of(cls, app: App) -> _Makers:
        """Take down those of an app."""
        amqp = vars(app.amqp)
        return cls(app.conf, {name: amqp.get(name) for name in _MAKERS}, {})

    def is_there_still(self, app: App) -> bool:
        """Tell whether the app has no others."""
        amqp = vars(app.amqp)
        return app.conf is self.conf and all(
            amqp.get(name) is value for name, value in self.amqp.items()
        )


@dataclass(slots=True)
class _Template:
    """A message that Celery has made, and what it was made by.

    Attributes:
        message: The message, without its arguments.
        serializer: The name of the serializer of its body.
        nested: Names of the headers that are no plain values.
        made_by: What it was made by.
        amqp: The module whose functions Celery makes headers with.
        is_refused: Celery makes all messages of such calls.
        is_proved: It has made the same message as Celery.
    """

    message: Message
    serializer: str | None
    nested: list[str]
    made_by: _Makers
    amqp: ModuleType
    is_refused: bool
    is_proved: bool = False

    def message_for(self, app: App, ids: Fields, call: _Call) -> Message:
        """Return the message of another call.

        Args:
            app: The Celery app.
            ids: The headers ``id``, ``root_id`` and ``parent_id``.
            call: The call.

        Raises:
            kombu.exceptions.EncodeError: The arguments cannot be serialised.
        """
        args, kwargs, amqp, mine = call.args or (), call.kwargs or {}, app.amqp, self.message
        # Celery 5.7; the default of saferepr before.
        levels = app.conf.get("task_repr_maxlevels", 3)
        saferepr = self.amqp.saferepr
        shown = {
            "argsrepr": saferepr(args, amqp.argsrepr_maxsize, maxlevels=levels),
            "kwargsrepr": saferepr(kwargs, amqp.kwargsrepr_maxsize, maxlevels=levels),
            "origin": self.amqp.anon_nodename(),
        }
        content_type, content_encoding, body = encoded((args, kwargs, _CARRIED), self.serializer)
        told = {"correlation_id": ids["id"], "reply_to": app.thread_oid}
        own = {name: copy(mine.headers[name]) for name in self.nested}
        return replace(
            mine,
            body=body,
            content_type=content_type,
            content_encoding=content_encoding,
            queues=[*mine.queues],
            declare=[*mine.declare],
            headers={**mine.headers, **ids, **shown, **own},
            properties={**mine.properties, **told},
            arguments=(tuple(args), dict(kwargs)),
        )
