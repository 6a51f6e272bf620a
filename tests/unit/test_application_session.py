"""The session of a request is what the application's own registry hands out while its body runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import create_engine, event, select
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, OnceCommitError, SessionTask
from celery_alchemy.testing import no_leaks
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Book, Shop

everywhere = pytest.mark.databases("sqlite", "postgresql", "mariadb")
pytestmark = pytest.mark.databases("sqlite", "postgresql")


class ShopSession(Session):
    """A class that a parameter is annotated with."""


class Bookshop(Shop):
    """A shop whose code says `registry`, as Flask applications say `db.session`."""

    def __init__(self, database: Database, scope: Callable[[], object] | None = None, **options: Any) -> None:
        self.engine = create_engine(database.url)
        self.registry = scoped_session(sessionmaker(self.engine), scope)
        super().__init__(database, bind=self.registry, **options)

    def add(self, title: str) -> None:
        """Put a book where the application's code puts it."""
        self.registry.add(Book(title=title))


@pytest.fixture
def make(database: Database) -> Iterator[Callable[..., Bookshop]]:
    """Make shops, in which every test gives back what it took."""
    shops: list[Bookshop] = []

    def make(**options: Any) -> Bookshop:
        shops.append(Bookshop(database, **options))
        return shops[-1]

    with no_leaks():
        yield make
        for shop in shops:
            shop.registry.remove()
    for shop in shops:
        shop.close()


@pytest.fixture
def shop(make: Callable[..., Bookshop]) -> Bookshop:
    """A shop whose registry has one session for each thread."""
    return make()


@everywhere
def test_what_a_helper_writes_is_committed_with_the_task(shop: Bookshop) -> None:
    """Helpers, models and extensions that say `registry` take part in the task's transaction."""

    @shop.task()
    def by_helper(title: str) -> None:
        shop.add(title)

    @shop.task()
    def by_both(session: Session) -> None:
        session.add(Book(title="Persuasion"))
        shop.add("Lady Susan")

    by_helper("Emma")
    by_both.apply(throw=True)
    shop.trace(by_helper, "Sanditon")

    assert sorted(shop.titles()) == ["Emma", "Lady Susan", "Persuasion", "Sanditon"]


def test_registry_parameter_and_attribute_are_one_session(shop: Bookshop) -> None:
    """`session`, `self.session` and what the registry hands out are the same object."""

    @shop.task(bind=True)
    def look(self: Any, session: Session, title: str) -> None:
        assert shop.registry() is session
        assert self.session is session
        shop.add(title)
        assert [book.title for book in session.new] == [title]

    look("Emma")
    look.apply(["Persuasion"], throw=True)
    assert shop.trace(look, "Sanditon").state == "SUCCESS"

    assert shop.titles() == ["Emma", "Persuasion", "Sanditon"]


@everywhere
def test_failed_task_takes_its_helpers_writes_back(shop: Bookshop) -> None:
    """Also what was flushed."""

    @shop.task()
    def fail() -> None:
        shop.add("Emma")
        shop.registry.flush()
        raise LookupError

    with pytest.raises(LookupError):
        fail()

    assert shop.titles() == []


@pytest.mark.parametrize("way", ["direct", "eager", "traced"])
def test_registry_holds_again_what_it_held_before(shop: Bookshop, way: str) -> None:
    """A task inside of a web request leaves the request's session and objects as they are."""
    before = shop.registry()
    pending = Book(title="pending")
    before.add(pending)
    ways: dict[str, Callable[[Any], Any]] = {
        "direct": lambda task: task(),
        "eager": lambda task: task.apply(throw=True),
        "traced": shop.trace,
    }

    @shop.task()
    def work() -> None:
        assert shop.registry() is not before
        shop.add("Emma")

    ways[way](work)

    assert shop.registry() is before
    assert list(before.new) == [pending]
    assert shop.titles() == ["Emma"]
    before.rollback()


def test_registry_that_was_empty_is_empty_again(shop: Bookshop) -> None:
    """The next request of the thread makes its own."""

    @shop.task()
    def work() -> None:
        shop.add("Emma")

    work()

    assert not shop.registry.registry.has()


def test_nested_task_has_its_own_session_in_the_registry(shop: Bookshop) -> None:
    """The outer one has its own again when the inner one is done, and is not committed by it."""
    seen: list[Session] = []

    @shop.task()
    def inner() -> None:
        seen.append(shop.registry())
        shop.add("inner")

    @shop.task()
    def outer() -> None:
        seen.append(shop.registry())
        inner()
        seen.append(shop.registry())
        shop.add("outer")
        raise LookupError

    with pytest.raises(LookupError):
        outer()

    assert seen[0] is seen[2]
    assert seen[0] is not seen[1]
    assert shop.titles() == ["inner"]


