"""An app whose tasks hold a connection each until enough of them do, in one process."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app
from tests.stand import task_of
from tests.waiting import eventually

app = make_app("crowd")
alchemy = Alchemy(app, database_url() or "sqlite:///crowd.db", engine_options={"pool_timeout": 2})
holding: set[int] = set()


@task_of(app, name="hold")
def hold(session: Session, number: int, wanted: int) -> int:
    """Hold a connection until so many tasks do; return how many that were."""
    session.execute(text("SELECT 1"))
    holding.add(number)
    eventually(lambda: len(holding) >= wanted, timeout=40)
    return len(holding)
