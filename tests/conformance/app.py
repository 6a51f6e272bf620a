"""The app of the conformance suite: for each way to end a task, one that gets its session each way.

Every body writes one mark under its caller's key as name, then ends. A worker serves the module's own `app`; the test's process
makes another with `make()` for eager and direct calls.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from celery import Celery
from celery.exceptions import Ignore, Reject
from celery.signals import task_postrun
from sqlalchemy import Engine, ForeignKey, String, Table, create_engine, event, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool, QueuePool

from celery_alchemy import Alchemy, SessionTask
from tests.conformance import folders
from tests.settings import database_url, make_app

#: Folder in which `<task id>` says that a request has ended and `<task id>.started` that its body wrote its mark.
SIGNS_VARIABLE = "CELERY_ALCHEMY_TEST_SIGNS"
INJECTED, BOUND = "injected", "self.session"
#: Seconds that a body may wait for what ends it; nothing in the suite takes longer.
LONG_SECONDS = 30

End = Callable[[SessionTask, Session, str], Any]


class Base(DeclarativeBase):
    """The tables of the suite."""


class Mark(Base):
    """What a task wrote; a name is written once, so that what should have been rolled back is noticed."""

    __tablename__ = "mark"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    note: Mapped[str] = mapped_column(String(100), default="")


class Lock(Base):
    """One row, which some bodies lock and their record_failure updates."""

    __tablename__ = "shared_row"

    id: Mapped[int] = mapped_column(primary_key=True)
    holder: Mapped[str] = mapped_column(String(100), default="")


class Parent(Base):
    """Nothing is ever in it."""

    __tablename__ = "parent"

    id: Mapped[int] = mapped_column(primary_key=True)


class Orphan(Base):
    """A row that refers to nothing: allowed until the commit, where the database can wait so long."""

    __tablename__ = "orphan"

    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey(Parent.id, deferrable=True, initially="DEFERRED"))


def create_tables(engine: Engine) -> None:
    """Make the suite's tables; MariaDB has no deferred constraints and so no orphans."""
    tables = list(Base.metadata.sorted_tables)
    if engine.dialect.name == "mysql":
        tables.remove(cast("Table", Orphan.__table__))
    Base.metadata.create_all(engine, tables=tables)
    with Session(engine) as session:
        session.add(Lock(id=1))
        session.commit()


def succeed(task: SessionTask, session: Session, key: str) -> str:
    return key


def fail(task: SessionTask, session: Session, key: str) -> None:
    raise LookupError(key)


def retry(task: SessionTask, session: Session, key: str) -> None:
    if task.request.retries == 0:
        raise task.retry(countdown=0)


def fail_once(task: SessionTask, session: Session, key: str) -> None:
    if task.request.retries == 0:
        raise ZeroDivisionError


def ignore(task: SessionTask, session: Session, key: str) -> None:
    raise Ignore


def reject(task: SessionTask, session: Session, key: str) -> None:
    raise Reject(key, requeue=False)


def replace(task: SessionTask, session: Session, key: str) -> Any:
    return task.replace(task.app.tasks["note"].si(f"{key}:replacement"))


def wait(task: SessionTask, session: Session, key: str) -> None:
    time.sleep(LONG_SECONDS)


def wait_in_statement(task: SessionTask, session: Session, key: str) -> None:
    """Be in the middle of a statement when the soft time limit comes; SQLite has none that waits."""
    dialect = session.get_bind().dialect
    if dialect.name == "sqlite":
        time.sleep(LONG_SECONDS)
    # psycopg2 hands a signal on only when the statement has ended by itself.
    seconds = 2 if dialect.driver == "psycopg2" else LONG_SECONDS
    session.execute(text(f"SELECT {'pg_sleep' if dialect.name == 'postgresql' else 'sleep'}({seconds})"))


def wait_in_short_statement(task: SessionTask, session: Session, key: str) -> None:
    """Be in the middle of a statement when the greenlet is ended; the server notices only when the statement is over."""
    is_postgresql = session.get_bind().dialect.name == "postgresql"
    session.execute(text(f"SELECT {'pg_sleep' if is_postgresql else 'sleep'}(4)"))


def exit_process(task: SessionTask, session: Session, key: str) -> None:
    raise SystemExit


