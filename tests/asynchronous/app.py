"""The async tasks that real workers run; the test's process sends them by name."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from sqlalchemy import String, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy, SessionTask
from tests.settings import database_url, make_app

#: Set to "1" to have an async task run while the worker loads this module, before it forks.
BEFORE_FORK_VARIABLE = "CELERY_ALCHEMY_TEST_BEFORE_FORK"


class Base(DeclarativeBase):
    """The tables of the app."""


class Mark(Base):
    """What a task wrote."""

    __tablename__ = "mark"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200))


# Its tasks are not shared: the test process has other apps, which would get them too.
app = make_app("asynchronous")
alchemy = Alchemy(app, database_url() or "sqlite+aiosqlite://")

_arrived: list[asyncio.Future[None]] = []


async def _connection_of(session: AsyncSession) -> int:
    raw = await (await session.connection()).get_raw_connection()
    return id(raw.driver_connection)


@app.task(shared=False, name="where")
async def where(session: AsyncSession) -> list[int]:
    """Say in which process, loop and engine this runs, and on which connection."""
    await session.execute(text("SELECT 1"))
    engine = (await session.connection()).engine
    return [os.getpid(), id(asyncio.get_running_loop()), id(engine.sync_engine.pool), await _connection_of(session)]


@app.task(shared=False, name="meet")
async def meet(session: AsyncSession, number: int, count: int) -> int:
    """Write a mark, and stay in the middle of the transaction's life until `count` tasks are there."""
    await session.execute(text("SELECT 1"))
    await session.rollback()
    mine = asyncio.get_running_loop().create_future()
    _arrived.append(mine)
    if len(_arrived) == count:
        for each in _arrived:
            each.set_result(None)
        _arrived.clear()
    await asyncio.wait_for(mine, 30)
    session.add(Mark(name=f"met {number}"))
    return number


def record(session: Session, exc: BaseException, name: str) -> None:
    """Write down why a task failed."""
    session.add(Mark(name=f"{name}: {type(exc).__name__}"))


async def record_in_loop(session: AsyncSession, exc: BaseException, name: str) -> None:
    """Write down why a task failed, in an event loop."""
    session.add(Mark(name=f"{name}: {type(exc).__name__}"))
    await session.flush()


async def _wait(session: AsyncSession, name: str) -> None:
    session.add(Mark(name=name))
    await session.flush()
    try:
        if session.get_bind().dialect.name == "postgresql":
            await session.execute(text("SELECT pg_sleep(60)"))
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        async with alchemy.async_session() as other:
            # SQLite has one writer, and that is this task still.
            if other.get_bind().dialect.name == "postgresql":
                other.add(Mark(name=f"{name}: cancelled"))
                await other.commit()
        raise


@app.task(shared=False, name="wait.soft", soft_time_limit=1, record_failure=record)
async def wait_soft(session: AsyncSession, name: str) -> None:
    """Be in the middle of a statement when the soft time limit comes."""
    await _wait(session, name)


@app.task(shared=False, name="wait.hard", time_limit=2, record_failure=record)
async def wait_hard(session: AsyncSession, name: str) -> None:
    """Be in the middle of a statement when the hard time limit comes."""
    if session.get_bind().dialect.name == "postgresql":
        # The task's own limit for statements is the same moment: either of the two might be first.
        await session.execute(text("SET LOCAL statement_timeout = '4s'"))
    await _wait(session, name)


@app.task(shared=False, name="dies", record_failure=record_in_loop)
async def dies(name: str) -> None:
    """Take the process down."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(shared=False, name="retry", bind=True, base=SessionTask)
async def retry(self: SessionTask, name: str) -> int:
    """Succeed at the second attempt."""
    session: Any = self.session
    session.add(Mark(name=f"{name} {self.request.retries}"))
    await session.flush()
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return int(self.request.retries)


if os.environ.get(BEFORE_FORK_VARIABLE) == "1":
    where()
