"""`alchemy check`: each finding, provoked; and the command as people and programs run it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from sqlalchemy import create_engine
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker

from celery_alchemy import Alchemy, SessionTask
from celery_alchemy.operations.check import Finding, check
from tests import forked
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.settings import environment
from tests.stand import task_of
from tests.workers import ROOT

pytestmark = pytest.mark.databases("sqlite")

MakeAlchemy = Callable[..., Alchemy]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def make_alchemy(database: Database) -> Iterator[MakeAlchemy]:
    """Make an Alchemy for a new app: `make_alchemy(broker, conf, **options of Alchemy)`."""
    made: list[Alchemy] = []

    def make(broker: str = "memory://", conf: dict[str, Any] | None = None, **options: Any) -> Alchemy:
        app = Celery("checked", broker=broker, set_as_current=False)
        app.conf.update({"worker_concurrency": 1, **(conf or {})})
        options.setdefault("bind", database.url)
        made.append(Alchemy(app, **options))
        return made[-1]

    yield make
    for alchemy in made:
        alchemy.engine.dispose()


def task_in(alchemy: Alchemy, **options: Any) -> None:
    """Give the app of an Alchemy a task with a session."""
    assert alchemy.app is not None

    @task_of(alchemy.app, name="pays", **options)
    def pays(session: Session) -> None: ...


def found(alchemy: Alchemy) -> dict[str, Finding]:
    findings = check(alchemy)
    assert len({finding.code for finding in findings}) == len(findings)
    return {finding.code: finding for finding in findings}


def test_async_task_without_async_sessions_is_found(make_alchemy: MakeAlchemy) -> None:
    """The worker would refuse to start for it."""
    alchemy = make_alchemy()
    assert alchemy.app is not None
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": sessionmaker()})

    @task_of(alchemy.app, name="pays", base=base)
    async def pays(session: AsyncSession) -> None: ...

    finding = found(alchemy)["no-session-source"]
    assert finding.level == "error"
    assert "Task pays: session_factory of task 'pays' is a 'sessionmaker'" in finding.reason
    assert "async_sessionmaker" in finding.fix


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_sound_app_has_no_findings(make_alchemy: MakeAlchemy) -> None:
    """With its table, a time limit and a server with room there is nothing to say."""
    alchemy = make_alchemy(outbox=True)
    alchemy.create_tables()
    task_in(alchemy, once=True, time_limit=60)

    assert check(alchemy) == []


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_missing_table_is_found(make_alchemy: MakeAlchemy) -> None:
    """An error, with the command that makes it."""
    finding = found(make_alchemy(outbox=True))["missing-table"]

    assert finding.level == "error"
    assert "celery_outbox" in finding.reason
    assert "create-tables" in finding.fix


def test_table_is_not_missed_where_nothing_needs_it(make_alchemy: MakeAlchemy) -> None:
    """Sessions alone need no table; one once task does."""
    without, with_once = make_alchemy(), make_alchemy()
    task_in(without)
    task_in(with_once, once=True, time_limit=60)

    assert found(without) == {}
    assert set(found(with_once)) == {"missing-table"}


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_missing_index_is_found(make_alchemy: MakeAlchemy) -> None:
    """A table made by hand without the index that relays search by."""
    alchemy = make_alchemy(outbox=True)
    alchemy.create_tables()
    table = next(table for table in alchemy.metadata.sorted_tables if table.name == "celery_outbox")
    index = min(table.indexes, key=lambda index: str(index.name))
    index.drop(alchemy.engine)

    finding = found(alchemy)["missing-index"]

    assert finding.level == "error"
    assert str(index.name) in finding.reason
    assert all(column.name in finding.fix for column in index.columns)


@pytest.mark.parametrize(("time_limit", "expected"), [(3600, False), (3601, True)])
def test_time_limit_over_the_visibility_timeout_is_found(make_alchemy: MakeAlchemy, time_limit: int, expected: bool) -> None:
    """Redis delivers again after an hour what is not acknowledged by then."""
    alchemy = make_alchemy("redis://127.0.0.1:1/0")
    task_in(alchemy, acks_late=True, time_limit=time_limit)

    findings = found(alchemy)

    assert ("visibility-timeout" in findings) is expected
    for finding in findings.values():
        assert finding.level == "error"
        assert "pays" in finding.reason


def test_visibility_timeout_of_the_transport_options_is_read(make_alchemy: MakeAlchemy) -> None:
    """A longer one allows longer tasks."""
    alchemy = make_alchemy("redis://127.0.0.1:1/0", {"broker_transport_options": {"visibility_timeout": 7200}})
    task_in(alchemy, acks_late=True, time_limit=3601)

    assert found(alchemy) == {}


def test_once_window_within_the_visibility_timeout_is_found(make_alchemy: MakeAlchemy) -> None:
    """The record would be gone before the broker delivers again."""
    alchemy = make_alchemy("redis://127.0.0.1:1/0", once_window=3599)
    alchemy.create_tables()
    task_in(alchemy, once=True, time_limit=60)

    finding = found(alchemy)["once-window"]

    assert finding.level == "error"
    assert "3599 s" in finding.reason


@pytest.mark.parametrize(("window", "once"), [(3600, True), (1, False)])
def test_once_window_that_lets_a_worker_start_is_no_finding(make_alchemy: MakeAlchemy, window: float, once: bool) -> None:
    """The check and the worker's start are of one mind: as long is long enough, and without once tasks any is."""
    alchemy = make_alchemy("redis://127.0.0.1:1/0", once_window=window)
    alchemy.create_tables()
    task_in(alchemy, once=once, time_limit=60)

    assert found(alchemy) == {}


