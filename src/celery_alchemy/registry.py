"""Which Alchemy serves a Celery app, or a task class that carries its own session factory.

Between ``alchemy.py``, which writes here, and ``task.py``, which reads here at each request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from celery import Celery
from sqlalchemy.orm import sessionmaker

from .errors import ConfigurationError
from .outcome import SUCCESS, CommitOn
from .sessions import CallableSource, SessionmakerSource, SessionSource

__all__ = ["FactoryHome", "Home", "home_of", "homes_of"]

_ATTRIBUTE = "celery_alchemy_homes"


class Home(Protocol):
    """What a task needs of the Alchemy that serves it."""

    commit_on: CommitOn
    publish_in_transaction: str

    @property
    def source(self) -> SessionSource: ...


class FactoryHome:
    """Serves a task class that has ``session_factory`` and needs no Alchemy."""

    commit_on: CommitOn = SUCCESS
    publish_in_transaction = "warn"

    def __init__(self, factory: object, task_name: str) -> None:
        if isinstance(factory, sessionmaker):
            self.source: SessionSource = SessionmakerSource(lambda: factory, factory.class_)
        elif callable(factory):
            self.source = CallableSource(cast("Callable[[], Any]", factory))
        else:
            raise ConfigurationError(
                f"session_factory of task {task_name!r} is a {type(factory).__name__!r}.",
                "Give it a sessionmaker, or a callable that takes no arguments and returns a new Session.",
            )


def homes_of(app: Celery) -> dict[str | None, Home]:
    """Return the Alchemy objects of an app by name; the default one is under None. The dict is live."""
    # On the app itself: two apps in one process, each with its own Alchemy, share nothing.
    return cast("dict[str | None, Home]", app.__dict__.setdefault(_ATTRIBUTE, {}))


def home_of(app: Celery, name: str | None = None) -> Home | None:
    """Return the app's Alchemy of that name, None if it has none."""
    homes = app.__dict__.get(_ATTRIBUTE)
    return None if homes is None else homes.get(name)
