"""F40, F41, F55: the library's statements reach its table, whatever sessions do to the user's."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import Engine, Update, create_engine, event, inspect, text
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    sessionmaker,
    with_loader_criteria,
)

from celery_alchemy import Alchemy, ConfigurationError, MissingTableError, enqueue
from celery_alchemy.databases.tables import metadata
from celery_alchemy.operations.check import check
from celery_alchemy.operations.dead_tasks import dead, prune_all, revive, status
from celery_alchemy.outbox.relay import relay_of
from tests.delivery.outbox_stand import OutboxStand
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Base, Book

MakeStand = Callable[..., OutboxStand]

QUALIFIES = ("postgresql", "mariadb", "sqlite")
TENANT = "tenant1"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close at the end what a test has opened."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_stand(database: Database, stack: ExitStack) -> Callable[..., OutboxStand]:
    """Make an app with an outbox on the test's database."""

    def make(**options: Any) -> OutboxStand:
        stand = OutboxStand(database, **options)
        stack.callback(stand.close)
        return stand

    return make


def other_schema(database: Database, stack: ExitStack, name: str = "") -> str:
    """Make a second schema beside the test's, and return its name."""
    if database.name == "sqlite":
        return "attached"
    schema = name or (f"{database.engine.url.database}_app" if database.name == "mariadb" else "app")
    database.execute(f"CREATE SCHEMA {schema}")
    stack.callback(
        database.execute,
        f"DROP SCHEMA {schema}" + (" CASCADE" if database.name == "postgresql" else ""),
    )
    return schema


def nothing() -> None:
    """Be a task."""


def attach(engine: Engine, path: str) -> None:
    """Attach a second SQLite file to every connection of an engine."""
    event.listen(
        engine,
        "connect",
        lambda connection, record: connection.execute(f"ATTACH '{path}' AS attached"),
    )


# --- what a user's session does to statements ---------------------------------------------------


def translate(session: Session) -> None:
    """Send statements without a schema to a tenant's."""
    session.connection(execution_options={"schema_translate_map": {None: TENANT}})


def search(session: Session) -> None:
    """Look for tables in a tenant's schema first, until the transaction ends."""
    session.execute(text(f"SET LOCAL search_path TO {TENANT}"))


def use(session: Session) -> None:
    """Go to another database of the server, as tenants do on MySQL."""
    session.execute(text(f"USE {session.connection().engine.url.database}_app"))


def refuse_orm(session: Session) -> None:
    """Let no statement through that the session executes."""

    def refuse(state: Any) -> None:
        raise AssertionError(f"the user's filter has seen {state.statement}")

    event.listen(session, "do_orm_execute", refuse)


def send_and_repeat(
    database: Database,
    stack: ExitStack,
    stand: OutboxStand,
    to_tenant: Callable[[Session], None],
    *,
    has_table_there: bool,
) -> None:
    """Send from a once task, deliver it twice, send from a block; all from a tenant's sessions."""
    schema = other_schema(database, stack, TENANT if database.name == "postgresql" else "")
    if has_table_there and database.name != "sqlite":
        like = "(LIKE public.celery_outbox)" if database.name == "postgresql" else "LIKE celery_outbox"
        database.execute(f"CREATE TABLE {schema}.celery_outbox {like}")

    @stand.task(name=f"{stand.prefix}.pay", once=True)
    def pay(session: Session) -> str:
        to_tenant(session)
        stand.effect.delay_on_commit("paid")
        return "paid"

    sent = pay.delay()
    [message] = stand.sent()
    first, second = stand.deliver(message), stand.deliver(message)
    with stand.alchemy.begin() as session:
        to_tenant(session)
        enqueue(session, stand.effect.s("sent"))

    assert [(ended.state, ended.value) for ended in (first, second)] == [("SUCCESS", "paid")] * 2
    assert [message.args for message in stand.sent()] == [["paid"], ["sent"]]
    assert database.rows("SELECT task_id, completed_at IS NOT NULL FROM celery_outbox") == [(sent.id, True)]
    if has_table_there and database.name != "sqlite":
        assert database.rows(f"SELECT id FROM {schema}.celery_outbox") == []


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("to_tenant", [translate, search, refuse_orm])
@pytest.mark.parametrize("has_table_there", [False, True])
def test_tenants_session_sends_through_the_one_table(
    database: Database,
    stack: ExitStack,
    make_stand: MakeStand,
    to_tenant: Callable[[Session], None],
    has_table_there: bool,
) -> None:
    """F40: on commit, and a once task with its redelivery, whether the tenant has such a table or not."""
    send_and_repeat(database, stack, make_stand(), to_tenant, has_table_there=has_table_there)


