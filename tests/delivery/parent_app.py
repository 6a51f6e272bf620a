"""Tasks that end in their worker's parent process, and whose record waits for a row that somebody has locked."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.delivery.outbox_stand import Effect
from tests.settings import database_url, make_app

app = make_app("parent")
alchemy = Alchemy(app, database_url() or "sqlite://", relay=False)


def record(session: Session, exc: BaseException, *args: Any) -> None:
    """Write into a row that may be locked."""
    session.execute(update(Effect).where(Effect.name == "locked").values(name=type(exc).__name__))


@app.task(shared=False, name="slow", record_failure=record, time_limit=1)
def slow(session: Session) -> None:
    """Run into the hard time limit."""
    time.sleep(60)


@app.task(shared=False, name="slow.once", once=True, record_failure=record, time_limit=1)
def slow_once(session: Session) -> None:
    """Run into the hard time limit, to be dead then."""
    time.sleep(60)


@app.task(shared=False, name="dies", record_failure=record)
def dies(session: Session) -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(shared=False, name="other", time_limit=2)
def other() -> None:
    """Run into a hard time limit that has nothing to record."""
    time.sleep(60)
