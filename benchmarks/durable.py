"""DBOS's part in what ``delivery.py`` compares: a workflow whose transaction inserts one row, sent in the caller's transaction.

``python -m durable`` is its worker. Both sides are as its documentation has them: ``enqueue_in_transaction`` in a transaction of the
database that holds its own tables, and a ``SQLAlchemyDatasource``, whose transactions record their completion in themselves.
Sources: https://docs.dbos.dev/python/reference/client, https://docs.dbos.dev/python/reference/datasources
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import rivals
from dbos import DBOS, DBOSClient, SQLAlchemyDatasource
from sqlalchemy import Engine
from sqlalchemy.orm import Session

NAME = "delivery"
URL = rivals.psycopg(rivals.CONNINFO)
#: One task at a time, as the other workers do it, and as many as there are, which is its default. A queue with a limit takes no
#: more than that at each poll, and by default polls once a second: the one with a limit polls more often.
ONE_AT_A_TIME, UNLIMITED = "one", "unlimited"
POLLING_SECONDS = {ONE_AT_A_TIME: 0.01, UNLIMITED: 1.0}

WORKER = ["durable"]


@contextmanager
def dbos_client(engine: Engine) -> Iterator[DBOSClient]:
    """A client that enqueues, with the tables and the queues."""
    subprocess.run([Path(sys.executable).with_name("dbos"), "migrate", "--sys-db-url", URL], check=True, capture_output=True)
    client = DBOSClient(system_database_engine=engine, application_name=NAME)
    for queue, seconds in POLLING_SECONDS.items():
        client.register_queue(queue, worker_concurrency=1 if queue == ONE_AT_A_TIME else None, polling_interval_sec=seconds)
    yield client
    client.destroy()


def send(engine: Engine, client: DBOSClient, queue: str, *, with_row: bool = True) -> None:
    """Enqueue a workflow in the transaction of a row."""
    with Session(engine) as session:
        if with_row:
            session.execute(rivals.ADD_LINE)
        client.enqueue_in_transaction(session, {"workflow_name": "line", "queue_name": queue})
        session.commit()


def work() -> None:
    """Run workflows until the process is ended."""
    DBOS(config={"name": NAME, "system_database_url": URL, "log_level": "ERROR", "run_migrations": False})
    datasource = SQLAlchemyDatasource.create(URL, engine=rivals.engine())

    # Its default is SERIALIZABLE; the others run on the server's.
    @datasource.transaction(isolation_level="READ COMMITTED")
    def add_line() -> None:
        datasource.sql_session().execute(rivals.ADD_LINE)

    @DBOS.workflow(name="line")
    def line() -> None:
        add_line()

    DBOS.launch()
    Event().wait()


if __name__ == "__main__":
    work()
