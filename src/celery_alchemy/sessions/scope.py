"""The application's own session: a registry that hands out the running request's session.

Underneath the request, which says for which registry its session stands; ``alchemy.py`` and
``requests/registry.py`` put a RequestRegistry into the ``scoped_session`` they are given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from sqlalchemy.orm import Session
from sqlalchemy.util import ScopedRegistry

from .at_hand import AtHand, at_hand

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["HasRegistry", "RequestRegistry", "request_registry"]


class _NoScope:
    """Where the application's scope function knows no scope."""

    def __repr__(self) -> str:
        return "<no scope>"


NO_SCOPE = _NoScope()


class HandsOut(AtHand, Protocol):
    """A request, whose session a registry hands out."""

    def handed_out(self) -> Session | AsyncSession:
        """Return the session for the registry, made at the first use."""
        ...

    def is_handed_out(self) -> bool:
        """Tell whether that session has been used."""
        ...

    def take(self, session: Session | AsyncSession) -> None:
        """Use a session that the application has put into the registry."""
        ...

    def renew(self) -> None:
        """Have the next use make another session: the application has removed this one."""
        ...


class HasRegistry(Protocol):
    """A scoped_session or an async_scoped_session."""

    registry: ScopedRegistry[Session | AsyncSession]


class RequestRegistry(ScopedRegistry["Session | AsyncSession"]):
    """Hands out the running request's session, and outside of requests what the registry has.

    A request is found through ``at_hand``, so that nothing is put into the registry when it begins
    and nothing taken out when it ends: a request that never asks for its session pays nothing, and
    what the registry held before is never moved.

    The application's scope function keeps its say. The request's session is that of the scope in
    which the request began. A scope that the body makes by itself, such as a Flask application
    context inside of another, or an asyncio task, has its own session as ever; so the end of that
    scope, which removes it, does not take the request's work back.

    Where a request began in no scope at all, as a task of a Flask application without an
    application context, its session is handed out in every scope that the body makes. The end of
    such a scope leaves it alone.

    Args:
        outside: The registry as the application has it.
        is_async: Its sessions are AsyncSessions.
    """

    def __init__(self, outside: ScopedRegistry[Session | AsyncSession], *, is_async: bool) -> None:
        self._outside = outside
        self.is_async = is_async
        # For code that looks into a registry. The one of threads has no scope function.
        self.createfunc: Callable[[], Session | AsyncSession] = outside.createfunc
        self.registry: Any = outside.registry
        self._scope_of_application: Callable[[], object] | None = getattr(
            outside, "scopefunc", None
        )
        #: Returns what tells one scope of the application from another.
        self.scope: Callable[[], object] = threading.get_ident
        if self._scope_of_application is not None:
            self.scopefunc: Callable[[], object] = self._scope_of_application
            self.scope = self._asked_scope

    def __call__(self) -> Session | AsyncSession:
        """Return the session for whoever asks here."""
        held, _ = self._serving()
        return self._outside() if held is None else held.handed_out()

    def has(self) -> bool:
        """Tell whether a session is there."""
        held, is_its_own = self._serving()
        if held is None:
            return self._outside.has()
        return is_its_own and held.is_handed_out()

    def set(self, obj: Session | AsyncSession) -> None:
        """Have a session handed out from here on."""
        held, _ = self._serving()
        if held is None:
            self._outside.set(obj)
        else:
            held.take(obj)

    def clear(self) -> None:
        """Forget the session; the next use makes a new one."""
        held, is_its_own = self._serving()
        if held is None:
            self._outside.clear()
        elif is_its_own:
            held.renew()

    def held_outside(self) -> list[object]:
        """Return what the registry holds outside of requests, in all scopes that can be seen."""
        if self._scope_of_application is None:
            return [self._outside()] if self._outside.has() else []
        return list(self.registry.values())

    def _asked_scope(self) -> object:
        try:
            return NO_SCOPE if self._scope_of_application is None else self._scope_of_application()
        except Exception:  # noqa: BLE001 - RuntimeError of Flask and asyncio, anything of others.
            return NO_SCOPE

    def _serving(self) -> tuple[HandsOut | None, bool]:
        """Return the innermost request whose session this registry hands out here.

        With it, whether the request began in this very scope.
        """
        held = at_hand.get()
        if held is None:
            return None, False
        scope = self.scope()
        while held is not None:
            if held.registry is self and (held.scope == scope or held.scope is NO_SCOPE):
                # Only a request says that it is handed out somewhere.
                return cast("HandsOut", held), held.scope == scope
            held = held.outer
        return None, False


def request_registry(scoped: HasRegistry, *, is_async: bool) -> RequestRegistry:
    """Return the RequestRegistry of a scoped_session, putting it there at the first call."""
    registry = scoped.registry
    if not isinstance(registry, RequestRegistry):
        registry = RequestRegistry(registry, is_async=is_async)
        scoped.registry = registry
    return registry
