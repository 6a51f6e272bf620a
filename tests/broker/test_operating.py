"""What operating the broker costs and shows: plans of its statements, idle workers, the status."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from click.testing import CliRunner
from kombu import Exchange, Queue
from sqlalchemy import Engine, create_engine, event, text

from celery_alchemy import Alchemy
from celery_alchemy.databases import database_of
from celery_alchemy.databases.tables import metadata, outbox
from celery_alchemy.operations.command_line import alchemy as command_line
from tests.broker.lines import Line, OpenLine
from tests.cost.test_query_plans import _ANALYZE, _NUMBERS, Plans
from tests.services.databases import Database
from tests.waiting import eventually

MANY = 50_000
_COLUMNS = "id, task_name, once, created_at, due_at, completed_at, queue, priority, body, envelope, sends, failures, deliveries"


def fill(database: Database, count: int, prefix: str, values: str) -> None:
    identity = f"'{prefix}' || n" if database.name == "sqlite" else f"concat('{prefix}', n)"
    once = "0" if database.name == "sqlite" else "false"
    numbers = _NUMBERS[database.name].format(count=count)
    database.execute(
        f"INSERT INTO celery_outbox ({_COLUMNS}) SELECT {identity}, 'task', {once},"
        f" '2020-01-01 00:00:00', {values}, 'body', '{{}}', 0, 0, 0 FROM ({numbers}) numbers"
    )


def test_taking_reads_an_index(database: Database) -> None:
    """Neither completed messages nor those that are not due are looked at."""
    engine = create_engine(database.url)
    metadata.create_all(engine)
    fill(database, MANY, "done", "NULL, '2020-06-01 00:00:00', 'jobs', 0")
    fill(database, MANY, "later", "'2100-01-01 00:00:00', NULL, 'jobs', 0")
    fill(database, 20, "now", "'2020-01-01 00:00:00', NULL, 'jobs', 5")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(_ANALYZE[database.name]))
    plans = Plans(engine)

    with engine.begin() as connection:
        take = database_of(engine.dialect.name).take
        taken = [len(take(connection, outbox, "worker", ["jobs"], 15, {})) for _ in range(3)]

    assert taken == [15, 5, 0]
    assert plans.full_scans() == []
    engine.dispose()


@pytest.mark.databases("postgresql", "mariadb")
def test_idle_consumer_sends_two_statements_a_second(line: Line) -> None:
    """At most, with its heartbeat and its look after others; also after a time in which it had too much to do to read broadcasts."""
    with line.consuming(Queue("jobs"), Queue("reader", Exchange("all", type="fanout"), auto_delete=True)) as heard:
        for _ in range(5):
            line.send("jobs")
        for message in heard.wait_for(5):
            message.ack()
            heard.drain(0.03)
        heard.drain(0.5)
        statements: list[str] = []

        def note(*args: Any) -> None:
            statements.append(args[2])

        event.listen(Engine, "before_cursor_execute", note)
        try:
            heard.drain(4.0)
        finally:
            event.remove(Engine, "before_cursor_execute", note)

    assert 2 <= len(statements) <= 9, statements


@pytest.mark.databases("sqlite")
def test_consumer_without_room_hardly_looks_at_the_file(database: Database, open_line: OpenLine) -> None:
    """It is told when a message ends, and reads broadcasts ten times a second."""
    looks: list[str] = []

    def trace(connection: Any, _: object) -> None:
        connection.set_trace_callback(lambda statement: looks.append(statement) if "data_version" in statement else None)

    event.listen(Engine, "connect", trace)
    try:
        line = open_line()
        queues = (Queue("jobs"), Queue("reader", Exchange("all", type="fanout"), auto_delete=True))
        with line.consuming(*queues, prefetch=1) as heard:
            for _ in range(2):
                line.send("jobs")
            (first,) = heard.wait_for(1)
            heard.drain(0.5)
            began = time.monotonic()
            looks.clear()
            heard.drain(2.0)
            looks_a_second = len(looks) / (time.monotonic() - began)
            first.ack()
            heard.wait_for(2)
    finally:
        event.remove(Engine, "connect", trace)

    assert 0 < looks_a_second < 20


@contextmanager
def before_each_look(act: Callable[[], object]) -> Iterator[None]:
    """Do something in the thread that looks at the number of SQLite's commits, with its connection in the middle of the look."""

    class Watched(sqlite3.Connection):
        def execute(self, statement: str, *args: Any) -> sqlite3.Cursor:
            cursor = super().execute(statement, *args)
            if "data_version" in statement:
                try:
                    act()
                except sqlite3.OperationalError:
                    # The log keeps the error, and what is on its stack.
                    cursor.close()
                    raise
            return cursor

    def watch(dialect: Any, record: Any, arguments: Any, options: dict[str, Any]) -> None:
        options["factory"] = Watched

    event.listen(Engine, "do_connect", watch)
    try:
        yield
    finally:
        event.remove(Engine, "do_connect", watch)


