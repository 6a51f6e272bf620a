"""The callables that are given for later: which of them can be called, and how coroutines end.

Beneath ``transaction.py``, which calls them when a transaction has ended.
"""

from __future__ import annotations

from types import CoroutineType
from typing import Any

from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ..errors import CallableError
from .any_session import AnySession, in_scope
from .coroutine_functions import is_coroutine_function
from .off_loop import in_greenlet_of_loop

__all__ = ["end_coroutine", "refuse_unawaitable", "refuse_uncallable"]

_NOBODY_AWAITS = "nobody awaits a coroutine when the transaction of a plain Session has ended"


def refuse_uncallable(given: object, what: str, way: str) -> None:
    """Refuse what cannot be called where it is given, not where it would be called.

    Args:
        given: What was given.
        what: What would call it, for people.
        way: The call that would be right.

    Raises:
        CallableError: It cannot be called.
    """
    if not callable(given):
        shown = "None" if given is None else f"a {type(given).__name__!r}"
        raise CallableError(what, shown, way)


def refuse_unawaitable(given: object, session: AnySession, what: str) -> None:
    """Refuse a coroutine function for the end of a plain Session's transaction.

    Raises:
        CallableError: It is one, and the session is no AsyncSession.
    """
    if is_coroutine_function(given) and isinstance(in_scope(session), Session):
        way = f"{what}(session, ...) with a plain function, or give it the AsyncSession"
        raise CallableError(f"{what}()", "an `async def`", way, _NOBODY_AWAITS)


def end_coroutine(made: CoroutineType[Any, Any, Any], what: str) -> None:
    """Await what a callable has returned, in the greenlet in which an AsyncSession has ended.

    Raises:
        CallableError: It was a plain Session.
        Exception: What the coroutine raised.
    """
    if not in_greenlet_of_loop():
        made.close()
        raise CallableError(what, "a coroutine", "a plain function", _NOBODY_AWAITS)
    await_only(made)
