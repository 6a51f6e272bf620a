"""What a careful colleague would look at before production: ``celery -A app alchemy check``.

At the edge, beside the command line; reads the app's configuration and asks the database, changes
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from ..alchemy import Alchemy
from ..errors import CeleryAlchemyError, ConfigurationError, NotConfiguredError
from ..messages.celery_types import AnyTask, App
from ..messages.visibility_timeout import visibility_timeout_seconds, window_is_short
from ..sessions.engine import WorkerPool, most_connections, small_pool
from ..task import SessionTask, asks_in_vain
from .findings import Finding

__all__ = ["Finding", "check"]

#: Levels at which a transaction may be refused for what another one did, where that is not the
#: database's own default.
#: Sources: https://www.postgresql.org/docs/current/transaction-iso.html#XACT-REPEATABLE-READ and
#: https://dev.mysql.com/doc/refman/8.4/en/innodb-transaction-isolation-levels.html
#: (reads lock, so deadlocks).
_MAY_REFUSE = {
    "postgresql": ("REPEATABLE READ", "SERIALIZABLE"),
    "mysql": ("SERIALIZABLE",),
    "mariadb": ("SERIALIZABLE",),
}
#: How many task names a finding lists.
_NAMED = 3


def check(alchemy: Alchemy) -> list[Finding]:
    """Run every check of an Alchemy and of its app.

    Args:
        alchemy: An Alchemy that serves an app.

    Returns:
        The findings, errors first; empty when all is well.
    """
    _app(alchemy).finalize()
    findings = [finding for look in (*_LOOKS, *_LOOKS_AT_THE_APP) for finding in look(alchemy)]
    return sorted(findings, key=lambda finding: finding.level != "error")


def _app(alchemy: Alchemy) -> App:
    if alchemy.app is None:
        raise ConfigurationError(
            "This Alchemy serves no app.", "Write Alchemy(app, url), or alchemy.init_app(app)."
        )
    return alchemy.app


def _database(alchemy: Alchemy) -> Iterator[Finding]:
    try:
        with alchemy.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
    except (DBAPIError, CeleryAlchemyError) as exc:
        yield Finding(
            "database",
            "error",
            f"The database cannot be used: {exc}",
            "Check the URL and that the server runs.",
        )


def _reachable(
    look: Callable[[Alchemy, Engine], Iterator[Finding]],
) -> Callable[[Alchemy], Iterator[Finding]]:
    """Skip a look at the database when it cannot be used, which ``_database`` has said."""

    def guarded(alchemy: Alchemy) -> Iterator[Finding]:
        try:
            yield from list(look(alchemy, alchemy.engine))
        except (DBAPIError, CeleryAlchemyError):
            return

    return guarded


def _missing_tables(tables: Sequence[str]) -> Finding:
    names = ", ".join(tables)
    those, do, them = ("table", "does", "it") if len(tables) == 1 else ("tables", "do", "them")
    return Finding(
        "missing-table",
        "error",
        f"The {those} {names} {do} not exist, and outbox=True, once tasks or results need {them}.",
        "Run `celery -A app alchemy create-tables`, or add alchemy.metadata to Alembic.",
    )


@_reachable
def _tables(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    # The records of once tasks are in the default database.
    app = _app(alchemy)
    needed = (
        alchemy.keeps_messages
        or any(getattr(task, "is_once", False) for task in app.tasks.values())
        or str(app.conf.result_backend).startswith("alchemy:")
    )
    if not needed:
        return
    with engine.connect() as connection:
        there = inspect(connection)
        table = alchemy.place.on(connection).table
        missing = [
            t for t in table.metadata.sorted_tables if not there.has_table(t.name, schema=t.schema)
        ]
        has_table = table not in missing
        indexes = (
            {index["name"] for index in there.get_indexes(table.name, schema=table.schema)}
            if has_table
            else set()
        )
    if missing:
        yield _missing_tables([one.fullname for one in missing])
    if not has_table:
        return
    for index in table.indexes:
        if index.name not in indexes:
            yield Finding(
                "missing-index",
                "error",
                f"The index {index.name} of {table.fullname} does not exist: relays read the whole"
                " table each second.",
                f"Create it on {', '.join(column.name for column in index.columns)}.",
            )


@_reachable
def _connections(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    statement = {
        "postgresql": "SELECT current_setting('max_connections')::int",
        "mysql": "SELECT @@max_connections",
        "mariadb": "SELECT @@max_connections",
    }.get(engine.dialect.name)
    if statement is None:
        return
    with engine.connect() as connection:
        limit = int(connection.scalar(text(statement)) or 0)
    pool = _worker_pool(_app(alchemy))
    needed = pool.processes * pool.tasks_per_process + 1
    each = most_connections(alchemy.engine_in(pool)) or pool.tasks_per_process
    if needed > limit:
        yield Finding(
            "connections",
            "error",
            f"A worker that runs {needed - 1} tasks at once takes {needed} connections or more; the"
            f" server allows {limit}.",
            "Lower worker_concurrency, raise max_connections, or put a connection pooler in"
            " between.",
        )
    elif needed * 5 > limit:
        yield Finding(
            "connections",
            "warning",
            f"Each worker that runs {needed - 1} tasks at once takes {needed} connections; the"
            f" server allows {limit}, which is enough for {limit // needed} such workers and"
            " nothing else.",
            "Count your workers and web processes against the limit.",
        )
    elif pool.processes * each > limit:
        yield Finding(
            "connections",
            "warning",
            f"Each of the {pool.processes} processes of a worker has a pool of its own, which may"
            f" grow to {each} connections: {pool.processes * each} in all, and the server allows"
            f" {limit}.",
            "Give Alchemy the URL instead of an engine, or make the engine with pool_size=1 and a"
            " small max_overflow.",
        )


def _worker_pool(app: App) -> WorkerPool:
    """Return what the app's settings say of its workers.

    Options of the command line are not known here.
    """
    name = str(app.conf.worker_pool or "prefork").split(":")[0].rsplit(".", 1)[-1]
    # Celery knows one pool by two names, and this one runs its tasks one by one.
    name = {"processes": "prefork", "thread": "threads"}.get(name, name)
    return WorkerPool(
        name, 1 if name == "solo" else int(app.conf.worker_concurrency or os.cpu_count() or 1)
    )


@_reachable
def _pool(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    pool = _worker_pool(_app(alchemy))
    small = small_pool(alchemy.engine_in(pool), pool)
    if small is not None:
        yield Finding("small-pool", "warning", *small)


@_reachable
def _autocommit(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    # Asked for the level, a server tells that of a transaction; the driver alone knows that it
    # makes none.
    of_driver = getattr(engine.dialect, "_on_connect_isolation_level", None)
    if (
        str(engine.get_execution_options().get("isolation_level", of_driver)).upper()
        == "AUTOCOMMIT"
    ):
        yield Finding(
            "isolation-level",
            "error",
            "The engine is in AUTOCOMMIT: each statement is committed by itself, no rollback takes"
            " anything back, and neither the outbox nor once keeps its promise.",
            "Make the engine without isolation_level='AUTOCOMMIT'; give it to the statements that"
            " need it.",
        )


@_reachable
def _sqlite(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    if engine.dialect.name != "sqlite":
        return
    with engine.connect() as connection:
        mode = str(connection.exec_driver_sql("PRAGMA journal_mode").scalar())
    # A database in memory has one connection, or one process.
    if mode not in ("wal", "memory"):
        yield Finding(
            "sqlite-journal",
            "warning",
            f"The SQLite file is in journal mode {mode!r}: readers and the writer wait for each"
            " other.",
            "Give Alchemy the URL instead of an engine, or run PRAGMA journal_mode=WAL on it.",
        )


def _broker(alchemy: Alchemy) -> Iterator[Finding]:
    if not _app(alchemy).conf.broker_url:
        return
    try:
        transport = str(_app(alchemy).connection_for_write().transport_cls)
        timeout = visibility_timeout_seconds(_app(alchemy))
    except ImportError as exc:
        yield Finding(
            "broker",
            "error",
            f"The broker's transport cannot be used: {exc}",
            "Install its package, such as celery[sqs].",
        )
        return
    options = _app(alchemy).conf.broker_transport_options or {}
    if transport in ("amqp", "amqps", "pyamqp") and not options.get("confirm_publish"):
        yield Finding(
            "confirm-publish",
            "warning",
            "Plain .delay() and retries are published to RabbitMQ without confirms: it may drop"
            " them silently. (The outbox always waits for confirms.)",
            "Set broker_transport_options = {'confirm_publish': True}.",
        )
    if timeout is not None:
        yield from _visibility(alchemy, timeout)


def _visibility(alchemy: Alchemy, timeout: float) -> Iterator[Finding]:
    for task in _app(alchemy).tasks.values():
        if task.acks_late and task.time_limit and task.time_limit > timeout:
            yield Finding(
                "visibility-timeout",
                "error",
                f"Task {task.name} may run for {task.time_limit} s and is acknowledged at its end;"
                f" the broker delivers it again after {timeout:.0f} s.",
                "Raise broker_transport_options['visibility_timeout'] above the longest time"
                " limit.",
            )
    if window_is_short(_app(alchemy), alchemy.once_window_seconds):
        yield Finding(
            "once-window",
            "error",
            f"Completion records are kept {alchemy.once_window_seconds:.0f} s, and the broker may"
            f" deliver again after {timeout:.0f} s: a once task could be done twice.",
            "Make once_window longer than the visibility timeout and the longest eta.",
        )


def _tasks(alchemy: Alchemy) -> Iterator[Finding]:
    for task in _app(alchemy).tasks.values():
        if task.name.startswith("celery."):
            continue
        if not isinstance(task, SessionTask):
            yield from _plain_task(task)
            continue
        try:
            task.home()
            if task.is_async and (task.injection.session is not None or task.is_once):
                # As the worker does at its start, which would end it.
                task.session_plan.async_source  # noqa: B018
        except NotConfiguredError as exc:
            yield Finding("no-session-source", "error", str(exc), "Tie an Alchemy to the app.")
        except ConfigurationError as exc:
            told = f"Task {task.name}: {exc.problem}"
            yield Finding("no-session-source", "error", told, exc.remedy)
        # A message that the database holds is nobody else's while its worker lives.
        if task.is_once and not task.time_limit and not alchemy.is_broker:
            yield Finding(
                "once-time-limit",
                "warning",
                f"Task {task.name} is once and has no hard time limit: a run that takes longer than"
                f" redeliver_after ({alchemy.redeliver_after:.0f} s) is started a second time"
                " beside it. Its writes are still committed once.",
                "Give it a time_limit.",
            )


@_reachable
def _isolation(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    with engine.connect() as connection:
        default = str(connection.get_isolation_level())
    refused: dict[str, list[str]] = {}
    for task in _app(alchemy).tasks.values():
        if not isinstance(task, SessionTask) or not (
            task.injection.session or task.isolation_level
        ):
            continue
        level = (task.isolation_level or default).upper().replace("_", " ")
        if level == "AUTOCOMMIT" and task.isolation_level is not None:
            yield Finding(
                "isolation-level",
                "error",
                f"Task {task.name} has isolation_level='AUTOCOMMIT': what it has written stays when"
                " it fails.",
                "Remove the option.",
            )
        runs_again = task.transient_retries or getattr(task, "autoretry_for", None)
        if level in _MAY_REFUSE.get(engine.dialect.name, ()) and not runs_again:
            refused.setdefault(level, []).append(task.name)
    for level, names in refused.items():
        yield Finding(
            "isolation-level",
            "warning",
            f"At {level} the database refuses transactions that meet each other, and nothing runs"
            " these tasks again then:"
            f" {', '.join(sorted(names)[:_NAMED])}"
            f"{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}.",
            "Give them transient_retries=3.",
        )


def _plain_task(task: AnyTask) -> Iterator[Finding]:
    try:
        found = asks_in_vain(task)
    except CeleryAlchemyError as exc:
        yield Finding("session-parameter", "error", str(exc), "See the message.")
        return
    if found is not None:
        yield Finding("task-class", "error", *found)


#: The variable of the environment that says how psycopg waits.
_PSYCOPG_WAITS = "PSYCOPG_WAIT_FUNC"


@_reachable
def _green_drivers(alchemy: Alchemy, engine: Engine) -> Iterator[Finding]:
    pool, driver = _worker_pool(_app(alchemy)).name, engine.dialect.driver
    if pool in ("gevent", "eventlet") and driver in ("psycopg2", "mysqldb"):
        fix = "Use psycopg (3) or pymysql, or psycogreen for psycopg2."
    elif pool == "eventlet" and driver == "psycopg" and _PSYCOPG_WAITS not in os.environ:
        # psycopg/waiting.py looks for what gevent patches, and not for what eventlet does.
        fix = f"Set {_PSYCOPG_WAITS}=wait_selector in the worker's environment, or use gevent."
    else:
        return
    told = f"The driver {driver} waits in C and stops every greenlet of the {pool} pool meanwhile."
    yield Finding("green-driver", "error", told, fix)


#: At each database of the app.
_LOOKS: tuple[Callable[[Alchemy], Iterator[Finding]], ...] = (
    _database,
    _tables,
    _connections,
    _pool,
    _autocommit,
    _sqlite,
    _green_drivers,
)
_LOOKS_AT_THE_APP: tuple[Callable[[Alchemy], Iterator[Finding]], ...] = (
    _broker,
    _tasks,
    _isolation,
)
