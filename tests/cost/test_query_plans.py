"""What the relay and a broker's worker ask again and again reads an index, however many rows are completed or due one day."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text

from celery_alchemy.broker.acknowledging import acknowledge, give_back
from celery_alchemy.broker.claims import has_due, take
from celery_alchemy.broker.floors import Floors
from celery_alchemy.broker.revoking import unfinished
from celery_alchemy.broker.tables import begun
from celery_alchemy.broker.workers import enlist, release_lost
from celery_alchemy.databases import database_of
from celery_alchemy.databases.tables import metadata, outbox
from celery_alchemy.messages.message import Message
from celery_alchemy.outbox.place import Place
from celery_alchemy.outbox.relay import prune
from tests.services.databases import Database

#: A million where it is checked whole (`.ci/run`); a tenth of that chooses the same plans and is there in a second.
COMPLETED_ROWS = int(os.environ.get("TEST_COMPLETED_ROWS", "100000"))
DUE_ROWS = 50

# The numbers from 1 on, without a table of them.
_NUMBERS = {
    "postgresql": "SELECT generate_series AS n FROM generate_series(1, {count})",
    "mariadb": "SELECT seq AS n FROM seq_1_to_{count}",
    "sqlite": "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < {count}) SELECT n FROM t",
}
_COLUMNS = (
    "id, task_id, task_name, once, created_at, due_at, completed_at, body, envelope, queue, priority, sends, failures, deliveries"
)
#: The body of a message.
_EMPTY_LIST = {"postgresql": "'\\x5b5d'", "mariadb": "x'5b5d'", "sqlite": "x'5b5d'"}
_ANALYZE = {"postgresql": "ANALYZE celery_outbox", "mariadb": "ANALYZE TABLE celery_outbox", "sqlite": "ANALYZE"}


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """An outbox with many completed rows and few that are due."""
    engine = create_engine(database.url)
    metadata.create_all(engine)
    _fill(engine, database.name, COMPLETED_ROWS, "c", "NULL, '2020-06-01 00:00:00', NULL, NULL, NULL, NULL")
    _fill(engine, database.name, DUE_ROWS, "d", "'2020-01-01 00:00:00', NULL, NULL, '{}', NULL, NULL")
    _analyze(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def queue(database: Database) -> Iterator[Engine]:
    """A queue with few messages that are due, many that are due one day, and many completed rows."""
    engine = create_engine(database.url)
    metadata.create_all(engine)
    name = database.name
    _fill(engine, name, COMPLETED_ROWS, "c", "NULL, '2020-06-01 00:00:00', NULL, NULL, 'jobs', 3")
    message = Message(b"[]", "application/json", "utf-8", exchange="", routing_key="jobs")
    waiting = f"NULL, {_EMPTY_LIST[name]}, '{message.envelope()}', 'jobs', 3"
    _fill(engine, name, COMPLETED_ROWS, "f", f"'2099-01-01 00:00:00', {waiting}")
    _fill(engine, name, DUE_ROWS, "d", f"'2020-01-01 00:00:00', {waiting}")
    _analyze(engine)
    yield engine
    engine.dispose()


def _analyze(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(_ANALYZE[_name_of(engine)]))


def _name_of(engine: Engine) -> str:
    return "mariadb" if engine.dialect.name in ("mysql", "mariadb") else engine.dialect.name


def _fill(engine: Engine, name: str, count: int, prefix: str, values: str) -> None:
    numbers = _NUMBERS[name].format(count=count)
    identity = f"concat('{prefix}', n)" if name != "sqlite" else f"'{prefix}' || n"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO celery_outbox ({_COLUMNS}) SELECT {identity}, {identity}, 'task', "
            f"{'true' if name != 'sqlite' else '1'}, '2020-01-01 00:00:00', {values}, 0, 0, 0 FROM ({numbers}) numbers"
        )


class Plans:
    """Explains each statement that reads or changes the outbox, right before it is executed."""

    def __init__(self, engine: Engine) -> None:
        self.texts: list[str] = []
        event.listen(engine, "before_cursor_execute", self._explain)

    def _explain(self, connection: Connection, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if outbox.name not in statement:
            return
        many = rest[1]
        explained = connection.connection.cursor()
        dialect = connection.dialect.name
        prefix = "EXPLAIN QUERY PLAN" if dialect == "sqlite" else "EXPLAIN"
        explained.execute(f"{prefix} {statement}", parameters[0] if many else parameters)
        if dialect in ("mysql", "mariadb"):
            read = [_of_mariadb(row, explained.description) for row in explained.fetchall()]
            self.texts.extend(text for text in read if "table=celery_outbox" in text)
        else:
            self.texts.append("\n".join(" ".join(map(str, row)) for row in explained.fetchall()))
        explained.close()

    def full_scans(self) -> list[str]:
        """Return the plans that read the whole table, or a whole index or queue of it because they filter what it gives."""
        scan = re.compile(
            r"Seq Scan on celery_outbox|Filter: \((due|completed)_at|type=(ALL|index)\b|SCAN celery_outbox(?! USING INDEX)|priority>"
        )
        return [plan for plan in self.texts if scan.search(plan)]


def _of_mariadb(row: Any, description: Any) -> str:
    return " ".join(f"{column[0]}={value}" for column, value in zip(description, row, strict=True))


def claim(engine: Engine, token: str) -> int:
    with engine.begin() as connection:
        return len(database_of(engine.dialect.name).claim(connection, outbox, token, 60.0, 500))


@pytest.mark.timeout(600)
def test_what_a_relay_asks_reads_an_index(engine: Engine) -> None:
    """A claim, the question of an idle relay and a prune find their rows without a look at all completed ones."""
    plans = Plans(engine)

    claimed = claim(engine, "first")
    nothing = claim(engine, "second")
    deleted = prune(engine, 7 * 86400)

    assert (claimed, nothing, deleted) == (DUE_ROWS, 0, 1000)
    assert len(plans.texts) >= 4
    assert plans.full_scans() == []


@pytest.mark.timeout(600)
def test_what_a_worker_of_the_broker_asks_reads_an_index(queue: Engine) -> None:
    """It takes, looks, acknowledges, gives back and frees what a lost worker had, without a look at what is due one day."""
    place = Place()
    with begun(place, queue) as tables:
        enlist(tables, "lost", -1, None)
        enlist(tables, "living", 60, None)
    plans = Plans(queue)

    with begun(place, queue) as tables:
        lost = take(tables, "lost", ["jobs"], 10, Floors())
        taken = take(tables, "living", ["jobs"], 20, Floors())
        is_more = has_due(tables, ["jobs"], None, Floors())
    with begun(place, queue) as tables:
        claims = [delivery.claim for delivery in taken if delivery.claim is not None]
        acknowledge(tables, "living", claims[:10])
        give_back(tables, "living", claims[10:])
        released = release_lost(tables, "living", 5)

    assert (len(lost), len(taken), is_more, released.due) == (10, 20, True, 10)
    assert len(plans.texts) >= 6
    assert plans.full_scans() == []


@pytest.mark.timeout(600)
def test_revoking_a_task_reads_no_completed_row(engine: Engine, database: Database) -> None:
    """There is no index of task ids: what is not completed is found through the others."""
    message = Message(b"[]", "application/json", "utf-8", exchange="", routing_key="jobs")
    body = _EMPTY_LIST[database.name]
    _fill(engine, database.name, DUE_ROWS, "w", f"'2099-01-01 00:00:00', NULL, {body}, '{message.envelope()}', 'jobs', 3")
    _analyze(engine)
    plans = Plans(engine)

    with begun(Place(), engine) as tables:
        found = tables.run(unfinished(tables, ["w7", f"c{COMPLETED_ROWS}", "nobody"])).all()

    assert [row.task_id for row in found] == ["w7"]
    assert plans.texts != []
    assert plans.full_scans() == []
