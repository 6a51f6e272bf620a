"""The one lock of an SQLite database, where the task at hand holds it.

Beneath what writes states of tasks, chords and remote control: what is written beside that task
would wait for it, and it for what is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from ..outbox.place import Place, is_same_database
from ..requests.attempt import UnitOfWork, at_hand

__all__ = ["KnownDatabase", "session_with_the_lock"]


class KnownDatabase(Protocol):
    """This process's engine of a database, and where in it the tables are."""

    @property
    def place(self) -> Place: ...

    @property
    def engine(self) -> Callable[[], Engine]: ...


def session_with_the_lock(database: KnownDatabase) -> Session | None:
    """Return the session at hand if it holds the one lock of the database; only SQLite has one.

    What is written in its transaction comes with the task's COMMIT.
    """
    held = at_hand.get()
    if held is None or database.engine().dialect.name != "sqlite":
        return None
    session = held.used_session if isinstance(held, UnitOfWork) else held.session
    if session is None or not session.in_transaction():
        return None
    bind = database.place.bind_of(session)
    return session if is_same_database(bind, database.engine()) else None
