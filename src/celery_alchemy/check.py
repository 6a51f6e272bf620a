"""What a careful colleague would look at before production: ``celery -A app alchemy check``.

At the edge, beside the command line; reads the app's configuration and asks the database, changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from .errors import CeleryAlchemyError, NotConfiguredError
from .registry import homes_of
from .task import SessionTask, asks_in_vain
from .visibility import visibility_timeout_seconds, window_is_short

__all__ = ["Finding", "check"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change.

    Attributes:
        code: A short name, stable across releases.
        level: ``"error"``: a guarantee does not hold, or tasks will fail. ``"warning"``: worth a look.
        reason: What was found and what it leads to.
        fix: What to change.
    """

    code: str
    level: Literal["error", "warning"]
    reason: str
    fix: str

    def of_database(self, name: str | None) -> Finding:
        """Return the finding as one of another of the app's databases."""
        return replace(self, reason=f"Database {name!r}: {self.reason}")

    def as_dict(self) -> dict[str, str]:
        """Return the finding as plain values."""
        return asdict(self)


def check(alchemy: Any) -> list[Finding]:
    """Run every check of an Alchemy, of its app, and of the app's other databases.

    Args:
        alchemy: An Alchemy that serves an app.

    Returns:
        The findings, errors first; empty when all is well.
    """
    alchemy.app.finalize()
    findings = [finding for look in (*_LOOKS, *_LOOKS_AT_THE_APP) for finding in look(alchemy)]
    for name, other in homes_of(alchemy.app).items():
        if other is not alchemy:
            findings += [finding.of_database(name) for look in _LOOKS for finding in look(other)]
    return sorted(findings, key=lambda finding: finding.level != "error")


def _database(alchemy: Any) -> Iterator[Finding]:
    try:
        with alchemy.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    except (DBAPIError, CeleryAlchemyError) as exc:
        yield Finding("database", "error", f"The database cannot be used: {exc}", "Check the URL and that the server runs.")


def _reachable(look: Callable[[Any, Engine], Iterator[Finding]]) -> Callable[[Any], Iterator[Finding]]:
    """Skip a look at the database when it cannot be used, which ``_database`` has said."""

    def guarded(alchemy: Any) -> Iterator[Finding]:
        try:
            yield from list(look(alchemy, alchemy.engine))
        except (DBAPIError, CeleryAlchemyError):
            return

    return guarded


@_reachable
def _tables(alchemy: Any, engine: Engine) -> Iterator[Finding]:
    # The records of once tasks are in the default database.
    needed = alchemy.keeps_messages or (
        alchemy.name is None and any(getattr(task, "is_once", False) for task in alchemy.app.tasks.values())
    )
    there = inspect(engine)
    for table in alchemy.metadata.sorted_tables if needed else ():
        if not there.has_table(table.name):
            yield Finding(
                "missing-table",
                "error",
                f"The table {table.name} does not exist, and outbox=True or once tasks need it.",
                "Run `celery -A app alchemy create-tables`, or add alchemy.metadata to Alembic.",
            )
            continue
        indexes = {index["name"] for index in there.get_indexes(table.name)}
        for index in table.indexes:
            if index.name not in indexes:
                yield Finding(
                    "missing-index",
                    "error",
                    f"The index {index.name} of {table.name} does not exist: relays read the whole table each second.",
                    f"Create it on {', '.join(column.name for column in index.columns)}.",
                )


@_reachable
def _connections(alchemy: Any, engine: Engine) -> Iterator[Finding]:
    statement = {
        "postgresql": "SELECT current_setting('max_connections')::int",
        "mysql": "SELECT @@max_connections",
        "mariadb": "SELECT @@max_connections",
    }.get(engine.dialect.name)
    if statement is None:
        return
    with engine.connect() as connection:
        limit = int(connection.scalar(text(statement)) or 0)
    processes = alchemy.app.conf.worker_concurrency or os.cpu_count() or 1
    if limit and processes + 1 > limit:
        yield Finding(
            "connections",
            "error",
            f"A worker of {processes} processes takes {processes + 1} connections or more; the server allows {limit}.",
            "Lower worker_concurrency, raise max_connections, or put a connection pooler in between.",
        )
    elif limit and (processes + 1) * 5 > limit:
        yield Finding(
            "connections",
            "warning",
            f"Each worker of {processes} processes takes {processes + 1} connections; the server allows {limit}, which is"
            f" enough for {limit // (processes + 1)} such workers and nothing else.",
            "Count your workers and web processes against the limit.",
        )