@pytest.mark.skipif(find_spec("botocore") is not None, reason="the package of SQS is installed here")
def test_broker_whose_package_is_missing_is_found(make_alchemy: MakeAlchemy) -> None:
    """One error with its name, and no traceback."""
    finding = found(make_alchemy("sqs://"))["broker"]

    assert finding.level == "error"
    assert "botocore" in finding.reason


def test_publishing_without_confirms_is_found(make_alchemy: MakeAlchemy) -> None:
    """A warning on RabbitMQ, until the transport option is set."""
    without = make_alchemy("amqp://127.0.0.1:1")
    with_confirms = make_alchemy("amqp://127.0.0.1:1", {"broker_transport_options": {"confirm_publish": True}})

    assert found(without)["confirm-publish"].level == "warning"
    assert found(with_confirms) == {}


@pytest.mark.parametrize("bind", [False, True])
def test_session_asked_for_in_a_class_that_injects_none_is_found(make_alchemy: MakeAlchemy, bind: bool) -> None:
    """Such a task would fail at its first request with a missing argument."""
    alchemy = make_alchemy()
    assert alchemy.app is not None
    if bind:

        @task_of(alchemy.app, name="pays", base=Task, bind=True)
        def pays_bound(self: Any, session: Session) -> None: ...

    else:
        task_in(alchemy, base=Task)

    finding = found(alchemy)["task-class"]

    assert finding.level == "error"
    assert "Task pays asks for a session as 'session', but its class is Task" in finding.reason


def test_options_that_a_tasks_class_does_not_know_are_found(make_alchemy: MakeAlchemy) -> None:
    """They would be nothing, and once=True is a promise."""
    alchemy = make_alchemy()
    assert alchemy.app is not None

    @task_of(alchemy.app, name="pays", base=Task, once=True, transient_retries=3)
    def pays(order_id: int) -> None: ...

    finding = found(alchemy)["task-class"]

    assert finding.level == "error"
    assert "Task pays has once, transient_retries, but its class is Task" in finding.reason
    assert "before Alchemy(app, ...)" in finding.fix


def test_once_task_without_a_time_limit_is_found(make_alchemy: MakeAlchemy) -> None:
    """A warning: it may run twice at the same time."""
    alchemy = make_alchemy()
    alchemy.create_tables()
    task_in(alchemy, once=True)

    finding = found(alchemy)["once-time-limit"]

    assert finding.level == "warning"
    assert "pays" in finding.reason


