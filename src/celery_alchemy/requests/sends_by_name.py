"""Entities in what is sent by the name of a task: ``app.send_task()``, ``app.signature()``.

Above ``planned_task.py``, whose tasks replace those in their own arguments. A name may be that of
another service's task, which this process knows nothing else of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from celery.canvas import Signature

from ..messages.celery_types import App
from ..signatures.entities import encoded
from .planned_task import PlannedTask
from .registry import home_of

__all__ = ["let_entities_travel"]

_INSTALLED = "_celery_alchemy_sends_by_name"

#: The options of a message that hold signatures, and the arguments of a canvas that do.
_OPTIONS = ("link", "link_error", "chain", "chord")
_PARTS = ("tasks", "header", "body")

Allowed = Callable[[type], bool]


def let_entities_travel(app: App) -> None:
    """Have entities replaced by references in what an app sends by name.

    Does nothing the second time. A task that is no SessionTask could not load them: what is sent to
    it is left alone.

    Args:
        app: The Celery app; its ``send_task`` is wrapped.
    """
    if _INSTALLED in app.__dict__:
        return
    send = app.send_task

    @functools.wraps(send)
    def send_task(
        name: str, args: Any = None, kwargs: Any = None, *more: Any, **options: Any
    ) -> Any:
        allowed = functools.partial(_may_travel, app)
        for option in _OPTIONS:
            if options.get(option):
                _encode_signatures(app, options[option], allowed)
        # A task that sends itself has seen to its arguments.
        if options.get("task_type") is None and _loads_entities(app, name):
            args, kwargs = encoded(args, allowed), encoded(kwargs, allowed)
        return send(name, args, kwargs, *more, **options)

    app.__dict__[_INSTALLED] = True
    app.__dict__["send_task"] = send_task


def _may_travel(app: App, class_: type) -> bool:
    home = home_of(app)
    return home is None or home.allows_entity(class_)


def _loads_entities(app: App, name: str) -> bool:
    """Tell whether a task may load entities: one of this app's class, or of another service."""
    # Not app.tasks, which would finalize an app that only sends.
    task = app._tasks.get(name)  # type: ignore[attr-defined]
    return task is None or isinstance(task, PlannedTask)


def _encode_signatures(app: App, value: object, allowed: Allowed) -> None:
    """Replace the entities in the arguments of signatures, and of those inside of these."""
    if isinstance(value, Signature):
        _encode_signature(app, value, allowed)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _encode_signatures(app, one, allowed)


def _encode_signature(app: App, signature: Signature, allowed: Allowed) -> None:
    held: dict[str, Any] = signature
    if _loads_entities(app, str(held["task"])):
        held["args"] = encoded(held["args"], allowed)
        held["kwargs"] = encoded(held["kwargs"], allowed)
    for name in _PARTS:
        _encode_signatures(app, held["kwargs"].get(name), allowed)
    for name in _OPTIONS:
        _encode_signatures(app, held["options"].get(name), allowed)
