"""What a transaction sends is a row of it: there with the COMMIT, gone with the rollback."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, chain, group
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from celery_alchemy import (
    Alchemy,
    ConfigurationError,
    MissingTableError,
    PublishInTransactionError,
    enqueue,
)
from tests.services.databases import Database

MakeAlchemy = Callable[..., Alchemy]


@pytest.fixture
def make_alchemy(database: Database) -> Iterator[MakeAlchemy]:
    """Make apps with the database for their broker."""
    made: list[Alchemy] = []

    def make(name: str = "shop", **options: Any) -> Alchemy:
        app = Celery(name, set_as_current=False)
        alchemy = Alchemy(app, database.url, broker=True, **options)
        alchemy.create_tables()

        @app.task(name="add", shared=False)  # type: ignore[untyped-decorator]
        def add(x: int, y: int) -> int:
            return x + y

        @app.task(name="pay", shared=False, once=True)  # type: ignore[untyped-decorator]
        def pay(session: Session, order: int) -> int:
            return order

        made.append(alchemy)
        return alchemy

    yield make
    for alchemy in made:
        assert alchemy.app is not None
        alchemy.app.close()
        alchemy.engine.dispose()


@pytest.fixture
def alchemy(make_alchemy: MakeAlchemy) -> Alchemy:
    """An app with the database for its broker."""
    return make_alchemy()


def task(alchemy: Alchemy, name: str) -> Any:
    assert alchemy.app is not None
    return alchemy.app.tasks[name]


def waiting(database: Database) -> list[tuple[Any, ...]]:
    return database.rows("SELECT task_name, queue, priority, claim FROM celery_outbox ORDER BY created_at")


def test_committed_transaction_has_sent(alchemy: Alchemy, database: Database) -> None:
    """The row waits in its queue, and is nobody's."""
    with alchemy.begin() as session:
        enqueue(session, task(alchemy, "add").s(1, 2), priority=4)
        assert database.name == "sqlite" or waiting(database) == []

    assert waiting(database) == [("add", "celery", 4, None)]


def test_rolled_back_transaction_has_not_sent(alchemy: Alchemy, database: Database) -> None:
    """Nothing is left of what it sent."""
    with alchemy.session() as session:
        enqueue(session, task(alchemy, "add").s(1, 2))
        session.execute(text("SELECT 1"))
        session.rollback()

    assert waiting(database) == []


def test_many_messages_are_one_insert(alchemy: Alchemy, database: Database) -> None:
    """Beside BEGIN and COMMIT it is the only statement of the transaction, and none follows."""
    add = task(alchemy, "add")
    statements: list[tuple[Any, str]] = []
    with alchemy.session() as session:
        enqueue(session, add.s(0, 0))
        session.commit()

    event.listen(alchemy.engine, "before_cursor_execute", lambda *args: statements.append((args[0], args[2].split()[0])))
    with alchemy.begin() as session:
        own = session.connection()
        for number in range(20):
            enqueue(session, add.s(number, 1))

    # The workers are told on a connection apart, of the send before too.
    assert [kind for connection, kind in statements if connection is own] == ["INSERT"]
    assert {kind for connection, kind in statements if connection is not own} <= {"NOTIFY"}
    assert len(waiting(database)) == 21


def test_plain_send_is_a_row_of_its_own(alchemy: Alchemy, database: Database) -> None:
    """It is there when `delay` returns."""
    task(alchemy, "add").delay(1, 2)

    assert waiting(database) == [("add", "celery", 0, None)]


def test_canvas_is_sent_whole(alchemy: Alchemy, database: Database) -> None:
    """The parts of a group are rows, a chain begins with its first task."""
    add = task(alchemy, "add")
    with alchemy.begin() as session:
        enqueue(session, group(add.s(1, 1), add.s(2, 2)))
        enqueue(session, chain(add.s(1, 1), add.s(2)))

    assert len(waiting(database)) == 3


def test_countdown_is_when_the_row_is_due(alchemy: Alchemy, database: Database) -> None:
    """Counted from the sending, by the clock of the database."""
    with alchemy.begin() as session:
        enqueue(session, task(alchemy, "pay").s(7), countdown=3600)

    seconds = {
        "sqlite": "(julianday(due_at) - julianday(created_at)) * 86400",
        "postgresql": "EXTRACT(EPOCH FROM due_at - created_at)",
        "mariadb": "TIMESTAMPDIFF(SECOND, created_at, due_at)",
    }[database.name]
    assert 3595 < float(database.scalar(f"SELECT {seconds} FROM celery_outbox")) < 3601


def test_on_sqlite_a_plain_send_joins_its_task(make_alchemy: MakeAlchemy, database: Database) -> None:
    """A second writer would wait for the lock of the task itself."""
    if database.name != "sqlite":
        pytest.skip("elsewhere a second writer waits for nothing")
    alchemy = make_alchemy(publish_in_transaction="allow")
    database.execute("CREATE TABLE effect (name TEXT)")
    app: Any = alchemy.app

    @app.task(name="write and send", shared=False)
    def write_and_send(session: Session, fail: bool, write: bool) -> None:
        session.execute(text("SELECT 1"))
        if write:
            session.execute(text("INSERT INTO effect (name) VALUES ('x')"))
        task(alchemy, "add").delay(1, 2)
        if fail:
            raise LookupError

    with pytest.raises(LookupError):
        write_and_send(fail=True, write=True)
    assert waiting(database) == []

    write_and_send(fail=False, write=True)
    assert len(waiting(database)) == 1

    with pytest.raises(LookupError):
        write_and_send(fail=True, write=False)
    assert len(waiting(database)) == 2