@pytest.mark.databases("mariadb")
@pytest.mark.parametrize("has_table_there", [False, True])
def test_tenants_database_is_not_where_the_table_is(
    database: Database, stack: ExitStack, make_stand: MakeStand, has_table_there: bool
) -> None:
    """F40: as on PostgreSQL, from sessions that USE a tenant's database."""
    send_and_repeat(database, stack, make_stand(), use, has_table_there=has_table_there)


@pytest.mark.databases("sqlite")
def test_filter_of_the_users_does_not_see_the_librarys_statements(
    database: Database, stack: ExitStack, make_stand: MakeStand
) -> None:
    """A do_orm_execute listener is told of the user's statements only."""
    send_and_repeat(database, stack, make_stand(), refuse_orm, has_table_there=False)


@pytest.mark.databases("postgresql")
def test_map_of_the_engine_does_not_move_the_table(database: Database, stack: ExitStack) -> None:
    """An engine that translates by itself: the table is made, used and looked at where it is."""
    other_schema(database, stack, TENANT)
    engine = create_engine(database.url, execution_options={"schema_translate_map": {None: TENANT}})
    stack.callback(engine.dispose)
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    alchemy = Alchemy(app, engine, outbox=True)
    alchemy.create_tables()
    Base.metadata.create_all(engine)
    note = task_of(app, name="note")(nothing)
    with alchemy.begin() as session:
        session.add(Book(title="Emma"))
        enqueue(session, note.s())

    tables = inspect(database.engine)
    counts = status(alchemy.engine, alchemy.place)

    assert (sorted(tables.get_table_names("public")), tables.get_table_names(TENANT)) == (
        sorted(metadata.tables),
        ["book"],
    )
    assert counts["waiting"] == counts["dead"] == 0
    assert not [finding for finding in check(alchemy) if finding.code.startswith("missing")]


@pytest.mark.databases("postgresql", "mariadb", "sqlite")
def test_loader_criteria_of_the_user_do_not_hide_a_record(make_stand: MakeStand) -> None:
    """A filter on all that a session loads, as for soft deletion, is not for the library's rows."""
    stand = make_stand()

    @stand.task(name=f"{stand.prefix}.pay", once=True)
    def pay(session: Session) -> int:
        def add_criteria(state: Any) -> None:
            state.statement = state.statement.options(with_loader_criteria(DeclarativeBase, lambda cls: text("1 = 0")))

        event.listen(session, "do_orm_execute", add_criteria)
        return 7

    pay.delay()
    [message] = stand.sent()

    assert [stand.deliver(message).value, stand.deliver(message).value] == [7, 7]


# --- a schema of its own ------------------------------------------------------------------------


@pytest.mark.databases(*QUALIFIES)
def test_table_lives_in_the_schema_that_it_was_given(
    database: Database, stack: ExitStack, tmp_path: Any, make_stand: MakeStand
) -> None:
    """Made, written, settled, claimed, completed, counted, revived, pruned and checked there only."""
    if database.name == "postgresql":
        schema = "app"
        stack.callback(database.execute, "DROP SCHEMA app CASCADE")
    else:
        schema = other_schema(database, stack)
    if database.name == "sqlite":
        engine = create_engine(database.url)
        stack.callback(engine.dispose)
        attach(engine, str(tmp_path / "attached.db"))
        stand = make_stand(bind=engine, schema=schema)
        look = engine
    else:
        stand = make_stand(schema=schema)
        look = database.engine
    alchemy = stand.alchemy

    @stand.task(name=f"{stand.prefix}.pay", once=True)
    def pay(session: Session, fails: bool) -> int:
        if fails:
            raise LookupError("no such account")
        return 7

    with alchemy.begin() as session:
        paid = enqueue(session, pay.s(fails=False))
        enqueue(session, pay.s(fails=True))
    assert alchemy.drain()
    owed = status(alchemy.engine, alchemy.place)["owed"]
    ended = [stand.deliver(message).state for message in stand.sent()]
    [died] = dead(alchemy.engine, place=alchemy.place)
    revived = revive(alchemy.engine, place=alchemy.place)
    relayed = relay_of(alchemy).step()

    assert inspect(look).has_table("celery_outbox", schema=schema)
    assert not inspect(look).has_table("celery_outbox", schema=None if database.name != "sqlite" else "main")
    assert (owed, ended, died["error"]) == (
        2,
        ["SUCCESS", "FAILURE"],
        "LookupError: no such account",
    )
    assert (revived, relayed) == (1, 1)
    assert sorted(alchemy.metadata.tables) == sorted(f"{schema}.{name}" for name in metadata.tables)
    assert not [finding for finding in check(alchemy) if finding.code.startswith("missing")]
    with look.begin() as connection:
        ids = connection.exec_driver_sql(f"SELECT task_id FROM {schema}.celery_outbox WHERE completed_at IS NOT NULL").scalars().all()
        connection.exec_driver_sql(
            f"UPDATE {schema}.celery_outbox SET completed_at = '2020-01-01 00:00:00.000000' WHERE result IS NOT NULL"
        )
    assert (ids, prune_all(alchemy.engine, 60, alchemy.place)) == ([paid.id], 1)


