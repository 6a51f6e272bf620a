"""The app's default task class: SessionTask, or the app's own with SessionTask mixed in front.

Between ``alchemy.py``, which ties an app, and ``task.py``, whose class this is about.
"""

from __future__ import annotations

import inspect
import logging
import types
from typing import Any

from celery import Celery, Task
from celery.utils.imports import symbol_by_name

from .errors import ConfigurationError, TasksAlreadyBoundError
from .messages.celery_types import App, tasks_so_far
from .task import SessionTask

__all__ = ["give_task_class"]

logger: logging.Logger = logging.getLogger("celery_alchemy.task_class")

#: A class of tasks; the stubs of Celery take ``task_cls`` for a name.
TaskClass = type

_DEFAULT_TASK_CLASS = "celery.app.task:Task"


def give_task_class(app: App) -> None:
    """Have the tasks of an app be SessionTasks.

    An app that has a task class of its own keeps it: as ``task_cls``, by ``app.Task = ...``, as
    many Flask applications do, or from a Celery subclass. SessionTask is mixed in front of it.

    Raises:
        TasksAlreadyBoundError: Tasks of the app are in use, with a class that knows no sessions.
        ConfigurationError: SessionTask and the app's own class cannot be one class.
    """
    tasks: Any = app
    own: TaskClass
    assigned = app.__dict__.get("Task")
    # The class that Celery makes of task_cls carries its app.
    if assigned is not None and vars(assigned).get("_app") is not app:
        own = assigned
    elif _makes_its_own(app):
        own = tasks.Task
    elif app.task_cls in (_DEFAULT_TASK_CLASS, Task):
        _refuse_bound_tasks(app)
        tasks.task_cls = SessionTask
        # app.Task is a cached property, which Celery's own tasks may have filled.
        app.__dict__.pop("Task", None)
        return
    elif isinstance(app.task_cls, str):
        _mix_at_first_use(app)
        return
    else:
        own = tasks.task_cls
    if issubclass(own, SessionTask):
        return
    _refuse_bound_tasks(app)
    mixed = _mixed(app, own)
    if own is tasks.task_cls:
        tasks.task_cls = mixed
        app.__dict__.pop("Task", None)
        return
    try:
        tasks.Task = mixed
    except AttributeError:
        raise ConfigurationError(
            f"The task class of {type(app).__qualname__} cannot be changed, and knows no sessions.",
            f"Mix SessionTask into {own.__qualname__}: class {own.__name__}(SessionTask, ...).",
        ) from None


def _makes_its_own(app: App) -> bool:
    """Tell whether a Celery subclass makes the class itself, by ``Task`` or ``create_task_cls``."""
    names = ("Task", "create_task_cls")
    mro = type(app).__mro__
    return any(name in vars(class_) for class_ in mro[: mro.index(Celery)] for name in names)


def _mix_at_first_use(app: App) -> None:
    """Mix when Celery first asks for the class: a name may stand for what is not made yet."""
    if "Task" in app.__dict__:
        # It was asked for already.
        app.__dict__.pop("Task")
        _mix_named(app)
        return
    create = app.create_task_cls

    def create_task_cls() -> object:
        _mix_named(app)
        return create()

    vars(app)["create_task_cls"] = create_task_cls


def _mix_named(app: App) -> None:
    own: TaskClass = symbol_by_name(str(app.task_cls))
    if not issubclass(own, SessionTask):
        _refuse_bound_tasks(app)
        vars(app)["task_cls"] = _mixed(app, own)


def _mixed(app: App, own: TaskClass) -> TaskClass:
    name = f"{own.__module__}.{own.__qualname__}"
    try:
        # As the app's own, for logs and for what is found by its name.
        members = {"abstract": True, "__module__": own.__module__, "__qualname__": own.__qualname__}
        # With the class's own metaclass, as a class statement would.
        mixed: TaskClass = types.new_class(
            own.__name__, (SessionTask, own), {}, lambda namespace: namespace.update(members)
        )
    except TypeError as exc:
        raise ConfigurationError(
            f"The app {app.main!r} has the task class {name}, which cannot be one class with"
            f" SessionTask: {exc}.",
            "Derive it from celery_alchemy.SessionTask, or take it away from the app and give"
            " base=... to the tasks that need it.",
        ) from exc
    text = "The app %r has the task class %s: its tasks get sessions, SessionTask is mixed in front"
    logger.info(text, app.main, name)
    _warn_of_hidden_names(own, name)
    return mixed


def _warn_of_hidden_names(own: TaskClass, name: str) -> None:
    """Warn of what SessionTask hides of the app's own class, in front of which it stands."""
    hidden = sorted(
        attribute
        for attribute in set(dir(SessionTask)) - set(dir(Task))
        if not attribute.startswith("_")
        and inspect.getattr_static(own, attribute, None) is not None
    )
    if hidden:
        text = (
            "The task class %s has %s of its own, which SessionTask hides: self.%s is"
            " SessionTask's now. Rename yours; or, to keep it, derive the class yourself, with"
            " yours in front: class %s(..., SessionTask)."
        )
        logger.warning(text, name, ", ".join(hidden), hidden[0], own.__name__)


def _refuse_bound_tasks(app: App) -> None:
    others = (task.name for task in tasks_so_far(app) if not isinstance(task, SessionTask))
    bound = [name for name in others if not name.startswith("celery.")]
    if bound:
        raise TasksAlreadyBoundError(tuple(sorted(bound))[:5])