@pytest.mark.databases("sqlite")
def test_message_is_got_while_the_thread_looks_at_the_file(database: Database, open_line: OpenLine) -> None:
    """Both use one connection, on which nothing can begin while it reads what another connection has changed since."""
    looks = threading.Event()

    def look_for_long() -> None:
        looks.set()
        time.sleep(0.3)

    with before_each_look(look_for_long):
        line = open_line()
        for _ in range(3):
            line.send("jobs")
        got = [line.take("jobs", no_ack=True)]
        for _ in range(2):
            looks.clear()
            assert looks.wait(5)
            database.execute("UPDATE celery_queues SET expires_at = NULL")
            got.append(line.take("jobs", no_ack=True))

    assert None not in got


@pytest.mark.databases("sqlite")
def test_look_at_the_file_that_fails_is_done_again(open_line: OpenLine) -> None:
    """The thread that takes messages goes on."""
    failures = [sqlite3.OperationalError("disk I/O error") for _ in range(2)]

    def fail() -> None:
        if failures:
            raise failures.pop()

    with before_each_look(fail):
        line = open_line()
        with line.consuming(Queue("jobs")) as heard:
            eventually(lambda: not failures, what="both looks have failed")
            line.send("jobs")
            heard.wait_for(1)


def test_status_shows_queues_and_workers(database: Database, line: Line) -> None:
    """What waits in each queue and for how long, and what each worker has."""
    app = Celery("shop", set_as_current=False)
    alchemy = Alchemy(app, database.url, broker=True)
    line.send("jobs", "taken", priority=9)
    line.send("jobs", "waits")
    line.send("idle")
    assert line.take("idle", no_ack=True) is not None
    taken = line.take("jobs")
    database.execute("UPDATE celery_outbox SET due_at = '2020-01-01 00:00:00.000000' WHERE claim IS NULL")
    line.send("jobs", "later", headers={"eta": "2100-01-01T00:00:00+00:00"})

    class Root:
        """What `celery -A` hands to its sub-commands."""

    root: Any = Root()
    root.app = app
    shown = CliRunner().invoke(command_line, ["status"], obj=root)
    told = CliRunner().invoke(command_line, ["status", "--json"], obj=root)

    assert taken.payload == "taken"
    assert shown.exit_code == 0, shown.output
    rows = [row.split() for row in shown.output.splitlines()]
    assert ["jobs", "1", "1", "1"] in [row[:4] for row in rows]
    assert ["idle", "0", "0", "0", "-"] in rows
    assert [row[:2] for row in rows if row[:1] in (["running"], ["scheduled"])] == [["running", "1"], ["scheduled", "1"]]
    counts = json.loads(told.output)
    assert (counts["waiting"], counts["running"], counts["scheduled"], counts["owed"]) == (1, 1, 1, 0)
    [jobs] = [queue for queue in counts["queues"] if queue["queue"] == "jobs"]
    assert jobs["oldest_seconds"] == pytest.approx(counts["oldest_seconds"], abs=60)
    assert jobs["oldest_seconds"] > 86400 * 365
    [worker] = [one for one in counts["workers"] if one["taken"]]
    assert (worker["taken"], worker["is_late"]) == (1, False)
    app.close()
    alchemy.engine.dispose()


@pytest.mark.databases("sqlite", "postgresql")
def test_celerys_own_command_line_knows_the_url(database: Database, line: Line) -> None:
    """Without an app, as by somebody who has only the URL."""
    line.send("jobs")
    line.send("jobs")
    command = [sys.executable, "-m", "celery", "-b", f"alchemy+{database.url}", "purge", "-f", "-Q", "jobs"]

    finished = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert "Purged 2 messages" in finished.stdout, finished.stdout + finished.stderr