@pytest.mark.databases("postgresql")
def test_create_tables_makes_the_schema_where_it_does_not_exist(database: Database, stack: ExitStack, make_stand: MakeStand) -> None:
    """Once; a role that may make no schemas can make the table in one that does exist."""
    stack.callback(database.execute, "DROP SCHEMA app CASCADE")
    make_stand(schema="app").alchemy.create_tables()
    role = f"limited_{secrets.token_hex(4)}"
    database.execute(f"CREATE ROLE {role} LOGIN; CREATE SCHEMA theirs AUTHORIZATION {role}")
    stack.callback(database.execute, f"DROP SCHEMA theirs CASCADE; DROP ROLE {role}")
    limited = create_engine(database.engine.url.set(username=role))
    stack.callback(limited.dispose)

    Alchemy(bind=limited, schema="theirs").create_tables()

    schemas = [schema for schema in ("app", "theirs") if inspect(database.engine).has_table("celery_outbox", schema=schema)]
    assert schemas == ["app", "theirs"]


@pytest.mark.databases(*QUALIFIES)
def test_missing_table_is_named_with_its_schema(database: Database, stack: ExitStack) -> None:
    """So that a reader sees where it was looked for."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, database.url, outbox=True)
    stack.callback(alchemy.engine.dispose)
    note = task_of(app, name="note")(nothing)
    expected = {"postgresql": "public", "sqlite": "main"}.get(database.name, str(database.engine.url.database))

    with pytest.raises(MissingTableError) as raised, alchemy.begin() as session:
        enqueue(session, note.s())

    assert raised.value.table == f"{expected}.celery_outbox"
    assert "schema=" in str(raised.value)


# --- sessions that route ------------------------------------------------------------------------


class Routing(Session):
    """Read replicas as SQLAlchemy's documentation has them: a flush goes to the primary."""

    primary: Engine
    replica: Engine

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Engine:  # type: ignore[override]
        if self._flushing or isinstance(clause, Update):  # type: ignore[attr-defined]
            return self.primary
        return random.choice([self.replica])


@pytest.fixture
def replicas(database: Database, tmp_path: Any, stack: ExitStack) -> type[Routing]:
    """Sessions with a primary, which is the test's database, and a replica without any table."""
    primary, replica = (
        create_engine(database.url),
        create_engine(f"sqlite:///{tmp_path / 'replica.db'}"),
    )
    for engine in (primary, replica):
        stack.callback(engine.dispose)
    Base.metadata.create_all(primary)
    return type("Replicated", (Routing,), {"primary": primary, "replica": replica})


@pytest.mark.databases("postgresql", "sqlite")
@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("has_bind", [False, True])
def test_read_replicas_keep_their_outbox_on_the_primary(
    database: Database,
    replicas: type[Routing],
    make_stand: MakeStand,
    is_named: bool,
    has_bind: bool,
) -> None:
    """In the transaction of the rows that are written there; asked, or named as engine=."""
    maker = sessionmaker(replicas.replica if has_bind else None, class_=replicas)
    stand = make_stand(bind=maker, **({"engine": replicas.primary} if is_named else {}))

    @stand.task(name=f"{stand.prefix}.add", once=True)
    def add(session: Session) -> None:
        session.add(Book(title="Emma"))
        stand.effect.delay_on_commit("added")

    add.delay()
    [message] = stand.sent()
    ended = [stand.deliver(message).state, stand.deliver(message).state]

    assert ended == ["SUCCESS", "SUCCESS"]
    assert [sent.args for sent in stand.sent()] == [["added"]]
    assert database.rows("SELECT title FROM book") == [("Emma",)]
    assert stand.alchemy.engine is replicas.primary


class ShardedBase(DeclarativeBase):
    """The tables of the shards."""


class Weather(ShardedBase):
    """A row that belongs to a shard."""

    __tablename__ = "weather"

    id: Mapped[int] = mapped_column(primary_key=True)


def make_sharded(north: Engine, south: Engine) -> sessionmaker[ShardedSession]:
    """Return sessions that choose a shard by the row."""

    def choose(mapper: Any, instance: Any, clause: Any = None) -> str:
        assert instance is not None
        return "north" if instance.id % 2 else "south"

    return sessionmaker(
        class_=ShardedSession,
        shards={"north": north, "south": south},
        shard_chooser=choose,
        identity_chooser=lambda *_, **__: ["north", "south"],
        execute_chooser=lambda context: ["north", "south"],
    )