def test_once_task_with_the_database_as_its_broker_needs_no_time_limit(database: Database) -> None:
    """Its message is nobody else's while its worker lives, however long it runs."""
    alchemy = Alchemy(Celery("checked", set_as_current=False), database.url, broker=True)
    alchemy.create_tables()
    task_in(alchemy, once=True)

    assert "once-time-limit" not in found(alchemy)
    alchemy.engine.dispose()


def test_journal_mode_of_a_users_sqlite_engine_is_found(make_alchemy: MakeAlchemy, database: Database) -> None:
    """Alchemy sets it on its own engines, but not on one that it is given."""
    finding = found(make_alchemy(bind=create_engine(database.url)))["sqlite-journal"]

    assert finding.level == "warning"
    assert "'delete'" in finding.reason


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
@pytest.mark.parametrize("is_engine", [False, True])
def test_database_in_memory_needs_no_journal(make_alchemy: MakeAlchemy, url: str, is_engine: bool) -> None:
    """Nobody else reads or writes it."""
    assert found(make_alchemy(bind=create_engine(url) if is_engine else url)) == {}


@pytest.mark.databases("postgresql", "mariadb")
def test_more_processes_than_connections_is_found(make_alchemy: MakeAlchemy) -> None:
    """An error if one worker does not fit, a warning if few do."""
    too_many = make_alchemy(conf={"worker_concurrency": 1_000_000})
    with too_many.engine.connect() as connection:
        query = "SHOW max_connections" if connection.dialect.name == "postgresql" else "SELECT @@max_connections"
        limit = int(connection.exec_driver_sql(query).scalar_one())
    few = make_alchemy(conf={"worker_concurrency": limit // 2 - 1})

    assert found(too_many)["connections"].level == "error"
    assert found(few)["connections"].level == "warning"
    assert "enough for 2 such workers" in found(few)["connections"].reason


@pytest.mark.databases("postgresql", "mariadb")
def test_pools_that_may_grow_beyond_the_server_are_found(make_alchemy: MakeAlchemy, database: Database) -> None:
    """A pool in each process of prefork, one for all threads; an engine that Alchemy makes has a pool that fits."""
    few = {"worker_concurrency": 4}
    big = create_engine(database.url, pool_size=5, max_overflow=2_000_000)

    finding = found(make_alchemy(bind=big, conf=few))["connections"]

    assert finding.level == "warning"
    assert "Each of the 4 processes" in finding.reason
    assert "2000005 connections: 8000020 in all" in finding.reason
    assert found(make_alchemy(conf=few)) == {}
    assert found(make_alchemy(conf={**few, "worker_pool": "threads"})) == {}
    assert "connections" in found(make_alchemy(conf=few, engine_options={"max_overflow": 2_000_000}))


@pytest.mark.databases("postgresql")
def test_pool_that_is_smaller_than_the_tasks_at_once_is_found(make_alchemy: MakeAlchemy, database: Database) -> None:
    """Threads and greenlets share one pool; solo runs one task whatever the number says."""
    small = create_engine(database.url, pool_size=2, max_overflow=1)

    def codes(pool: str, **options: Any) -> list[str]:
        alchemy = make_alchemy(conf={"worker_concurrency": 8, "worker_pool": pool}, **options)
        return [finding.code for finding in check(alchemy)]

    assert codes("threads", bind=small) == codes("gevent", bind=small) == ["small-pool"]
    assert codes("prefork", bind=small) == codes("solo", bind=small) == []
    assert codes("threads") == []


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("options", [{"isolation_level": "AUTOCOMMIT"}, {"execution_options": {"isolation_level": "AUTOCOMMIT"}}])
def test_engine_without_transactions_is_found(make_alchemy: MakeAlchemy, options: dict[str, Any]) -> None:
    """In AUTOCOMMIT nothing is ever rolled back."""
    finding = found(make_alchemy(engine_options=options))["isolation-level"]

    assert finding.level == "error"
    assert "AUTOCOMMIT" in finding.reason


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_task_without_a_transaction_is_found(make_alchemy: MakeAlchemy) -> None:
    """By its own option."""
    alchemy = make_alchemy()
    task_in(alchemy, isolation_level="AUTOCOMMIT")

    finding = found(alchemy)["isolation-level"]

    assert finding.level == "error"
    assert "Task pays" in finding.reason


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("of", ["task", "engine"])
def test_level_that_may_refuse_a_transaction_is_found(make_alchemy: MakeAlchemy, of: str) -> None:
    """Where nothing runs the task again; the databases' own defaults are no finding."""
    level = {"isolation_level": "SERIALIZABLE"}

    def at_level(**options: Any) -> dict[str, Finding]:
        alchemy = make_alchemy(engine_options=level if of == "engine" else {})
        task_in(alchemy, **options, **(level if of == "task" else {}))
        return found(alchemy)

    finding = at_level()["isolation-level"]

    assert finding.level == "warning"
    assert "At SERIALIZABLE" in finding.reason
    assert "pays" in finding.reason
    assert at_level(transient_retries=3) == {}
    assert at_level(autoretry_for=(OperationalError,)) == {}


@pytest.mark.databases("postgresql+psycopg2")
def test_driver_that_blocks_greenlets_is_found(make_alchemy: MakeAlchemy) -> None:
    """psycopg2 waits in C, where gevent cannot switch."""
    finding = found(make_alchemy(conf={"worker_pool": "gevent"}))["green-driver"]

    assert finding.level == "error"
    assert "psycopg2" in finding.reason


@pytest.mark.databases("postgresql")
def test_psycopg_in_an_eventlet_pool_is_found(make_alchemy: MakeAlchemy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits in C there, unless it is told not to; with gevent it sees by itself that it must not."""
    eventlet = {"worker_pool": "eventlet"}
    monkeypatch.delenv("PSYCOPG_WAIT_FUNC", raising=False)

    assert "wait_selector" in found(make_alchemy(conf=eventlet))["green-driver"].fix
    assert "green-driver" not in found(make_alchemy(conf={"worker_pool": "gevent"}))
    monkeypatch.setenv("PSYCOPG_WAIT_FUNC", "wait_selector")
    assert "green-driver" not in found(make_alchemy(conf=eventlet))


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
def test_unreachable_database_is_found_without_its_password(make_alchemy: MakeAlchemy, driver: str) -> None:
    """One finding says so; those that need the database say nothing, and nobody says the password."""
    alchemy = make_alchemy(bind=f"{driver}://someone:hunter2@127.0.0.1:1/shop", outbox=True)

    findings = check(alchemy)

    assert [finding.code for finding in findings] == ["database"]
    assert findings[0].level == "error"
    assert "hunter2" not in repr(findings)


def test_errors_come_before_warnings(make_alchemy: MakeAlchemy) -> None:
    """What breaks a guarantee is read first."""
    alchemy = make_alchemy("amqp://127.0.0.1:1")
    task_in(alchemy, once=True)

    levels = [finding.level for finding in check(alchemy)]

    assert levels == ["error", "warning", "warning"]


@pytest.fixture
def command(database: Database, broker: Broker, tmp_path: Path) -> Command:
    """Run `celery -A tests.insight.check_app alchemy <arguments>`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment(broker.settings, database.url)}
        return forked.run(["-A", "tests.insight.check_app", "alchemy", *arguments], env=env, folder=tmp_path)

    return run


@pytest.mark.brokers("filesystem")
def test_command_ends_with_code_1_for_an_error_and_0_for_warnings(command: Command) -> None:
    """Without the table a deployment stops; a warning is printed and lets it go on. Both as text and as JSON."""
    broken, broken_json = command("check"), command("check", "--json")
    command("create-tables")
    sound, sound_json = command("check"), command("check", "--json")

    assert (broken.returncode, broken_json.returncode) == (1, 1), broken.stderr
    assert "ERROR   missing-table: " in broken.stdout
    assert "Traceback" not in broken.stderr
    assert [(row["code"], row["level"]) for row in json.loads(broken_json.stdout)] == [
        ("missing-table", "error"),
        ("once-time-limit", "warning"),
    ]
    assert set(json.loads(broken_json.stdout)[0]) == {"code", "level", "reason", "fix"}
    assert (sound.returncode, sound_json.returncode) == (0, 0), sound.stdout
    assert "WARNING once-time-limit: " in sound.stdout
    assert [row["code"] for row in json.loads(sound_json.stdout)] == ["once-time-limit"]
