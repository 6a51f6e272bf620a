"""Where everything is wired: the settings, the Celery app, the database, and the sending of tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery
from celery_alchemy import Alchemy
from kombu import Exchange, Queue
from sqlalchemy import make_url

from ragline.broker import transport_options
from ragline.databases import index_of, search_index
from ragline.settings import Settings, settings_from
from ragline.tables import Base

# One thread a process: worker processes are the parallelism, and threads of their own would fight for the
# same cores. The libraries read these when they are loaded, in the worker's children.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def create_app(settings: Settings) -> tuple[Celery, Alchemy]:
    """The Celery app and the database that its tasks have sessions of."""
    settings.home.mkdir(parents=True, exist_ok=True)
    app = Celery("ragline", include=["ragline.tasks"])
    app.conf.update(
        broker_url=settings.broker_url,
        task_ignore_result=True,
        worker_hijack_root_logger=False,
        # A step takes seconds: what one machine holds in reserve, another could be doing.
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
    )
    app.conf.update(_queues(settings))
    if settings.has_own_broker:
        app.conf.update(_own_broker(settings.home))
    # Messages are rows of the sender's transaction: what is committed is sent, and what is not never was.
    return app, Alchemy(
        app,
        settings.database_url,
        engine_options=search_index(make_url(settings.database_url).get_backend_name()).ENGINE_OPTIONS,
        outbox=True,
        redeliver_after=settings.redeliver_seconds,
    )


def _queues(settings: Settings) -> dict[str, Any]:
    """Parsing and embedding apart: a worker takes from both, or from one where the machine suits it."""
    names = settings.queue_names
    configuration = {
        "task_queues": [
            Queue(name, Exchange(name, type="direct"), routing_key=name) for name in names.values()
        ],
        "task_default_queue": names["parsing"],
        "task_routes": {"ragline.tasks.embed": {"queue": names["embedding"]}},
        # What workers and commands tell each other stays among those of this installation.
        "control_exchange": f"{settings.queues}-control",
        "event_exchange": f"{settings.queues}-events",
    }
    if settings.broker_url.startswith("redis"):
        configuration["broker_transport_options"] = {"global_keyprefix": f"{settings.queues}:"}
    return configuration


def _own_broker(home: Path) -> dict[str, Any]:
    return {
        "broker_transport": "ragline.broker:Transport",
        "broker_transport_options": transport_options(home),
        # All workers of files are on this machine: a reserve keeps them busy between two looks at the folder.
        "worker_prefetch_multiplier": 8,
    }


def create_tables(alchemy: Alchemy) -> None:
    """Make ragline's tables and the outbox where they are missing; safe in several processes at once."""
    with alchemy.engine.begin() as connection, index_of(connection).creation_lock(connection):
        Base.metadata.create_all(connection)
        alchemy.metadata.create_all(connection)
        index_of(connection).create(connection)


settings = settings_from()
app, alchemy = create_app(settings)
