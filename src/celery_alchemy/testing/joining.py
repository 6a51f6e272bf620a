"""Sessions that join a test's transaction: whatever they commit is rolled back when the test ends.

Beside the code under test: it binds the sessions of an Alchemy, and those of the sessionmaker that it was given, to one connection.
Source: https://docs.sqlalchemy.org/en/20/orm/session_transaction.html#joining-a-session-into-an-external-transaction-such-as-for-test-suites
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from ..alchemy import Alchemy
from ..errors import ConfigurationError
from ..ledger import LEDGER, ledger_of
from ..registry import homes_of
from ..sessions import NOTHING, CallableSource, SessionmakerSource
from ..transaction import joined_connections
from .points import replaced

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["Joined", "joined"]

_JOINS: dict[str, Any] = {"join_transaction_mode": "create_savepoint"}


class Joined:
    """What a test sees of the transaction that everything joins.

    Args:
        alchemy: Whose sessions join.
        connection: In the transaction that will be rolled back.
        keep: Closes a session at the end.
    """

    def __init__(self, alchemy: Alchemy, connection: Connection, keep: Callable[[Session], object]) -> None:
        self._alchemy = alchemy
        self.connection = connection
        self._keep = keep

    def session(self) -> Session:
        """Return a session in the transaction, to arrange and to assert with; it is not "at hand" for ``delay_on_commit``."""
        session = self._alchemy.source.session()
        self._keep(session)
        return session

    def async_session(self) -> AsyncSession:
        """Return an AsyncSession in the transaction; it works in any event loop."""
        session: AsyncSession = self._alchemy.async_source.session(NOTHING)
        self._keep(session.sync_session)
        return session


@contextmanager
def joined(alchemy: Alchemy) -> Iterator[Joined]:
    """Have all sessions of an Alchemy join one transaction, which is rolled back at the end of the block.

    A commit of theirs releases a SAVEPOINT; what waits for it (``on_commit``, ``enqueue``) happens then, as after the commit of the
    outermost transaction. AsyncSessions join too: inside of the block they use the same, synchronous, connection.

    One connection serves one session at a time: sessions may follow or enclose one another, also from several threads, but not work
    side by side.

    Args:
        alchemy: With a URL, an engine, a sessionmaker, or a callable whose sessions look at their ``bind``. Other Alchemies of
            its app join too, each in a transaction of its own.

    Raises:
        ConfigurationError: The Alchemy's sessions cannot be bound to a connection.
    """
    with ExitStack() as stack:
        connections = _Connections(stack)
        stack.enter_context(_ledgers_by_session(connections))
        alchemies: list[Any] = [alchemy, *(other for other in _others(alchemy) if other is not alchemy)]
        firsts = [_join(one, connections, stack) for one in alchemies]
        # Sessions are closed before the transaction ends.
        yield Joined(alchemy, firsts[0], lambda session: stack.callback(session.close))


def _others(alchemy: Alchemy) -> list[Any]:
    return [] if alchemy.app is None else list(homes_of(alchemy.app).values())


class _Connections:
    """One connection for each engine, in a transaction that is rolled back."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._of: dict[Engine, Connection] = {}

    def __contains__(self, connection: object) -> bool:
        return any(connection is mine for mine in self._of.values())

    def of(self, engine: Engine) -> Connection:
        """Return the connection that stands for an engine, opening it at the first call."""
        if engine not in self._of:
            connection = self._stack.enter_context(engine.connect())
            self._stack.callback(connection.begin().rollback)
            if engine.dialect.name == "sqlite":
                _begin_on_sqlite(connection)
            joined_connections.add(connection)
            self._stack.callback(joined_connections.discard, connection)
            self._of[engine] = connection
        return self._of[engine]


def _begin_on_sqlite(connection: Connection) -> None:
    """Begin for certain: the sqlite3 module waits for the first write; a SAVEPOINT before it would be the transaction.

    Source: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html#serializable-isolation-savepoints-transactional-ddl
    """
    driver: Any = connection.connection.driver_connection
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN")

    def allow_writes(connection: Connection, *more: Any) -> None:
        # A read-only task's setting belongs to the connection, which is not given back here.
        connection.exec_driver_sql("PRAGMA query_only = OFF")

    event.listen(connection, "release_savepoint", allow_writes)
    event.listen(connection, "rollback_savepoint", allow_writes)


