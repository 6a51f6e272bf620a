"""released() does not let row locks go without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import ForUpdate, LocksHeldError, UncommittedChangesError, released
from celery_alchemy.requests.event_loop import process_loop
from celery_alchemy.testing import joined
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mariadb")

Locks = Callable[[Session], object]
SERVERS = ("postgresql", "mariadb")
ROW_LOCK = select(Book).with_for_update()
SUBQUERY = select(ROW_LOCK.subquery().c.id)

ASKED: dict[str, Locks] = {
    "statement": lambda s: s.scalars(ROW_LOCK).all(),
    "columns": lambda s: s.execute(select(Book.id).with_for_update()).all(),
    "get": lambda s: s.get(Book, 1, with_for_update=True),
    "query": lambda s: s.query(Book).with_for_update().all(),
    "refresh": lambda s: s.refresh(s.get_one(Book, 1), with_for_update=True),
    "read": lambda s: s.scalars(select(Book).with_for_update(read=True)).all(),
}
WRITTEN: dict[str, Locks] = {
    "skip locked": lambda s: s.scalars(select(Book).with_for_update(skip_locked=True)).all(),
    "text": lambda s: s.execute(text("select id from book for update")).all(),
    "text of several lines": lambda s: s.execute(text("SELECT id\nFROM book\nFOR  UPDATE")).all(),
    "driver's own SQL": lambda s: s.connection().exec_driver_sql("SELECT id FROM book FOR UPDATE"),
    "subquery": lambda s: s.execute(SUBQUERY).all(),
    "entity from text": lambda s: s.scalars(select(Book).from_statement(text("SELECT * FROM book FOR UPDATE"))).all(),
}
ON_POSTGRESQL: dict[str, Locks] = {
    "share in text": lambda s: s.execute(text("SELECT id FROM book FOR KEY SHARE")).all(),
    "driver cursor": lambda s: s.connection().connection.cursor().execute("SELECT id FROM book FOR UPDATE"),
}


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


@pytest.fixture(autouse=True)
def _one_book(shop: Shop) -> None:
    shop.database.execute("INSERT INTO book (title) VALUES ('Emma')")


def release_after(shop: Shop, lock: Locks, **options: Any) -> Any:
    """Run a task that locks and releases; return what it returned or raised."""

    @shop.task()
    def work(session: Session) -> int:
        lock(session)
        with released(session, **options):
            return shop.checked_out()

    return shop.trace(work).value


@pytest.mark.parametrize("kind", ASKED)
def test_lock_that_was_asked_for_is_not_let_go(shop: Shop, kind: str) -> None:
    """On SQLite it is the transaction's own lock that keeps others from writing, and it would be gone too."""
    error = release_after(shop, ASKED[kind])

    assert isinstance(error, LocksHeldError)
    assert "locked rows of book" in str(error)
    assert shop.checked_out() == 0


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("kind", WRITTEN)
def test_lock_in_the_text_is_not_let_go(shop: Shop, kind: str) -> None:
    """However it was written."""
    error = release_after(shop, WRITTEN[kind])

    assert isinstance(error, LocksHeldError)
    assert shop.checked_out() == 0


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("kind", ON_POSTGRESQL)
def test_lock_that_postgresql_knows_of_is_not_let_go(shop: Shop, kind: str) -> None:
    """It tells whose rows are locked, also if no statement of the session did it."""
    error = release_after(shop, ON_POSTGRESQL[kind])

    assert isinstance(error, LocksHeldError)
    assert error.tables == ("book",)


@pytest.mark.databases("postgresql")
def test_lock_of_no_row_is_none(shop: Shop) -> None:
    """A queue in which nothing waits has nothing to lose."""
    empty = select(Book).where(Book.id < 0).with_for_update(skip_locked=True)

    assert release_after(shop, lambda session: session.scalars(empty).all()) == 0


@pytest.mark.parametrize("many", [False, True])
def test_lock_of_an_entity_is_not_let_go(shop: Shop, many: bool) -> None:
    """`Annotated[Book, ForUpdate]` is a promise for the whole body."""
    annotation: Any = Annotated[list[Book] if many else Book, ForUpdate]

    def work(session: Session, book: Any) -> None:
        with released(session):
            raise LookupError

    work.__annotations__["book"] = annotation
    task = shop.task()(work)
    reference = {"@entity": "Book", "key": [1]}
    with shop.alchemy.session() as session:
        reference = session.get_one(Book, 1)

    with pytest.raises(LocksHeldError):
        task([reference] if many else reference)


@pytest.mark.parametrize("options", [{"locks": False}, {"commit": True}, {"commit": True, "locks": False}])
def test_locks_may_go_when_that_is_said(shop: Shop, options: dict[str, bool]) -> None:
    """`locks=False`, or with a commit."""
    assert release_after(shop, ASKED["statement"], **options) == 0


def test_locks_false_does_not_let_writes_go(shop: Shop) -> None:
    """It is about locks alone."""

    def write(session: Session) -> None:
        session.scalars(ROW_LOCK).all()
        add_books(session, ["Persuasion"])

    assert isinstance(release_after(shop, write, locks=False), UncommittedChangesError)
    assert shop.titles() == ["Emma"]


@pytest.mark.databases("sqlite", "postgresql")
def test_locks_false_does_not_let_unseen_writes_go(shop: Shop) -> None:
    """A row that was locked beside one that was changed by the driver's own cursor."""

    def write(session: Session) -> None:
        session.scalars(ROW_LOCK).all()
        cursor = session.connection().connection.cursor()
        cursor.execute("INSERT INTO book (title) VALUES ('x')")
        cursor.close()

    assert isinstance(release_after(shop, write, locks=False), UncommittedChangesError)
    assert shop.titles() == ["Emma"]


def test_locks_are_forgotten_with_their_transaction(shop: Shop) -> None:
    """What was locked before a commit is not locked any more."""

    def lock_and_commit(session: Session) -> None:
        session.scalars(ROW_LOCK).all()
        session.commit()
        session.get_one(Book, 1)

    assert release_after(shop, lock_and_commit) == 0


@pytest.mark.databases("postgresql+asyncpg", "sqlite+aiosqlite", "mariadb")
def test_async_task_keeps_its_locks(shop: Shop) -> None:
    """The same words with an AsyncSession."""

    @shop.task()
    async def work(session: AsyncSession) -> None:
        await session.scalars(ROW_LOCK)
        async with released(session):
            raise LookupError

    assert isinstance(shop.trace(work).value, LocksHeldError)


@pytest.mark.databases("sqlite", "postgresql")
def test_locks_are_known_in_the_kit_s_transaction(shop: Shop) -> None:
    """A test of a task finds what a worker would."""

    @shop.task()
    def work(session: Session) -> None:
        session.scalars(ROW_LOCK).all()
        with released(session):
            raise LookupError

    with joined(shop.alchemy), pytest.raises(LocksHeldError):
        work()


@pytest.mark.databases("sqlite", "postgresql")
def test_rows_of_the_test_are_no_writes_of_the_task(shop: Shop) -> None:
    """What a test has arranged in the transaction that it shares with the task does not keep this from releasing."""

    @shop.task()
    def work(session: Session) -> int:
        session.scalars(select(Book)).all()
        with released(session):
            return 1

    with joined(shop.alchemy) as test:
        add_books(test.session(), ["Persuasion"])
        test.session().commit()

        assert work() == 1
