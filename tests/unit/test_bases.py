"""SessionTask is a base like others: it mixes with users' classes, and classes with `run` are tasks too."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import flask
import pytest
from celery import Celery, Task
from celery.signals import before_task_publish
from sqlalchemy import Engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, NotConfiguredError, SessionTask
from tests.services.databases import Database
from tests.stand import task_of, trace
from tests.unit.shop import Base, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")


def test_class_with_run_is_served(shop: Shop) -> None:
    """A class-based task gets its session in `run` and in `self.session`, the same one."""

    class Add(SessionTask):
        name = "add"

        def run(self, session: Session, title: str) -> str:
            assert self.session is session
            add_books(session, [title])
            return title

    task = shop.app.register_task(Add())

    assert task("Emma") == "Emma"
    assert task.apply(args=["Lady Susan"]).get() == "Lady Susan"
    assert shop.trace(task, title="Persuasion").value == "Persuasion"
    assert shop.titles() == ["Emma", "Lady Susan", "Persuasion"]


def test_class_with_autoretry_retries_a_failing_commit(shop: Shop) -> None:
    """register_task() adds Celery's autoretry around the transaction, so that the second attempt is a fresh one."""
    attempts: list[int] = []

    class Add(SessionTask):
        name = "add"
        autoretry_for = (LookupError,)
        retry_kwargs = {"countdown": 0}  # noqa: RUF012

        def run(self, session: Session, title: str) -> None:
            attempts.append(self.request.retries)
            add_books(session, [title])
            if len(attempts) == 1:
                raise LookupError(title)

    task = shop.app.register_task(Add())
    task.apply(args=["Emma"]).get()

    assert attempts == [0, 1]
    assert shop.titles() == ["Emma"]


def test_run_inherited_from_a_users_class_is_served(shop: Shop) -> None:
    """The body may stand in a base class, abstract or not."""

    class Importer(SessionTask, abc.ABC):
        abstract = True

        def run(self, session: Session) -> None:
            add_books(session, self.titles())

        @abc.abstractmethod
        def titles(self) -> list[str]: ...

    class ImportAusten(Importer):
        name = "import-austen"

        def titles(self) -> list[str]:
            return ["Emma"]

    shop.app.register_task(ImportAusten())()

    assert shop.titles() == ["Emma"]


def test_super_run_stays_in_one_transaction(shop: Shop) -> None:
    """A run() that calls super().run() passes its session on as an ordinary argument, and both commit together."""

    class One(SessionTask):
        name = "one"

        def run(self, session: Session) -> None:
            add_books(session, ["Emma"])

    class Two(One):
        name = "two"

        def run(self, session: Session) -> None:
            super().run(session)
            raise LookupError

    with pytest.raises(LookupError):
        shop.app.register_task(Two())()

    assert shop.titles() == []


def test_flask_task_of_celerys_documentation_mixes_in(database: Database) -> None:
    """Flask's documented FlaskTask, which overrides __call__, gives its context and SessionTask the session."""
    web = flask.Flask("shop")

    class FlaskTask(Task):
        def __call__(self, *args: object, **kwargs: object) -> object:
            with web.app_context():
                return self.run(*args, **kwargs)

    class ShopTask(FlaskTask, SessionTask):
        abstract = True

    app = Celery("shop", task_cls=ShopTask, broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, database.url)
    Base.metadata.create_all(database.engine)

    @task_of(app, bind=True)
    def add(self: Any, session: Session, title: str) -> str:
        add_books(self.session, [title])
        return flask.current_app.name

    assert add("Emma") == "shop"
    assert add.apply(args=["Persuasion"]).get() == "shop"
    assert app.task_cls is ShopTask
    assert database.scalar("SELECT count(*) FROM book") == 2
    alchemy.engine.dispose()


