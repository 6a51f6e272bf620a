"""The types of sessions, tasks and what surrounds them, as a user of the Celery stubs sees them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

from celery import Celery, shared_task
from celery.result import AsyncResult
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from typing_extensions import assert_type

from celery_alchemy import (
    Alchemy,
    ForUpdate,
    SessionReport,
    SessionTask,
    UncommittedChangesError,
    enqueue,
    is_transient,
    on_commit,
    released,
)


class Base(DeclarativeBase):
    """The tables of the shop."""


class Book(Base):
    """What its tasks are about."""

    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


app = Celery("shop")
engine = create_engine("sqlite://")
async_engine: AsyncEngine = create_async_engine("sqlite+aiosqlite://")


def a_session() -> Session:
    return Session(engine)


# Every kind of bind that is documented.
Alchemy()
Alchemy(app)
Alchemy(app, "sqlite:///shop.db", engine_options={"echo": True})
Alchemy(app, engine.url)
Alchemy(app, engine)
Alchemy(app, sessionmaker(engine))
Alchemy(app, a_session)
Alchemy(app, async_engine)
Alchemy(app, async_sessionmaker(async_engine))
Alchemy(app, engine, models=[Base])
alchemy = Alchemy(app, engine, commit_on=("success", "retry"), publish_in_transaction="defer")


def the_block_gives_a_session() -> None:
    with alchemy.session() as session:
        assert_type(session, Session)
    with alchemy.begin() as session:
        assert_type(session, Session)


def the_engine_is_an_engine() -> None:
    assert_type(alchemy.engine, Engine)


def a_bound_task_has_a_session(task: SessionTask) -> None:
    assert_type(task.session, Session)


@app.task
def rename(session: Session, book_id: int, title: str) -> bool:
    return session.is_active


@app.task(bind=True, base=SessionTask)
def publish(self: SessionTask, book_id: int) -> bool:
    assert_type(self.session, Session)
    return self.session.is_active


@app.task(bind=True, base=SessionTask)
async def reprint(self: SessionTask, book_id: int) -> bool:
    assert_type(self.async_session, AsyncSession)
    return (await self.async_session.connection()).in_transaction()


@app.task
async def summarise(session: AsyncSession, book_id: int) -> str:
    return str(await session.scalar(text("SELECT 1")))


@app.task
def shelve(book: Book, others: list[Book], next_one: Book | None, locked: Annotated[Book, ForUpdate]) -> str:
    assert_type(book.title, str)
    assert_type(locked, Book)
    return " ".join(each.title for each in [book, *others, locked]) + (next_one.title if next_one else "")


@shared_task(base=SessionTask)
def withdraw(session: Session, book_id: int) -> bool:
    return session.is_active


typed_app = Celery("typed", task_cls=SessionTask)


@typed_app.task(once=True)
def lend(session: Session, book_id: int) -> bool:
    return session.is_active


@typed_app.task(bind=True)
def return_(self: SessionTask, book_id: int) -> bool:
    return self.session.is_active


def callers_leave_the_session_out(test_session: Session) -> None:
    rename.delay(7, "Emma")
    rename.si(7, title="Emma")
    publish.delay(7)
    withdraw.delay(7)
    withdraw.si(7)
    reprint.delay(7)
    summarise.delay(7)
    # A test may pass its own.
    rename(session=test_session, book_id=7, title="Emma")


def callers_pass_entities_as_they_are(book: Book) -> None:
    shelve.delay(book, [book], None, book)
    shelve.s(book, [book], next_one=book, locked=book)
    shelve(book, [book], None, book)


async def a_coroutine_awaits_a_direct_call(test_session: AsyncSession) -> None:
    await summarise(session=test_session, book_id=7)


def sending_on_commit_returns_a_result(session: Session, asynchronous: AsyncSession, book: Book) -> None:
    assert_type(withdraw.delay_on_commit(7), AsyncResult[Any])
    assert_type(withdraw.apply_async_on_commit((7,), session=asynchronous, countdown=5), AsyncResult[Any])
    assert_type(lend.delay_on_commit(7), AsyncResult[Any])
    assert_type(return_.delay_on_commit(7), AsyncResult[Any])
    enqueue(session, shelve.s(book, [book], None, book))
    enqueue(asynchronous, summarise.s(7))


def an_error_may_be_transient(error: Exception) -> None:
    assert_type(is_transient(error), bool)


@alchemy.on_session_closed
def a_listener_gets_a_report(report: SessionReport) -> None:
    assert_type(report.task_name, str)
    assert_type(report.task_id, str | None)
    assert_type(report.database_seconds, float)


async def the_async_block_gives_an_async_session() -> None:
    async with alchemy.async_session() as session:
        assert_type(session, AsyncSession)


def a_task_with_the_base_is_a_session_task() -> None:
    assert_type(reprint, SessionTask)
    assert_type(publish, SessionTask)
    assert_type(withdraw, SessionTask)


def released_takes_both_kinds_of_session(session: Session) -> None:
    with released(session):
        pass
    with released(session, commit=True):
        pass


async def released_is_asynchronous_too(session: AsyncSession) -> None:
    async with released(session):
        pass


def on_commit_takes_both_kinds_of_session(session: Session, asynchronous: AsyncSession) -> None:
    on_commit(session, lambda: None)
    on_commit(asynchronous, lambda: None)


def an_error_has_its_fields(error: UncommittedChangesError) -> None:
    assert_type(error.what, str)


# --- around -----------------------------------------------------------------------------------------


@contextmanager
def in_tenant(task: SessionTask, session: Session) -> Iterator[None]:
    """Set something for the transaction of a task."""
    session.execute(text("SELECT 1"))
    yield


@asynccontextmanager
async def in_async_tenant(task: SessionTask, session: AsyncSession) -> AsyncIterator[None]:
    """Set something for the transaction of an async task."""
    await session.execute(text("SELECT 1"))
    yield


Alchemy(app, "sqlite://", around=in_tenant)
Alchemy(app, "sqlite://", around=in_async_tenant)


class AuditedTask(SessionTask):
    """A task class with something of its own around its bodies."""

    @contextmanager
    def around(self, session: Session) -> Iterator[None]:
        """Enter what the app has, too."""
        with super().around(session):
            yield
