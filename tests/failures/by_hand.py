"""How sessions are put into tasks by hand today, from articles, answers and projects: the counter-examples.

Each pattern is a class that makes tasks as `Ours` does, so that the same promise can be put to both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import flask
from celery import Task
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import NoSessionError, released
from tests.services.databases import Database
from tests.stand import task_of
from tests.unit.shop import Book, Shop

Body = Callable[..., Any]

current: ContextVar[Session | None] = ContextVar("current", default=None)


class Ours(Shop):
    """Tasks as celery-alchemy makes them."""

    @property
    def engine(self) -> Engine:
        """The engine of the tasks' sessions."""
        return self.alchemy.engine

    def make(self, body: Body, *, saves_failure: bool = False, **options: Any) -> Any:
        """Make a task of `body(task, session, *args)`."""

        def run(self: Any, session: Session, *args: Any) -> Any:
            return body(self, session, *args)

        if saves_failure:
            options["record_failure"] = _record
        return self.task(bind=True, **options)(run)

    def make_once(self, body: Body) -> Any:
        """Make a task that may be delivered twice."""
        self.alchemy.create_tables()
        return self.make(body, once=True)

    def send(self, session: Session, task: Any) -> None:
        """Send a task that reads what the session has written."""
        task.delay_on_commit()

    def slow(self, session: Session) -> AbstractContextManager[None]:
        """Surround slow work that needs no connection."""
        return released(session)

    def session_of(self, task: Any) -> Session:
        """Return the session as a running body reaches it through its task."""
        session: Session = task.session
        return session

    def session_left_behind(self, task: Any) -> bool:
        """Tell whether a session of a task that has ended can still be reached."""
        try:
            self.session_of(task)
        except NoSessionError:
            return False
        return True


def _record(session: Session, exc: BaseException) -> None:
    session.add(Book(title="failed"))


class ByHand(Ours):
    """What the patterns have in common: an engine and a sessionmaker at module level, and a commit at the end."""

    base: type[Task] = Task

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database)
        options.setdefault("pool_timeout", 1)
        self.hands_engine = create_engine(database.url, **options)
        self.sessions = sessionmaker(self.hands_engine)

    @property
    def engine(self) -> Engine:
        """The engine of the tasks' sessions."""
        return self.hands_engine

    def checked_out(self) -> int:
        """Return how many connections are lent out."""
        return int(self.hands_engine.pool.checkedout())  # type: ignore[attr-defined]

    def make(self, body: Body, *, saves_failure: bool = False, **options: Any) -> Any:
        """Make a task of `body(task, session, *args)`; a failure is saved in the session at hand."""
        options.pop("commit_on", None)
        pattern = self

        def run(self: Any, *args: Any) -> Any:
            with pattern.session_for(self) as session:
                try:
                    return pattern.finish(session, body(self, session, *args))
                except Exception:
                    if saves_failure:
                        session.add(Book(title="failed"))
                        session.flush()
                    raise

        base = options.pop("base", Task)
        return task_of(self.app, bind=True, base=self.task_class(base), **options)(run)

    def finish(self, session: Session, result: Any) -> Any:
        """End the work of a body that returned."""
        session.commit()
        return result

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the task's base class."""
        return base

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Give the running body its session."""
        yield task.db

    def make_once(self, body: Body) -> Any:
        """Make a task that may be delivered twice, and has nothing against it."""
        return self.make(body, acks_late=True)

    def send(self, session: Session, task: Any) -> None:
        """Commit first, so that the worker finds the rows."""
        session.commit()
        task.delay()

    def slow(self, session: Session) -> AbstractContextManager[None]:
        """Nobody gives the connection back."""
        return nullcontext()

    def session_of(self, task: Any) -> Session:
        """Return the session as a running body reaches it through its task."""
        session: Session = task.db
        return session

    def session_left_behind(self, task: Any) -> bool:
        """Tell whether a session of a task that has ended can still be reached."""
        return current.get() is not None


class WithBlock(ByHand):
    """`with SessionLocal() as session:` in every body."""

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Open and close around the body."""
        with self.sessions() as session:
            yield session


