"""A task with sessions of several databases."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, SessionReport, SessionTask, enqueue
from celery_alchemy.loop import process_loop
from tests.services.databases import Database
from tests.unit.shop import Base, Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")

Analytics = Annotated[Session, "analytics"]


@pytest.fixture
def analytics(shop: Shop, tmp_path: Path) -> Alchemy:
    """A second database of the shop's app, with the same tables."""
    alchemy = Alchemy(shop.app, f"sqlite:///{tmp_path / 'analytics.db'}", name="analytics")
    Base.metadata.create_all(alchemy.engine)
    return alchemy


def titles_in(alchemy: Alchemy) -> list[str]:
    with alchemy.session() as session:
        return [book.title for book in session.query(Book).order_by(Book.id)]


def two_books(shop: Shop, exc: Exception | None = None) -> Any:
    """Return a task that writes one book to each database and then raises."""

    @shop.task(name="two_books")
    def two_books(session: Session, title: str, analytics: Analytics) -> bool:
        add_books(session, [title])
        add_books(analytics, [f"{title} in analytics"])
        if exc is not None:
            raise exc
        return session is not analytics

    return two_books


def test_each_database_has_its_own_session_and_both_commit(shop: Shop, analytics: Alchemy) -> None:
    """The session without a name is the default's, the named one the other's; callers see neither."""
    traced = shop.trace(two_books(shop), "Emma")

    assert traced.value is True
    assert shop.titles() == ["Emma"]
    assert titles_in(analytics) == ["Emma in analytics"]


def test_both_databases_roll_back_when_the_body_fails(shop: Shop, analytics: Alchemy) -> None:
    """Neither keeps its book, and no connection stays out."""
    traced = shop.trace(two_books(shop, ValueError("wrong")), "Emma")

    assert traced.state == "FAILURE"
    assert shop.titles() == []
    assert titles_in(analytics) == []
    assert shop.checked_out() == 0


def test_named_database_that_cannot_commit_rolls_the_default_back(shop: Shop, analytics: Alchemy) -> None:
    """The named database commits first: when it refuses, the default one, whose commit sends messages, does not commit."""

    @shop.task()
    def adds(session: Session, other: Analytics) -> None:
        add_books(session, ["Emma"])
        other.add_all([Book(title="twice"), Book(title="twice")])

    assert shop.trace(adds).state == "FAILURE"
    assert shop.titles() == []
    assert titles_in(analytics) == []


def test_task_may_ask_for_a_named_database_only(shop: Shop, analytics: Alchemy) -> None:
    """One parameter with a name is the named database's session."""

    @shop.task()
    def adds(other: Analytics) -> None:
        add_books(other, ["Emma"])

    assert shop.trace(adds).state == "SUCCESS"
    assert titles_in(analytics) == ["Emma"]
    assert shop.titles() == []


def test_name_that_no_alchemy_has_is_refused(shop: Shop, analytics: Alchemy) -> None:
    """The message names the task, the name and what to write; nothing is committed."""

    @shop.task(name="adds")
    def adds(session: Session, other: Annotated[Session, "archive"]) -> None:
        add_books(session, ["Emma"])

    traced = shop.trace(adds)

    assert isinstance(traced.value, Exception)
    assert type(traced.value) is ConfigurationError
    assert "'adds'" in str(traced.value)
    assert "name='archive'" in str(traced.value)
    assert shop.titles() == []


@pytest.mark.parametrize("promise", [{"once": True}, {"transient_retries": 3}], ids=lambda value: next(iter(value)))
def test_promise_that_cannot_span_databases_is_refused(shop: Shop, analytics: Alchemy, promise: dict[str, Any]) -> None:
    """A run that is repeated would write to the named database again."""

    def adds(session: Session, other: Analytics) -> None: ...

    task: Any = shop.task(name="adds", **promise)(adds)
    with pytest.raises(ConfigurationError) as refused:
        task.name  # noqa: B018 - Celery makes the task at its first use.

    assert f"'adds' has {next(iter(promise))}" in str(refused.value)
    assert "'analytics'" in str(refused.value)


def test_annotated_text_is_a_comment_where_there_is_one_database(shop: Shop) -> None:
    """Annotated[Session, "of the shop"] is a documented parameter, as it was before there were names."""

    @shop.task()
    def adds(session: Annotated[Session, "where the books are"]) -> None:
        add_books(session, ["Emma"])

    assert shop.trace(adds).state == "SUCCESS"
    assert shop.titles() == ["Emma"]