@everywhere
@pytest.mark.parametrize("once", [False, True])
def test_removed_session_is_rolled_back_and_the_next_is_the_tasks_too(make: Callable[..., Bookshop], once: bool) -> None:
    """`remove()` in a body does what it does everywhere; what follows is committed at the end."""
    shop = make()
    shop.alchemy.create_tables()

    @shop.task(bind=True, once=once)
    def work(self: Any) -> None:
        first = self.session
        shop.add("rolled back")
        shop.registry.flush()
        shop.registry.remove()
        shop.add("committed")
        assert shop.registry() is self.session
        assert self.session is not first

    assert shop.trace(work).state == "SUCCESS"

    assert shop.titles() == ["committed"]


def test_removed_session_that_is_used_again_says_so(shop: Bookshop) -> None:
    """Nobody would commit it: the parameter is not the registry's session any more."""

    @shop.task()
    def add(session: Session) -> None:
        session.add(Book(title="Emma"))
        shop.registry.remove()
        session.add(Book(title="Persuasion"))

    @shop.task()
    def ask(session: Session) -> None:
        session.connection()
        shop.registry.remove()
        session.get(Book, 1)

    for task in (add, ask):
        with pytest.raises(ConfigurationError, match=r"taken out of its registry by remove\(\)"):
            task()

    assert shop.titles() == []


def test_remove_before_the_first_use_changes_nothing(shop: Bookshop) -> None:
    """As a helper does that cleans up at its beginning."""

    @shop.task()
    def work(session: Session) -> None:
        shop.registry.remove()
        session.add(Book(title="Emma"))
        assert shop.registry() is session

    work()

    assert shop.titles() == ["Emma"]


def test_commit_of_writes_through_the_registry_is_refused_in_a_once_task(
    make: Callable[..., Bookshop],
) -> None:
    """Also after the registry has got another session."""
    shop = make()
    shop.alchemy.create_tables()

    @shop.task(once=True)
    def work(removes: bool) -> None:
        shop.registry.connection()
        if removes:
            shop.registry.remove()
        shop.add("Emma")
        shop.registry.commit()

    for removes in (False, True):
        assert isinstance(shop.trace(work, removes).value, OnceCommitError)

    assert shop.titles() == []


@pytest.mark.parametrize("once", [False, True])
def test_record_failure_has_the_registry_too(make: Callable[..., Bookshop], once: bool) -> None:
    """A new session of its own, not that of the body, which is rolled back."""
    shop = make()
    shop.alchemy.create_tables()
    sessions: list[Session] = []

    def record(session: Session, exc: Exception) -> None:
        sessions.append(shop.registry())
        assert shop.registry() is session
        shop.add("failed")

    @shop.task(record_failure=record, once=once)
    def fail() -> None:
        sessions.append(shop.registry())
        shop.add("half done")
        raise LookupError

    assert shop.trace(fail).state == "FAILURE"

    assert sessions[0] is not sessions[1]
    assert shop.titles() == ["failed"]


def test_listener_of_the_commit_gets_the_session_that_commits(shop: Bookshop) -> None:
    """A listener of the flush that says `registry`, as extensions for history do."""
    seen: list[bool] = []

    def listen(session: Session, *more: Any) -> None:
        if any(isinstance(item, Book) for item in session.new):
            seen.append(shop.registry() is session)

    @shop.task()
    def work() -> None:
        shop.add("Emma")

    event.listen(Session, "before_flush", listen)
    try:
        work()
    finally:
        event.remove(Session, "before_flush", listen)

    assert seen == [True]
    assert not shop.registry.registry.has()


def test_session_that_the_caller_passes_is_handed_out(shop: Bookshop) -> None:
    """`task(session=...)` in a test: the body's helpers see the test's own unflushed rows."""
    with Session(shop.engine) as mine:
        mine.add(Book(title="Emma"))

        @shop.task()
        def look(session: Session) -> Any:
            assert shop.registry() is mine
            return shop.registry.scalar(select(Book.title))

        assert look(session=mine) == "Emma"
        assert mine.in_transaction()

    assert shop.titles() == []


def test_registry_itself_may_be_passed(shop: Bookshop) -> None:
    """It stands for the session that it hands out to the caller."""
    before = shop.registry()

    @shop.task()
    def look(session: Session) -> bool:
        shop.add("Emma")
        return session is before and shop.registry() is before

    assert look(session=shop.registry)
    assert [book.title for book in before.new] == ["Emma"]
    before.rollback()


def test_task_that_leaves_its_session_alone_opens_none(shop: Bookshop) -> None:
    """The registry is asked for nothing, and no session is made."""
    made: list[Session] = []
    factory: Any = shop.registry.session_factory
    event.listen(factory.class_, "after_transaction_create", lambda session, _: made.append(session))

    @shop.task()
    def work() -> bool:
        return shop.registry.registry.has()

    assert work() is False
    assert made == []


