"""Which row of the table is a ``once`` task's.

It is that of its task id, or of the key that it makes of its arguments.

Between the outbox's rows and ``once_records.py``, which reads and writes them; asked where a task
is sent and where it runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from celery.app.task import Context

from ..databases.tables import ID_MAX_LENGTH
from ..error_texts import storable
from ..errors import OnceKeyError
from ..messages.celery_types import Fields
from ..messages.message import Message
from ..outbox.outbox import ROW_HEADER, Row, shown
from ..signatures.entity_loading import key_arguments
from .plan import Plan, Timelimit
from .registry import Home

__all__ = [
    "key_of",
    "nesting_of",
    "once_row",
    "owed_row",
    "row_key",
    "row_of_guest",
    "with_nesting",
]

#: Celery's name for the depth of replacement, which its eager mode leaves out of the request.
_NESTING = "replaced_task_nesting"


def nesting_of(request: Context) -> int:
    """Return how many tasks with this id have been replaced, one by the other, up to this one."""
    return int(request.replaced_task_nesting or (request.headers or {}).get(_NESTING) or 0)


def with_nesting(options: Mapping[str, object]) -> Fields:
    """Return the options of ``apply()`` so that its request knows the depth of replacement."""
    if not options.get(_NESTING):
        return dict(options)
    headers = options.get("headers")
    more = headers if isinstance(headers, Mapping) else {}
    return {**options, "headers": {**more, _NESTING: options[_NESTING]}}


def row_key(
    plan: Plan,
    request: Context,
    args: tuple[object, ...] | None = None,
    kwargs: Mapping[str, object] | None = None,
) -> str | None:
    """Return the id of a request's row; None for a task without ``once``, or called without an id.

    Args:
        plan: What is known of the task.
        request: Celery's request.
        args: The positional arguments; None for those of the request.
        kwargs: The keyword arguments; None for those of the request.

    Raises:
        EntityReferenceError, OnceKeyError: As for ``key_of``.
    """
    if plan.once is None or (request.id is None and plan.once.make_key is None):
        return None
    named: str | None = getattr(request, ROW_HEADER, None)
    if request.retries and named is not None:
        # The retry of a row stays its row's, also with arguments of which another key is made.
        return named
    args = tuple(request.args or ()) if args is None else args
    kwargs = request.kwargs or {} if kwargs is None else kwargs
    return key_of(plan, request.id or "", nesting_of(request), args, dict(kwargs))


def key_of(
    plan: Plan, task_id: str, nesting: int, args: tuple[object, ...], kwargs: dict[str, object]
) -> str:
    """Return the id of a ``once`` task's row.

    A task that replaced another has its task id, so the depth of replacement is part of the key.

    Raises:
        EntityReferenceError: An entity among the arguments is not one that the task takes.
        OnceKeyError: The user's key is no str, is empty, has white space at an end (which MySQL
            ignores), a NUL (which PostgreSQL refuses) or half of a surrogate pair (which has no
            UTF-8); or it, or the task id that the caller chose, is too long.
    """
    make_key = None if plan.once is None else plan.once.make_key
    if make_key is None:
        return _fitting(plan, f"{task_id}/{nesting}" if nesting else task_id)
    key_args, key_kwargs = _taken_by(
        make_key, plan, *key_arguments(plan.injection.entities, args, kwargs)
    )
    key = make_key(*key_args, **key_kwargs)
    if not isinstance(key, str):
        raise OnceKeyError(plan.name, f"is a {type(key).__name__!r}")
    if not key or key != key.strip() or key != storable(key, len(key)):
        raise OnceKeyError(plan.name, f"is {key!r}")
    return _fitting(plan, f"{plan.name}:{key}")


def _fitting(plan: Plan, row_id: str) -> str:
    if len(row_id) > ID_MAX_LENGTH:
        raise OnceKeyError(plan.name, f"makes a row id of {len(row_id)} characters")
    return row_id


def _taken_by(
    make_key: Callable[..., object], plan: Plan, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return what a key function takes of a task's arguments.

    It is the same, by position or by name, with a default left out or given.

    One whose parameters have other names than the task's gets the arguments as they were passed.
    """
    try:
        taken = inspect.signature(make_key).parameters.values()
        signature = plan.injection.signature
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs
    bound.apply_defaults()
    given = dict(bound.arguments)
    takes_more = False
    for parameter in signature.parameters.values():
        takes_more |= parameter.kind is parameter.VAR_POSITIONAL
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name))
    chosen = {}
    for parameter in taken:
        if parameter.kind is parameter.VAR_KEYWORD:
            return (args, kwargs) if takes_more else ((), given)
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            return args, kwargs
        if parameter.name in given:
            chosen[parameter.name] = given[parameter.name]
        elif parameter.default is parameter.empty:
            return args, kwargs
    return (), chosen


def once_row(task: object, home: Home, message: Message) -> Row | None:
    """Return the row of a message of a ``once`` task; None for any other task.

    Args:
        task: Any task, also one that has no plan.
        home: What serves the app.
        message: The finished message.

    Raises:
        OnceKeyError: The task's key cannot be used.
    """
    plan: Plan | None = getattr(task, "session_plan", None)
    if plan is None or plan.once is None or message.task_id is None:
        return None
    nesting = int(message.headers.get(_NESTING) or 0)
    key = key_of(plan, message.task_id, nesting, *message.arguments)
    has_own_key = plan.once.make_key is not None
    if not has_own_key:
        message.headers[ROW_HEADER] = key
    row = owed_row(plan, key, message, message.headers.get("timelimit"))
    row.may_exist = has_own_key
    return row


def owed_row(plan: Plan, key: str, message: Message, timelimit: Timelimit | None) -> Row:
    """Return the row that keeps a ``once`` task owed, with the message that starts it."""
    return Row(key, message, plan.redeliver_seconds(timelimit), plan.deliveries_allowed)


def row_of_guest(request: Context) -> str | None:
    """Return the id of the row in which a guest's starts are counted; None for a direct call.

    A guest is a task whose key is owed by another task: its end is not that other one's.
    """
    if request.id is None:
        return None
    nesting = nesting_of(request)
    return shown(f"{request.id}/{nesting}" if nesting else request.id)