def test_listener_of_each_alchemy_hears_of_its_own_sessions(shop: Shop, analytics: Alchemy) -> None:
    """The named one's report has the name behind the task's."""
    heard: dict[str, list[str]] = {"default": [], "analytics": []}

    def into(list_: list[str]) -> Callable[[SessionReport], object]:
        return lambda report: list_.append(f"{report.task_name}: {report.outcome}")

    shop.alchemy.on_session_closed(into(heard["default"]))
    analytics.on_session_closed(into(heard["analytics"]))

    shop.trace(two_books(shop), "Emma")

    assert heard == {"default": ["two_books: success"], "analytics": ["two_books (analytics): success"]}


@pytest.mark.parametrize("given", [{"session"}, {"analytics"}, {"session", "analytics"}], ids=lambda given: "+".join(sorted(given)))
def test_session_that_the_caller_gives_is_used_for_its_own_database(shop: Shop, analytics: Alchemy, given: set[str]) -> None:
    """In a direct call each session goes to the parameter it was given for, and is neither committed nor closed."""
    task = two_books(shop)

    with shop.alchemy.session() as default, analytics.session() as named:
        own = {"session": default, "analytics": named}
        task("Emma", **{name: own[name] for name in given})
        left_open = {name for name in own if own[name].in_transaction()}
        default.rollback()
        named.rollback()

    assert left_open == given
    assert shop.titles() == ([] if "session" in given else ["Emma"])
    assert titles_in(analytics) == ([] if "analytics" in given else ["Emma in analytics"])


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("promise", [{"once": True}, {"transient_retries": 3}], ids=lambda value: next(iter(value)))
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("late", ["not made", "made", "class"])
def test_text_is_a_comment_until_the_app_has_a_second_database(
    shop: Shop, tmp_path: Path, promise: dict[str, Any], is_async: bool, late: str
) -> None:
    """A promise is not refused for a comment; once the text is a name it is, whenever the task was made."""
    shop.alchemy.create_tables()

    def adds(session: Annotated[Session, "analytics"]) -> None:
        add_books(session, ["Emma"])

    async def adds_async(session: Annotated[AsyncSession, "analytics"]) -> None:
        session.add(Book(title="Emma"))

    body = adds_async if is_async else adds
    if late == "class":
        adds_class = type("Adds", (SessionTask,), {"name": "adds", "run": staticmethod(body), **promise})
        task: Any = shop.app.register_task(adds_class())
    else:
        task = shop.task(name="adds", **promise)(body)

    try:
        if late != "not made":
            assert shop.trace(task).state == "SUCCESS"
            assert shop.titles() == ["Emma"]
        with pytest.raises(ConfigurationError, match=f"'adds' has {next(iter(promise))}"):
            Alchemy(shop.app, f"sqlite:///{tmp_path / 'analytics.db'}", name="analytics")
            task.name  # noqa: B018 - Celery makes the task at its first use.
    finally:
        process_loop.close()


ASYNC = ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg")
AsyncAnalytics = Annotated[AsyncSession, "analytics"]


@pytest.fixture
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


def two_books_async(shop: Shop, exc: Exception | None = None) -> Any:
    """Return an async task that writes one book to each database and then raises."""

    @shop.task(name="two_books")
    async def two_books(session: AsyncSession, title: str, analytics: AsyncAnalytics) -> bool:
        session.add(Book(title=title))
        analytics.add(Book(title=f"{title} in analytics"))
        await session.flush()
        await analytics.flush()
        if exc is not None:
            raise exc
        return session is not analytics

    return two_books


@pytest.mark.databases(*ASYNC)
@pytest.mark.usefixtures("_end_loop")
def test_async_task_has_a_session_of_each_database(shop: Shop, analytics: Alchemy) -> None:
    """Both commit, and each Alchemy hears of its own session."""
    heard: list[str] = []
    shop.alchemy.on_session_closed(lambda report: heard.append(report.task_name))
    analytics.on_session_closed(lambda report: heard.append(report.task_name))

    traced = shop.trace(two_books_async(shop), "Emma")

    assert traced.value is True
    assert shop.titles() == ["Emma"]
    assert titles_in(analytics) == ["Emma in analytics"]
    assert heard == ["two_books (analytics)", "two_books"]


@pytest.mark.databases(*ASYNC)
@pytest.mark.usefixtures("_end_loop")
def test_async_task_that_fails_rolls_both_databases_back(shop: Shop, analytics: Alchemy) -> None:
    """Neither keeps its book, and the next task finds both free."""
    assert shop.trace(two_books_async(shop, ValueError("wrong")), "Emma").state == "FAILURE"

    assert shop.titles() == []
    assert titles_in(analytics) == []