def test_own_scope_of_the_body_has_its_own_session(make: Callable[..., Bookshop]) -> None:
    """As a Flask context inside of another: its end, which removes the session, takes nothing back."""
    scope: ContextVar[int] = ContextVar("scope", default=1)
    shop = make(scope=scope.get)

    @contextmanager
    def context() -> Iterator[None]:
        token = scope.set(scope.get() + 1)
        try:
            yield
        finally:
            shop.registry.remove()
            scope.reset(token)

    @shop.task()
    def work(session: Session) -> None:
        with context():  # Before the task's own session is used.
            assert shop.registry() is not session
            shop.add("nobody commits this")
        shop.add("Emma")
        with context():
            shop.add("Persuasion")
            shop.registry.commit()
        assert shop.registry() is session

    with context():
        work()

    assert shop.titles() == ["Persuasion", "Emma"]


def test_body_that_makes_the_scope_itself_writes_in_the_task(make: Callable[..., Bookshop]) -> None:
    """A task that begins outside of any Flask context, whose body pushes one or two."""
    scope: ContextVar[int | None] = ContextVar("scope", default=None)

    def current() -> int:
        value = scope.get()
        if value is None:
            raise RuntimeError("Working outside of application context.")
        return value

    shop = make(scope=current)

    @shop.task(bind=True)
    def work(self: Any) -> None:
        self.session.add(Book(title="Emma"))
        for number, title in enumerate(["Persuasion", "Sanditon"]):
            scope.set(number)
            assert shop.registry() is self.session
            shop.add(title)
            shop.registry.remove()  # As the end of the context does.
            scope.set(None)

    work()

    assert sorted(shop.titles()) == ["Emma", "Persuasion", "Sanditon"]
    scope.set(0)  # For the fixture's remove().


def test_session_that_the_body_puts_into_the_registry_is_the_tasks(shop: Bookshop) -> None:
    """`registry(**options)` makes one with options of its own, when none is in use."""

    @shop.task(bind=True)
    def work(self: Any) -> None:
        made = shop.registry(expire_on_commit=False)
        assert self.session is made
        shop.add("Emma")

    work()

    assert shop.titles() == ["Emma"]


def test_session_in_use_is_not_replaced_in_silence(shop: Bookshop) -> None:
    """What it did would be lost."""

    @shop.task()
    def work() -> None:
        shop.add("Emma")
        with Session(shop.engine) as other:
            shop.registry.registry.set(other)

    with pytest.raises(ConfigurationError, match="put another session into its registry"):
        work()


def test_tasks_of_several_threads_have_their_own(shop: Bookshop) -> None:
    """And a thread that a body starts has the registry's own for it."""
    seen: dict[str, Session] = {}
    barrier = threading.Barrier(2, timeout=10)

    @shop.task()
    def work(title: str) -> None:
        seen[title] = shop.registry()
        barrier.wait()
        assert shop.registry() is seen[title]
        helper = threading.Thread(target=look, args=(title,))
        helper.start()
        helper.join()

    def look(title: str) -> None:
        seen[f"helper of {title}"] = shop.registry()
        shop.registry.remove()

    threads = [threading.Thread(target=work, args=(title,)) for title in ("Emma", "Persuasion")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({id(session) for session in seen.values()}) == 4


def test_registry_on_a_task_class_serves_its_tasks(database: Database, shop: Bookshop) -> None:
    """`session_factory = db.session` needs no Alchemy."""
    other = Celery("other", broker="memory://", set_as_current=False)
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": shop.registry})

    @task_of(other, base=base)
    def work(session: Session) -> None:
        assert shop.registry() is session
        shop.add("Emma")

    work()
    other.close()

    assert shop.titles() == ["Emma"]


def test_task_of_another_app_leaves_the_outer_tasks_session(shop: Bookshop) -> None:
    """A registry stands for the innermost request that it serves."""
    other = Celery("other", broker="memory://", set_as_current=False)
    Alchemy(other, shop.engine)

    @task_of(other)
    def inner(session: Session) -> None:
        assert shop.registry() is not session
        shop.add("Emma")

    @shop.task()
    def outer() -> None:
        inner()
        raise LookupError

    with pytest.raises(LookupError):
        outer()
    other.close()

    assert shop.titles() == []


def test_session_class_of_the_parameter_is_the_registrys_too(shop: Bookshop) -> None:
    """What the task's signature asks for is what its helpers get."""

    @shop.task()
    def work(session: ShopSession) -> bool:
        return shop.registry() is session and isinstance(session, ShopSession)

    assert work()


def test_query_property_asks_in_the_tasks_session(shop: Bookshop) -> None:
    """The old way, `Model.query`, asks the registry at each access."""
    query: Any = shop.registry.query_property()

    @shop.task()
    def count(session: Session) -> int:
        session.add(Book(title="Emma"))
        return int(query.__get__(None, Book).count())

    assert count() == 1
