"""An app whose Celery class or task class is its own: SessionTask is mixed in front, or it says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from celery import Celery, Task
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, ConfigurationError, SessionTask, TasksAlreadyBoundError
from celery_alchemy.task_class import logger
from tests.stand import task_of


class ContextTask(Task):
    """What Flask applications have: each call in a context of the application."""

    abstract = True
    calls: list[str] = []  # noqa: RUF012 - each test clears it.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(str(self.name))
        return self.run(*args, **kwargs)


class FlaskCelery(Celery):
    """A Celery subclass as many applications have it: it makes and assigns the class itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        base: Any = self.Task

        class OwnTask(base):  # type: ignore[misc]
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                ContextTask.calls.append(str(self.name))
                return base.__call__(self, *args, **kwargs)

        self.Task = OwnTask  # type: ignore[method-assign, assignment]


class ClassCelery(Celery):
    """A Celery subclass that names the class."""

    task_cls = ContextTask


class NameCelery(Celery):
    """A Celery subclass that names the class by its path."""

    task_cls = f"{__name__}:ContextTask"


class MakingCelery(Celery):
    """A Celery subclass that makes the class when it is asked for."""

    def create_task_cls(self) -> Any:
        return type("MadeTask", (ContextTask,), {"abstract": True, "_app": self})


class FixedCelery(Celery):
    """A Celery subclass whose class nobody can change."""

    @property
    def Task(self) -> Any:  # noqa: N802 - Celery's name.
        return ContextTask


def _assigned() -> Celery[Any]:
    app = _app(Celery)
    app.Task = ContextTask  # type: ignore[method-assign, assignment]
    return app


def _app(class_: type[Celery[Any]], **options: Any) -> Celery[Any]:
    return class_("shop", broker="memory://", backend="cache+memory://", set_as_current=False, **options)


APPS: dict[str, Any] = {
    "task_cls": lambda: _app(Celery, task_cls=ContextTask),
    "task_cls by name": lambda: _app(Celery, task_cls=f"{__name__}:ContextTask"),
    "assigned": _assigned,
    "assigned by a subclass": lambda: _app(FlaskCelery),
    "named in a subclass": lambda: _app(ClassCelery),
    "named by path in a subclass": lambda: _app(NameCelery),
    "made by a subclass": lambda: _app(MakingCelery),
}


@pytest.fixture(autouse=True)
def calls() -> list[str]:
    """The calls of this test."""
    ContextTask.calls.clear()
    return ContextTask.calls


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("kind", APPS)
def test_own_task_class_gets_sessions_and_keeps_what_it_does(
    kind: str, calls: list[str], caplog: pytest.LogCaptureFixture, finalized: bool
) -> None:
    """The session is injected inside of the class's own call; it is said once, at INFO."""
    caplog.set_level(logging.INFO, logger.name)
    app = APPS[kind]()
    if finalized:
        app.finalize()  # Celery's own tasks are made, with a class without sessions.
    Alchemy(app, "sqlite://")

    @task_of(app, name="work")
    def work(session: Session) -> bool:
        return session.is_active

    @task_of(app, name="bound", bind=True)
    def bound(self: Any) -> bool:
        return isinstance(self.session, Session)

    assert work() is True
    assert bound.apply(throw=True).get() is True
    assert isinstance(work, SessionTask)
    assert calls == ["work", "bound"]
    assert [record.levelname for record in caplog.records if record.name == logger.name] == ["INFO"]
    app.close()


def test_class_that_is_a_session_task_already_stays_as_it_is() -> None:
    """The order of its bases is its author's."""

    class ShopTask(ContextTask, SessionTask):
        abstract = True

    app = _app(Celery, task_cls=ShopTask)
    Alchemy(app, "sqlite://")

    assert app.task_cls is ShopTask
    app.close()


def test_class_by_name_that_is_a_session_task_stays_as_it_is() -> None:
    """It is looked at when Celery first asks for it."""
    app = _app(Celery, task_cls="celery_alchemy:SessionTask")
    Alchemy(app, "sqlite://")

    assert issubclass(app.Task, SessionTask)
    assert app.task_cls == "celery_alchemy:SessionTask"
    app.close()


class LegacyTask(ContextTask):
    """What projects have written by hand: a session under the name of ours."""

    abstract = True
    session_factory = None
    commit_on = ("success", "retry")

    @property
    def session(self) -> str:
        return "legacy"

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        return super().retry(*args, **kwargs)


@pytest.mark.parametrize("by_name", [False, True])
def test_own_names_that_are_hidden_are_warned_of(caplog: pytest.LogCaptureFixture, by_name: bool) -> None:
    """`self.session` would go to another database without a word; what calls super() is not hidden."""
    app = _app(Celery, task_cls=f"{__name__}:LegacyTask" if by_name else LegacyTask)
    Alchemy(app, "sqlite://")
    app.Task  # noqa: B018

    [warning] = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert "LegacyTask has commit_on, session of its own, which SessionTask hides" in warning
    assert "class LegacyTask(..., SessionTask)" in warning
    app.close()


