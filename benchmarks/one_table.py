"""One table for owed and completed ``once`` tasks, or two: the statements of a task's life and of the relay, by themselves.

``python benchmarks/one_table.py postgresql [completed rows]``. One table: a completion is an UPDATE of the owed row. Two: it is a
DELETE there and an INSERT here. Both lives are taken in turn, in one process, on the same server.
"""

from __future__ import annotations

import sys
import tempfile
from statistics import median
from time import perf_counter
from uuid import uuid4

from sqlalchemy import Engine, create_engine, event, text

from celery_alchemy.databases import database_of
from celery_alchemy.databases.tables import metadata, outbox

SERVERS = {
    "postgresql": ("postgresql+psycopg://postgres@127.0.0.1:5432/", "postgres", "?options=-csynchronous_commit%3Doff"),
    "mariadb": ("mysql+pymysql://root@127.0.0.1:3306/", "information_schema", ""),
}
DATABASE = "celery_alchemy_one_table"
NUMBERS = {
    "postgresql": "SELECT generate_series AS n FROM generate_series(1, {})",
    "mariadb": "SELECT seq AS n FROM seq_1_to_{}",
    "sqlite": "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < {}) SELECT n FROM t",
}
COLUMNS = "id, task_id, task_name, once, created_at, sends, failures, deliveries"
BODY = b"x" * 800
LIVES = 300
ROUNDS = 7

#: Each life: after the INSERT by the sender, transactions of statements. ``:id`` is the task.
START = "UPDATE {owed} SET deliveries = 1, claim = NULL, due_at = '2099-01-01 00:00:00' WHERE id = :id"
COMPLETE = {
    "one": [
        (
            "UPDATE one SET completed_at = '2026-01-01 00:00:00', result = '{}', due_at = NULL, claim = NULL,"
            " body = NULL, envelope = NULL, deliveries = 0 WHERE id = :id AND completed_at IS NULL"
        )
    ],
    "two": [
        "DELETE FROM two WHERE id = :id",
        "INSERT INTO completed (id, task_id, task_name, completed_at, result) VALUES (:id, :id, 'task', '2026-01-01 00:00:00', '{}')",
    ],
}


