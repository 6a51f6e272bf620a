"""One session for each request: its own object and transaction, opened at its first use and gone at the end."""

from __future__ import annotations

import gc
import inspect
import signal
import threading
import traceback
from contextlib import suppress
from typing import Any
from unittest.mock import Mock, create_autospec
from weakref import ref

import pytest
from celery import Celery, Task
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from celery_alchemy import Alchemy, EntityReturnedError, NoSessionError, SessionTask
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.conftest import MakeShop
from tests.unit.shop import Base, Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")


def test_untouched_session_opens_no_connection(shop: Shop) -> None:
    """A task that names a session and does not use it connects to nothing, in every way to end."""

    @shop.task()
    def work(session: Session, fail: bool) -> None:
        if fail:
            raise LookupError

    shop.trace(work, False)
    shop.trace(work, True)

    assert shop.alchemy.engine.pool.checkedin() == 0  # type: ignore[attr-defined]


def test_request_outside_of_any_is_celerys_own_default(shop: Shop) -> None:
    """The same one each time, as with a plain task: what is written into it is there."""

    @shop.task()
    def work(session: Session) -> None: ...

    @shop.task()
    async def work_async(session: AsyncSession) -> None: ...

    for task in (work, work_async):
        task.request.id = "chosen"
        assert task.request is task.request
        assert task.request.id == "chosen"


def test_tracer_of_a_task_that_no_alchemy_serves_is_what_it_was_given() -> None:
    """It can be deleted, as one of a plain task."""
    app = Celery("served by none", set_as_current=False, task_cls=SessionTask)
    task: Any = app.task(name="work", shared=False)(add_books)
    tracer = Mock()

    task.__trace__ = tracer
    kept = task.__trace__
    del task.__trace__

    assert kept is tracer
    assert task.__trace__ is None


def test_untouched_session_is_a_session_of_the_right_class(shop: Shop) -> None:
    """The deferred session is an instance of Session before and after its first use."""

    @shop.task()
    def work(session: Session) -> tuple[bool, bool]:
        before = isinstance(session, Session)
        session.connection()
        return before, isinstance(session, Session)

    assert work() == (True, True)


@pytest.mark.parametrize(
    "first_use",
    [
        lambda s: s.connection(),
        lambda s: s.add(Book(title="x")),
        lambda s: s.get(Book, 1),
        lambda s: s.begin_nested(),
        list,
        lambda s: Book(title="x") in s,
        lambda s: s.info,
        lambda s: s.new,
        lambda s: s.close(),
        lambda s: s.commit(),
        lambda s: s.no_autoflush.__enter__(),
        lambda s: setattr(s, "autoflush", False) or s.execute(select(1)),
        lambda s: s.__enter__().__exit__(None, None, None),
    ],
)
def test_any_first_use_opens_the_session(shop: Shop, first_use: Any) -> None:
    """Whatever a body does first with its session, it is a whole session then."""

    @shop.task()
    def work(session: Session) -> int:
        first_use(session)
        return len(session.scalars(select(Book)).all())

    assert work() in (0, 1)
    assert shop.checked_out() == 0


def test_attribute_set_before_the_first_use_stays(shop: Shop) -> None:
    """A body that configures its session before it uses it is not undone by the opening."""

    @shop.task()
    def work(session: Session) -> bool:
        session.expire_on_commit = True
        session.connection()
        return session.expire_on_commit

    assert work() is True


