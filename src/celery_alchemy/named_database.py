"""A task as a unit of work on another of its app's databases sees it: ``Annotated[Session, "analytics"]``.

Beside ``task.py``, which is that for the app's default database.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.app.task import Context
from sqlalchemy.orm import Session

from .errors import ConfigurationError
from .events import SessionListener
from .outcome import CommitOn
from .registry import Home, home_of
from .request import UnitOfWork
from .sessions import SessionOptions

__all__ = ["OtherDatabase"]


class OtherDatabase:
    """A task, with the sessions of another Alchemy of its app."""

    uses_session = False
    deferred_class: type[Session] | None = None
    has_named_databases = True

    def __init__(self, task: Any, database: str) -> None:
        home = home_of(task.app, database)
        if home is None:
            raise ConfigurationError(
                f"Task {task.name!r} asks for a session of {database!r}, and the app has no Alchemy of that name.",
                f"Make Alchemy(app, url, name={database!r}).",
            )
        self._task = task
        self._home = home
        self._database = database
        self.request: Context = task.request
        self.name: str = f"{task.name} ({database})"

    def home(self) -> Home:
        """Return what serves that database's sessions."""
        return self._home

    def open_session(self, unit: UnitOfWork, *, deferred: bool = False) -> Session:
        """Return a deferred session of that database."""
        session: Session = self._task.of_asked_class(self._home.source, self._database).session(unit)
        return session

    def session_listeners(self) -> Sequence[SessionListener]:
        """Return who wants to know of this database's sessions."""
        return self._home.session_listeners

    def outcomes_to_commit(self) -> CommitOn:
        """Return the task's outcomes."""
        outcomes: CommitOn = self._task.outcomes_to_commit()
        return outcomes

    def unit_options(self, unit: UnitOfWork) -> SessionOptions:
        """Return the task's options."""
        options: SessionOptions = self._task.unit_options(unit)
        return options

    def in_database(self, database: str) -> OtherDatabase:
        """Return the task on yet another database."""
        return OtherDatabase(self._task, database)
