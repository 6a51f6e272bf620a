"""An app with an async task and a bind that gives only synchronous sessions."""

from __future__ import annotations

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from tests.settings import make_app

app = make_app("synchronous")
engine = create_engine("sqlite://")


def new_session() -> Session:
    """Return a session as a user's own code would make it."""
    return Session(engine)


alchemy = Alchemy(app, new_session)


@app.task(shared=False, name="impossible")
async def impossible(session: AsyncSession) -> None:
    """Ask for what the bind cannot give."""