@pytest.mark.parametrize("tries", [1, 2])
def test_session_that_cannot_be_opened_fails_the_task_with_the_reason(database: Database, tries: int) -> None:
    """Also a body that tries again is told the reason, and nothing at the task's end hides it."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    Alchemy(app, database.url, engine_options={"no_such_option": 1})

    @task_of(app)
    def work(session: Session) -> None:
        for _ in range(tries - 1):
            with suppress(TypeError):
                session.connection()
        session.connection()

    ended = work.apply()

    assert isinstance(ended.result, TypeError)
    assert "no_such_option" in str(ended.result)
    app.close()


def test_each_request_has_its_own_session(shop: Shop) -> None:
    """Two requests of one task, also with one id, share neither session nor identity map."""
    sessions: list[Session] = []

    @shop.task(bind=True)
    def work(self: SessionTask, session: Session) -> None:
        assert self.session is session
        session.connection()
        sessions.append(session)

    shop.trace(work, request={"id": "same"})
    shop.trace(work, request={"id": "same"})
    work()

    assert len({id(session) for session in sessions}) == 3


def test_requests_in_threads_do_not_share(shop: Shop) -> None:
    """Eight requests of one task at once, of one id: each keeps its own session from start to end."""
    together = threading.Barrier(8)
    kept: list[bool] = []
    sessions: list[Session] = []

    @shop.task(bind=True)
    def work(self: SessionTask) -> None:
        mine = self.session
        sessions.append(mine)
        together.wait(10)
        kept.append(self.session is mine)
        together.wait(10)

    threads = [threading.Thread(target=shop.trace, args=(work,), kwargs={"request": {"id": "x"}}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert kept == [True] * 8
    assert len({id(session) for session in sessions}) == 8


def test_task_inside_a_task_has_its_own_transaction(shop: Shop) -> None:
    """The inner commits by itself and leaves the outer, which then fails, untouched."""

    @shop.task(bind=True, name="inner")
    def inner(self: SessionTask, session: Session, outer_session: int) -> bool:
        add_books(session, ["inner"])
        return id(session) != outer_session and self.session is session

    @shop.task(bind=True, name="outer")
    def outer(self: SessionTask, session: Session) -> None:
        session.get(Book, 1)
        assert len(session.identity_map) == 0
        session.rollback()
        assert inner(id(session))
        assert self.session is session
        add_books(session, ["outer"])
        raise LookupError

    assert shop.trace(outer).state == "FAILURE"
    assert shop.titles() == ["inner"]
    assert shop.checked_out() == 0


def test_task_calling_itself_has_a_session_each_time(shop: Shop) -> None:
    """Recursion nests: after the inner call `self.session` is the outer request's again."""

    @shop.task(bind=True, name="count_down")
    def count_down(self: SessionTask, number: int) -> list[bool]:
        mine = self.session
        inner = count_down(number - 1) if number else []
        return [*inner, self.session is mine]

    assert count_down(3) == [True] * 4


def test_no_session_outside_of_a_request(shop: Shop) -> None:
    """`self.session` of a task that does not run says where to get one."""

    @shop.task(name="rename", bind=True)
    def rename(self: SessionTask) -> None: ...

    with pytest.raises(NoSessionError, match=r"self\.session of task 'rename'.*with alchemy\.session\(\)"):
        rename.session  # noqa: B018
    rename()
    with pytest.raises(NoSessionError):
        rename.session  # noqa: B018


def test_tasks_can_be_looked_over_attribute_by_attribute(shop: Shop) -> None:
    """What reads every attribute of a task, as mocks with a spec do, is not stopped by the session that is not there."""

    @shop.task(name="rename")
    def rename(session: Session, title: str) -> str:
        return title

    mocked = create_autospec(rename)
    mocked.delay("Emma")

    mocked.delay.assert_called_once_with("Emma")
    assert dict(inspect.getmembers(rename._get_current_object()))["name"] == "rename"
    assert not hasattr(rename, "session")


def test_missing_session_suggests_no_similar_attribute(shop: Shop) -> None:
    """Python ends the traceback of an AttributeError with a guess, which would contradict the message."""

    @shop.task(name="rename", bind=True)
    def rename(self: SessionTask) -> None: ...

    with pytest.raises(NoSessionError) as caught:
        rename.session  # noqa: B018

    assert traceback.format_exception(caught.value)[-1].endswith("as session:`.\n")


