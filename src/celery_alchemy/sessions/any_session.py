"""The Session behind whatever a caller has: an AsyncSession, or a registry of either.

Beneath all functions that take "a session".
"""

from __future__ import annotations

from typing import Any, Union

from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.util import ScopedRegistry

from ..errors import ConfigurationError

__all__ = ["AnySession", "in_scope", "sync_session_of"]

# A Session, a scoped_session, or their async twins (named as Any so that greenlet is not needed to
# import this package).
AnySession = Union[Session, "scoped_session[Any]", object]


def sync_session_of(session: AnySession) -> Session:
    """Return the Session behind an AsyncSession or a registry, or the Session itself."""
    session = in_scope(session)
    sync: object = (
        getattr(session, "sync_session", session) if not isinstance(session, Session) else session
    )
    if not isinstance(sync, Session):
        raise ConfigurationError(
            f"A session was expected and {type(session).__name__!r} was given.",
            "Give a sqlalchemy.orm.Session, an AsyncSession, a scoped_session or an"
            " async_scoped_session.",
        )
    return sync


def in_scope(session: AnySession) -> Any:
    """Return the session that a scoped_session or an async_scoped_session stands for here.

    Any other session stands for itself.
    """
    registry = getattr(session, "registry", None)
    return registry() if isinstance(registry, ScopedRegistry) else session