class _Meta(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if len(bases) > 1:
            raise TypeError("this class has one base")
        return super().__new__(mcs, name, bases, members)


class StubbornTask(Task, metaclass=_Meta):
    """Cannot be one of two bases."""

    abstract = True


def test_class_that_cannot_be_mixed_is_refused_at_alchemy() -> None:
    """With the reason, and what to do instead."""
    app = _app(Celery, task_cls=StubbornTask)

    with pytest.raises(ConfigurationError, match=r"StubbornTask, which cannot be one class.*one base"):
        Alchemy(app, "sqlite://")
    app.close()


def test_class_by_name_that_cannot_be_mixed_is_refused_at_its_first_use() -> None:
    """Its module may not be there yet when the Alchemy is made."""
    app = _app(Celery, task_cls=f"{__name__}:StubbornTask")
    Alchemy(app, "sqlite://")

    with pytest.raises(ConfigurationError, match="StubbornTask, which cannot be one class"):
        app.Task  # noqa: B018
    app.close()


def test_class_that_cannot_be_replaced_is_refused() -> None:
    """A property of a Celery subclass, for example."""
    app = _app(FixedCelery)

    with pytest.raises(ConfigurationError, match="The task class of FixedCelery cannot be changed"):
        Alchemy(app, "sqlite://")
    app.close()


def test_tasks_that_were_bound_before_are_refused() -> None:
    """They would go on without sessions."""
    app = _app(Celery, task_cls=ContextTask)

    @task_of(app, name="rename")
    def rename(session: Session) -> None: ...

    assert rename.name == "rename"
    with pytest.raises(TasksAlreadyBoundError, match="rename were bound before"):
        Alchemy(app, "sqlite://")
    app.close()


def test_second_alchemy_of_the_app_mixes_nothing_again(caplog: pytest.LogCaptureFixture) -> None:
    """It takes the place of the first."""
    caplog.set_level(logging.INFO, logger.name)
    app = _app(Celery, task_cls=ContextTask)
    Alchemy(app, "sqlite://")
    mixed = app.task_cls
    with pytest.warns(UserWarning, match="had an Alchemy already"):
        Alchemy(app, "sqlite://")

    assert app.task_cls is mixed
    assert len(caplog.records) == 1
    app.close()


# Names that the way to the body gives to things of its own.
NAMES = ["task", "args", "kwargs", "own", "unit", "body", "exc", "owner", "request", "session_", "call"]


@pytest.mark.parametrize("name", NAMES)
def test_argument_may_have_any_name_below_a_class_with_a_call_of_its_own(name: str) -> None:
    """By keyword too: `task` is what Celery's own celery.map calls its argument."""
    app = _app(Celery, task_cls=ContextTask)
    Alchemy(app, "sqlite://")
    namespace: dict[str, Any] = {}
    exec(f"def echo({name}):\n    return {name}", namespace)
    options: dict[str, Any]
    for options in ({}, {"transient_retries": 1}):
        work = task_of(app, name=f"echo-{len(options)}", **options)(namespace["echo"])

        assert work(**{name: 1}) == 1
        assert work.apply(kwargs={name: 1}, throw=True).get() == 1
    app.close()


@pytest.mark.parametrize("way", ["map", "starmap", "chunks"])
def test_tasks_for_many_items_run_below_a_class_with_a_call_of_its_own(way: str) -> None:
    """Celery's own tasks for them are of the app's class too."""
    app = _app(Celery, task_cls=ContextTask)
    Alchemy(app, "sqlite://")

    @task_of(app, name="double")
    def double(session: Session, number: int) -> int:
        return 2 * number

    signatures = {
        "map": lambda: double.map([1, 2]),
        "starmap": lambda: double.starmap([(1,), (2,)]),
        "chunks": lambda: double.chunks([(1,), (2,)], 2).group(),
    }
    result = signatures[way]().apply(throw=True).get()

    assert result in ([2, 4], [[2, 4]])
    app.close()


# --- the class of requests --------------------------------------------------------------------------


class CountingRequest:
    """Is none: not derived from Celery's."""


def test_request_that_cannot_be_combined_is_refused_when_the_worker_asks() -> None:
    """Without ours nobody would record a lost child."""
    app = _app(Celery)
    Alchemy(app, "sqlite://")

    @task_of(app, name="work", Request=CountingRequest)
    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match=r"CountingRequest.*cannot be one class.*is not derived from"):
        work.Request  # noqa: B018
    app.close()


@pytest.mark.parametrize("way", ["option", "base in front", "base behind", "by name"])
def test_request_of_a_task_class_is_combined_with_ours(way: str) -> None:
    """Whichever comes first among the bases."""
    from celery.worker.request import Request

    from celery_alchemy.worker.parent import SessionRequest

    class OwnRequest(Request):
        pass

    class OwnTask(Task):
        abstract = True
        Request = OwnRequest

    app = _app(Celery)
    Alchemy(app, "sqlite://")
    bases = (OwnTask, SessionTask) if way == "base in front" else (SessionTask, OwnTask)
    options: dict[str, Any] = {"base": type("ShopTask", bases, {"abstract": True})}
    if way == "option":
        options = {"Request": OwnRequest}
    if way == "by name":
        options = {"Request": "tests.unit.test_task_classes:NamedRequest"}

    @task_of(app, **options)
    def work(session: Session) -> None: ...

    expected = NamedRequest if way == "by name" else OwnRequest
    assert issubclass(work.Request, SessionRequest)
    assert issubclass(work.Request, expected)
    assert work.Request is work.Request
    app.close()


def _named_request() -> Any:
    from celery.worker.request import Request

    return type("NamedRequest", (Request,), {})


NamedRequest = _named_request()


def test_request_that_is_derived_from_ours_is_taken_as_it_is() -> None:
    """It says itself what comes first."""
    from celery_alchemy.worker.parent import SessionRequest

    own = type("OwnRequest", (SessionRequest,), {})
    app = _app(Celery)
    Alchemy(app, "sqlite://")

    @task_of(app, Request=own)
    def work(session: Session) -> None: ...

    assert work.Request is own
    app.close()