def test_helper_thread_of_a_body_has_no_session(shop: Shop) -> None:
    """A Session is not for two threads: another thread gets the error, not the request's session."""
    errors: list[type[BaseException]] = []

    @shop.task(bind=True)
    def work(self: SessionTask) -> None:
        self.session.connection()

        def help_out() -> None:
            try:
                self.session.connection()
            except NoSessionError as exc:
                errors.append(type(exc))

        thread = threading.Thread(target=help_out)
        thread.start()
        thread.join()

    shop.trace(work)

    assert errors == [NoSessionError]


def test_session_closed_by_the_body_is_no_trouble(shop: Shop) -> None:
    """Users who close their session by habit lose nothing that they committed."""

    @shop.task()
    def work(session: Session) -> None:
        with session:
            add_books(session, ["Emma"])
            session.commit()

    assert shop.trace(work).state == "SUCCESS"
    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("shape", ["bare", "list", "tuple", "set", "dict", "deep", "row", "rows"])
def test_returned_entity_is_refused_by_name_and_key(shop: Shop, shape: str) -> None:
    """It belongs to a session that ends with the task; its work is not committed as if it had succeeded."""

    @shop.task(name="find")
    def find(session: Session) -> Any:
        book = Book(title="Emma")
        session.add(book)
        session.flush()
        rows = session.execute(select(Book, Book.title)).all()
        return {
            "bare": book,
            "list": [book],
            "tuple": (1, book),
            "set": {book},
            "dict": {"book": book},
            "deep": {"shelves": [{"books": (1, [book])}]},
            "row": rows[0],
            "rows": {"rows": rows},
        }[shape]

    with pytest.raises(EntityReturnedError, match=r"Task find\[.*Book\(\(1,\)\).*primary key"):
        find()
    assert shop.titles() == []


def test_returned_mock_is_no_entity(shop: Shop) -> None:
    """It has every attribute that it is asked for; a test whose task returns one is not told of a session."""
    answer = Mock()

    @shop.task()
    def ask() -> Any:
        return answer

    assert ask() is answer


def test_returned_list_that_holds_itself_is_looked_through_once(shop: Shop) -> None:
    """A result that only pickle can carry does not stop the task for ever."""
    knot: list[Any] = [1]
    knot.append({"knot": knot})

    @shop.task()
    def tie() -> Any:
        return knot

    assert tie() is knot


def test_returned_unsaved_entity_is_refused(shop: Shop) -> None:
    """An object without a key is named as such."""

    @shop.task()
    def find(session: Session) -> Book:
        return Book(title="Emma")

    with pytest.raises(EntityReturnedError, match="not saved yet"):
        find()


def test_task_that_asks_for_no_session_returns_what_it_likes(shop: Shop) -> None:
    """It has ended its own transaction: to fail it now would have it write its rows again."""

    @shop.task()
    def find() -> Book:
        with Session(shop.alchemy.engine, expire_on_commit=False) as own:
            book = Book(title="Emma")
            own.add(book)
            own.commit()
        return book

    assert find().title == "Emma"
    assert shop.titles() == ["Emma"]


@pytest.mark.parametrize("has_default", [False, True])
def test_session_that_a_hook_assigns_is_kept(shop: Shop, has_default: bool) -> None:
    """As a task class written by hand does; once it is taken back there is the request's own again."""
    closed: list[str] = []

    class OwnSession(Task):  # type: ignore[type-arg]
        abstract = True

        def before_start(self, *args: Any) -> None:
            self.session = Session(shop.alchemy.engine)

        def after_return(self, status: str, *args: Any) -> None:
            self.session.close()
            self.session = None
            closed.append(status)

    if has_default:
        OwnSession.session = None
    # As an app's own task class is mixed.
    base = type("Mixed", (SessionTask, OwnSession), {"abstract": True})

    @shop.task(bind=True, base=base)
    def add(self: Any, title: str) -> None:
        self.session.add(Book(title=title))
        self.session.commit()

    ended = [add.apply(args=(title,)).state for title in ("Emma", "Persuasion")]

    assert ended == closed == ["SUCCESS", "SUCCESS"]
    assert shop.titles() == ["Emma", "Persuasion"]
    with pytest.raises(NoSessionError):
        add.session  # noqa: B018 - asked outside of a request


