"""Filling a body's arguments: its session, one that the caller passed, and the rows of entities.

Between ``signatures/injection.py``, which has read the signature, and ``sync_body.py`` and
``failure.py``, which call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from celery import Task
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from ..errors import EntityNotFoundError, SessionArgumentError
from ..sessions.any_session import in_scope
from ..signatures.entity_loading import load, refuse_unresolved
from ..signatures.injection import Body, Injection
from .attempt import UnitOfWork

__all__ = [
    "Arguments",
    "Call",
    "Keywords",
    "borrow",
    "caller",
    "resolve_before_own_call",
    "session_first",
    "sessions_in_scope",
]

#: Marks the call of a class that was given here.
_RESOLVES = "_celery_alchemy_resolves"

Arguments = tuple[object, ...]
Keywords = Mapping[str, object]
Call = Callable[[UnitOfWork, Arguments, Keywords], object]


def caller(body: Body, injection: Injection) -> Call:
    """Return the call of a body with its session, as short as its signature allows."""
    entities, unresolved = injection.entities, injection.unresolved
    if not injection.asks:
        return lambda unit, args, kwargs: body(*args, **kwargs)
    asked = injection.session
    is_first = asked is not None and asked.index == 0 and asked.named is None
    if is_first and not entities and not unresolved:
        return lambda unit, args, kwargs: body(unit.offered(), *args, **kwargs)

    def call(unit: UnitOfWork, args: Arguments, kwargs: Keywords) -> object:
        if unresolved:
            refuse_unresolved(unresolved, args, kwargs)
        if entities:
            args, kwargs = _load_entities(unit, injection, args, kwargs)
        session = None if injection.session is None else unit.offered()
        filled_args, filled_kwargs = injection.fill(args, kwargs, session)
        return body(*filled_args, **filled_kwargs)

    return call


def _load_entities(
    unit: UnitOfWork, injection: Injection, args: Arguments, kwargs: Keywords
) -> tuple[Arguments, Keywords]:
    """Return the arguments with references replaced by rows of the unit's session.

    Raises:
        EntityNotFoundError, Ignore, Retry: A row is not there; which one is up to the task's
            ``missing``.
    """
    try:
        return load(unit.session, injection.entities, args, kwargs)
    except EntityNotFoundError as exc:
        missing = unit.plan.missing
        if missing == "ignore":
            raise Ignore(str(exc)) from exc
        if missing == "retry":
            raise unit.plan.task.retry(exc=exc) from exc
        raise


def session_first(record: Body) -> Call:
    """Return the call of a function that takes the session first, whatever its annotation."""
    return lambda unit, args, kwargs: record(
        unit.offered() if unit.plan.is_async else unit.session, *args, **kwargs
    )


def borrow(unit: UnitOfWork, injection: Injection, kwargs: dict[str, object]) -> None:
    """Take the session that the caller passed out of its arguments, if it passed one.

    Raises:
        SessionArgumentError: It passed something else in its place.
    """
    if injection.session is None:
        return
    given = in_scope(kwargs.pop(injection.session.name, None))
    if given is None:
        return
    if not isinstance(given, Session) and not hasattr(given, "sync_session"):
        raise SessionArgumentError(unit.plan.name, injection.session.name)
    unit.borrow(given)


def sessions_in_scope(injection: Injection, kwargs: Keywords) -> Keywords:
    """Return arguments with the session that a registry among them stands for.

    It is that of the caller's scope.
    """
    asked = injection.session
    if asked is None or asked.name not in kwargs:
        return kwargs
    return {**kwargs, asked.name: in_scope(kwargs[asked.name])}


class _Injected(Protocol):
    """A task of the library's class, of which the signature is known."""

    @property
    def injection(self) -> Injection: ...


def resolve_before_own_call(cls: Any) -> None:
    """Have registries among the arguments looked at before a class's own ``__call__``.

    Inside of it, in the application context of a ``FlaskTask``, ``db.session`` is another session
    than the caller's.

    Args:
        cls: The class of one task.
    """
    own = cls.__call__
    if own is Task.__call__ or hasattr(own, _RESOLVES):
        return

    @functools.wraps(own)
    def call(task: _Injected, /, *args: object, **kwargs: object) -> object:
        # `task` by position only: a body may have a parameter of that name, as Celery's own
        # celery.map, celery.starmap and celery.chunks do.
        return own(task, *args, **(sessions_in_scope(task.injection, kwargs) if kwargs else kwargs))

    setattr(call, _RESOLVES, True)
    cls.__call__ = call
