"""What the relay asks again and again reads an index, however many completed rows the table keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text

from celery_alchemy.databases import database_of
from celery_alchemy.databases.tables import metadata, outbox
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
_COLUMNS = "id, task_id, task_name, once, created_at, due_at, completed_at, body, envelope, sends, failures, deliveries"
_ANALYZE = {"postgresql": "ANALYZE celery_outbox", "mariadb": "ANALYZE TABLE celery_outbox", "sqlite": "ANALYZE"}


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    """An outbox with many completed rows and few that are due."""
    engine = create_engine(database.url)
    metadata.create_all(engine)
    _fill(engine, database.name, COMPLETED_ROWS, "c", "NULL, '2020-06-01 00:00:00', NULL, NULL")
    _fill(engine, database.name, DUE_ROWS, "d", "'2020-01-01 00:00:00', NULL, NULL, '{}'")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(_ANALYZE[database.name]))
    yield engine
    engine.dispose()


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
            self.texts.extend(_of_mariadb(row, explained.description) for row in explained.fetchall())
        else:
            self.texts.append("\n".join(" ".join(map(str, row)) for row in explained.fetchall()))
        explained.close()

    def full_scans(self) -> list[str]:
        """Return the plans that read the whole table, or a whole index of it because they filter what it gives."""
        scan = re.compile(
            r"Seq Scan on celery_outbox|Filter: \((due|completed)_at|type=(ALL|index)\b|SCAN celery_outbox(?! USING INDEX)"
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
