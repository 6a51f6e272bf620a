"""The database as Celery's broker, beside Celery on Redis: what sending, draining and waking cost.

Part of ``targets.py``. The same tasks on the same PostgreSQL, whose commits do not wait for the disk;
workers have one process. They import this module by its name, in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import rivals
from celery import Celery
from figures import Figure, take_turns
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue

QUEUE = "celery_alchemy_brokers"
REDIS = "redis://127.0.0.1:6379/9"
ADD = text("INSERT INTO line (text) VALUES (:text)")
WORKER = [
    *(sys.executable, "-m", "celery", "-A", "brokers:worker_app", "worker", "--pool", "prefork", "--concurrency", "1"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"),
]
#: Messages of one turn of sending, tasks of one turn of a worker, and sends that are timed one by one.
SENDS, TASKS, TIMED = 50, 1000, 60
#: Rows of other times, and rows that are gone but kept, in a crowded table.
COMPLETED, GONE = 1_000_000, 500_000


def add_time(session: Session) -> None:
    """Insert a row that says when."""
    session.execute(ADD, {"text": str(time.time())})


class Shop:
    """An app on a database, whose broker is Redis or the database itself.

    Args:
        url: SQLAlchemy URL of the database.
        broker: URL of the broker; None for the database.
    """

    def __init__(self, url: str, broker: str | None) -> None:
        self.url, self.broker = url, broker
        self.app = Celery("brokers", broker=broker, set_as_current=False)
        self.app.conf.update(task_ignore_result=True, task_default_queue=QUEUE)
        if broker is not None and broker.startswith("pgmq"):
            self.app.conf.broker_transport_options = {"init_extension": False, "use_notify": True}
        self.alchemy = Alchemy(self.app, url, broker=broker is None)
        self.by_hand_engine: Engine = create_engine(url)

        def by_hand() -> None:
            with Session(self.by_hand_engine) as session:
                add_time(session)
                session.commit()

        self.by_hand: Any = self.app.task(name="by_hand", shared=False)(by_hand)
        self.plain: Any = self.app.task(name="plain", shared=False)(add_time)
        self.once: Any = self.app.task(name="once", once=True, shared=False)(add_time)

    def add_and_send(self) -> None:
        """Commit a row, with its task where that can be, else the task after it."""
        with Session(self.by_hand_engine) as session:
            session.execute(ADD, {"text": "sent"})
            if self.broker is None:
                enqueue(session, self.plain.s())
            session.commit()
        if self.broker is not None:
            self.by_hand.delay()

    def add(self) -> None:
        """Commit a row and send nothing."""
        with Session(self.by_hand_engine) as session:
            session.execute(ADD, {"text": "alone"})
            session.commit()

    def fill(self, task: Any) -> None:
        """Send what a worker is to drain."""
        self.empty()
        with self.alchemy.begin() as session:
            for _ in range(TASKS):
                enqueue(session, task.s())

    def empty(self) -> None:
        """Throw away what waits, and the rows of tasks."""
        with self.app.connection_for_write() as connection:
            self.app.amqp.queues[QUEUE](connection.default_channel).declare()
            connection.default_channel.queue_purge(QUEUE)
        with self.by_hand_engine.begin() as connection:
            connection.execute(text("DELETE FROM line"))

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run a worker."""
        variables = {"PYTHONPATH": str(Path(__file__).parent), "BROKERS_URL": self.url, "BROKERS_BROKER": self.broker or ""}
        worker = subprocess.Popen(WORKER, env={**os.environ, "C_FORCE_ROOT": "1", **variables}, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            worker.terminate()
            worker.wait()

    def times(self, count: int) -> list[float]:
        """Wait until so many tasks have run, and return when they did, in order.

        Raises:
            TimeoutError: They have not within two minutes.
        """
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with self.by_hand_engine.connect() as connection:
                rows = connection.execute(text("SELECT text FROM line WHERE text NOT IN ('sent', 'alone')")).scalars().all()
            if len(rows) >= count:
                return sorted(map(float, rows))
            sleep(0.02 if count == 1 else 0.2)
        raise TimeoutError(f"{count} tasks have not run within two minutes")

    def rate(self, task: Any) -> float:
        """Return how many tasks a second a worker drains, from its first to its last."""
        self.fill(task)
        with self.working():
            times = self.times(TASKS)
        return (len(times) - 1) / (times[-1] - times[0])

    def waking(self) -> float:
        """Return the milliseconds from the end of COMMIT to the body in a worker that is idle, at the median."""
        self.empty()
        task = self.plain if self.broker is None else self.by_hand
        taken = []
        with self.working():
            for number in range(TIMED + 10):
                with Session(self.by_hand_engine) as session:
                    session.execute(text("DELETE FROM line"))
                    if self.broker is None:
                        enqueue(session, task.s())
                    session.commit()
                committed = time.time()
                if self.broker is not None:
                    task.delay()
                [at] = self.times(1)
                if number >= 10:
                    taken.append((at - committed) * 1000)
        return median(taken)

    def close(self) -> None:
        """Close every connection."""
        self.app.close()
        self.alchemy.engine.dispose()
        self.by_hand_engine.dispose()


@contextmanager
def shops() -> Iterator[tuple[Shop, Shop]]:
    """An app on Redis and one on the database, on one empty PostgreSQL database."""
    server = create_engine(f"{rivals.psycopg(rivals.SERVER)}/postgres", isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {QUEUE} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {QUEUE}"))
        connection.execute(text(f"ALTER DATABASE {QUEUE} SET synchronous_commit = off"))
    url = f"{rivals.psycopg(rivals.SERVER)}/{QUEUE}"
    redis, database = Shop(url, REDIS), Shop(url, None)
    with database.by_hand_engine.begin() as connection:
        connection.execute(text("CREATE TABLE line (id bigserial PRIMARY KEY, text text)"))
    database.alchemy.create_tables()
    try:
        yield redis, database
    finally:
        for shop in (redis, database):
            shop.empty()
            shop.close()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {QUEUE} WITH (FORCE)"))
        server.dispose()


def broker(rounds: int) -> list[Figure]:
    """Measure what the database costs as a broker, to Celery on Redis in the same round."""
    with shops() as (redis, database):
        return [
            *_sending(redis, database, rounds),
            *_draining(redis, database, max(3, rounds // 5)),
            _waking(redis, database),
            _waking_on_sqlite(),
        ]


def crowded(rounds: int) -> list[Figure]:
    """Measure what rows that no worker may take cost it: those of other times, and those that PostgreSQL cannot remove."""
    figures = [
        Figure(f"database broker: draining beside {COMPLETED:,} completed and as many future rows, to alone", least=0.8),
        Figure(f"database broker: draining while a transaction keeps {GONE:,} dead rows, to alone", least=0.5),
    ]
    alone: list[float] = []
    for figure, crowd in ((None, _no_crowd), (figures[0], _other_times), (figures[1], _kept_rows)):
        with shops() as (_, database), crowd(database.by_hand_engine):
            rates = [database.rate(database.plain) for _ in range(max(3, rounds // 3))]
            if figure is None:
                alone = rates
            else:
                figure.measured += [rate / before for rate, before in zip(rates, alone, strict=True)]
    return figures


@contextmanager
def _no_crowd(engine: Engine) -> Iterator[None]:
    yield


@contextmanager
def _other_times(engine: Engine) -> Iterator[None]:
    for name, due_at, completed_at in (("c", "NULL", "now() - interval '1 hour'"), ("f", "now() + interval '1 day'", "NULL")):
        _add_rows(engine, name, COMPLETED, f"{due_at}, {completed_at}")
    yield


@contextmanager
def _kept_rows(engine: Engine) -> Iterator[None]:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        connection.execute(text("SELECT count(*) FROM line"))
        # As workers leave it after ten minutes: each message was taken, then deleted.
        _add_rows(engine, "d", GONE, "now() - n * interval '1 ms', NULL")
        for statement in ("UPDATE celery_outbox SET claim = 'gone', due_at = NULL", "DELETE FROM celery_outbox"):
            with engine.begin() as other:
                other.execute(text(statement))
        yield


def _add_rows(engine: Engine, name: str, count: int, times: str) -> None:
    columns = "id, task_id, task_name, body, envelope, queue, once, priority, sends, failures, deliveries, created_at"
    values = f"'{name}' || n, '{name}' || n, '{name}', ''::bytea, '', '{QUEUE}', false, 0, 0, 0, 0, now(), {times}"
    with engine.begin() as connection:
        connection.execute(
            text(f"INSERT INTO celery_outbox ({columns}, due_at, completed_at) SELECT {values} FROM generate_series(1, {count}) AS n")
        )


def _sending(redis: Shop, database: Shop, rounds: int) -> list[Figure]:
    sent = Figure("database broker: a row and a send, to a commit and `.delay()` on Redis", least=1.35)
    alone = Figure("... the row alone, for comparison")

    def turn(act: Callable[[], None]) -> float:
        start = perf_counter()
        for _ in range(SENDS):
            act()
        return perf_counter() - start

    def note(times: dict[str, float]) -> None:
        sent.measured.append(times["redis"] / times["database"])
        alone.measured.append(times["redis"] / times["alone"])

    acts = {
        "redis": lambda: turn(redis.add_and_send),
        "database": lambda: turn(database.add_and_send),
        "alone": lambda: turn(redis.add),
    }
    take_turns(acts, rounds, note)
    return [sent, alone]


def _draining(redis: Shop, database: Shop, rounds: int) -> list[Figure]:
    plain = Figure("database broker: draining tasks, to Redis", least=1.0)
    once = Figure("database broker: draining `once` tasks, to a task by hand on Redis", least=0.95)

    def note(rates: dict[str, float]) -> None:
        plain.measured.append(rates["database"] / rates["redis"])
        once.measured.append(rates["once"] / rates["by hand"])

    acts = {
        "redis": lambda: redis.rate(redis.plain),
        "by hand": lambda: redis.rate(redis.by_hand),
        "database": lambda: database.rate(database.plain),
        "once": lambda: database.rate(database.once),
    }
    take_turns(acts, rounds, note)
    return [plain, once]


def _waking(redis: Shop, database: Shop) -> Figure:
    figure = Figure("database broker: commit to body, to Redis", most=1.5)
    take_turns(
        {"redis": redis.waking, "database": database.waking},
        3,
        lambda taken: figure.measured.append(taken["database"] / taken["redis"]),
    )
    return figure


def _waking_on_sqlite() -> Figure:
    figure = Figure("database broker: commit to body on SQLite, ms", most=25)
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(f"sqlite:///{folder}/brokers.db", None)
        with shop.by_hand_engine.begin() as connection:
            connection.execute(text("CREATE TABLE line (id integer PRIMARY KEY, text text)"))
        shop.alchemy.create_tables()
        take_turns({"sqlite": shop.waking}, 3, lambda taken: figure.measured.append(taken["sqlite"]))
        shop.close()
    return figure


if "BROKERS_URL" in os.environ:
    worker_app = Shop(os.environ["BROKERS_URL"], os.environ["BROKERS_BROKER"] or None).app