def die(task: SessionTask, session: Session, key: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_commit(task: SessionTask, session: Session, key: str) -> None:
    """Have the COMMIT refused: by a deferred constraint, or where there is none by an error raised before it."""
    if session.get_bind().dialect.name == "mysql":
        event.listen(session, "before_commit", _refuse, once=True)
        return
    session.add(Orphan(id=1, parent_id=1))
    session.flush()


def _refuse(session: Session) -> None:
    raise OperationalError("COMMIT", {}, Exception("refused"))


def lose_database(task: SessionTask, session: Session, key: str) -> None:
    """Have the server cut this transaction's connection, and go on as if nothing were wrong."""
    cut_connection(session)
    session.execute(select(Mark.name)).all()


def lose_database_before_commit(task: SessionTask, session: Session, key: str) -> None:
    """Have the server cut the connection right before the commit."""
    cut_connection(session)


def lose_database_after_commit(task: SessionTask, session: Session, key: str) -> None:
    """Commit the work, begin to read, and have the server cut the connection: only the close can fail now."""
    session.commit()
    session.execute(select(Mark.name)).all()
    cut_connection(session)
    session.get_transaction()


def cut_connection(session: Session) -> None:
    """Cut the server's side of a session's connection, through another one."""
    bind = session.get_bind()
    is_postgresql = bind.dialect.name == "postgresql"
    query = "SELECT pg_backend_pid()" if is_postgresql else "SELECT CONNECTION_ID()"
    mine = session.execute(text(query)).scalar_one()
    other = create_engine(bind.engine.url, poolclass=NullPool)
    with other.connect() as connection:
        connection.exec_driver_sql(f"SELECT pg_terminate_backend({mine})" if is_postgresql else f"KILL {mine}")


def nest(task: SessionTask, session: Session, key: str) -> None:
    """Fail after another task ran inside of this one."""
    task.app.tasks["note"](f"{key}:inner")
    raise LookupError(key)


ENDINGS: dict[str, End] = {
    "success": succeed,
    "exception": fail,
    "self.retry": retry,
    "autoretry": fail_once,
    "ignore": ignore,
    "reject": reject,
    "replace": replace,
    "soft limit": wait_in_statement,
    "hard limit": wait,
    "revoke": wait,
    "revoke in a statement": wait_in_short_statement,
    "system exit": exit_process,
    "lost child": die,
    "failing commit": fail_commit,
    "database gone": lose_database,
    "database gone before commit": lose_database_before_commit,
    "database gone after commit": lose_database_after_commit,
    "task inside task": nest,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "autoretry": {"autoretry_for": (ZeroDivisionError,), "retry_kwargs": {"countdown": 0}},
    "soft limit": {"soft_time_limit": 1},
    "hard limit": {"time_limit": 1},
    # There the close alone must be what meets the dead connection.
    "database gone after commit": {"commit_on": ()},
}


#: Endings whose body holds a lock that record_failure needs too, as a document's row with its state.
LOCKING = {"soft limit", "hard limit", "lost child", "revoke"}


def write_mark(task: SessionTask, session: Session, ending: str, key: str) -> None:
    """Write a mark, tell that it is written, and leave the transaction open."""
    if ending in LOCKING:
        session.execute(update(Lock).values(holder=key))
    session.add(Mark(name=key, note=str(task.request.retries)))
    session.flush()
    _sign(f"{task.request.id}.started")


def record(session: Session, exc: BaseException, key: str) -> None:
    """Write down the failure of a task."""
    session.add(Mark(name=f"{key}:failed", note=type(exc).__name__))


def record_under_lock(session: Session, exc: BaseException, key: str) -> None:
    """Write down the failure of a task, and update the row that its body had locked."""
    session.execute(update(Lock).values(holder=key))
    record(session, exc, key)


def make(app: Celery, url: str) -> Alchemy:
    """Give an app its Alchemy and the suite's tasks."""
    alchemy = Alchemy(app, url)
    task: Any = app.task
    for ending, end in ENDINGS.items():
        options = {
            "bind": True,
            "shared": False,
            "record_failure": record_under_lock if ending in LOCKING else record,
            **OPTIONS.get(ending, {}),
        }
        task(name=f"{ending}, {INJECTED}", **options)(_injected(ending, end))
        task(name=f"{ending}, {BOUND}", **options)(_bound(ending, end))

    @task(name="note", shared=False)
    def note(session: Session, key: str) -> str:
        session.add(Mark(name=key))
        return key

    @task(name="probe", shared=False)
    def probe() -> int:
        pool = alchemy.engine.pool
        return pool.checkedout() if isinstance(pool, QueuePool) else 0

    return alchemy


def _injected(ending: str, end: End) -> Callable[..., Any]:
    def body(self: SessionTask, session: Session, key: str) -> Any:
        # Before a nested task the transaction only reads: SQLite has one writer.
        if ending != "task inside task":
            write_mark(self, session, ending, key)
        return end(self, session, key)

    return body


def _bound(ending: str, end: End) -> Callable[..., Any]:
    def body(self: SessionTask, key: str) -> Any:
        if ending != "task inside task":
            write_mark(self, self.session, ending, key)
        return end(self, self.session, key)

    return body


def _sign(name: str) -> None:
    folder = os.environ.get(SIGNS_VARIABLE)
    if folder is not None:
        Path(folder, name).touch()


def _sign_end(task_id: str, **more: Any) -> None:
    _sign(task_id)


folders.install()
_url = database_url()
if _url is not None:
    app = make_app("conformance")
    make(app, _url)
    task_postrun.connect(_sign_end)