@_reachable
def _sqlite(alchemy: Any, engine: Engine) -> Iterator[Finding]:
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
    # A database in memory has one connection, or one process.
    if mode not in ("wal", "memory"):
        yield Finding(
            "sqlite-journal",
            "warning",
            f"The SQLite file is in journal mode {mode!r}: readers and the writer wait for each other.",
            "Give Alchemy the URL instead of an engine, or run PRAGMA journal_mode=WAL on it.",
        )


def _broker(alchemy: Any) -> Iterator[Finding]:
    if not alchemy.app.conf.broker_url:
        return
    try:
        transport = str(alchemy.app.connection_for_write().transport_cls)
        timeout = visibility_timeout_seconds(alchemy.app)
    except ImportError as exc:
        yield Finding("broker", "error", f"The broker's transport cannot be used: {exc}", "Install its package, such as celery[sqs].")
        return
    options = alchemy.app.conf.broker_transport_options or {}
    if transport in ("amqp", "amqps", "pyamqp") and not options.get("confirm_publish"):
        yield Finding(
            "confirm-publish",
            "warning",
            "Plain .delay() and retries are published to RabbitMQ without confirms: it may drop them silently. (The outbox"
            " always waits for confirms.)",
            "Set broker_transport_options = {'confirm_publish': True}.",
        )
    if timeout is not None:
        yield from _visibility(alchemy, timeout)


def _visibility(alchemy: Any, timeout: float) -> Iterator[Finding]:
    for task in alchemy.app.tasks.values():
        if task.acks_late and task.time_limit and task.time_limit > timeout:
            yield Finding(
                "visibility-timeout",
                "error",
                f"Task {task.name} may run for {task.time_limit} s and is acknowledged at its end; the broker delivers it again"
                f" after {timeout:.0f} s.",
                "Raise broker_transport_options['visibility_timeout'] above the longest time limit.",
            )
    if window_is_short(alchemy.app, alchemy.once_window_seconds):
        yield Finding(
            "once-window",
            "error",
            f"Completion records are kept {alchemy.once_window_seconds:.0f} s, and the broker may deliver again after"
            f" {timeout:.0f} s: a once task could be done twice.",
            "Make once_window longer than the visibility timeout and the longest eta.",
        )


def _tasks(alchemy: Any) -> Iterator[Finding]:
    for task in alchemy.app.tasks.values():
        if task.name.startswith("celery."):
            continue
        if not isinstance(task, SessionTask):
            yield from _plain_task(task)
            continue
        try:
            task.home()
        except NotConfiguredError as exc:
            yield Finding("no-session-source", "error", str(exc), "Tie an Alchemy to the app.")
        for name in set(task.named_databases) - set(homes_of(alchemy.app)):
            yield Finding(
                "unknown-database",
                "error",
                f"Task {task.name} asks for a session of {name!r}, and the app has no Alchemy of that name.",
                f"Make Alchemy(app, url, name={name!r}), or write the name as it is there.",
            )
        if task.is_once and not task.time_limit:
            yield Finding(
                "once-time-limit",
                "warning",
                f"Task {task.name} is once and has no hard time limit: a run that takes longer than redeliver_after"
                f" ({alchemy.redeliver_after:.0f} s) is started a second time beside it. Its writes are still committed once.",
                "Give it a time_limit.",
            )


def _plain_task(task: Any) -> Iterator[Finding]:
    try:
        found = asks_in_vain(task)
    except CeleryAlchemyError as exc:
        yield Finding("session-parameter", "error", str(exc), "See the message.")
        return
    if found is not None:
        yield Finding("task-class", "error", *found)


def _green_drivers(alchemy: Any) -> Iterator[Finding]:
    pool = str(alchemy.app.conf.worker_pool or "")
    if pool in ("gevent", "eventlet") and alchemy.engine.dialect.driver in ("psycopg2", "mysqldb"):
        yield Finding(
            "green-driver",
            "error",
            f"The driver {alchemy.engine.dialect.driver} waits in C and stops every greenlet of the {pool} pool meanwhile.",
            "Use psycopg (3) or pymysql, or psycogreen for psycopg2.",
        )


#: At each database of the app.
_LOOKS: tuple[Callable[[Any], Iterator[Finding]], ...] = (_database, _tables, _connections, _sqlite, _green_drivers)
_LOOKS_AT_THE_APP: tuple[Callable[[Any], Iterator[Finding]], ...] = (_broker, _tasks)