@pytest.mark.databases("postgresql", "sqlite")
def test_sharded_session_needs_to_be_told_and_then_works(
    database: Database, tmp_path: Any, stack: ExitStack, make_stand: MakeStand
) -> None:
    """Which shard has the table cannot be seen; with engine= the row is in that shard's transaction."""
    north, south = create_engine(database.url), create_engine(f"sqlite:///{tmp_path / 'south.db'}")
    for engine in (north, south):
        stack.callback(engine.dispose)
        ShardedBase.metadata.create_all(engine)
    maker = make_sharded(north, south)

    untold = Alchemy(Celery("shop", set_as_current=False), maker, outbox=True)
    with pytest.raises(ConfigurationError, match=r"ShardedSession.*engine="):
        untold.engine  # noqa: B018
    stand = make_stand(bind=maker, engine=north)

    @stand.task(name=f"{stand.prefix}.measure")
    def measure(session: Session, fails: bool) -> None:
        session.add(Weather(id=1 if not fails else 3))
        stand.effect.delay_on_commit("measured")
        if fails:
            session.flush()
            raise LookupError

    for fails in (False, True):
        measure.delay(fails=fails)
    ended = [stand.deliver(message).state for message in stand.sent()]

    assert ended == ["SUCCESS", "FAILURE"]
    assert [sent.args for sent in stand.sent()] == [["measured"]]
    assert database.rows("SELECT id FROM weather") == [(1,)]


@pytest.mark.databases("postgresql", "sqlite")
def test_sessions_with_binds_only_work_with_the_engine_named(database: Database, stack: ExitStack, make_stand: MakeStand) -> None:
    """The statements join the connection that the session has there, with its isolation level."""
    engine = create_engine(database.url)
    stack.callback(engine.dispose)
    Base.metadata.create_all(engine)
    maker = sessionmaker(binds={Base: engine})
    untold_app = Celery("shop", set_as_current=False)
    Alchemy(untold_app, maker, outbox=True)
    stand = make_stand(bind=maker, engine=engine)
    seen: list[int] = []

    @stand.task(name=f"{stand.prefix}.add", isolation_level="SERIALIZABLE")
    def add(session: Session) -> None:
        session.add(Book(title="Emma"))
        session.flush()
        stand.effect.delay_on_commit("added")
        event.listen(session, "after_commit", lambda session: seen.append(engine.pool.checkedout()))  # type: ignore[attr-defined]

    note = task_of(untold_app, name="note")(nothing)
    add.delay()
    [message] = stand.sent()
    ended = stand.deliver(message)
    with pytest.raises(ConfigurationError, match="engine="):
        enqueue(maker(), note.s())

    assert (ended.state, seen) == ("SUCCESS", [1])
    assert [sent.args for sent in stand.sent()] == [["added"]]
    assert stand.outbox() == []


# --- Flask-SQLAlchemy: known in an app context only ---------------------------------------------


@pytest.mark.databases("postgresql", "sqlite")
@pytest.mark.parametrize("is_named", [False, True])
def test_flask_sqlalchemy_keeps_messages(database: Database, stack: ExitStack, is_named: bool) -> None:
    """F55: the engine is asked of the session in an app context, and known from then on; or named."""
    flask_sqlalchemy = pytest.importorskip("flask_sqlalchemy")
    flask_app = pytest.importorskip("flask").Flask("shop")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = database.url
    db = flask_sqlalchemy.SQLAlchemy(flask_app)
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    with flask_app.app_context():
        engine = db.engine
        stack.callback(engine.dispose)
        alchemy = Alchemy(app, db.session, outbox=True, engine=engine if is_named else None)
        alchemy.create_tables() if is_named else Alchemy(bind=database.url).create_tables()
    note = task_of(app, name="note")(nothing)
    if not is_named:
        with pytest.raises(ConfigurationError, match=r"context.*engine="):
            alchemy.engine  # noqa: B018

    with flask_app.app_context():
        enqueue(db.session, note.s())
        db.session.commit()

    assert alchemy.drain()
    assert alchemy.engine is engine
    assert relay_of(alchemy).step() == 0
    assert database.rows("SELECT id FROM celery_outbox") == []


def test_engine_must_be_a_sync_engine() -> None:
    """What is no Engine is refused where it was given."""
    with pytest.raises(ConfigurationError, match="sync Engine"):
        Alchemy(engine="sqlite://")  # type: ignore[arg-type]
