"""The isolation level of a task's session, in every transaction of it.

Also what a bind shows of its engines before they connect.

Underneath the ledger, which isolates each session that it is asked to; whoever made the session.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import methodcaller
from weakref import WeakSet

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Session

from ..errors import ConfigurationError
from .state import Level, level_of, state_for, state_of

__all__ = [
    "ShownEngine",
    "engines_shown_by",
    "isolate",
    "joined_connections",
    "refuse_other_level",
    "with_level_of",
]

#: Connections whose transaction a test began, to roll it back: a session's commit counts as the
#: outermost one there, and the transaction keeps the level that it has.
joined_connections: WeakSet[Connection] = WeakSet()

#: Where a Session class has its subclass whose connections begin with a level; on the class itself,
#: with which it ends.
_ISOLATED = "_celery_alchemy_isolated"


def isolate(session: Session, level: str | None, *, reads_only: bool = False) -> None:
    """Have each connection of a session begin as a task asks for, in every transaction.

    A Session class chooses its engine in ``get_bind()``: from ``bind`` and ``binds``, or as
    Flask-SQLAlchemy's, a ShardedSession and a user's own do. So its answer is changed there.

    Args:
        session: The session.
        level: The isolation level; None for the engine's own.
        reads_only: It takes no lock for writing, where the database can do without.
    """
    state_for(session).level = Level(level, reads_only=reads_only)
    object.__setattr__(session, "__class__", _isolated_class(type(session)))


def with_level_of(session: Session, bind: Engine | Connection) -> Engine | Connection:
    """Return what an isolated session connects to, for a bind in ``bind_arguments``."""
    state = state_of(session)
    return bind if state is None or state.level is None else state.level.of(bind)


def _isolated_class(class_: type[Session]) -> type[Session]:
    isolated: type[Session] | None = class_.__dict__.get(_ISOLATED)
    if isolated is None:

        def get_bind(session: Session, *args: object, **kwargs: object) -> Engine | Connection:
            choose: Callable[..., Engine | Connection] = class_.get_bind
            return with_level_of(session, choose(session, *args, **kwargs))

        members = {"__module__": class_.__module__, "__doc__": class_.__doc__, "get_bind": get_bind}
        isolated = type(class_.__name__, (class_,), members)
        setattr(class_, _ISOLATED, isolated)
    return isolated


def refuse_other_level(connection: Connection, level: str) -> None:
    """Refuse a connection, which has just begun, with another isolation level than the task's.

    Raises:
        ConfigurationError: It has another one.
    """
    if level_of(connection) == level or connection in joined_connections:
        return
    # A Connection that the session is bound to, or an engine that was named in bind_arguments.
    actual = "another level"
    with suppress(NotImplementedError):
        actual = str(connection.get_isolation_level())
    if _written_alike(actual) != _written_alike(level):
        raise ConfigurationError(
            f"The task has isolation_level={level!r}, and this connection of its session has"
            f" {actual}: it was given to the session as it is, as a Connection or in"
            " bind_arguments.",
            "Bind the session to an Engine, or remove isolation_level and set it where the"
            " connection begins.",
        )


def _written_alike(level: str) -> str:
    return level.upper().replace("_", " ").replace("-", " ")


# --- before anything connects ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShownEngine:
    """What is known of an engine before it connects.

    Attributes:
        dialect: Its dialect.
        level: The isolation level that it was made with; None for the server's.
    """

    dialect: Dialect
    level: object

    @property
    def levels(self) -> tuple[str, ...] | None:
        """The names of the dialect's levels; None where it cannot tell without a connection."""
        try:
            return tuple(methodcaller("get_isolation_level_values", None)(self.dialect))
        except Exception:  # noqa: BLE001 - a dialect may ask the connection, and there is none.
            return None


def engines_shown_by(bind: object, options: Mapping[str, object]) -> list[ShownEngine]:
    """Return the engines that a bind is known to use.

    There are none where its sessions choose for themselves.

    Args:
        bind: A URL, an Engine or AsyncEngine, a sessionmaker or async_sessionmaker; or anything
            else.
        options: The ``create_engine`` options for a URL.
    """
    if isinstance(bind, URL):
        level = options.get("isolation_level")
        of_execution = options.get("execution_options")
        if isinstance(of_execution, Mapping):
            level = of_execution.get("isolation_level", level)
        return [ShownEngine(bind.get_dialect()(), level)]
    engine: object = getattr(bind, "sync_engine", bind)
    if isinstance(engine, Engine):
        of_dialect = getattr(engine.dialect, "_on_connect_isolation_level", None)
        return [ShownEngine(engine.dialect, level_of(engine) or of_dialect)]
    keywords: object = getattr(bind, "kw", None)
    class_: object = getattr(bind, "class_", None)
    if not isinstance(keywords, Mapping) or not isinstance(class_, type):
        return []
    sync_class = keywords.get("sync_session_class") or getattr(class_, "sync_session_class", class_)
    if getattr(sync_class, "get_bind", None) is not Session.get_bind:
        return []
    binds = [keywords.get("bind"), *(keywords.get("binds") or {}).values()]
    return [shown for one in binds if one is not None for shown in engines_shown_by(one, {})]
