"""What an Alchemy may be bound to, and where its sessions come from then.

Between ``alchemy.py``, which is given the bind, and ``sources.py``, which makes sessions of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union, cast

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ..errors import ConfigurationError
from .callable_source import CallableSource
from .engine import ForeignEngine, Options, OwnEngine, checked_url
from .isolation import ShownEngine, engines_shown_by
from .scope import HasRegistry, RequestRegistry, request_registry
from .sources import OneMaker, SessionmakerSource, SessionSource
from .takeover import refuse_unfit

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import (
        AsyncEngine,
        async_scoped_session,
        async_sessionmaker,
    )

    from .async_engine import AsyncSource

__all__ = ["Bind", "Bound", "bound_if_given", "bound_to", "engine_options_of", "is_async_kind"]

# The type parameters of SQLAlchemy's factories are invariant: Any stands for each class of
# sessions.
Bind = Union[
    str,
    URL,
    Engine,
    "AsyncEngine",
    "sessionmaker[Any]",
    "async_sessionmaker[Any]",
    "scoped_session[Any]",
    "async_scoped_session[Any]",
    Callable[[], Session],
]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a bind has become.

    Attributes:
        bind: What makes the sessions: a URL, an engine or a factory; of a registry its factory.
        engine_options: The ``create_engine`` options for a URL.
        source: Where the sessions come from.
        engine_home: What has the engine; None where the sessions know it alone.
        registry: The application's own, if it was the bind: it hands out the requests' sessions.
    """

    bind: object
    engine_options: Mapping[str, object]
    source: SessionSource
    engine_home: OwnEngine | ForeignEngine | None
    registry: RequestRegistry | None

    def engines_shown(self) -> list[ShownEngine]:
        """Return the engines that the bind is known to use; nothing is connected."""
        return engines_shown_by(self.bind, self.engine_options)

    def async_source(self) -> AsyncSource:
        """Return a new source of AsyncSessions.

        Raises:
            ConfigurationError: The bind gives none, or no async driver is installed.
        """
        # An optional extra: greenlet and an async driver are only there where it is used.
        from .async_engine import async_source_of

        source = async_source_of(self.bind, self.engine_options)
        if source is None:
            raise ConfigurationError(
                f"An AsyncSession is needed, and a {type(self.bind).__name__!r} as bind gives"
                " none.",
                "Give Alchemy a URL, an AsyncEngine or an async_sessionmaker.",
            )
        return source


def bound_to(
    bind: object, engine_options: Mapping[str, object], engine: Engine | None = None
) -> Bound:
    """Return what becomes of a bind.

    Args:
        bind: What the user has given; one of ``Bind``, if the user was right.
        engine_options: ``create_engine`` options for a URL.
        engine: The sync engine of the library's tables, if the user has named one.

    Raises:
        ConfigurationError: The bind cannot work, or the options are for another kind of bind.
    """
    registry = _registry_of(bind)
    if registry is not None:
        # The factory makes the requests' sessions, the registry hands them out.
        bind = cast("scoped_session[Session]", bind).session_factory
    if isinstance(bind, (str, URL)):
        bind = checked_url(bind)
    home = _sync_home_of(bind, engine_options, engine)
    if home is not None:
        return Bound(bind, engine_options, SessionmakerSource(home), home, registry)
    if engine_options:
        raise ConfigurationError(
            f"engine_options were given with a {type(bind).__name__!r}.",
            "They are for a URL; give these options where your engine is made.",
        )
    if isinstance(bind, Engine):
        foreign = ForeignEngine(bind)
        return Bound(bind, engine_options, SessionmakerSource(foreign), foreign, registry)
    return Bound(bind, engine_options, _source_of_factory(bind), None, registry)


def bound_if_given(
    bind: object, engine_options: Mapping[str, object] | None, engine: Engine | None
) -> Bound | None:
    """Return what becomes of a bind; None if none was given.

    Raises:
        ConfigurationError: As for ``bound_to()``, or there are options without a bind.
    """
    options = engine_options_of("engine_options", engine_options)
    if bind is not None:
        return bound_to(bind, options, engine)
    if options:
        raise ConfigurationError(
            "engine_options were given without a URL.",
            "Give the URL as bind, or set sqlalchemy_engine_options in the app's configuration.",
        )
    return None


def engine_options_of(name: str, options: object) -> Options:
    """Return options for ``create_engine``; none for None. No value is shown: it may be a password.

    Args:
        name: The setting that they come from.
        options: What is set there.

    Raises:
        ConfigurationError: They are no mapping by names.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ConfigurationError(
            f"{name} is a {type(options).__name__!r}, and no dict of options by their names.",
            f'Write {name}={{"pool_size": 5}}, with what create_engine() takes.',
        )
    return dict(options)


def _source_of_factory(bind: object) -> SessionSource:
    if isinstance(bind, sessionmaker):
        return SessionmakerSource(OneMaker(bind), bind.class_)
    if callable(bind) and not isinstance(bind, type):
        refuse_unfit(bind, "The callable given to Alchemy")
        # It has no type that would say what it returns; the source looks at each session.
        return CallableSource(bind, "The callable given to Alchemy")
    fix = (
        "Give a URL, an Engine, a sessionmaker, or a callable that takes no arguments and returns a"
        " new Session."
    )
    if isinstance(getattr(bind, "session", None), scoped_session):
        fix = (
            "Give its registry, which hands out the task's session while a body runs:"
            " Alchemy(app, db.session)."
        )
    raise ConfigurationError(f"bind is a {type(bind).__name__!r}.", fix)


def _registry_of(bind: object) -> RequestRegistry | None:
    """Return what hands out the requests' sessions, of a scoped_session or its async twin."""
    if isinstance(bind, scoped_session):
        return request_registry(bind, is_async=False)
    if is_async_kind(bind, "async_scoped_session"):
        return request_registry(cast("HasRegistry", bind), is_async=True)
    return None


def _sync_home_of(
    bind: object, engine_options: Mapping[str, object], engine: Engine | None
) -> OwnEngine | ForeignEngine | None:
    """Return the sync engine of a URL and of an AsyncEngine; None for another bind.

    Raises:
        ConfigurationError: No driver for it is installed, and no ``engine`` was given.
    """
    try:
        url = _url_of(bind)
    except ConfigurationError as exc:
        if isinstance(bind, (str, URL)):
            raise
        if engine is None:
            raise ConfigurationError(
                exc.problem, f"{exc.remedy} Or give a sync engine: Alchemy(..., engine=engine)."
            ) from exc
        return ForeignEngine(engine)
    return None if url is None else OwnEngine(url, engine_options)


def _url_of(bind: object) -> URL | None:
    """Return the URL for the sync engine of a URL or of an AsyncEngine; None for another bind.

    The engine of an AsyncEngine only works in its event loop.
    """
    if isinstance(bind, URL):
        url = bind
    else:
        is_maker = is_async_kind(bind, "async_sessionmaker")
        engine = getattr(bind, "kw", {}).get("bind") if is_maker else bind
        if not is_async_kind(engine, "AsyncEngine"):
            return None
        url = cast("AsyncEngine", engine).url
    if url.get_dialect().is_async and url.get_driver_name() != "psycopg":
        from .async_engine import sync_url_of

        return sync_url_of(url)
    return url


def is_async_kind(bind: object, name: str) -> bool:
    """Tell whether a bind is one of SQLAlchemy's async kinds, without importing its extension."""
    return any(
        base.__name__ == name and base.__module__.startswith("sqlalchemy.ext.asyncio")
        for base in type(bind).__mro__
    )
