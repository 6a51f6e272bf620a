"""Where everything is wired: the settings, the Celery app, the database, and the sending of tasks."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, worker_ready
from celery_alchemy import Alchemy
from kombu import Exchange, Queue
from sqlalchemy import Engine, inspect, make_url
from sqlalchemy.orm import Session

from ragline.databases import index_of, search_index
from ragline.errors import ConfigurationError
from ragline.settings import Settings, settings_from
from ragline.tables import Base
from ragline.workers import end_with_starter, wake_at_signals

# One thread a process: worker processes are the parallelism, and threads of their own would fight for the
# same cores. The libraries read these when they are loaded, in the worker's children.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def create_app(settings: Settings) -> tuple[Celery, Alchemy]:
    """The Celery app and the database that its tasks have sessions of."""
    _make_home(settings.home)
    app = Celery("ragline", include=["ragline.tasks"])
    app.conf.update(
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=_prefetch_multiplier(settings),
        broker_connection_retry_on_startup=True,
    )
    app.conf.update(_queues(settings))
    if settings.broker_url is not None:
        app.conf.update(broker_url=settings.broker_url)
    # Messages are rows of the sender's transaction: what is committed is sent, and what is not never was.
    return app, Alchemy(
        app,
        settings.database_url,
        engine_options=search_index(_backend(settings)).ENGINE_OPTIONS,
        broker=settings.database_is_broker,
        outbox=True,
        redeliver_after=settings.redeliver_seconds,
        worker_lost_after=settings.worker_lost_seconds,
    )


def _backend(settings: Settings) -> str:
    return make_url(settings.database_url).get_backend_name()


def _prefetch_multiplier(settings: Settings) -> int:
    """How many messages a worker holds for each of its processes.

    A step takes seconds: what one machine holds in reserve, another could be doing. All workers on an SQLite
    file are on one machine, and there a claim is a transaction that all others wait for: few are better.
    """
    return 4 if settings.database_is_broker and _backend(settings) == "sqlite" else 1


def _make_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "is no folder" if isinstance(error, FileExistsError) else f"cannot be made: {error.strerror}"
        raise ConfigurationError(
            f"RAGLINE_HOME: {home} {why}. Set it to a folder that you may write to."
        ) from error


def _queues(settings: Settings) -> dict[str, Any]:
    """Parsing and embedding apart: a worker takes from both, or from one where the machine suits it."""
    names = settings.queue_names
    # A document that was begun is ended before the next one is begun: the first is ready at once, not when
    # all are parsed. The database takes 9 first; what a number means to other brokers differs.
    sooner, first = ({"priority": 5}, {"priority": 9}) if settings.database_is_broker else ({}, {})
    configuration = {
        "task_queues": [
            Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names.values()
        ],
        "task_default_queue": names["parsing"],
        "task_routes": {
            "ragline.tasks.split": {"queue": names["parsing"], **sooner},
            "ragline.tasks.embed": {"queue": names["embedding"], **first},
        },
        # What workers and commands tell each other stays among those of this installation.
        "control_exchange": f"{settings.queues}-control",
        "event_exchange": f"{settings.queues}-events",
    }
    if settings.broker_url is not None and settings.broker_url.startswith("redis"):
        configuration["broker_transport_options"] = {"global_keyprefix": f"{settings.queues}:"}
    return configuration


def create_tables(alchemy: Alchemy) -> None:
    """Make ragline's tables and the outbox where they are missing; safe in several processes at once."""
    wanted = {*Base.metadata.tables, *alchemy.metadata.tables, "chunk_keywords"}
    if wanted <= set(inspect(reading_engine(alchemy)).get_table_names()):
        return  # as nearly always: who only reads then waits for no writer
    with alchemy.engine.begin() as connection, index_of(connection).creation_lock(connection):
        Base.metadata.create_all(connection)
        alchemy.metadata.create_all(connection)
        index_of(connection).create(connection)


@cache
def reading_engine(alchemy: Alchemy) -> Engine:
    """The engine of transactions that only read."""
    engine = alchemy.engine
    return search_index(engine.dialect.name).reading_engine(engine)


def reading_session() -> Session:
    """A session that only reads: it sees one state of the database, and waits for no writer."""
    return Session(reading_engine(alchemy))


settings = settings_from()
app, alchemy = create_app(settings)
celeryd_init.connect(end_with_starter)
worker_ready.connect(wake_at_signals)