def test_on_sqlite_a_plain_send_can_be_refused(make_alchemy: MakeAlchemy, database: Database) -> None:
    """`publish_in_transaction="raise"` means it here too."""
    if database.name != "sqlite":
        pytest.skip("elsewhere it is as without the broker")
    alchemy = make_alchemy(publish_in_transaction="raise")
    database.execute("CREATE TABLE effect (name TEXT)")
    app: Any = alchemy.app

    @app.task(name="write and send", shared=False)
    def write_and_send(session: Session) -> None:
        session.execute(text("INSERT INTO effect (name) VALUES ('x')"))
        task(alchemy, "add").delay(1, 2)

    with pytest.raises(PublishInTransactionError):
        write_and_send()


def test_two_apps_do_not_disturb_each_other(make_alchemy: MakeAlchemy, database: Database, tmp_path: Any) -> None:
    """Each sends into its own database, also with the same name and through the same URL."""
    first, second = make_alchemy("shop"), Celery("shop", set_as_current=False)
    other = Alchemy(second, f"sqlite:///{tmp_path}/other.db", broker=True)
    other.create_tables()

    task(first, "add").delay(1, 2)

    assert second.conf.broker_url == "alchemy://"
    assert second.connection_for_write().default_channel.queue_declare("celery").message_count == 0
    assert len(waiting(database)) == 1
    second.close()
    other.engine.dispose()


@pytest.mark.databases("sqlite")
def test_transport_options_can_be_pickled(alchemy: Alchemy) -> None:
    """A process that is spawned, not forked, gets them by pickle."""
    assert alchemy.app is not None
    options = alchemy.app.conf.broker_transport_options

    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("setting", ["broker_url", "broker_read_url", "broker_write_url"])
def test_app_with_another_broker_is_refused(database: Database, setting: str) -> None:
    """The error names the setting, and hides its password."""
    app = Celery("shop", set_as_current=False)
    app.conf.update({setting: "redis://:pa55word@localhost"})

    with pytest.raises(ConfigurationError, match=f"{setting}=.*broker=True") as raised:
        Alchemy(app, database.url, broker=True)

    assert "pa55word" not in str(raised.value)


@pytest.mark.databases("sqlite")
def test_configured_result_backend_is_kept(database: Database) -> None:
    """Only the broker becomes the database."""
    app = Celery("shop", backend="cache+memory://", set_as_current=False)

    Alchemy(app, database.url, broker=True)

    assert app.conf.result_backend == "cache+memory://"


@pytest.mark.databases("sqlite")
def test_configuration_that_is_read_later_keeps_the_broker(database: Database) -> None:
    """`config_from_object` after the Alchemy forgets nothing."""
    app = Celery("shop", set_as_current=False)
    alchemy = Alchemy(app, database.url, broker=True)

    app.config_from_object({"task_default_queue": "orders"})

    assert (app.conf.broker_url, app.conf.task_default_queue) == ("alchemy://", "orders")
    alchemy.create_tables()
    app.send_task("anything")
    assert [row[1] for row in waiting(database)] == ["orders"]
    alchemy.engine.dispose()


@pytest.mark.databases("postgresql")
def test_tables_may_be_in_a_schema(make_alchemy: MakeAlchemy, database: Database) -> None:
    """Sending, declaring and taking all find them there."""
    alchemy = make_alchemy(schema="queueing")
    with alchemy.begin() as session:
        enqueue(session, task(alchemy, "add").s(1, 2))
    app: Any = alchemy.app

    with app.connection_for_read() as connection:
        queue = app.amqp.queues["celery"](connection.default_channel)
        queue.declare()
        message = queue.get(no_ack=True)

    assert message.headers["task"] == "add"
    assert database.rows("SELECT queue FROM queueing.celery_queues WHERE exchange = ''") == [("celery",)]


def test_missing_table_is_named_to_the_sender(database: Database) -> None:
    """With the command that makes it."""
    app = Celery("shop", set_as_current=False)
    alchemy = Alchemy(app, database.url, broker=True)

    @app.task(name="ping", shared=False)  # type: ignore[untyped-decorator]
    def ping() -> None: ...

    with pytest.raises(MissingTableError, match="create-tables"), alchemy.begin() as session:
        enqueue(session, ping.s())

    alchemy.engine.dispose()


@pytest.mark.databases("postgresql")
def test_commit_stands_where_no_thread_can_be_started(
    database: Database, make_alchemy: MakeAlchemy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the interpreter's end nobody tells the workers, which look by themselves; the send has not failed."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    alchemy = make_alchemy()
    add = alchemy.app.tasks["add"]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        add.delay(1, 2)
        with alchemy.begin() as session:
            enqueue(session, add.s(3, 4))

    assert database.rows("SELECT count(*) FROM celery_outbox WHERE due_at IS NOT NULL") == [(2,)]
