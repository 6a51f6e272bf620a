"""Wrong input is refused at the earliest possible moment, with what, why and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, SessionTask, TasksAlreadyBoundError
from celery_alchemy.sessions.engine import set_worker_pool
from celery_alchemy.worker.boot_steps import SessionStep
from tests.services.databases import Database
from tests.stand import task_of


class ShopSession(Session):
    """A user's class."""


class OtherSession(Session):
    """Another one."""


def _dependency() -> Iterator[Session]:
    """What FastAPI calls a dependency: it closes the session when its caller is done."""
    with Session() as session:
        yield session


async def _coroutine() -> Session:
    return Session()


class _AsyncMaker:
    async def __call__(self) -> Session:
        return Session()


@pytest.fixture
def app() -> Iterator[Celery]:
    """A fresh app."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    yield app
    app.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("shop.db", "cannot be parsed.*dialect\\+driver://"),
        ("", "cannot be parsed"),
        ("nodialect://host/shop", "no dialect 'nodialect'.*psycopg"),
        ("postgresql+nodriver://host/shop", r"no dialect 'postgresql\+nodriver'"),
        ("oracle+oracledb://host/shop", "driver for oracle.* is not installed.*Install"),
        ("mysql+cymysql://host/shop", "driver for mysql.* is not installed"),
    ],
)
def test_wrong_url_is_refused_when_alchemy_is_made(app: Celery, url: str, message: str) -> None:
    """Not at the first task: a typo in a URL stops the program where it is written."""
    with pytest.raises(ConfigurationError, match=message):
        Alchemy(app, url)


@pytest.mark.parametrize(
    ("bind", "message"),
    [
        (3, "bind is a 'int'.*Give a URL, an Engine"),
        ({"url": "sqlite://"}, "bind is a 'dict'"),
        (SimpleNamespace(session=scoped_session(sessionmaker())), "Give its registry.*db.session"),
        (Session, "bind is a 'type'"),
        (_dependency, "yields its session"),
        (_coroutine, "is an `async def`"),
        (_AsyncMaker(), "is an `async def`"),
        (lambda url: Session(create_engine(url)), "cannot be called without arguments.*'url'"),
    ],
)
def test_bind_of_the_wrong_kind_is_refused(app: Celery, bind: Any, message: str) -> None:
    """The error names the kind that was given and those that work."""
    with pytest.raises(ConfigurationError, match=message):
        Alchemy(app, bind)


def test_connection_and_session_are_no_bind(app: Celery) -> None:
    """Both are one connection's or one thread's; a worker needs what makes them."""
    engine = create_engine("sqlite://")

    with engine.connect() as connection, pytest.raises(ConfigurationError, match="bind is a 'Connection'"):
        Alchemy(app, connection)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    with Session(engine) as session, pytest.raises(ConfigurationError, match="bind is a 'Session'"):
        Alchemy(app, session)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("where", ["alchemy", "session_factory"])
def test_scoped_session_gives_each_request_its_own_session(app: Celery, database: Database, where: str) -> None:
    """As Flask-SQLAlchemy's `db.session` is one: a task inside of a task must not share its session, nor remove it."""
    scoped = scoped_session(sessionmaker(database.engine, info={"made by": "scoped"}))
    options: dict[str, Any] = {}
    if where == "alchemy":
        assert Alchemy(app, scoped).engine is database.engine
    else:
        options["base"] = type("ScopedTask", (SessionTask,), {"abstract": True, "session_factory": scoped})
        Alchemy(app, "sqlite://")

    @task_of(app, **options)
    def inner(session: Session) -> Session:
        return seen(session)

    @task_of(app, **options)
    def outer(session: Session) -> None:
        inner()
        seen(session)

    sessions: list[Session] = []

    def seen(session: Session) -> None:
        assert session.info["made by"] == "scoped"
        sessions.append(session)

    outer()

    assert sessions[0] is not sessions[1]
    assert not scoped.registry.has()


def test_callable_that_returns_no_session_says_so(app: Celery) -> None:
    """It can only be seen at the first use, and is named there."""
    Alchemy(app, lambda: "session")  # type: ignore[arg-type, return-value] # pyright: ignore[reportArgumentType]

    @task_of(app)
    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="returned 'str', which is no Session"):
        work()