@pytest.mark.databases(*ASYNC)
@pytest.mark.usefixtures("_end_loop")
def test_async_task_may_ask_for_a_named_database_only(shop: Shop, analytics: Alchemy) -> None:
    """One parameter with a name is the named database's session."""

    @shop.task()
    async def adds(other: AsyncAnalytics) -> None:
        other.add(Book(title="Emma"))

    assert shop.trace(adds).state == "SUCCESS"
    assert titles_in(analytics) == ["Emma"]
    assert shop.titles() == []


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.usefixtures("_end_loop")
def test_name_that_no_alchemy_has_is_refused_to_an_async_task(shop: Shop, analytics: Alchemy) -> None:
    """As for a plain task."""

    @shop.task(name="adds")
    async def adds(session: AsyncSession, other: Annotated[AsyncSession, "archive"]) -> None: ...

    traced = shop.trace(adds)

    assert type(traced.value) is ConfigurationError
    assert "name='archive'" in str(traced.value)


@pytest.mark.databases("postgresql+asyncpg", "sqlite+aiosqlite")
@pytest.mark.usefixtures("_end_loop")
@pytest.mark.parametrize("given", [{"session"}, {"analytics"}, {"session", "analytics"}], ids=lambda given: "+".join(sorted(given)))
def test_async_session_that_the_caller_gives_is_used_for_its_own_database(shop: Shop, analytics: Alchemy, given: set[str]) -> None:
    """In a direct call each session goes to the parameter it was given for, and is neither committed nor closed."""
    task = two_books_async(shop)

    async def call() -> set[str]:
        async with shop.alchemy.async_session() as default, analytics.async_session() as named:
            own = {"session": default, "analytics": named}
            await task("Emma", **{name: own[name] for name in given})
            left_open = {name for name in own if own[name].in_transaction()}
            await default.rollback()
            await named.rollback()
            return left_open

    assert asyncio.run(call()) == given
    assert shop.titles() == ([] if "session" in given else ["Emma"])
    assert titles_in(analytics) == ([] if "analytics" in given else ["Emma in analytics"])


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("name", [None, "analytics"])
def test_second_alchemy_of_the_same_name_is_warned_of(shop: Shop, analytics: Alchemy, tmp_path: Path, name: str | None) -> None:
    """Whoever forgot the name would write everything to the wrong database, and hear nothing of it."""
    with pytest.warns(UserWarning, match=r"had an Alchemy.* already.*name='analytics'") as caught:
        Alchemy(shop.app, f"sqlite:///{tmp_path / 'other.db'}", name=name)

    assert caught[0].filename == __file__


@pytest.mark.databases("sqlite")
@pytest.mark.filterwarnings("error")
def test_alchemy_that_is_initialised_twice_for_its_app_is_not_warned_of(shop: Shop, analytics: Alchemy) -> None:
    """It replaces nothing."""
    analytics.init_app(shop.app)


class FactsBase(DeclarativeBase):
    """Tables of a database beside the shop's."""


class Fact(FactsBase):
    """A row that stands in the other database."""

    __tablename__ = "fact"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("has_default", [True, False])
def test_outbox_with_binds_is_in_the_default_database(database: Database, tmp_path: Path, has_default: bool) -> None:
    """Without one, whoever sends, and a `once` task, is told what to write."""
    facts = create_engine(f"sqlite:///{tmp_path / 'facts.db'}")
    FactsBase.metadata.create_all(facts)
    Base.metadata.create_all(database.engine)
    binds: dict[Any, Any] = {Base: database.engine, FactsBase: facts}
    app = Celery("binds", broker="memory://", backend="cache+memory://", set_as_current=False)
    maker = sessionmaker(database.engine if has_default else None, binds=binds)
    alchemy = Alchemy(app, maker, outbox=True, publish_in_transaction="allow")
    Alchemy(app, database.engine, name="making").create_tables()

    @app.task(name="both", shared=False)
    def both(session: Session) -> None:
        add_books(session, ["Emma"])
        session.add(Fact())

    @app.task(name="twice", once=True, shared=False)
    def twice(session: Session) -> None:
        add_books(session, ["Letters"])

    def send() -> None:
        with alchemy.begin() as session:
            session.add(Fact())  # a task is sent from a transaction that has used the other database only
            session.flush()
            enqueue(session, both.s())

    assert both.apply().state == "SUCCESS"
    if has_default:
        send()
        assert twice.apply().state == "SUCCESS"
    else:
        with pytest.raises(ConfigurationError, match=r"celery_outbox.*sessionmaker\(engine, binds="):
            send()
        with pytest.raises(ConfigurationError, match="celery_outbox"):
            twice.apply().get()
    with sessionmaker(binds=binds)() as session:
        assert len(session.scalars(select(Fact)).all()) == 1 + has_default
        assert sorted(session.scalars(select(Book.title))) == ["Emma", "Letters"][: 1 + has_default]
    facts.dispose()
