"""What ``delivery.py`` compares: one business row and one send, by Celery, by celery-alchemy and by procrastinate.

Workers import this module by its name, in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import procrastinate
from celery import Celery
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue

SERVER = "postgresql://postgres@127.0.0.1:5432"
DATABASE = "celery_alchemy_delivery"
CONNINFO = f"{SERVER}/{DATABASE}?options=-csynchronous_commit%3Doff"
SECONDS_TO_DRAIN = 120

ADD_LINE = text("INSERT INTO line (text) VALUES ('a line')")

CELERY_WORKER = [
    *("celery", "-A", "rivals:worker_app", "worker", "--pool", "prefork", "--concurrency", "1"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"),
]
PROCRASTINATE_WORKER = ["procrastinate", "--log-level", "error", "--app", "rivals.worker_jobs", "worker", "--concurrency", "1"]


class Shop:
    """A Celery app with an outbox on PostgreSQL, and one task with and without ``once``.

    Args:
        broker: URL of the broker.
        folder: For the messages of the file-system broker.
    """

    def __init__(self, broker: str, folder: str) -> None:
        self.broker, self.folder = broker, folder
        self.app = Celery("delivery", broker=broker, set_as_current=False)
        self.app.conf.update(task_ignore_result=True, task_default_queue="celery_alchemy_delivery")
        if broker.startswith("filesystem"):
            paths = dict.fromkeys(("data_folder_in", "data_folder_out"), f"{folder}/messages")
            self.app.conf.broker_transport_options = {**paths, "control_folder": f"{folder}/control"}
            Path(folder, "messages").mkdir(exist_ok=True)
        self.engine = engine()
        self.alchemy = Alchemy(self.app, self.engine, outbox=True)
        self.line = self.app.task(name="line", shared=False)(add_line)
        self.line_once = self.app.task(name="line_once", once=True, shared=False)(add_line)

    def create_tables(self) -> None:
        """Make an empty database with the tables of all contenders."""
        with create_engine(f"{psycopg(SERVER)}/postgres", isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)"))
            connection.execute(text(f"CREATE DATABASE {DATABASE}"))
        with self.engine.begin() as connection:
            connection.execute(
                text("CREATE TABLE line (id bigserial PRIMARY KEY, text text, at timestamptz DEFAULT clock_timestamp())")
            )
        self.alchemy.create_tables()
        self.empty_queue()

    def empty_queue(self) -> None:
        """Throw away what waits in the broker."""
        with self.app.connection_for_write() as connection:
            self.app.amqp.queues["celery_alchemy_delivery"](connection.default_channel).declare()
            connection.default_channel.queue_purge("celery_alchemy_delivery")

    def take_message(self) -> tuple[str, dict[str, Any]]:
        """Take one message from the queue: the task's id, and the headers."""
        with self.app.connection_for_read() as connection:
            queue = self.app.amqp.queues["celery_alchemy_delivery"](connection.default_channel)
            headers = queue.get(no_ack=True).headers
            return headers["id"], headers

    def delay_after_commit(self, sends: int = 1) -> None:
        """Commit a row, then send."""
        with Session(self.engine) as session:
            session.execute(ADD_LINE)
            session.commit()
        for _ in range(sends):
            self.line.delay()

    def enqueue(self, sends: int = 1) -> None:
        """Send in the transaction of a row."""
        with Session(self.engine) as session:
            session.execute(ADD_LINE)
            for _ in range(sends):
                enqueue(session, self.line.s())
            session.commit()

    def rate_of(self, command: list[str], count: int) -> float:
        """Start a worker and return how many rows a second it inserts until there are ``count``."""
        with self.engine.begin() as connection:
            connection.execute(text("TRUNCATE line"))
        variables = {"PYTHONPATH": str(Path(__file__).parent), "DELIVERY_BROKER": self.broker, "DELIVERY_FOLDER": self.folder}
        worker = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
        try:
            return self._rate(count)
        finally:
            worker.terminate()
            worker.wait()

    def _rate(self, count: int) -> float:
        deadline = time.monotonic() + SECONDS_TO_DRAIN
        while time.monotonic() < deadline:
            with self.engine.connect() as connection:
                done, seconds = connection.execute(text("SELECT count(*), extract(epoch FROM max(at) - min(at)) FROM line")).one()
            if done >= count:
                return (done - 1) / float(seconds)
            time.sleep(0.2)
        raise TimeoutError(f"the worker did not drain {count} tasks in {SECONDS_TO_DRAIN} s")

    def close(self) -> None:
        """Close every connection and drop the database."""
        self.alchemy.outbox.publisher.close()
        self.app.close()
        self.engine.dispose()
        with create_engine(f"{psycopg(SERVER)}/postgres", isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)"))


def psycopg(url: str) -> str:
    """Return a PostgreSQL URL for SQLAlchemy."""
    return url.replace("postgresql://", "postgresql+psycopg://")


def engine() -> Engine:
    """Return an engine; commits do not wait for the disk, which is the same for all."""
    return create_engine(psycopg(CONNINFO))


def add_line(session: Session, number: int = 0, text: str = "") -> None:
    """Insert one row."""
    session.execute(ADD_LINE)


# --- procrastinate ------------------------------------------------------------------------------------------


def _procrastinate(connector: Any) -> procrastinate.App:
    app = procrastinate.App(connector=connector)

    @app.task(name="line", queue="default")
    async def line() -> None:
        async with app.connector.pool.connection() as connection:  # type: ignore[attr-defined]
            await connection.execute("INSERT INTO line (text) VALUES ('a line')")

    return app


@contextmanager
def procrastinate_app() -> Iterator[procrastinate.App]:
    """An app that defers, with its tables."""
    app = _procrastinate(procrastinate.SyncPsycopgConnector(conninfo=CONNINFO))
    with app.open():
        app.schema_manager.apply_schema()
        yield app


def defer(engine: Engine, app: procrastinate.App, *, with_row: bool = True) -> None:
    """Defer a job in the transaction of a row."""
    with Session(engine) as session:
        if with_row:
            session.execute(ADD_LINE)
        connection = session.connection().connection.driver_connection
        app.tasks["line"].configure(connection=connection).defer()
        session.commit()


if "DELIVERY_BROKER" in os.environ:
    worker_app = Shop(os.environ["DELIVERY_BROKER"], os.environ["DELIVERY_FOLDER"]).app
    worker_jobs = _procrastinate(procrastinate.PsycopgConnector(conninfo=CONNINFO))
