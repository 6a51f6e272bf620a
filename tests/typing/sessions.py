"""The types of sessions, tasks and what surrounds them, as a user of the Celery stubs sees them."""

from __future__ import annotations

from celery import Celery, shared_task
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import assert_type

from celery_alchemy import Alchemy, SessionTask, UncommittedChangesError, on_commit, released

app = Celery("shop")
engine = create_engine("sqlite://")


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


@shared_task(base=SessionTask)
def withdraw(session: Session, book_id: int) -> bool:
    return session.is_active


def callers_leave_the_session_out(test_session: Session) -> None:
    rename.delay(7, "Emma")
    rename.si(7, title="Emma")
    publish.delay(7)
    withdraw.delay(7)
    withdraw.si(7)
    # A test may pass its own.
    rename(session=test_session, book_id=7, title="Emma")


def a_task_with_the_base_is_a_session_task() -> None:
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