class TenantSession(Session):
    """A user's class with a default of its own."""

    tenant = "nobody"

    def __init__(self, *args: Any, tenant: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tenant = tenant


@pytest.mark.parametrize("name", ["info", "tenant"])
def test_what_the_sessionmaker_sets_is_there_at_the_first_look(database: Database, name: str) -> None:
    """Also where the class has a value of that name, which a session that nobody has used yet would show."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    Alchemy(app, sessionmaker(database.engine, class_=TenantSession, info={"shop": 1}, tenant="Emma"))

    @task_of(app)
    def work(session: Session) -> Any:
        return getattr(session, name)

    assert work() == {"info": {"shop": 1}, "tenant": "Emma"}[name]


def test_nothing_is_left_of_a_sessionmaker_that_is_gone(database: Database) -> None:
    """Each sessionmaker has a class of its own, and a process may make many: a test-suite does."""

    def use() -> ref[type[Session]]:
        app = Celery("shop", broker="memory://", set_as_current=False)
        engine = create_engine(database.url)
        maker = sessionmaker(engine)
        Alchemy(app, maker)

        @task_of(app)
        def work(session: Session) -> None:
            session.execute(select(42))

        work()
        engine.dispose()
        app.close()
        return ref(maker.class_)

    class_ = use()
    gc.collect()

    assert class_() is None


def test_objects_stay_usable_after_a_commit(shop: Shop) -> None:
    """Sessions of Alchemy do not expire objects, so that a title can be read after the commit without a reload."""

    @shop.task()
    def work(session: Session) -> tuple[str, bool]:
        book = Book(title="Emma")
        session.add(book)
        session.commit()
        return book.title, session.in_transaction()

    assert work() == ("Emma", False)


def test_two_apps_in_one_process_do_not_disturb_each_other(shop: Shop, database: Database, tmp_path: Any) -> None:
    """Each app's tasks write into their own Alchemy's database, by their own policy, also inside one another."""
    other_app = Celery("other", broker="memory://", set_as_current=False)
    other = Alchemy(other_app, f"sqlite:///{tmp_path}/other.db", commit_on=("success", "ignore"))
    plain_app = Celery("plain", broker="memory://", set_as_current=False)
    Base.metadata.create_all(other.engine)

    @task_of(other_app, name="add")
    def add_elsewhere(session: Session) -> None:
        add_books(session, ["elsewhere"])

    @shop.task(name="add")
    def add_here(session: Session) -> None:
        add_elsewhere()
        add_books(session, ["here"])

    @task_of(plain_app)
    def plain() -> str:
        return "plain"

    add_here()
    with other.session() as session:
        elsewhere = session.scalars(select(Book.title)).all()
    other.engine.dispose()

    assert elsewhere == ["elsewhere"]
    assert shop.titles() == ["here"]
    assert plain() == "plain"
    assert not isinstance(plain, SessionTask)
    assert plain_app.task_cls == "celery.app.task:Task" or plain_app.task_cls is Task


def test_eager_call_inside_a_task_keeps_the_transactions_apart(shop: Shop) -> None:
    """With task_always_eager `.delay()` runs the task at once, in a session of its own."""
    shop.app.conf.task_always_eager = True

    @shop.task(name="inner")
    def inner(session: Session) -> None:
        add_books(session, ["inner"])

    @shop.task(name="outer")
    def outer(session: Session) -> None:
        inner.delay()
        add_books(session, ["outer"])
        raise LookupError

    assert outer.delay().state == "FAILURE"
    assert shop.titles() == ["inner"]


class TestBind:
    """What `bind` may be: each serves a task and keeps its own options."""

    def test_engine(self, database: Database) -> None:
        """A user's own engine is used as it is."""
        engine = create_engine(database.url, poolclass=NullPool)

        assert self._roundtrip(engine, database) is engine

    def test_sessionmaker(self, database: Database) -> None:
        """A sessionmaker keeps its class and options."""

        class Own(Session):
            pass

        maker = sessionmaker(database.engine, class_=Own, expire_on_commit=True, info={"mine": 1})
        seen: list[Any] = []
        self._roundtrip(maker, database, lambda s: seen.extend([isinstance(s, Own), s.expire_on_commit, s.info["mine"]]))

        assert seen == [True, True, 1]

    def test_callable(self, database: Database) -> None:
        """A callable is asked once for each request."""
        made: list[Session] = []

        def make() -> Session:
            made.append(Session(database.engine))
            return made[-1]

        self._roundtrip(make, database)

        assert len(made) == 1

    def test_settings(self, database: Database) -> None:
        """Without a bind the app's settings are read at the first use, also after Alchemy was made."""
        app = Celery("shop", broker="memory://", set_as_current=False)
        alchemy = Alchemy(app)
        app.conf.sqlalchemy_url = database.url
        app.conf.sqlalchemy_engine_options = {"poolclass": NullPool}

        assert isinstance(alchemy.engine.pool, NullPool)

    def test_init_app(self, database: Database) -> None:
        """App factories make the Alchemy first and tie it later."""
        alchemy = Alchemy(bind=database.url)
        app = Celery("shop", broker="memory://", set_as_current=False)
        alchemy.init_app(app)

        @task_of(app)
        def ask(session: Session) -> int:
            return int(session.scalar(select(42)) or 0)

        assert ask() == 42
        alchemy.engine.dispose()

    def _roundtrip(self, bind: Any, database: Database, use: Any = lambda session: None) -> Any:
        app = Celery("shop", broker="memory://", set_as_current=False)
        alchemy = Alchemy(app, bind)
        Base.metadata.create_all(database.engine)

        @task_of(app)
        def add(session: Session) -> None:
            use(session)
            add_books(session, ["Emma"])

        add()
        assert database.rows("SELECT title FROM book") == [("Emma",)]
        return alchemy.engine if not callable(bind) else None


def test_block_outside_of_tasks_commits_only_on_begin(shop: Shop) -> None:
    """`session()` rolls back what was not committed, `begin()` commits, and rolls back when the block raises."""
    with shop.alchemy.session() as session:
        add_books(session, ["lost"])
    with shop.alchemy.begin() as session:
        add_books(session, ["kept"])
    with pytest.raises(LookupError), shop.alchemy.begin() as session:
        add_books(session, ["lost too"])
        raise LookupError

    assert shop.titles() == ["kept"]
    assert shop.checked_out() == 0


@pytest.mark.databases("postgresql", "mariadb")
def test_block_that_a_soft_limit_interrupts_costs_no_connection(make_shop: MakeShop) -> None:
    """As for a task's own session: the limit comes through, and the connection that waits for an answer is dropped."""
    shop = make_shop(engine_options={"pool_size": 1, "max_overflow": 0, "pool_timeout": 1})
    slow = {"postgresql": "SELECT pg_sleep(10)", "mariadb": "SELECT sleep(10)"}[shop.database.name]

    @shop.task()
    def work() -> None:
        with shop.alchemy.session() as session:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            session.execute(text(slow))

    @shop.task()
    def ask() -> int:
        with shop.alchemy.session() as session:
            return int(session.scalar(select(42)) or 0)

    def interrupt(number: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        interrupted = shop.trace(work)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert shop.trace(ask).value == 42


def test_block_whose_session_cannot_be_closed_raises_its_own_error(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is gone makes the rollback fail as well, which tells nothing of the cause."""

    def refuse(connection: Any) -> None:
        raise OSError("the connection is gone")

    with pytest.raises(LookupError), shop.alchemy.session() as session:
        session.execute(select(42))
        monkeypatch.setattr(shop.alchemy.engine.dialect, "do_rollback", refuse)
        raise LookupError

    assert shop.checked_out() == 0