@pytest.mark.parametrize("given", [3, Celery, object()])
def test_what_is_no_celery_app_is_refused(given: Any) -> None:
    """Flask's own app is easily given for Celery's."""
    with pytest.raises(ConfigurationError, match="which is no Celery app"):
        Alchemy(given, "sqlite://")
    with pytest.raises(ConfigurationError, match="which is no Celery app"):
        Alchemy(bind="sqlite://").init_app(given)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("transient_retries", -1),
        ("transient_retries", "3"),
        ("transient_retries", True),
        ("record_failure", "save"),
        ("read_only", "yes"),
    ],
)
def test_option_of_a_task_that_cannot_work_is_refused(app: Celery, option: str, value: Any) -> None:
    """When the task is made, not when it first fails."""
    Alchemy(app, "sqlite://")

    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match=f"{option}={value!r}"):
        app.task(lazy=False, shared=False, **{option: value})(work)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("remote_tasks", "billing.*"),
        ("remote_tasks", 5),
        ("remote_tasks", [None]),
        ("schema", 1),
        ("schema", " "),
        ("redeliver_after", float("nan")),
        ("worker_lost_after", float("nan")),
        ("max_deliveries", 1.5),
        ("max_deliveries", float("inf")),
        ("max_message_bytes", 0.5),
        ("on_session_closed", 1),
        ("outbox", "yes"),
        ("broker", 1),
        ("relay", None),
    ],
)
def test_option_of_an_alchemy_that_cannot_work_is_refused(app: Celery, option: str, value: Any) -> None:
    """When it is made, by the option's name."""
    with pytest.raises(ConfigurationError, match=re.escape(f"{option}={value!r}")):
        Alchemy(app, "sqlite://", **{option: value})


@pytest.mark.parametrize("value", [5, "x", ["echo"], {1: 2}], ids=str)
def test_engine_options_that_are_none_are_refused(app: Celery, value: Any) -> None:
    """By the name of the setting, and without the value, which may hold a password."""
    with pytest.raises(ConfigurationError, match=r"^engine_options "):
        Alchemy(app, "sqlite://", engine_options=value)
    app.conf.update(sqlalchemy_url="sqlite://", sqlalchemy_engine_options=value)
    with pytest.raises(ConfigurationError, match=r"^sqlalchemy_engine_options "):
        Alchemy(app).engine  # noqa: B018


def test_listener_that_cannot_be_called_is_refused(app: Celery) -> None:
    """Else it would fail in the log of each task."""
    with pytest.raises(ConfigurationError, match="on_session_closed=1 "):
        Alchemy(app, "sqlite://").on_session_closed(1)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("options", [{"once": True}, {"transient_retries": 2}])
def test_autocommit_is_refused_where_a_run_may_be_repeated(app: Celery, options: dict[str, Any]) -> None:
    """Nothing of the first run would be rolled back."""
    Alchemy(app, "sqlite://")

    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match=f"{next(iter(options))} and isolation_level='AUTOCOMMIT'"):
        app.task(lazy=False, shared=False, isolation_level="autocommit", **options)(work)  # type: ignore[call-overload]


def test_worker_refuses_a_task_whose_class_of_sessions_cannot_be_had(app: Celery) -> None:
    """It would fail at its first request."""
    Alchemy(app, sessionmaker(class_=OtherSession))

    @task_of(app)
    def work(session: ShopSession) -> None: ...

    worker: Any = SimpleNamespace(app=app, pool_cls="celery.concurrency.solo:TaskPool", concurrency=1)
    try:
        with pytest.raises(SystemExit, match=r"work' asks for a .*ShopSession, and the sessionmaker makes a .*OtherSession"):
            SessionStep(worker)
    finally:
        set_worker_pool(None)


@pytest.mark.parametrize("first", ["sqlite://", sessionmaker(), scoped_session(sessionmaker()), create_engine("sqlite://")])
def test_forgotten_app_is_told_from_a_wrong_bind(first: Any) -> None:
    """`Alchemy(url)` says that the first argument is the app."""
    with pytest.raises(ConfigurationError, match=r"not the Celery app.*Alchemy\(app, url\)"):
        Alchemy(first)


def test_engine_options_without_a_url_are_refused(app: Celery) -> None:
    """Options that nothing would read are a mistake."""
    with pytest.raises(ConfigurationError, match="without a URL"):
        Alchemy(app, engine_options={"pool_size": 3})
    with pytest.raises(ConfigurationError, match="with a 'Engine'"):
        Alchemy(app, create_engine("sqlite://"), engine_options={"pool_size": 3})


def test_unknown_publish_mode_is_refused(app: Celery) -> None:
    """The four modes are listed."""
    with pytest.raises(ConfigurationError, match="'warn', 'raise', 'defer', 'allow'"):
        Alchemy(app, "sqlite://", publish_in_transaction="later")  # type: ignore[arg-type]


def test_alchemy_without_a_database_says_so_at_the_first_use(app: Celery) -> None:
    """Both ways to give one are named; before init_app() that is named too."""
    with pytest.raises(ConfigurationError, match="sqlalchemy_url"):
        Alchemy(app).engine  # noqa: B018
    with pytest.raises(ConfigurationError, match="init_app"):
        Alchemy().engine  # noqa: B018


