"""Worker processes killed with SIGKILL in every state of a document: it goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from celery_alchemy import Alchemy
from celery_alchemy.operations.dead_tasks import status
from sqlalchemy import select
from tests.services.databases import Databases
from tests.waiting import eventually

from pipelines import LETTERS, empty_index, long_text, offer
from ragline import controls
from ragline.app import alchemy, app, create_tables, settings
from ragline.audit import audit
from ragline.states import State
from ragline.tables import Document
from ragline.workers import stop, worker_arguments

DEADLINE_SECONDS = 120.0


@pytest.fixture(params=("sqlite", "postgresql"))
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Alchemy]:
    """A database that workers and this process share: the app's own file, or a server's."""
    empty_index()
    if request.param == "sqlite":
        yield alchemy
        return
    databases = Databases()
    shared = Alchemy(app, databases.open(request.param, tmp_path).url, broker=True)
    create_tables(shared)
    yield shared
    shared.engine.dispose()
    alchemy.init_app(app)
    databases.close()


@contextmanager
def deadly_worker(database: Alchemy, struck: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker of two processes whose steps kill them."""
    struck.mkdir()
    environment = {
        **os.environ,
        "RAGLINE_DATABASE_URL": database.engine.url.render_as_string(hide_password=False),
        "RAGLINE_TEST_STRUCK": str(struck),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with (settings.home / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "deadly_app", *worker_arguments(processes=2)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield worker
    finally:
        stop(worker)


def test_a_worker_killed_in_every_state_loses_and_doubles_nothing(database: Alchemy, tmp_path: Path) -> None:
    """At the begin of each step and between its last write and its commit: every document ends ready and whole."""
    struck = tmp_path / "struck"
    with database.begin() as session:
        ids = [
            controls.add(session, offer(long_text(word), f"file:///{word}.txt"), LETTERS).document_id
            for word in ("whale", "bee")
        ]

    def states() -> list[State]:
        with database.session() as session:
            return list(session.scalars(select(Document.state).order_by(Document.id)))

    def messages() -> tuple[int, int, int]:
        counts = status(database.engine)
        return counts["waiting"], counts["owed"], counts["dead"]

    with deadly_worker(database, struck):
        eventually(lambda: states() == [State.READY] * 2, timeout=DEADLINE_SECONDS)
        eventually(lambda: messages() == (0, 0, 0), timeout=DEADLINE_SECONDS)

    steps = ("parse", "split", "embed")
    assert {file.name for file in struck.iterdir()} == {
        f"{step} {document_id} {when}" for step in steps for document_id in ids for when in ("begins", "ends")
    }
    with database.session() as session:
        assert audit(session) == []
