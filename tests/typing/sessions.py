"""The types of sessions, tasks and what surrounds them, as a user of the Celery stubs sees them."""

from __future__ import annotations

from celery import Celery
from celery.result import AsyncResult
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


def the_result_keeps_its_type(session: Session) -> None:
    assert_type(rename(session=session, book_id=7, title="Emma"), bool)
    assert_type(rename.apply_async(args=(7, "Emma")), AsyncResult[bool])


@app.task(bind=True, base=SessionTask)
def publish(self: SessionTask, book_id: int) -> bool:
    assert_type(self.session, Session)
    return self.session.is_active


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
    on_commit(asynchronous, lambda: print)


def an_error_has_its_fields(error: UncommittedChangesError) -> None:
    assert_type(error.what, str)
