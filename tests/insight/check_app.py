"""The app that the tests of `celery -A app alchemy check` name: a once task without a time limit."""

from __future__ import annotations

from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import database_url, make_app

app = make_app("checked")
alchemy = Alchemy(app, database_url(), outbox=True)


@app.task(name="pays", once=True)
def pays(session: Session) -> None:
    """Ask for the table and, having no time limit, for a warning."""