class Hooks(ByHand):
    """`self.db` made in before_start and closed in after_return."""

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class with both hooks, behind the user's own base."""
        sessions = self.sessions

        class DatabaseTask(Task):
            def before_start(self, *args: Any, **kwargs: Any) -> None:
                self.db = sessions()

            def after_return(self, *args: Any, **kwargs: Any) -> None:
                self.db.close()

        return type("DatabaseTask", (DatabaseTask,) if base is Task else (base, DatabaseTask), {"abstract": True})


class Lazy(ByHand):
    """A property that makes `self._db` once, and after_return that takes it away."""

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class with the property."""
        sessions = self.sessions

        class DatabaseTask(base):  # type: ignore[misc, valid-type]
            abstract = True
            _db = None

            @property
            def db(self) -> Session:
                if self._db is None:
                    self._db = sessions()
                return self._db

            def after_return(self, *args: Any, **kwargs: Any) -> None:
                if self._db is not None:
                    self._db.close()
                    self._db = None

        return DatabaseTask


class LateCommit(Hooks):
    """As Hooks, with the commit where the session is closed."""

    def finish(self, session: Session, result: Any) -> Any:
        """Leave the commit to after_return."""
        return result

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class that commits in after_return."""

        class Committing(super().task_class(base)):  # type: ignore[misc]
            abstract = True

            def after_return(self, *args: Any, **kwargs: Any) -> None:
                self.db.commit()
                self.db.close()

        return Committing


class CommitInFinally(ByHand):
    """A generator dependency that commits in its `finally`, whatever happened."""

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Commit and close around the body."""
        session = self.sessions()
        try:
            yield session
        finally:
            session.commit()
            session.close()


class AroundCall(ByHand):
    """A base whose __call__ opens, commits and closes: outside of Celery's autoretry."""

    def finish(self, session: Session, result: Any) -> Any:
        """Leave the commit to __call__."""
        return result

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class with that __call__."""
        sessions = self.sessions

        class DatabaseTask(base):  # type: ignore[misc, valid-type]
            abstract = True

            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                with sessions() as self.db:
                    result = super().__call__(*args, **kwargs)
                    self.db.commit()
                    return result

        return DatabaseTask


class FlaskScoped(ByHand):
    """A scoped_session of Flask's application context, removed in after_return, where that context is gone."""

    def __init__(self, database: Database, **options: Any) -> None:
        super().__init__(database, **options)
        self.web = flask.Flask("shop")
        # As Flask-SQLAlchemy does it.
        context: Any = flask.current_app
        self.scoped = scoped_session(self.sessions, scopefunc=lambda: id(context._get_current_object()))

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Give the session of the context that is pushed for the body."""
        with self.web.app_context():
            yield self.scoped()

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class that removes the session."""
        scoped = self.scoped

        class DatabaseTask(base):  # type: ignore[misc, valid-type]
            abstract = True

            def after_return(self, *args: Any, **kwargs: Any) -> None:
                scoped.remove()

        return DatabaseTask


class EnginePerTask(ByHand):
    """create_engine() in every task, for fear of forks."""

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Make an engine and a session of it."""
        with Session(create_engine(self.database.url)) as session:
            yield session


class KeptByTaskId(ByHand):
    """A dict of sessions by task id, popped in on_failure and in after_return."""

    def task_class(self, base: type[Task]) -> type[Task]:
        """Return the class with the dict."""
        kept: dict[str, Session] = {}
        sessions = self.sessions

        class DatabaseTask(base):  # type: ignore[misc, valid-type]
            abstract = True

            @property
            def db(self) -> Session:
                return kept.setdefault(self.request.id, sessions())

            def on_failure(self, *args: Any, **kwargs: Any) -> None:
                kept.pop(self.request.id).rollback()

            def after_return(self, *args: Any, **kwargs: Any) -> None:
                kept.pop(self.request.id).close()

        return DatabaseTask


class InContextVariable(ByHand):
    """A context variable that is set and never reset."""

    @contextmanager
    def session_for(self, task: Any) -> Iterator[Session]:
        """Set the variable around the body."""
        with self.sessions() as session:
            current.set(session)
            yield session
