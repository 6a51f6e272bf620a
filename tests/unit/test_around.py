"""around: the application's context manager is entered first in the transaction of a task, and left before the commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Retry
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, ConfigurationError, SessionTask
from tests.stand import task_of
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


class Recorder:
    """An `around` that notes when it is entered and left, and with what error."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextmanager
    def __call__(self, task: Any, session: Session) -> Iterator[None]:
        name = task.name.rsplit(".", 1)[-1]
        self.seen.append(f"enter {name}")
        try:
            yield
        except BaseException as exc:
            self.seen.append(f"leave {name}: {type(exc).__name__}")
            raise
        self.seen.append(f"leave {name}")


@pytest.fixture
def recorder() -> Recorder:
    """An around that says what happens to it."""
    return Recorder()


@pytest.fixture
def shop(make_shop: MakeShop, recorder: Recorder) -> Shop:
    """A shop with the recorder around every task."""
    return make_shop(around=recorder)


def _book(shop: Shop) -> Book:
    with shop.alchemy.session() as session:
        return session.get_one(Book, 1)


def test_it_is_entered_first_and_left_before_the_commit(shop: Shop, recorder: Recorder) -> None:
    """Entities are loaded inside of it; what the body left unflushed is flushed there too."""
    shop.database.execute("INSERT INTO book (id, title) VALUES (1, 'Emma')")

    @shop.task(name="rename", bind=True)
    def rename(self: SessionTask, book: Book, title: str) -> None:
        recorder.seen.append(f"body has {book.title}")
        event.listen(self.session, "after_flush", lambda *_: recorder.seen.append("flush"))
        event.listen(self.session, "before_commit", lambda *_: recorder.seen.append("commit"))
        book.title = title

    rename.apply(args=[_book(shop), "Persuasion"]).get()

    assert recorder.seen == ["enter rename", "body has Emma", "flush", "leave rename", "commit"]
    assert shop.titles() == ["Persuasion"]


def test_entities_are_loaded_inside_of_it(make_shop: MakeShop) -> None:
    """What is to hold for the whole transaction is set before the library's own first statement."""
    statements: list[str] = []

    @contextmanager
    def around(task: Any, session: Session) -> Iterator[None]:
        event.listen(session, "do_orm_execute", lambda state: statements.append("load"))
        statements.append("set")
        yield

    shop = make_shop(around=around)
    shop.database.execute("INSERT INTO book (id, title) VALUES (1, 'Emma')")

    @shop.task()
    def read(book: Book, session: Session) -> str:
        return book.title

    title = read.apply(args=[_book(shop)]).get()

    assert title == "Emma"
    assert statements == ["set", "load"]


def test_task_that_leaves_its_session_alone_opens_no_connection(shop: Shop, recorder: Recorder) -> None:
    """The session that it is given is not connected until somebody uses it."""
    connected: list[int] = []
    event.listen(shop.alchemy.engine, "connect", lambda *_: connected.append(1))

    @shop.task(name="idle")
    def idle(session: Session) -> int:
        return 42

    traced = [shop.trace(idle).value for _ in range(3)]

    assert traced == [42, 42, 42]
    assert recorder.seen == ["enter idle", "leave idle"] * 3
    assert connected == []


@pytest.mark.parametrize("error", [LookupError(), Ignore(), Retry()])
def test_it_sees_how_the_body_ends(shop: Shop, recorder: Recorder, error: Exception) -> None:
    """Celery's own ways to end a task come through it as any other exception."""

    @shop.task(name="fail")
    def fail(session: Session) -> None:
        add_books(session, ["Emma"])
        raise error

    shop.trace(fail)

    assert recorder.seen == ["enter fail", f"leave fail: {type(error).__name__}"]
    assert shop.titles() == []


def test_error_at_its_entry_is_the_tasks(make_shop: MakeShop) -> None:
    """The body does not run; record_failure and autoretry see the error as one of the body's."""
    bodies: list[int] = []
    recorded: list[str] = []

    def around(task: Any, session: Session) -> Any:
        if task.request.retries == 0:
            raise LookupError("no such tenant")
        return nullcontext()

    shop = make_shop(around=around)

    @shop.task(autoretry_for=(LookupError,), retry_backoff=False, default_retry_delay=0)
    def again(session: Session) -> int:
        bodies.append(1)
        return 42

    @shop.task(record_failure=lambda session, exc: recorded.append(str(exc)))
    def refused(session: Session) -> None:
        bodies.append(2)

    value = again.apply().get()
    with pytest.raises(LookupError):
        refused()

    assert value == 42
    assert bodies == [1]
    assert recorded == []  # It has the same tenant around it, which there is not.


