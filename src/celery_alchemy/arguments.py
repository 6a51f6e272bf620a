"""Filling a body's arguments: its sessions, those that the caller passed, and the rows of entities.

Between ``injection.py``, which has read the signature, and ``body.py``, ``coroutines.py`` and ``failure.py``, which call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from .entities import load
from .errors import EntityNotFoundError
from .injection import Injection
from .request import UnitOfWork

__all__ = ["Arguments", "Call", "Keywords", "borrow", "caller", "is_named", "load_entities", "session_first"]

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]
Call = Callable[[UnitOfWork, Arguments, Keywords], Any]


def caller(body: Callable[..., Any], injection: Injection) -> Call:
    """Return the call of a body with its sessions, in the shortest form that its signature allows."""
    parameters, entities = injection.parameters, injection.entities
    if not parameters and not entities:
        return lambda unit, args, kwargs: body(*args, **kwargs)

    def call(unit: UnitOfWork, args: Arguments, kwargs: Keywords) -> Any:
        if entities:
            args, kwargs = load_entities(unit, injection, args, kwargs)
        named = is_named(unit, injection)
        sessions = {p.name: unit.other_session(p.database) if named and p.database else unit.session_to_offer() for p in parameters}
        filled_args, filled_kwargs = injection.fill(args, kwargs, sessions)
        return body(*filled_args, **filled_kwargs)

    return call


def load_entities(unit: UnitOfWork, injection: Injection, args: Arguments, kwargs: Keywords) -> tuple[Arguments, Keywords]:
    """Return the arguments with references replaced by rows of the unit's session.

    Raises:
        EntityNotFoundError, Ignore, Retry: A row is not there; which one is up to the task's ``missing``.
    """
    try:
        return load(unit.session, injection.entities, args, kwargs)
    except EntityNotFoundError as exc:
        task: Any = unit.task
        missing = getattr(task, "missing", "fail")
        if missing == "ignore":
            raise Ignore(str(exc)) from exc
        if missing == "retry":
            raise task.retry(exc=exc) from exc
        raise


def session_first(record: Callable[..., Any]) -> Call:
    """Return the call of a function that takes the session first, whatever its annotation."""
    return lambda unit, args, kwargs: record(unit.session, *args, **kwargs)


def borrow(unit: UnitOfWork, injection: Injection, kwargs: dict[str, Any]) -> Session | None:
    """Take the sessions that the caller passed out of its arguments, each for its database; return the default one."""
    named = is_named(unit, injection)
    for parameter in injection.parameters:
        session = kwargs.pop(parameter.name, None)
        if session is None:
            continue
        if named and parameter.database:
            unit.borrow_other(parameter.database, session)
        else:
            unit.borrow(session)
    return unit.used_session


def is_named(unit: UnitOfWork, injection: Injection) -> bool:
    """Tell whether the text in ``Annotated[Session, "text"]`` names a database.

    In an app with one database it is a comment; beside another session it is a name.
    """
    return len(injection.parameters) > 1 or unit.task.has_named_databases