@pytest.mark.parametrize("order", ["before", "after"])
def test_celery_once_mixes_in_with_its_own_option_named_once(shop: Shop, order: str) -> None:
    """Its dict of settings reaches its methods, also from behind SessionTask, and is not taken for `once=True`."""

    class QueueOnce(Task):
        abstract = True
        once = {"graceful": False, "unlock_before_run": False}  # noqa: RUF012 - as celery_once.tasks has it.
        locks: ClassVar[set[str]] = set()

        def __init__(self) -> None:
            self._arguments = inspect.signature(self.run)
            super().__init__()

        def __call__(self, *args: object, **kwargs: object) -> object:
            assert not self.once.get("unlock_before_run", False)
            return super().__call__(*args, **kwargs)

        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            assert isinstance(self.once.get("graceful", False), bool)
            self.locks.add(str(self._arguments.bind(*args, **kwargs).arguments))
            return super().apply_async(args, kwargs, **options)

    bases = (QueueOnce, SessionTask) if order == "before" else (SessionTask, QueueOnce)
    base: Any = type("ShopTask", bases, {"abstract": True})
    shop.app.conf.task_always_eager = True

    @shop.task(base=base)
    def add(session: Session, title: str) -> None:
        add_books(session, [title])

    @shop.task(base=base, once={"graceful": True})
    def add_gracefully(session: Session, title: str) -> None:
        add_books(session, [title])

    with pytest.raises(ConfigurationError, match="once is a dict, as in celery-once's"):

        @shop.task(base=base, once=True, lazy=False)
        def add_twice(session: Session, title: str) -> None: ...

    add.delay("Emma").get()
    add_gracefully.delay(title="Persuasion").get()

    assert shop.titles() == ["Emma", "Persuasion"]
    assert base.locks == {"{'title': 'Emma'}", "{'title': 'Persuasion'}"}
    assert not add.is_once
    assert not add_gracefully.is_once


@pytest.mark.parametrize("order", ["before", "after"])
def test_base_that_does_not_call_super_init_mixes_in(shop: Shop, order: str) -> None:
    """A user's base with an __init__ of its own need not know of SessionTask, whichever stands first."""

    class Counted(Task):
        def __init__(self) -> None:
            self.calls = 0

    bases = (Counted, SessionTask) if order == "before" else (SessionTask, Counted)
    base = type("ShopTask", bases, {"abstract": True})

    @shop.task(base=base, bind=True)
    def add(self: Any, session: Session, title: str) -> None:
        self.calls += 1
        add_books(session, [title])

    add("Emma")

    assert add.calls == 1
    assert shop.titles() == ["Emma"]


def test_base_with_its_own_hooks_keeps_them(shop: Shop) -> None:
    """before_start, on_success and after_return of a mixed-in base run as in Celery, on_success after the commit."""
    seen: list[tuple[str, int]] = []

    class Noisy(Task):
        def before_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(("before_start", len(shop.titles())))

        def on_success(self, *args: Any, **kwargs: Any) -> None:
            seen.append(("on_success", len(shop.titles())))

        def after_return(self, *args: Any, **kwargs: Any) -> None:
            seen.append(("after_return", len(shop.titles())))

    @shop.task(base=type("ShopTask", (Noisy, SessionTask), {"abstract": True}))
    def add(session: Session) -> None:
        add_books(session, ["Emma"])

    shop.trace(add)

    assert seen == [("before_start", 0), ("on_success", 1), ("after_return", 1)]


def test_call_override_runs_the_body_in_its_transaction(shop: Shop) -> None:
    """A user's __call__ around super().__call__() sees the committed result."""
    committed: list[int] = []

    class Timed(SessionTask):
        abstract = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            committed.append(len(shop.titles()))
            return result

    @shop.task(base=Timed)
    def add(session: Session, title: str) -> None:
        add_books(session, [title])

    add("Emma")
    shop.trace(add, "Persuasion")

    assert committed == [1, 2]


