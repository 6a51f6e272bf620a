"""AsyncSessions from a callable of the user's, which makes them as it likes.

Beside ``callable_source.py``, by the same rules; imported where an ``async def`` task needs one.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from ..errors import ConfigurationError
from .state import NO_OPTIONS, SessionOptions
from .takeover import refuse_in_use, take_over

__all__ = ["AsyncCallableSource"]


class AsyncCallableSource:
    """AsyncSessions from a user's own zero-argument callable, one call for each request.

    Args:
        make: Returns a new AsyncSession, or an async_sessionmaker that makes it.
        what: What it is, for messages.
    """

    def __init__(self, make: Callable[[], object], what: str) -> None:
        self._make = make
        self._what = what

    def of_class(self, class_: type[AsyncSession], asker: str) -> AsyncCallableSource:
        """Return the source: what class its sessions have is the callable's affair."""
        return self

    def opened(self, options: SessionOptions = NO_OPTIONS) -> AsyncSession:
        """Return what the callable returns, with a ledger; to be called in the event loop.

        Raises:
            ConfigurationError: It is no AsyncSession, or one that is in use.
        """
        made = self._make()
        session = made() if isinstance(made, async_sessionmaker) else made
        if not isinstance(session, AsyncSession):
            raise ConfigurationError(
                f"{self._what} returned {type(session).__name__!r}, which is no AsyncSession, to"
                " an `async def` task.",
                "Return a new AsyncSession at each call, or make the task a plain `def`.",
            )
        refuse_in_use(session.sync_session, self._what, self._make)
        take_over(session.sync_session, options)
        return session
