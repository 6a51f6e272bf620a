"""Sessions that somebody else made: which of them a request can take for its own, and which not.

Beside ``sources.py``, which makes sessions from a sessionmaker; underneath the request.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, scoped_session

from ..errors import ConfigurationError
from .coroutine_functions import is_coroutine_function
from .ledger import NO_OPTIONS, SessionOptions, keep_ledger, listen

__all__ = [
    "carry_over",
    "pattern_of",
    "refuse_in_use",
    "refuse_removed",
    "refuse_unfit",
    "take_over",
    "use_of",
]


def refuse_unfit(make: Callable[..., object], what: str) -> None:
    """Refuse a callable that can be seen to return no Session.

    One is a FastAPI dependency that yields its session.

    Args:
        make: The callable.
        what: What it is, for messages.

    Raises:
        ConfigurationError: It needs arguments, or it is a generator or a coroutine function.
    """
    if inspect.isgeneratorfunction(make) or inspect.isasyncgenfunction(make):
        problem = f"{what} yields its session, and so would close it by itself."
    elif is_coroutine_function(make):
        problem = f"{what} is an `async def`."
    else:
        try:
            inspect.signature(make).bind()
        except TypeError as exc:
            problem = f"{what} cannot be called without arguments: {exc}."
        except ValueError:
            return  # Written in C, without a signature.
        else:
            return
    raise ConfigurationError(
        problem,
        "Give a callable that takes no arguments and returns a new Session, such as a"
        " sessionmaker.",
    )


def use_of(session: Session) -> str | None:
    """Say what a session is in use for; None for one that is as new.

    A request that ended such a session would commit, and detach, what is somebody else's.
    """
    if session.in_transaction():
        return "in a transaction"
    if session.new or session.deleted:
        return "with pending objects"
    return "with loaded objects" if len(session.identity_map) else None


def refuse_in_use(session: object, what: str, make: Callable[..., object]) -> None:
    """Refuse a session that a user's callable has returned, and that somebody uses.

    Args:
        session: What was returned.
        what: What the callable is, for messages.
        make: The callable.

    Raises:
        ConfigurationError: It names the registry that the session is from, where that can be seen.
    """
    use = use_of(session) if isinstance(session, Session) else None
    if use is None:
        return
    name = next(_registries_in(make), None)
    source = (
        "the one that its registry hands out" if name is None else f"the one that {name} hands out"
    )
    raise ConfigurationError(
        f"{what} returned a session that is in use ({use}), {source} to everybody here: the task"
        " would commit and close what is not its own.",
        "Give the registry itself, the scoped_session, or a callable that returns a new session."
        if name is None
        else f"Give the registry itself: {name}, without calling it.",
    )


def _registries_in(make: Callable[..., object]) -> Iterator[str]:
    """Yield the names under which a callable finds a scoped_session, such as ``db.session``."""
    function: object = inspect.unwrap(make)
    owner = getattr(function, "__self__", None)
    if isinstance(owner, scoped_session):
        yield "the scoped_session"
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        # An object that is called.
        function = inspect.getattr_static(type(function), "__call__", None)
    if not inspect.isfunction(function):
        return
    seen = inspect.getclosurevars(function)
    names: Mapping[str, object] = {**seen.globals, **seen.nonlocals}
    for name, value in names.items():
        if isinstance(value, scoped_session):
            yield name
        # What the code asks for as an attribute: ``db.session``.
        for attribute in seen.unbound:
            if isinstance(inspect.getattr_static(value, attribute, None), scoped_session):
                yield f"{name}.{attribute}"


def take_over(session: Session, options: SessionOptions = NO_OPTIONS) -> Session:
    """Have a session that somebody else made follow a request's rules, and return it."""
    # The request ends what it does not begin: it must be there at the first statement.
    session.autobegin = True
    listen(session)
    keep_ledger(session, options)
    return session


def pattern_of(session: Session) -> Session:
    """Return a session that nobody uses, set up as one that is about to be closed for good."""
    pattern = Session(session.bind)
    carry_over(session, pattern)
    return pattern


def carry_over(before: Session, session: Session) -> None:
    """Set a session up as the one whose place it takes in a request.

    It may have set its tenant there: by a listener, by ``info``, or by options of the engine.

    Args:
        before: The request's session so far, or its pattern.
        session: The next one, of the same database.
    """
    session.dispatch._update(before.dispatch, only_propagate=False)
    session.info.update(before.info)
    given, own = before.bind, session.bind
    if isinstance(given, Engine) and isinstance(own, Engine) and given.pool is own.pool:
        session.bind = given


def refuse_removed(session: Session, owner: str) -> None:
    """Refuse further use of a session that the application has removed from its registry.

    The request has another one from now on; what is written through this one nobody would commit.

    Args:
        session: Closed by the registry's ``remove()``.
        owner: The task's name and the request's id.
    """

    def refuse(*args: object) -> NoReturn:
        raise ConfigurationError(
            f"{owner} uses a session that was taken out of its registry by remove(): what was not"
            " committed is rolled back, and the task has a new session.",
            "Ask for that, by self.session or by the registry; or leave out remove(), for the"
            " session ends with the task.",
        )

    for name in ("after_transaction_create", "before_attach", "do_orm_execute"):
        event.listen(session, name, refuse)
