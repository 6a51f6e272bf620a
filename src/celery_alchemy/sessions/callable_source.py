"""Sessions from a callable of the user's, which makes them as it likes.

Beside ``sources.py``; here a session is taken over when it is there, and cannot be deferred.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from ..errors import ConfigurationError
from .sources import NOTHING, Asks
from .state import NO_OPTIONS, SessionOptions
from .takeover import refuse_in_use, take_over

__all__ = ["CallableSource"]


class CallableSource:
    """Sessions from a user's own zero-argument callable, one call for each request.

    Args:
        make: Returns a new Session.
        what: What it is, for messages.
    """

    deferred_class = None

    def __init__(self, make: Callable[[], object], what: str) -> None:
        #: The user's callable.
        self.make = make
        self._what = what

    def of_class(self, class_: type[Session], asker: str) -> CallableSource:
        """Return the source: what class its sessions have is the callable's affair."""
        return self

    def engine(self) -> Engine | None:
        """Return None: each session may be bound to another."""
        return None

    def session(self, asks: Asks = NOTHING) -> Session:
        """Return what the callable returns, with a ledger."""
        return self.opened(asks.session_options())

    def opened(self, options: SessionOptions = NO_OPTIONS) -> Session:
        """Return what the callable returns, with a ledger.

        Raises:
            ConfigurationError: It is no Session, or one that is in use.
        """
        session = self.make()
        if not isinstance(session, Session):
            raise ConfigurationError(
                f"{self._what} returned {type(session).__name__!r}, which is no Session.",
                "Return a new sqlalchemy.orm.Session at each call.",
            )
        refuse_in_use(session, self._what, self.make)
        return take_over(session, options)
