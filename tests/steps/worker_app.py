"""A long task of steps that real workers run: it parses a document and pays a model for each batch of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy, step
from tests.settings import database_url, make_app

#: Where the model keeps its bill.
BILL_VARIABLE = "CELERY_ALCHEMY_TEST_BILL"
#: Set where the database is the worker's broker.
BROKER_VARIABLE = "CELERY_ALCHEMY_TEST_DATABASE_IS_BROKER"
#: A third as many kills fit into it.
BATCHES = int(os.environ.get("TEST_STEPS", "12"))


class Base(DeclarativeBase):
    """The tables of the app."""


class Batch(Base):
    """A part of a document that was embedded."""

    __tablename__ = "batch"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))


# Its tasks are not shared: the test process has other apps, which would get them too.
app = make_app("steps")
# A kill may fall before the COMMIT again and again, which is what a poisonous step looks like.
alchemy = Alchemy(
    app,
    database_url() or "sqlite://",
    outbox=True,
    broker=BROKER_VARIABLE in os.environ,
    worker_lost_after=2,
    max_deliveries=100,
)


def pay(what: str) -> None:
    """Put something on the bill, as no rollback takes it back; it takes a moment."""
    with Path(os.environ[BILL_VARIABLE]).open("ab", buffering=0) as bill:
        bill.write(f"{what} {os.getpid()}\n".encode())
    threading.Event().wait(0.05)


def parse(session: Session, document: str) -> list[str]:
    """Split a document into its batches."""
    pay("parse")
    session.add(Batch(name=document))
    return [f"{document} {number}" for number in range(BATCHES)]


def embed(session: Session, batch: str) -> int:
    """Have a batch embedded."""
    pay(batch)
    session.add(Batch(name=batch))
    session.flush()
    return len(batch)


async def aparse(session: AsyncSession, document: str) -> list[str]:
    """Do as ``parse``."""
    return await session.run_sync(parse, document)


async def aembed(session: AsyncSession, batch: str) -> int:
    """Do as ``embed``."""
    return await session.run_sync(embed, batch)


@app.task(shared=False, name="ingest", once=True)
def ingest(document: str) -> int:
    """Parse a document and embed its batches."""
    batches = step("parse", parse, document)
    return sum(step(f"embed {n}", embed, batch) for n, batch in enumerate(batches))


@app.task(shared=False, name="ingest.async", once=True)
async def ingest_async(document: str) -> int:
    """Do the same in an event loop."""
    batches = await step("parse", aparse, document)
    return sum([await step(f"embed {n}", aembed, batch) for n, batch in enumerate(batches)])
