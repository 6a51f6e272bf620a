"""Sessions that join a test's transaction: whatever they commit is rolled back when the test ends.

Beside the code under test: it binds the sessions of an Alchemy, and those of the sessionmaker that
it was given, to one connection. Source:
https://docs.sqlalchemy.org/en/20/orm/session_transaction.html, "Joining a Session into an External
Transaction"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionTransaction

from ..alchemy import Alchemy
from ..errors import ConfigurationError
from ..messages.celery_types import Fields
from ..sessions.any_session import AnySession, in_scope, sync_session_of
from ..sessions.callable_source import CallableSource
from ..sessions.isolation import joined_connections
from ..sessions.ledger import LEDGER, ledger_of
from ..sessions.sources import SessionmakerSource
from .points import replaced

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["Joined", "joined"]

_JOINS: dict[str, object] = {"join_transaction_mode": "create_savepoint"}


class Joined:
    """What a test sees of the transaction that everything joins.

    Args:
        alchemy: Whose sessions join.
        connection: In the transaction that will be rolled back.
        keep: Closes a session at the end, and has what it holds flushed before a task begins.
    """

    def __init__(
        self, alchemy: Alchemy, connection: Connection, keep: Callable[[Session], object]
    ) -> None:
        self._alchemy = alchemy
        self.connection = connection
        self._keep = keep

    def session(self) -> Session:
        """Return a session in the transaction, to arrange and to assert with.

        It is not "at hand" for ``delay_on_commit``.

        What it holds is flushed before another session of the Alchemy begins: a task sees it
        without a flush or a commit.
        """
        session = self._alchemy.source.opened()
        self._keep(session)
        return session

    def async_session(self) -> AsyncSession:
        """Return an AsyncSession in the transaction; it works in any event loop."""
        session = self._alchemy.async_source.opened()
        self._keep(session.sync_session)
        return session


@contextmanager
def joined(alchemy: Alchemy, session: AnySession | None = None) -> Iterator[Joined]:
    """Have all sessions of an Alchemy join one transaction.

    It is rolled back at the end of the block.

    A commit of theirs releases a SAVEPOINT; what waits for it (``on_commit``, ``enqueue``) happens
    then, as after the commit of the outermost transaction. AsyncSessions join too: inside of the
    block they use the same, synchronous, connection.

    One connection serves one session at a time: sessions may follow or enclose one another, also
    from several threads, but not work side by side.

    Args:
        alchemy: With a URL, an engine, a sessionmaker, a registry, or a callable.
        session: A Session of the suite's own fixture, or a registry of one, whose transaction is
            joined. It is that fixture's to roll back. What the session holds is flushed before a
            session of the Alchemy begins, so that tasks see it.

    Raises:
        ConfigurationError: The Alchemy's sessions cannot be bound to a connection, or the session
            is an AsyncSession.
    """
    with ExitStack() as stack:
        connections = _Connections(stack)
        own: list[Session] = []
        stack.enter_context(_ledgers_by_session(connections))
        if session is not None:
            given = in_scope(session)
            connections.put(alchemy, _connection_of(given))
            own.append(given)
        first = _join(alchemy, connections, stack)
        stack.enter_context(_flushed_before_others(own, alchemy))

        def keep(session: Session) -> None:
            own.append(session)
            # Sessions are closed before the transaction ends.
            stack.callback(session.close)

        yield Joined(alchemy, first, keep)


def _connection_of(session: object) -> Connection:
    if not isinstance(session, Session):
        raise ConfigurationError(
            f"The session to be joined is a {type(session).__name__}: no Session, on whose"
            " connection all others could work.",
            "Give a Session, or use joined(alchemy) without one and its async_session().",
        )
    bind = session.bind
    return bind if isinstance(bind, Connection) else session.connection()


@contextmanager
def _flushed_before_others(own: list[Session], alchemy: Alchemy) -> Iterator[None]:
    """Flush what the test holds before a task's session begins.

    In production a task sees what is committed. A test that arranges in the transaction which all
    share has nothing to commit it to; that it has flushed is a detail of its fixture.
    """

    def begins(session: Session, transaction: SessionTransaction) -> None:
        held = [*own, *_held_by_registry(alchemy)]
        if transaction.parent is not None or any(session is mine for mine in held):
            return
        for mine in held:
            # Before the other one's SAVEPOINT, whose end would take along what was flushed after
            # it.
            if not mine._flushing and (mine.new or mine.dirty or mine.deleted):
                mine.flush()

    event.listen(Session, "after_transaction_create", begins)
    try:
        yield
    finally:
        event.remove(Session, "after_transaction_create", begins)


def _held_by_registry(alchemy: Alchemy) -> Iterator[Session]:
    # In all scopes: a task of a Flask application begins in a context of its own.
    held = [] if alchemy.registry is None else alchemy.registry.held_outside()
    yield from map(sync_session_of, held)


class _Connections:
    """One connection for each engine, in a transaction that is rolled back."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._of: dict[Engine, Connection] = {}
        #: The one that the test has given; None if it gave none.
        self.given: Connection | None = None

    def put(self, alchemy: Alchemy, connection: Connection) -> None:
        """Have a connection of somebody else's stand for an Alchemy's engine.

        That may be another engine on the same database.
        """
        engines = [connection.engine]
        # A session that chooses its engine itself may not tell.
        with suppress(ConfigurationError):
            engines.append(alchemy.engine)
        for engine in engines:
            self._of[engine] = connection
        self.given = connection
        self._use(connection)

    def _use(self, connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            _begin_on_sqlite(connection)
        joined_connections.add(connection)
        self._stack.callback(joined_connections.discard, connection)

    def __contains__(self, connection: object) -> bool:
        return any(connection is mine for mine in self._of.values())

    def of(self, engine: Engine) -> Connection:
        """Return the connection that stands for an engine, opening it at the first call."""
        if engine not in self._of:
            connection = self._stack.enter_context(engine.connect())
            self._stack.callback(connection.begin().rollback)
            self._use(connection)
            self._of[engine] = connection
        return self._of[engine]


def _begin_on_sqlite(connection: Connection) -> None:
    """Begin for certain: the sqlite3 module waits for the first write.

    A SAVEPOINT before it would be the transaction.

    Source: https://docs.sqlalchemy.org/en/20/dialects/sqlite.html, on transactional DDL
    """
    driver = connection.connection.driver_connection
    assert driver is not None
    if not driver.in_transaction:
        connection.exec_driver_sql("BEGIN")

    def allow_writes(connection: Connection, *more: object) -> None:
        # A read-only task's setting belongs to the connection, which is not given back here.
        connection.exec_driver_sql("PRAGMA query_only = OFF")

    event.listen(connection, "release_savepoint", allow_writes)
    event.listen(connection, "rollback_savepoint", allow_writes)


def _join(alchemy: Alchemy, connections: _Connections, stack: ExitStack) -> Connection:
    connection = _connection_for(alchemy, connections)
    source: object = alchemy.source
    if isinstance(source, SessionmakerSource):
        class_ = source.maker.class_
        stack.enter_context(_configured(source.maker.kw, connections))
        if class_.get_bind is not Session.get_bind:
            stack.enter_context(_replaced_choice(class_, connections))
    elif isinstance(source, CallableSource):
        stack.enter_context(_bound(source, connection, connections))
    _join_async(alchemy, connection, stack)
    # A relay has connections of its own: on SQLite it would wait for the end of the test, elsewhere
    # it would find nothing.
    stack.enter_context(replaced(alchemy, "runs_relay", False))  # noqa: FBT003 - it is the value.
    if alchemy.outbox is not None:
        stack.enter_context(alchemy.outbox.in_caller())
        outbox: object = alchemy.outbox
        stack.enter_context(replaced(outbox, "engine", lambda: _EngineOfOne(connection)))
    return connection


def _connection_for(alchemy: Alchemy, connections: _Connections) -> Connection:
    try:
        return connections.of(alchemy.engine)
    except ConfigurationError:
        if connections.given is None:
            raise
        return connections.given


@contextmanager
def _configured(options: Fields, connections: _Connections) -> Iterator[None]:
    """Change what a sessionmaker makes, as its ``configure()`` would, and undo it."""
    before = dict(options)
    options.update(_JOINS)
    if isinstance(options.get("bind"), Engine):
        options["bind"] = connections.of(options["bind"])
    if options.get("binds"):
        options["binds"] = {
            key: connections.of(bind) if isinstance(bind, Engine) else bind
            for key, bind in options["binds"].items()
        }
    try:
        yield
    finally:
        options.clear()
        options.update(before)


def _choice(choose: Callable[..., object], connections: _Connections) -> Callable[..., object]:
    """Return a ``get_bind`` that chooses as the user's.

    It gives the connection that stands for the engine.
    """

    def get_bind(*args: object, **options: object) -> object:
        bind = choose(*args, **options)
        return connections.of(bind) if isinstance(bind, Engine) else bind

    return get_bind


@contextmanager
def _replaced_choice(class_: Any, connections: _Connections) -> Iterator[None]:
    """Have sessions that choose their engine themselves get a connection.

    Such are Flask-SQLAlchemy's.

    Args:
        class_: The class that the sessionmaker has made for itself.
        connections: What stands for the engines.
    """
    class_.get_bind = _choice(class_.get_bind, connections)
    try:
        yield
    finally:
        del class_.get_bind


@contextmanager
def _bound(
    source: CallableSource, connection: Connection, connections: _Connections
) -> Iterator[None]:
    make = source.make

    def make_joined() -> object:
        made = make()
        session: Any = made
        if type(session).get_bind is not Session.get_bind:
            session.get_bind = _choice(session.get_bind, connections)
        else:
            session.bind = connection
        session.join_transaction_mode = "create_savepoint"
        return made

    with replaced(source, "make", make_joined):
        yield


class _AsyncStandIn:
    """What an AsyncSession takes for an AsyncEngine: it asks for no more than the sync half.

    A connection of an async driver belongs to one event loop and to a transaction of its own; with
    the sync one all sessions of the test, in whatever loop or thread, see the same rows.
    """

    def __init__(self, connection: Connection) -> None:
        self.sync_engine = connection


def _join_async(alchemy: Alchemy, connection: Connection, stack: ExitStack) -> None:
    try:
        source = alchemy.async_source
    except (ConfigurationError, ImportError):
        return  # Its tasks have none either.
    bind = _AsyncStandIn(connection)
    stack.enter_context(replaced(alchemy, "_async_source", source.bound_to(bind, **_JOINS)))
    maker_options = None if alchemy._bound is None else getattr(alchemy._bound.bind, "kw", None)
    if (
        maker_options is not None
        and "bind" in maker_options
        and not isinstance(maker_options["bind"], (Engine, Connection))
    ):
        stack.enter_context(_updated(maker_options, {**_JOINS, "bind": bind}))


class _EngineOfOne:
    """Stands for the engine of the outbox's database.

    With it messages are settled after the commit.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        with self._connection.begin_nested():
            yield self._connection


@contextmanager
def _ledgers_by_session(connections: _Connections) -> Iterator[None]:
    """Give the connection back the ledger of the session that goes on.

    Another one that it enclosed has ended.
    """
    open_sessions: list[Session] = []

    def begins(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        if connection in connections and session not in open_sessions:
            open_sessions.append(session)

    def ends(session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None or session not in open_sessions:
            return
        open_sessions.remove(session)
        connection = session.bind
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
def _updated(options: dict[str, object], changes: dict[str, object]) -> Iterator[None]:
    before = dict(options)
    options.update(changes)
    try:
        yield
    finally:
        options.clear()
        options.update(before)
