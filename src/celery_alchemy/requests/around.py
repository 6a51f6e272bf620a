"""What is around each run of a body.

A context manager of the application's, entered first and left before the commit.

Above the arguments, which it is entered before; ``sync_body.py`` and ``failure.py`` run bodies
inside of it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ..errors import ConfigurationError
from ..sessions.sources import is_open
from ..signatures.injection import hints_of, is_async_session_class
from ..signatures.outcomes import Outcome, outcome_of
from .arguments import Arguments, Call, Keywords
from .attempt import UnitOfWork

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["Around", "enclosed"]

#: Called with the running task and its session.
Around = Callable[[Any, Any], AbstractContextManager[object] | AbstractAsyncContextManager[object]]


def enclosed(call: Call) -> Call:
    """Return the call of a body inside of what is around it."""

    def run(unit: UnitOfWork, args: Arguments, kwargs: Keywords) -> object:
        with _manager(unit):
            try:
                returned = call(unit, args, kwargs)
            except BaseException as exc:
                _flush_inside(unit, outcome_of(exc))
                raise
            _flush_inside(unit, "success")
            return returned
        # Its exit has swallowed an error.
        return None

    return run


def _flush_inside(unit: UnitOfWork, outcome: Outcome) -> None:
    """Flush what an outcome will commit, while what is around the body still holds.

    A listener may read what it has set.
    """
    session = unit.used_session
    if session is not None and is_open(session) and outcome in unit.plan.commit_on:
        session.flush()


def _manager(unit: UnitOfWork) -> AbstractContextManager[object]:
    """Return what is around a body.

    Raises:
        ConfigurationError: It is no context manager, or an async one around a plain ``def``.
    """
    plan = unit.plan
    session: Session | AsyncSession = unit.session_to_offer()
    if unit.async_session is not None and plan.around_written is not None:
        session = _session_for(plan.around_written, unit.async_session)
    manager = None if plan.around is None else plan.around(session)
    if isinstance(manager, AbstractContextManager):
        return manager
    if isinstance(manager, AbstractAsyncContextManager) and plan.is_async:
        return _Awaited(manager)
    what = f"The around of task {plan.name!r} returned a {type(manager).__name__!r}"
    if isinstance(manager, AbstractAsyncContextManager):
        raise ConfigurationError(
            f"{what}, an async context manager, for a plain Session: plain tasks have one, and"
            " every plain record_failure.",
            "Return a plain context manager for a Session, and the async one for an AsyncSession.",
        )
    raise ConfigurationError(
        f"{what}, which is no context manager.",
        "Put @contextmanager on the function, or return contextlib.nullcontext() where there is"
        " nothing to do.",
    )


# --- async tasks ----------------------------------------------------------------------------------


class _Awaited(AbstractContextManager[object]):
    """An async context manager, entered and left in the loop in whose greenlet this is used."""

    def __init__(self, manager: AbstractAsyncContextManager[object]) -> None:
        self._manager = manager

    def __enter__(self) -> object:
        return await_only(self._manager.__aenter__())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        return await_only(self._manager.__aexit__(kind, exc, trace))


def _session_for(around: Callable[..., object], session: AsyncSession) -> Session | AsyncSession:
    """Return the session with which an ``around`` is called for an ``async def`` task.

    The AsyncSession if it is an async generator function under @asynccontextmanager, or annotated
    so;
    else the Session behind it: what a plain one did with an AsyncSession would be coroutines that
    nobody awaits, and the tenant not set.

    Args:
        around: The user's.
        session: The AsyncSession.
    """
    function = inspect.unwrap(around)
    return session if _asks_async(getattr(function, "__func__", function)) else session.sync_session


@lru_cache(maxsize=256)
def _asks_async(function: Callable[..., object]) -> bool:
    """Tell whether a function is for an AsyncSession.

    Kept, for reading annotations costs more than most statements.
    """
    if inspect.isasyncgenfunction(function):
        return True
    hints = [hint for name, hint in hints_of(function).items() if name != "return"]
    asked = [member for hint in hints for member in typing.get_args(hint) or (hint,)]
    return any(isinstance(member, type) and is_async_session_class(member) for member in asked)
