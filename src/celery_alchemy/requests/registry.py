"""Which Alchemy serves a Celery app.

Between ``alchemy.py``, which writes here, and ``task.py``, which reads here at each request;
``session_factory.py`` stands in for an Alchemy where a task class carries its own factory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from ..events import SessionListener
from ..messages.celery_types import App
from ..outbox.outbox import Outbox
from ..outbox.place import Place
from ..sessions.isolation import ShownEngine
from ..sessions.scope import RequestRegistry
from ..sessions.sources import AsyncSessionSource, SessionSource
from ..signatures.outcomes import CommitOn

__all__ = ["Home", "give_home", "home_of"]

_ATTRIBUTE = "celery_alchemy_home"


class Home(Protocol):
    """What tasks need of the Alchemy that serves them.

    Attributes:
        commit_on: The outcomes that commit, for tasks that do not say.
        publish_in_transaction: What a plain send in a transaction with uncommitted writes does.
        place: Where the library's table is.
        outbox: Where messages are kept; None where there is no table for them.
        is_broker: The table is the app's broker too.
        keeps_messages: Every send on commit goes through the outbox, not only those of ``once``
            tasks.
        remote_tasks: Patterns of task names that other services run.
        redeliver_after: Seconds after which an owed task is sent again.
        max_deliveries: Starts without an end after which a task is dead.
        idle_transaction_seconds: A transaction that is idle for longer is reported; None for never.
        session_listeners: Told of each closed session of a task.
        around: Returns what is around each run of a task's body; None for nothing.
        registry: The application's own, which hands out the sessions of requests while they run.
    """

    commit_on: CommitOn
    publish_in_transaction: str
    place: Place
    outbox: Outbox | None
    is_broker: bool
    keeps_messages: bool
    remote_tasks: tuple[str, ...]
    redeliver_after: float
    max_deliveries: int
    idle_transaction_seconds: float | None
    session_listeners: list[SessionListener]

    @property
    def around(self) -> Callable[[object, object], object] | None: ...

    @property
    def registry(self) -> RequestRegistry | None: ...

    def engines_shown(self) -> list[ShownEngine]: ...

    @property
    def source(self) -> SessionSource: ...

    @property
    def async_source(self) -> AsyncSessionSource: ...

    @property
    def engine(self) -> Engine: ...

    def session(self) -> AbstractContextManager[Session]: ...

    def allows_entity(self, class_: type) -> bool: ...


def give_home(app: App, home: Home) -> Home | None:
    """Have an Alchemy serve the tasks of an app; return the one that has served them so far."""
    # On the app itself: two apps in one process, each with its own Alchemy, share nothing.
    before = home_of(app)
    app.__dict__[_ATTRIBUTE] = home
    return before


def home_of(app: App) -> Home | None:
    """Return the app's Alchemy, None if it has none."""
    home: Home | None = app.__dict__.get(_ATTRIBUTE)
    return home
