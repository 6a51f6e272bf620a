"""released() gives the connection back around slow work, and refuses to lose what is not committed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import SessionTask, UncommittedChangesError, on_commit, released
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")

Dirty = Callable[[Session], object]


@pytest.fixture(autouse=True)
def _one_book(shop: Shop) -> None:
    shop.database.execute("INSERT INTO book (title) VALUES ('Emma')")


def test_connection_is_back_in_the_block_and_objects_stay_loaded(shop: Shop) -> None:
    """In the block no connection is held; what was loaded can be read without a statement."""

    @shop.task()
    def work(session: Session) -> tuple[int, str, int, int, str]:
        book = session.get_one(Book, 1)
        before = shop.checked_out()
        with released(session):
            during, transactions = shop.checked_out(), shop.database.transactions()
            title = book.title
            still_during = shop.checked_out()
        book.title = "Emma Woodhouse"
        return before, title, during + transactions, still_during, book.title

    assert work() == (1, "Emma", 0, 0, "Emma Woodhouse")
    assert shop.titles() == ["Emma Woodhouse"]
    assert shop.checked_out() == 0


def test_next_use_begins_a_new_transaction(shop: Shop) -> None:
    """After the block the session sees what others have committed in between."""

    @shop.task()
    def work(session: Session) -> list[str]:
        session.scalars(select(Book.title)).all()
        with released(session):
            shop.database.execute("INSERT INTO book (title) VALUES ('Persuasion')")
        return list(session.scalars(select(Book.title).order_by(Book.id)))

    assert work() == ["Emma", "Persuasion"]


def test_session_may_be_used_inside_of_the_block(shop: Shop) -> None:
    """The block holds nothing closed: a statement in it takes a connection again."""

    @shop.task(bind=True)
    def work(self: SessionTask) -> tuple[int, int]:
        with released(self.session):
            count = len(self.session.scalars(select(Book)).all())
            held = shop.checked_out()
        return count, held

    assert work() == (1, 1)


def test_untouched_session_may_be_released(shop: Shop) -> None:
    """There is nothing to give back, and no connection is opened for it."""

    @shop.task()
    def work(session: Session) -> None:
        with released(session):
            pass

    work()

    assert shop.alchemy.engine.pool.checkedin() == 0  # type: ignore[attr-defined]


def test_error_in_the_block_comes_through(shop: Shop) -> None:
    """released() swallows nothing."""

    @shop.task()
    def work(session: Session) -> None:
        session.get_one(Book, 1)
        with released(session):
            raise LookupError("slow work failed")

    with pytest.raises(LookupError, match="slow work failed"):
        work()


DIRTY: dict[str, tuple[Dirty, str]] = {
    "new object": (lambda s: s.add(Book(title="x")), "unflushed changes"),
    "changed object": (lambda s: setattr(s.get_one(Book, 1), "title", "x"), "unflushed changes"),
    "deleted object": (lambda s: s.delete(s.get_one(Book, 1)), "unflushed changes"),
    "flushed object": (lambda s: add_books(s, ["x"]), "uncommitted writes"),
    "Core insert": (lambda s: s.execute(insert(Book).values(title="x")), "uncommitted writes"),
    "textual update": (lambda s: s.execute(text("UPDATE book SET title = 'x'")), "uncommitted writes"),
    "driver's own SQL": (
        lambda s: s.connection().exec_driver_sql("UPDATE book SET title = 'x'"),
        "uncommitted writes",
    ),
    "savepoint": (lambda s: s.begin_nested(), "an open SAVEPOINT"),
    "waiting callable": (lambda s: on_commit(s, lambda: None), "sends or callables of on_commit that wait for the commit"),
}


@pytest.mark.parametrize("kind", DIRTY)
def test_uncommitted_work_is_refused(shop: Shop, kind: str) -> None:
    """Each kind of work that giving back would lose or publish is named, and nothing of it is committed."""
    make_dirty, named = DIRTY[kind]

    @shop.task()
    def work(session: Session) -> None:
        make_dirty(session)
        with released(session):
            raise LookupError("the block must not run")

    with pytest.raises(UncommittedChangesError, match=named):
        work()
    assert shop.titles() == ["Emma"]
    assert shop.checked_out() == 0


@pytest.mark.parametrize("kind", [kind for kind in DIRTY if kind != "savepoint"])
def test_commit_true_commits_the_work_first(shop: Shop, kind: str) -> None:
    """`released(session, commit=True)` makes the work visible before the slow part, whatever comes after."""
    make_dirty, _ = DIRTY[kind]

    @shop.task()
    def work(session: Session) -> None:
        make_dirty(session)
        with released(session, commit=True):
            assert shop.checked_out() == 0
            raise LookupError

    before = shop.titles()
    with pytest.raises(LookupError):
        work()

    assert (shop.titles() != before) == (kind != "waiting callable")


def test_commit_true_does_not_commit_half_a_savepoint(shop: Shop) -> None:
    """An open SAVEPOINT belongs to somebody further up; it is refused with commit=True too."""

    @shop.task()
    def work(session: Session) -> None:
        with session.begin_nested():
            add_books(session, ["x"])
            with released(session, commit=True):
                raise LookupError

    with pytest.raises(UncommittedChangesError, match=r"SAVEPOINT.*begin_nested\(\):` block first"):
        work()
    assert shop.titles() == ["Emma"]


def test_reading_statements_of_every_kind_may_be_released(shop: Shop) -> None:
    """SELECT as ORM query, as text, with a comment before it: none of them is a write."""

    @shop.task()
    def work(session: Session) -> int:
        session.get_one(Book, 1)
        session.execute(text("/* report */ SELECT 1"))
        session.execute(text("-- report\n  select 1"))
        with released(session):
            return shop.checked_out()

    assert work() == 0


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("writes", [True, False])
def test_common_table_expression_is_a_write_if_it_changes_rows(shop: Shop, writes: bool) -> None:
    """The statement is a SELECT in both cases."""
    made = insert(Book).values(title="Persuasion").returning(Book.id)
    rows = (made if writes else select(Book.id)).cte()

    @shop.task()
    def work(session: Session) -> int:
        session.execute(select(rows.c.id)).all()
        with released(session):
            return shop.checked_out()

    traced = shop.trace(work)

    assert type(traced.value) is (UncommittedChangesError if writes else int)


def test_writes_are_forgotten_with_their_transaction(shop: Shop) -> None:
    """After a commit in the body the session has nothing uncommitted."""

    @shop.task()
    def work(session: Session) -> int:
        add_books(session, ["Persuasion"])
        session.commit()
        session.get_one(Book, 1)
        with released(session):
            return shop.checked_out()

    assert work() == 0


def test_scoped_session_and_foreign_session_may_be_released(shop: Shop) -> None:
    """A session that somebody else made is released too; it keeps its own expire_on_commit."""
    maker = sessionmaker(shop.alchemy.engine)
    scoped = scoped_session(maker)

    book = scoped.get_one(Book, 1)
    with released(scoped):
        held, title = shop.checked_out(), book.title
    expires = scoped().expire_on_commit
    scoped.remove()

    assert (held, title, expires) == (0, "Emma", True)


def test_foreign_session_with_a_flushed_object_is_refused(shop: Shop) -> None:
    """For a session without our ledger, what its unit of work has flushed counts."""
    with Session(shop.alchemy.engine) as session:
        add_books(session, ["Persuasion"])
        with pytest.raises(UncommittedChangesError, match="uncommitted writes"), released(session):
            raise LookupError