def test_session_factory_on_the_class_needs_no_alchemy(database: Database) -> None:
    """A SessionTask subclass with a sessionmaker serves its tasks in an app that has nothing else."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    Base.metadata.create_all(database.engine)

    class ShopTask(SessionTask):
        abstract = True
        session_factory = sessionmaker(database.engine)

    @task_of(app, base=ShopTask, bind=True)
    def add(self: SessionTask, title: str) -> None:
        add_books(self.session, [title])

    add("Emma")

    assert database.rows("SELECT title FROM book") == [("Emma",)]


@pytest.fixture
def plain_app() -> Iterator[Celery]:
    """An app without any Alchemy."""
    app = Celery("plain", broker="memory://", set_as_current=False)
    yield app
    app.close()


def test_session_factory_may_be_a_function(plain_app: Celery, database: Database) -> None:
    """A plain function that returns a new Session is called once for each request, without self."""
    made: list[Session] = []

    def new_session() -> Session:
        made.append(Session(database.engine))
        return made[-1]

    class ShopTask(SessionTask):
        abstract = True
        session_factory = new_session

    @task_of(plain_app, base=ShopTask)
    def ask(session: Session) -> bool:
        return session is made[-1]

    assert ask() is True
    assert ask() is True
    assert len(made) == 2


class _Factory:
    """What a `session_factory` may return: each kind of maker, and a session."""

    def __init__(self, engine: Engine) -> None:
        self.maker = sessionmaker(engine, info={"made by": "factory"})

    def function(self) -> Session:
        return self.maker()


@pytest.mark.parametrize(
    "kind", ["method", "classmethod", "property", "cached_property", "property of a function", "method of a maker"]
)
def test_session_factory_may_be_a_method_or_a_property(plain_app: Celery, database: Database, kind: str) -> None:
    """As `record_failure` may be; it is asked anew for each request."""
    Base.metadata.create_all(database.engine)
    factory = _Factory(database.engine)
    written: dict[str, Any] = {
        "method": lambda self: factory.maker(info={"made by": f"factory of {self.name}"}),
        "classmethod": classmethod(lambda cls: factory.maker()),
        "property": property(lambda self: factory.maker),
        "cached_property": cached_property(lambda self: factory.maker),
        "property of a function": property(lambda self: factory.function),
        "method of a maker": lambda self: factory.maker,
    }
    written["cached_property"].__set_name__(SessionTask, "session_factory")
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": written[kind]})

    @task_of(plain_app, base=base, name="add", bind=True)
    def add(self: Any, session: Session, title: str) -> Any:
        add_books(session, [title])
        assert self.session is session
        return session.info["made by"]

    expected = "factory of add" if kind == "method" else "factory"
    assert add("Emma") == add.apply(["Persuasion"], throw=True).get() == expected

    assert database.rows("SELECT title FROM book ORDER BY id") == [("Emma",), ("Persuasion",)]


def test_session_factory_may_be_a_property_that_returns_a_registry(plain_app: Celery, database: Database) -> None:
    """The registry hands out the task's session then, as one that is written there."""
    Base.metadata.create_all(database.engine)
    registry = scoped_session(sessionmaker(database.engine))
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": property(lambda self: registry)})

    @task_of(plain_app, base=base, name="add")
    def add(session: Session) -> bool:
        add_books(registry, ["Emma"])
        return registry() is session

    assert add() is True
    assert database.rows("SELECT title FROM book") == [("Emma",)]


def test_session_factory_that_gives_no_session_is_named(plain_app: Celery) -> None:
    """A property can only be seen at the first use."""
    base = type("ShopTask", (SessionTask,), {"abstract": True, "session_factory": property(lambda self: 3)})

    @task_of(plain_app, base=base, name="rename")
    def rename(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="session_factory of task 'rename' returned 'int'"):
        rename()


def test_session_task_without_any_alchemy_says_so(plain_app: Celery) -> None:
    """The error names the task and the app, and the three remedies."""

    @task_of(plain_app, base=SessionTask, name="rename", bind=True)
    def rename(self: SessionTask) -> None:
        self.session.connection()

    with pytest.raises(NotConfiguredError, match=r"'rename'.*'plain'.*Alchemy\(app, url\).*session_factory"):
        rename()


def test_task_that_uses_no_session_needs_no_alchemy(plain_app: Celery) -> None:
    """It retries, and replaces itself, as a plain task of Celery does."""
    sent: list[str] = []

    @task_of(plain_app, base=SessionTask, name="other")
    def other() -> None: ...

    @task_of(plain_app, base=SessionTask, bind=True)
    def work(self: SessionTask, way: str) -> None:
        raise self.retry(countdown=0) if way == "retry" else self.replace(other.si())

    def published(sender: str, **message: Any) -> None:
        sent.append(sender)

    before_task_publish.connect(published)
    try:
        for way in ("retry", "replace"):
            trace(plain_app, work, (way,), {}, {"id": way, "args": (way,), "kwargs": {}, "retries": 0, "is_eager": False})
    finally:
        before_task_publish.disconnect(published)

    assert sent == [work.name, "other"]


def test_shared_task_is_served_in_its_app(shop: Shop) -> None:
    """A task of another module, registered by a class of its own, still finds the app's Alchemy."""

    class Add(shop.app.Task):  # type: ignore[name-defined, misc]
        name = "add"

        def run(self, title: str, session: Session) -> None:
            add_books(session, [title])

    shop.app.register_task(Add)("Emma")

    assert shop.titles() == ["Emma"]
