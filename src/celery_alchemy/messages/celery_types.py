"""Celery's own types, with the parameters that its stubs want.

Beneath all that names an app or a task. The classes take no parameters at run time, in Celery 5.5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from celery import Celery, Task
from celery.canvas import Signature, maybe_signature
from celery.local import Proxy
from celery.result import AsyncResult, EagerResult

__all__ = ["AnyTask", "App", "Eager", "Fields", "Result", "app_of", "signed", "tasks_so_far"]


class Signs(Protocol):
    """Returns the signature that a mapping is or stands for, as one of an app."""

    def __call__(self, written: Mapping[str, object], app: App | None = None) -> Signature: ...


if TYPE_CHECKING:
    App = Celery[Any]
    AnyTask = Task[Any, Any]
    Eager = EagerResult[Any]
    Result = AsyncResult[Any]

    signed: Signs
else:
    App = Celery
    AnyTask = Task
    Eager = EagerResult
    Result = AsyncResult
    signed = maybe_signature

#: What JSON holds under names: headers, properties, options, the parts of a signature.
Fields = dict[str, Any]


def app_of(signature: Signature) -> App:
    """Return the app of a signature itself, where that has a proxy of the current one."""
    app = signature.app
    return app._get_current_object() if isinstance(app, Proxy) else app


def tasks_so_far(app: App) -> Collection[AnyTask]:
    """Return the tasks that an app has bound.

    ``app.tasks`` would bind those that still wait for it.
    """
    bound: Mapping[str, AnyTask] = app.__dict__["_tasks"]
    return bound.values()
