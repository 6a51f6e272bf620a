"""A task that works in several databases: each has an Alchemy, and the app has one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, enqueue
from celery_alchemy.requests.event_loop import process_loop
from tests.services.databases import Database
from tests.unit.shop import Base, Book, Shop, add_books


@pytest.fixture
def analytics(tmp_path: Path) -> Iterator[Alchemy]:
    """A second database with the same tables, which no app is tied to."""
    alchemy = Alchemy(bind=f"sqlite:///{tmp_path / 'analytics.db'}")
    Base.metadata.create_all(alchemy.engine)
    yield alchemy
    process_loop.close()
    alchemy.engine.dispose()


def titles_in(alchemy: Alchemy) -> list[str]:
    with alchemy.session() as session:
        return [book.title for book in session.query(Book).order_by(Book.id)]


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("fails", [False, True])
def test_block_of_a_second_alchemy_is_a_transaction_of_its_own(
    shop: Shop,
    analytics: Alchemy,
    fails: bool,
) -> None:
    """It is committed at its end, whatever becomes of the task."""

    @shop.task()
    def sell(session: Session, title: str) -> bool:
        add_books(session, [title])
        with analytics.begin() as facts:
            facts.add(Book(title=f"{title} sold"))
        if fails:
            raise ValueError("wrong")
        return session is not facts

    traced = shop.trace(sell, "Emma")

    assert traced.state == ("FAILURE" if fails else "SUCCESS")
    assert shop.titles() == ([] if fails else ["Emma"])
    assert titles_in(analytics) == ["Emma sold"]
    assert shop.checked_out() == 0


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
def test_async_task_has_the_async_block_of_a_second_alchemy(shop: Shop, analytics: Alchemy) -> None:
    """The second engine belongs to the same event loop."""

    @shop.task()
    async def sell(session: AsyncSession, title: str) -> bool:
        session.add(Book(title=title))
        async with analytics.async_session() as facts:
            facts.add(Book(title=f"{title} sold"))
            await facts.commit()
        return facts is not session

    traced = shop.trace(sell, "Emma")

    assert traced.value is True
    assert shop.titles() == ["Emma"]
    assert titles_in(analytics) == ["Emma sold"]


@pytest.mark.databases("sqlite")
def test_send_on_commit_in_the_block_waits_for_the_block(shop: Shop, analytics: Alchemy) -> None:
    """The innermost session is the one at hand; `session=` names the task's."""

    @shop.task(name="note")
    def note() -> None: ...

    @shop.task()
    def sell(session: Session) -> tuple[int, int]:
        with analytics.begin():
            note.delay_on_commit()
            note.apply_async_on_commit(session=session)
            inside = shop.waiting()
        return inside, shop.waiting()

    assert shop.trace(sell).value == (0, 1)
    assert shop.waiting() == 2


@pytest.mark.databases("sqlite")
def test_text_beside_a_session_is_a_comment(shop: Shop) -> None:
    """Annotated[Session, "of the shop"] is a documented parameter."""

    @shop.task()
    def adds(session: Annotated[Session, "where the books are"]) -> None:
        add_books(session, ["Emma"])

    assert shop.trace(adds).state == "SUCCESS"
    assert shop.titles() == ["Emma"]


@pytest.mark.databases("sqlite")
def test_second_alchemy_of_an_app_is_warned_of(shop: Shop, tmp_path: Path) -> None:
    """Whoever ties it by mistake would write to the wrong database, and hear nothing of it."""
    expected = r"had an Alchemy already.*analytics = Alchemy\(bind=url\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        Alchemy(shop.app, f"sqlite:///{tmp_path / 'other.db'}")

    assert caught[0].filename == __file__


@pytest.mark.databases("sqlite")
@pytest.mark.filterwarnings("error")
def test_alchemy_that_is_initialised_twice_for_its_app_is_not_warned_of(shop: Shop) -> None:
    """It replaces nothing."""
    shop.alchemy.init_app(shop.app)


class FactsBase(DeclarativeBase):
    """Tables of a database beside the shop's."""


class Fact(FactsBase):
    """A row that stands in the other database."""

    __tablename__ = "fact"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("has_default", [True, False])
def test_outbox_with_binds_is_in_the_default_database(
    database: Database,
    tmp_path: Path,
    has_default: bool,
) -> None:
    """Without one, whoever sends, and a `once` task, is told what to write."""
    facts = create_engine(f"sqlite:///{tmp_path / 'facts.db'}")
    FactsBase.metadata.create_all(facts)
    Base.metadata.create_all(database.engine)
    binds: dict[Any, Any] = {Base: database.engine, FactsBase: facts}
    app = Celery("binds", broker="memory://", backend="cache+memory://", set_as_current=False)
    maker = sessionmaker(database.engine if has_default else None, binds=binds)
    alchemy = Alchemy(app, maker, outbox=True, publish_in_transaction="allow")
    Alchemy(bind=database.engine).create_tables()

    @app.task(name="both", shared=False)
    def both(session: Session) -> None:
        add_books(session, ["Emma"])
        session.add(Fact())

    @app.task(name="twice", once=True, shared=False)
    def twice(session: Session) -> None:
        add_books(session, ["Letters"])

    def send() -> None:
        with alchemy.begin() as session:
            # A task is sent from a transaction that has used the other database only.
            session.add(Fact())
            session.flush()
            enqueue(session, both.s())

    assert both.apply().state == "SUCCESS"
    if has_default:
        send()
        assert twice.apply().state == "SUCCESS"
    else:
        expected = r"celery_outbox.*sessionmaker\(engine, binds="
        with pytest.raises(ConfigurationError, match=expected):
            send()
        with pytest.raises(ConfigurationError, match="celery_outbox"):
            twice.apply().get()
    with sessionmaker(binds=binds)() as session:
        assert len(session.scalars(select(Fact)).all()) == 1 + has_default
        assert sorted(session.scalars(select(Book.title))) == ["Emma", "Letters"][: 1 + has_default]
    facts.dispose()
