"""An app whose worker serves its metrics, as the how-to page has it; the test's process sends its tasks by name."""

from __future__ import annotations

import os
from typing import Any

from celery.signals import worker_ready
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.integrations.prometheus import instrument
from tests.settings import database_url, make_app

PORT_VARIABLE = "CELERY_ALCHEMY_TEST_METRICS_PORT"

app = make_app("measured")
alchemy = Alchemy(app, database_url() or "sqlite://")
instrument(alchemy)


@worker_ready.connect
def serve(**_: Any) -> None:
    """Serve the metrics of all processes from the parent."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    start_http_server(int(os.environ[PORT_VARIABLE]), "127.0.0.1", registry=registry)


@app.task(shared=False, name="ask")
def ask(session: Session, fail: bool) -> int:
    """Send two statements; return the process."""
    session.execute(text("SELECT 1"))
    session.execute(text("SELECT 2"))
    if fail:
        raise ValueError("wrong")
    return os.getpid()
