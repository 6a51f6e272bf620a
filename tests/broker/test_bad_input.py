"""What somebody gives the broker that it cannot use: an error says so, and others are not held up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from kombu import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from celery_alchemy import Alchemy, ConfigurationError
from celery_alchemy.broker import taking
from celery_alchemy.databases import database_of
from celery_alchemy.sessions import async_engine
from tests.broker.lines import Line, OpenLine
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

#: A worker whose Alchemy is the broker has its URL from there.
OWN = {"broker_url": "alchemy://"}


@pytest.fixture
def no_sync_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is installed."""
    monkeypatch.setattr(async_engine, "find_spec", lambda name: None)


@pytest.mark.databases("postgresql+asyncpg", "mariadb+asyncmy")
@pytest.mark.usefixtures("no_sync_driver")
def test_async_engine_without_a_sync_driver_asks_for_an_engine(database: Database) -> None:
    """The error names the argument, and with it the database is the broker."""
    app, bind = Celery("shop", set_as_current=False), create_async_engine(database.url)
    with pytest.raises(ConfigurationError, match=r"No sync driver .*engine="):
        Alchemy(app, bind, broker=True)

    alchemy = Alchemy(app, bind, broker=True, engine=database.engine)
    alchemy.create_tables()
    app.send_task("add", (1, 2))

    assert database.rows("SELECT task_name FROM celery_outbox") == [("add",)]
    app.close()


#: Of each database a version that is too old, and the one that is asked for.
TOO_OLD = {
    "postgresql": ((9, 4, 26), r"PostgreSQL 9\.4\.26.*SKIP LOCKED.*9\.5"),
    "mariadb": ((10, 5, 9), r"MariaDB 10\.5\.9.*SKIP LOCKED.*10\.6"),
    "sqlite": ((3, 34, 1), r"SQLite 3\.34\.1.*RETURNING.*3\.35"),
}


def test_database_that_is_too_old_is_named(line: Line, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects learns its version, and which one is needed."""
    line.send("jobs")
    transport: Any = line.connection.transport
    version, text = TOO_OLD[database.name]
    engine = transport.home.engine()
    for each in (engine, database_of(engine.dialect.name).reading(engine)):
        monkeypatch.setattr(each.dialect, "server_version_info", version)

    with pytest.raises(ConfigurationError, match=text):
        Connection(f"alchemy+{database.url}").connect()


@pytest.mark.brokers("alchemy")
@pytest.mark.databases("sqlite", "postgresql")
def test_broken_arguments_are_set_aside_alone(start_worker: StartWorker, broker: Broker, database: Database) -> None:
    """A body that is no JSON is kept with its error, and the next task runs."""
    broken = broker.client.send_task("add", (1, 1))
    disallowed = broker.client.send_task("add", (1, 1))
    packed = broker.client.send_task("add", (1, 1), compression="gzip")
    bodies = [{"id": sent.id, "body": b"[[1, 1"} for sent in (broken, disallowed, packed)]
    for values in bodies:
        database.execute("UPDATE celery_outbox SET body = :body WHERE task_id = :id", **values)
    unwanted = "UPDATE celery_outbox SET envelope = replace(envelope, 'application/json', 'application/x-python-serialize')"
    database.execute(f"{unwanted} WHERE task_id = :id", id=disallowed.id)
    start_worker("tests.broker.app", settings=OWN)

    whole = broker.client.send_task("add", (1, 2))

    assert whole.get(timeout=20, interval=0.02) == 3
    died = "SELECT task_id, error FROM celery_outbox WHERE died_at IS NOT NULL"
    errors = eventually(lambda: len(found := dict(database.rows(died))) == 3 and found)  # type: ignore[arg-type]
    assert "DecodeError" in errors[broken.id]
    assert "ContentDisallowed" in errors[disallowed.id]
    assert "error: " in errors[packed.id]


def test_readers_of_one_name_do_not_silence_each_other(
    open_line: OpenLine, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers were given one node name: one ends, and the other still hears remote control."""
    monkeypatch.setattr(taking, "READER_SECONDS", 0.3)
    app = Celery("twins", set_as_current=False, broker=f"alchemy+{database.url}")
    heard: list[str] = []
    nodes = []
    for name in ("first", "second"):
        channel = open_line().channel
        node = app.control.mailbox.Node(
            "celery@twin", channel=channel, handlers={"ping": lambda state, name=name: heard.append(name)}
        )
        node.listen()
        nodes.append(node)
    first, second = (node.channel.connection.client for node in nodes)
    first.release()

    def answers() -> bool:
        app.control.broadcast("ping")
        try:
            while True:
                second.drain_events(timeout=0.1)
        except TimeoutError:
            return "second" in heard

    eventually(answers, what="the second one has heard")
    app.close()


def test_message_of_many_megabytes_is_a_tasks(database: Database) -> None:
    """A plain send has the database's own limit."""
    if database.name == "mariadb" and int(database.scalar("SELECT @@max_allowed_packet")) < 64 * 2**20:
        pytest.skip("this server's max_allowed_packet is too small")
    app = Celery("shop", set_as_current=False)
    alchemy = Alchemy(app, database.url, broker=True)
    alchemy.create_tables()

    app.send_task("store", ("x" * 20 * 2**20,))

    with app.connection_for_read() as connection:
        message: Any = connection.SimpleQueue("celery").get(timeout=5)
        assert len(json.loads(message.body)[0][0]) == 20 * 2**20
        message.ack()
    app.close()
    alchemy.engine.dispose()