def test_error_at_its_exit_rolls_back(make_shop: MakeShop) -> None:
    """It is inside of the transaction, so that what it refuses is not committed."""

    @contextmanager
    def around(task: Any, session: Session) -> Iterator[None]:
        yield
        raise LookupError("written without an audit entry")

    shop = make_shop(around=around)

    @shop.task()
    def write(session: Session) -> None:
        add_books(session, ["Emma"])

    with pytest.raises(LookupError, match="audit"):
        write()

    assert shop.titles() == []


def test_exit_that_returns_true_ends_the_error(make_shop: MakeShop) -> None:
    """As a `with` statement in the body: the task returns None, and what it wrote before is committed."""
    shop = make_shop(around=lambda task, session: suppress(KeyError))

    @shop.task()
    def write(session: Session) -> int:
        add_books(session, ["Emma"])
        raise KeyError

    assert write() is None
    assert shop.titles() == ["Emma"]


def test_flush_that_fails_is_seen_by_it(shop: Shop, recorder: Recorder) -> None:
    """What would fail at the commit fails while it is there to see it."""
    shop.database.execute("INSERT INTO book (title) VALUES ('Emma')")

    @shop.task(name="add")
    def add(session: Session) -> None:
        session.add(Book(title="Emma"))

    with pytest.raises(IntegrityError):
        add()

    assert recorder.seen == ["enter add", "leave add: IntegrityError"]


def test_listener_of_the_last_flush_sees_what_it_has_set(make_shop: MakeShop) -> None:
    """A context variable still holds when the library flushes what the body left; also for a retry that commits."""

    @contextmanager
    def around(task: Any, session: Session) -> Iterator[None]:
        token = tenant.set("emma")
        try:
            yield
        finally:
            tenant.reset(token)

    shop = make_shop(around=around, commit_on=("success", "retry"))

    def sign(session: Session, *_: Any) -> None:
        for book in session.new:
            book.title += f" of {tenant.get()}"

    @shop.task(name="write", bind=True)
    def write(self: SessionTask, again: bool) -> None:
        event.listen(self.session, "before_flush", sign)
        self.session.add(Book(title=f"{again}"))
        if again:
            raise Retry

    shop.trace(write, False)
    shop.trace(write, True)

    assert shop.titles() == ["False of emma", "True of emma"]
    assert tenant.get() == "nobody"


def test_each_run_has_its_own(shop: Shop, recorder: Recorder) -> None:
    """Each run of transient_retries and of autoretry, and record_failure; a nested task has its own inside."""
    runs: list[int] = []

    @shop.task(name="work", transient_retries=1, record_failure=lambda session, exc: recorder.seen.append("recorded"))
    def work(session: Session) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise _BUSY
        inner()
        raise LookupError

    @shop.task(name="inner")
    def inner(session: Session) -> None: ...

    shop.trace(work)

    assert recorder.seen == [
        "enter work",
        "leave work: OperationalError",
        "enter work",
        "enter inner",
        "leave inner",
        "leave work: LookupError",
        "enter work",
        "recorded",
        "leave work",
    ]


def test_once_task_has_it_once_for_its_body_and_not_for_what_is_replayed(make_shop: MakeShop, recorder: Recorder) -> None:
    """A delivery that has nothing to run enters nothing."""
    shop = make_shop(around=recorder)
    shop.alchemy.create_tables()

    @shop.task(name="charge", once=True)
    def charge(session: Session) -> str:
        session.add(Book(title="Emma"))
        return "done"

    values = [shop.trace(charge, request={"id": "one"}).value for _ in range(2)]

    assert values == ["done", "done"]
    assert recorder.seen == ["enter charge", "leave charge"]
    assert shop.titles() == ["Emma"]