def _join(alchemy: Alchemy, connections: _Connections, stack: ExitStack) -> Connection:
    engine = alchemy.engine
    connection = connections.of(engine)
    source: object = alchemy.source
    if isinstance(source, SessionmakerSource):
        stack.enter_context(_configured(source.maker.kw, connections))
    elif isinstance(source, CallableSource):
        stack.enter_context(_bound(source, connection))
    _join_async(alchemy, connection, stack)
    # A relay has connections of its own: on SQLite it would wait for the end of the test, elsewhere it would find nothing.
    stack.enter_context(replaced(alchemy, "runs_relay", False))  # noqa: FBT003 - it is the value.
    if alchemy.outbox is not None:
        outbox: Any = alchemy.outbox
        stack.enter_context(replaced(outbox, "engine", lambda: _EngineOfOne(connection)))
    return connection


@contextmanager
def _configured(options: dict[str, Any], connections: _Connections) -> Iterator[None]:
    """Change what a sessionmaker makes, as its ``configure()`` would, and undo it."""
    before = dict(options)
    options.update(_JOINS)
    if isinstance(options.get("bind"), Engine):
        options["bind"] = connections.of(options["bind"])
    if options.get("binds"):
        options["binds"] = {key: connections.of(bind) if isinstance(bind, Engine) else bind for key, bind in options["binds"].items()}
    try:
        yield
    finally:
        options.clear()
        options.update(before)


@contextmanager
def _bound(source: CallableSource, connection: Connection) -> Iterator[None]:
    make = source.make

    def make_joined() -> Session:
        session = make()
        if type(session).get_bind is not Session.get_bind:
            raise ConfigurationError(
                f"Sessions of {type(session).__module__}.{type(session).__name__} choose their engine themselves, so that they"
                " cannot join a test's transaction.",
                "Give Alchemy the engine, or a sessionmaker of plain sessions, in the tests.",
            )
        session.bind = connection
        session.join_transaction_mode = "create_savepoint"
        return session

    with replaced(source, "make", make_joined):
        yield


class _AsyncStandIn:
    """What an AsyncSession takes for an AsyncEngine: it asks for no more than the sync half.

    A connection of an async driver belongs to one event loop and to a transaction of its own; with the sync one all sessions of the
    test, in whatever loop or thread, see the same rows.
    """

    def __init__(self, connection: Connection) -> None:
        self.sync_engine = connection

    def execution_options(self, **options: Any) -> _AsyncStandIn:
        """Change nothing: the transaction has begun."""
        return self


def _join_async(alchemy: Any, connection: Connection, stack: ExitStack) -> None:
    try:
        source = alchemy.async_source
    except (ConfigurationError, ImportError):
        return  # Its tasks have none either.
    bind = _AsyncStandIn(connection)
    stack.enter_context(replaced(alchemy, "_async_source", source.bound_to(bind, **_JOINS)))
    maker_options = getattr(alchemy._bind, "kw", None)
    if maker_options is not None and "bind" in maker_options and not isinstance(maker_options["bind"], (Engine, Connection)):
        stack.enter_context(_updated(maker_options, {**_JOINS, "bind": bind}))


class _EngineOfOne:
    """Stands for the engine of the outbox's database where messages are settled after the commit."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._connection.begin_nested():
            yield self._connection


@contextmanager
def _ledgers_by_session(connections: _Connections) -> Iterator[None]:
    """Give the connection back the ledger of the session that goes on, when one that it enclosed has ended."""
    open_sessions: list[Session] = []

    def begins(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if connection in connections and session not in open_sessions:
            open_sessions.append(session)

    def ends(session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None or session not in open_sessions:
            return
        open_sessions.remove(session)
        connection = cast("Connection", session.bind)
        if connection in connections:
            connection.__dict__[LEDGER] = ledger_of(open_sessions[-1]) if open_sessions else None

    event.listen(Session, "after_begin", begins)
    event.listen(Session, "after_transaction_end", ends)
    try:
        yield
    finally:
        event.remove(Session, "after_begin", begins)
        event.remove(Session, "after_transaction_end", ends)


@contextmanager
def _updated(options: dict[str, Any], changes: dict[str, Any]) -> Iterator[None]:
    before = dict(options)
    options.update(changes)
    try:
        yield
    finally:
        options.clear()
        options.update(before)