def engine_of(name: str, folder: str) -> Engine:
    """Return an engine on a new database."""
    if name == "sqlite":
        engine = create_engine(f"sqlite:///{folder}/one_table.db")

        @event.listens_for(engine, "connect")
        def configure(connection: object, record: object) -> None:
            connection.execute("PRAGMA journal_mode = WAL")  # type: ignore[attr-defined]
            connection.execute("PRAGMA synchronous = OFF")  # type: ignore[attr-defined]

        return engine
    server, maintenance, options = SERVERS[name]
    with create_engine(server + maintenance, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {DATABASE}"))
        connection.execute(text(f"CREATE DATABASE {DATABASE}"))
    return create_engine(server + DATABASE + options)


def prepare(engine: Engine, name: str, completed: int) -> None:
    """Make both layouts and their completed rows."""
    metadata.create_all(engine)
    identity = "'c' || n" if name == "sqlite" else "concat('c', n)"
    yes = "1" if name == "sqlite" else "true"
    numbers = NUMBERS[name].format(completed)
    with engine.begin() as connection:
        run = connection.exec_driver_sql
        run("ALTER TABLE celery_outbox RENAME TO one")
        run(
            f"INSERT INTO one ({COLUMNS}, completed_at, result) SELECT {identity}, {identity}, 'task', {yes},"
            f" '2026-01-01 00:00:00', 0, 0, 0, '2026-01-01 00:00:00', '{{}}' FROM ({numbers}) numbers"
        )
        run(
            "CREATE TABLE completed (id varchar(255) PRIMARY KEY, task_id varchar(255), task_name varchar(255),"
            " completed_at timestamp NULL, result text)"
        )
        run("CREATE INDEX completed_at ON completed (completed_at)")
        run(f"INSERT INTO completed SELECT {identity}, {identity}, 'task', '2026-01-01 00:00:00', '{{}}' FROM ({numbers}) numbers")
        if name != "mariadb":
            # Names of indexes are the schema's, not the table's.
            for column in ("due_at", "completed_at", "died_at"):
                run(f"DROP INDEX celery_outbox_{column}")
                run(f"CREATE INDEX one_{column} ON one ({column}) WHERE {column} IS NOT NULL")
    metadata.create_all(engine)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ALTER TABLE celery_outbox RENAME TO two")
        for table in ("one", "two", "completed") if name != "sqlite" else ():
            connection.exec_driver_sql(f"ANALYZE {'TABLE ' if name == 'mariadb' else ''}{table}")


def lives(engine: Engine, layout: str) -> dict[str, float]:
    """Let tasks be sent, started and completed; return microseconds for one, by step."""
    insert = text(
        f"INSERT INTO {layout} ({COLUMNS}, body, envelope, due_at) VALUES"
        f" (:id, :id, 'task', {'1' if engine.dialect.name == 'sqlite' else 'true'}, '2026-01-01 00:00:00', 0, 0, 0,"
        " :body, :envelope, '2099-01-01 00:00:00')"
    )
    steps = {
        "send": [insert],
        "start": [text(START.format(owed=layout))],
        "complete": [text(s) for s in COMPLETE[layout]],
    }
    ids = [f"t{uuid4().hex}" for _ in range(LIVES)]
    spent = {}
    for step, statements in steps.items():
        start = perf_counter()
        for task_id in ids:
            with engine.begin() as connection:
                for statement in statements:
                    values = {"id": task_id}
                    if step == "send":
                        values |= {"body": BODY, "envelope": "x" * 800}  # type: ignore[dict-item]
                    connection.execute(statement, values)
        spent[step] = (perf_counter() - start) / LIVES * 1e6
    spent["life"] = sum(spent.values())
    return spent


def claims(engine: Engine, layout: str) -> dict[str, float]:
    """Claim, with nothing due and with 200 rows due; return microseconds for one claim."""
    table = outbox.to_metadata(type(metadata)(), name=layout)
    claim = database_of(engine.dialect.name).claim
    spent = {}
    for what in ("claim of nothing", "claim of 200"):
        if what == "claim of 200":
            for task_id in (f"d{uuid4().hex}" for _ in range(200)):
                with engine.begin() as connection:
                    connection.execute(
                        text(
                            f"INSERT INTO {layout} ({COLUMNS}, due_at) VALUES (:id, :id, 't',"
                            f" {'1' if engine.dialect.name == 'sqlite' else 'true'},"
                            " '2026-01-01 00:00:00', 0, 0, 0, '2020-01-01 00:00:00')"
                        ),
                        {"id": task_id},
                    )
        times = 20 if what == "claim of nothing" else 1
        start = perf_counter()
        for _ in range(times):
            with engine.begin() as connection:
                claim(connection, table, "token", 60.0, 200)
        spent[what] = (perf_counter() - start) / times * 1e6
    with engine.begin() as connection:
        connection.execute(text(f"DELETE FROM {layout} WHERE due_at IS NOT NULL"))
    return spent


def main() -> None:
    """Compare, and print ratios of two tables to one."""
    name = sys.argv[1]
    completed = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(name, folder)
        prepare(engine, name, completed)
        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        for number in range(ROUNDS + 1):
            one, two = ({**lives(engine, layout), **claims(engine, layout)} for layout in ("one", "two"))
            if number:
                rounds.append((one, two))
        print(f"\n### {name}, {completed} completed rows\n\n| | one table, us | two : one | range |\n|---|---:|---:|---:|")
        for step in rounds[0][0]:
            ratios = [two[step] / one[step] for one, two in rounds]
            print(
                f"| {step} | {median(one[step] for one, _ in rounds):.0f} | {median(ratios):.2f}"
                f" | {min(ratios):.2f}-{max(ratios):.2f} |"
            )
        engine.dispose()
        if name in SERVERS:
            server, maintenance, _ = SERVERS[name]
            with create_engine(server + maintenance, isolation_level="AUTOCOMMIT").connect() as connection:
                connection.execute(text(f"DROP DATABASE {DATABASE}"))


if __name__ == "__main__":
    main()