class TestWhose:
    """A task's own takes the place of its Alchemy's."""

    def test_method_of_a_task_class_wins_and_may_ask_for_the_other(self, shop: Shop, recorder: Recorder) -> None:
        """As any method that is overridden."""

        class Audited(SessionTask):
            abstract = True

            @contextmanager
            def around(self, session: Session) -> Iterator[None]:
                recorder.seen.append(f"audit {self.name}")
                with super().around(session):
                    yield

        @shop.task(name="work", base=Audited)
        def work(session: Session) -> None: ...

        work()

        assert recorder.seen == ["audit work", "enter work", "leave work"]

    def test_option_of_a_task_is_a_function_of_task_and_session_and_none_is_nothing(self, shop: Shop, recorder: Recorder) -> None:
        """As `record_failure` may be given in the decorator; None leaves a task without the app's."""
        own = Recorder()

        @contextmanager
        def around(task: SessionTask, session: Session) -> Iterator[None]:
            with own(task, session):
                yield

        @shop.task(name="own", around=around)
        def with_own(session: Session) -> None: ...

        @shop.task(name="none", around=None)
        def with_none(session: Session) -> None: ...

        with_own()
        with_none()

        assert own.seen == ["enter own", "leave own"]
        assert recorder.seen == []

    @pytest.mark.parametrize("form", ["object", "method", "partial"])
    def test_option_of_a_task_may_be_anything_that_is_called(self, shop: Shop, form: str) -> None:
        """What Alchemy takes a task takes too: an object, a method of one, a partial."""
        own = Recorder()
        forms: dict[str, Any] = {"object": own, "method": own.__call__, "partial": partial(own)}

        @shop.task(name="sync", around=forms[form])
        def work(session: Session) -> None: ...

        @shop.task(name="async", around=forms[form])
        async def work_async(session: AsyncSession) -> None: ...

        work()
        work_async()

        assert own.seen == ["enter sync", "leave sync", "enter async", "leave async"]

    def test_alchemy_that_is_tied_after_the_tasks_are_made(self, recorder: Recorder, database: Any) -> None:
        """As in an app factory."""
        app = Celery("late", broker="memory://", set_as_current=False)

        @task_of(app, name="work", base=SessionTask)
        def work(session: Session) -> None: ...

        alchemy = Alchemy(bind=database.url, around=recorder)
        work.name  # noqa: B018 - makes the task.
        alchemy.init_app(app)
        work()
        alchemy.engine.dispose()

        assert recorder.seen == ["enter work", "leave work"]


def test_session_that_the_caller_passes_is_given_to_it(shop: Shop, recorder: Recorder) -> None:
    """The body runs inside of it in any call; the transaction stays the caller's."""

    @shop.task(name="write")
    def write(session: Session) -> None:
        add_books(session, ["Emma"])

    with shop.alchemy.session() as session:
        write(session=session)
        before = shop.titles()
        session.commit()

    assert recorder.seen == ["enter write", "leave write"]
    assert (before, shop.titles()) == ([], ["Emma"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [(None, "'NoneType', which is no context manager"), (asynccontextmanager(lambda: None), "is no context manager")],
)
def test_what_is_no_context_manager_is_refused_by_name(make_shop: MakeShop, returned: Any, message: str) -> None:
    """With what to put on the function."""
    shop = make_shop(around=lambda task, session: returned)

    @shop.task()
    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match=message):
        work()


def test_async_one_is_refused_for_a_plain_task(make_shop: MakeShop) -> None:
    """The text says for which session to return which."""

    @asynccontextmanager
    async def around(task: Any, session: AsyncSession) -> AsyncIterator[None]:
        yield

    shop = make_shop(around=around)

    @shop.task()
    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="for a plain Session"):
        work()


def _generator(task: Any, session: Session) -> Iterator[None]:
    yield


async def _async_generator(task: Any, session: AsyncSession) -> AsyncIterator[None]:
    yield


async def _coroutine(task: Any, session: AsyncSession) -> None: ...


class _AsyncCallable:
    async def __call__(self, task: Any, session: AsyncSession) -> None: ...


@pytest.mark.parametrize("wrong", [_generator, _async_generator, _coroutine, _AsyncCallable(), "tenant"])
def test_what_cannot_work_is_refused_when_it_is_given(shop: Shop, wrong: Callable[..., Any]) -> None:
    """To the Alchemy, and to the task."""
    with pytest.raises(ConfigurationError, match="@contextmanager"):
        Alchemy(bind=shop.database.url, around=wrong)
    with pytest.raises(ConfigurationError, match="@contextmanager"):
        shop.task(around=wrong, lazy=False)(add_books)


_BUSY = OperationalError("UPDATE", {}, type("Error", (Exception,), {"args": (1213, "deadlock")})())


def test_direct_statement_of_it_is_in_the_tasks_transaction(make_shop: MakeShop) -> None:
    """What it writes is committed, and rolled back, with the body."""

    @contextmanager
    def around(task: Any, session: Session) -> Iterator[None]:
        session.execute(text("INSERT INTO book (title) VALUES ('by around')"))
        yield

    shop = make_shop(around=around)

    @shop.task()
    def work(session: Session, fails: bool) -> None:
        if fails:
            raise LookupError

    with pytest.raises(LookupError):
        work(True)
    rolled_back = shop.titles()
    work(False)

    assert rolled_back == []
    assert shop.titles() == ["by around"]