def test_one_alchemy_serves_one_app(app: Celery) -> None:
    """init_app() of a second app is refused; of the same app it changes nothing."""
    alchemy = Alchemy(app, "sqlite://")
    alchemy.init_app(app)

    with pytest.raises(ConfigurationError, match="serves the app 'shop' already"):
        alchemy.init_app(Celery("other", set_as_current=False))


def test_alchemy_after_bound_tasks_is_refused(app: Celery) -> None:
    """Tasks in use cannot change their class; the error names them and the remedy."""

    @task_of(app, name="rename")
    def rename(session: Session) -> None: ...

    assert rename.name == "rename"
    with pytest.raises(TasksAlreadyBoundError, match="rename were bound before.*base=SessionTask"):
        Alchemy(app, "sqlite://")


def test_alchemy_after_finalize_without_tasks_is_fine(app: Celery) -> None:
    """Celery's own tasks need no session."""
    app.finalize()
    Alchemy(app, "sqlite://")

    @task_of(app)
    def work(session: Session) -> bool:
        return session.is_active

    assert work() is True


def test_alchemy_after_bound_session_tasks_is_fine(app: Celery) -> None:
    """Tasks with base=SessionTask find an Alchemy that comes later."""

    @task_of(app, base=SessionTask)
    def work(session: Session) -> bool:
        return session.is_active

    assert work.name.endswith("work")
    Alchemy(app, "sqlite://")

    assert work() is True


def test_alchemy_after_decorated_but_unused_tasks_is_fine(app: Celery) -> None:
    """Celery makes tasks at their first use; decorating is not using."""

    @task_of(app)
    def work(session: Session) -> bool:
        return session.is_active

    Alchemy(app, "sqlite://")

    assert work() is True


def test_worker_reports_a_task_whose_class_injects_no_session(caplog: pytest.LogCaptureFixture) -> None:
    """It would fail at each request with a missing argument, which says nothing of the class."""
    app = Celery("own", broker="memory://", set_as_current=False)
    Alchemy(app, "sqlite://")
    flask_task = type("FlaskTask", (Task,), {"abstract": True})

    @task_of(app, base=flask_task, name="charge")
    def charge(order_id: int) -> None: ...

    @task_of(app, base=flask_task, name="rename")
    def rename(session: Session) -> None: ...

    worker: Any = SimpleNamespace(app=app, pool_cls="celery.concurrency.solo:TaskPool", concurrency=1)
    try:
        SessionStep(worker)
    finally:
        set_worker_pool(None)
        app.close()

    [message] = caplog.messages
    assert "Task rename asks for a session as 'session', but its class is FlaskTask" in message
    assert "mix SessionTask into the class" in message


@pytest.mark.parametrize("way", ["base", "assigned late", "class"])
def test_worker_reports_options_that_the_tasks_class_does_not_know(caplog: pytest.LogCaptureFixture, way: str) -> None:
    """A task with once=True would be done twice without a word; celery-once's own option is none of ours."""
    app = Celery("own", broker="memory://", set_as_current=False)
    Alchemy(app, "sqlite://")
    plain: Any = type("FlaskTask", (Task,), {"abstract": True, "once": {"graceful": True}, "missing": "x"})
    options: dict[str, Any] = {"once": True, "read_only": True, "missing": "ignore"}
    if way == "class":
        plain.once = True
        options = {"read_only": True, "missing": "ignore"}
    if way == "assigned late":
        app.Task = plain  # type: ignore[method-assign]
    else:
        options["base"] = plain

    def charge(order_id: int) -> None: ...

    def rename() -> None: ...

    made = [task_of(app, name="charge", **options)(charge)]
    if way != "class":
        made.append(task_of(app, name="rename", base=plain, once={"graceful": False})(rename))
    worker: Any = SimpleNamespace(app=app, pool_cls="celery.concurrency.solo:TaskPool", concurrency=1)
    try:
        SessionStep(worker)
    finally:
        set_worker_pool(None)
        app.close()

    [message] = caplog.messages
    assert "Task charge has missing, once, read_only, but its class is FlaskTask" in message
    assert "they have no effect" in message


def test_wrong_session_factory_is_refused(app: Celery) -> None:
    """A class attribute that can make no session is named with its task."""

    class ShopTask(SessionTask):
        abstract = True
        session_factory = 3

    def rename() -> None: ...

    with pytest.raises(ConfigurationError, match="session_factory of task 'rename' is a 'int'"):
        bool(task_of(app, base=ShopTask, name="rename")(rename))
