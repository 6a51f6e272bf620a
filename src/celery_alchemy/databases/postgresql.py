"""PostgreSQL: statement time-outs and read-only transactions.

Both are ended by the transaction itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import lru_cache, partial

from sqlalchemy import (
    ARRAY,
    BindParameter,
    ColumnElement,
    Connection,
    DateTime,
    Engine,
    Executable,
    Insert,
    Integer,
    Subquery,
    Table,
    Text,
    Update,
    bindparam,
    func,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from . import on_conflict
from .chord_rows import READS_COMMITTED, Tally, read_within
from .holding import NOTHING, TAKEN_BACK, WRITES, Held
from .isolation import LoneStatement, commits_each_statement, is_put_back, put_back_at_checkin
from .result_rows import read_in_transaction
from .tables import NOT_TRANSLATED, Query, Rows, Since, from_now, publishable, takeable

_HAS_CHANGED = text("SELECT pg_catalog.txid_current_if_assigned() IS NOT NULL")

# What a rolled back SAVEPOINT did is counted too, and so is what earlier transactions of this
# connection did within a second: a write too many, and none too few. TOAST tables are elsewhere.
_HAS_CHANGED_CATALOG = text(
    "SELECT pg_catalog.current_setting('track_counts') = 'off' OR EXISTS ("
    "SELECT 1 FROM pg_catalog.pg_stat_xact_sys_tables"
    " WHERE schemaname = 'pg_catalog' AND n_tup_ins + n_tup_upd + n_tup_del > 0)"
)
# Row locks leave no trace in pg_locks but the lock of their table, ROW SHARE; whoever changes rows
# holds ROW EXCLUSIVE, and who changes tables a stronger one.
_TABLE_LOCKS = text(
    "SELECT l.mode, c.relname, l.mode = 'RowExclusiveLock' AND c.relkind = 'S' AS is_nextval"
    " FROM pg_catalog.pg_locks l"
    " JOIN pg_catalog.pg_class c ON c.oid = l.relation"
    " WHERE l.pid = pg_catalog.pg_backend_pid() AND l.locktype = 'relation'"
    " AND l.mode <> 'AccessShareLock' AND c.relkind NOT IN ('i', 'I')"
)


#: The units in which the server shows a time-out, in milliseconds.
#: https://www.postgresql.org/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES
_UNITS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def configure(engine: Engine) -> None:
    """Nothing: the server's defaults are right for tasks."""


def reading(engine: Engine) -> Engine:
    """Return the engine itself: a statement makes its transactions read-only."""
    return engine


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return the SET statements of a task's transaction.

    ``SET LOCAL`` and ``SET TRANSACTION`` end with the transaction, so a pooled connection carries
    nothing over, also behind PgBouncer in transaction mode. Source:
    https://www.postgresql.org/docs/current/sql-set.html
    """
    statements: list[str] = []
    if timeout_seconds is not None:
        statements += _limit(connection, timeout_seconds)
    if read_only:
        statements.append("SET TRANSACTION READ ONLY")
    return statements


def _limit(connection: Connection, timeout_seconds: float) -> list[str]:
    """Return the SET that limits statements to what is left.

    There is none where something else limits them more.

    That may be the URL, the role, the database, or a listener of the user's that ran before. It is
    asked for by SHOW, which is no query: SELECT would take the transaction's snapshot, before a
    body that begins with LOCK TABLE or SET TRANSACTION. In AUTOCOMMIT no transaction ends a SET
    LOCAL: the limit is the connection's, and what was set before is put back at its check-in.
    """
    shown = str(connection.exec_driver_sql("SHOW statement_timeout").scalar_one())
    # A time-out of 0 would switch it off.
    left = max(1, int(timeout_seconds * 1000))
    if 0 < _milliseconds(shown) <= left:
        return []
    if not commits_each_statement(connection):
        return [f"SET LOCAL statement_timeout = {left}"]
    if not is_put_back(connection):
        put_back_at_checkin(connection, f"SET SESSION statement_timeout = '{shown}'")
    return [f"SET SESSION statement_timeout = {left}"]


def _milliseconds(shown: str) -> int:
    """Return a time-out as the server shows it, such as 5s, 1500ms or 0, in milliseconds."""
    number = shown.rstrip("abcdefghijklmnopqrstuvwxyz")
    return int(number) * _UNITS.get(shown.removeprefix(number), 1)


def hasten(connection: Connection) -> None:
    """Let the COMMIT of this transaction not wait for the disk: what it says may be said again.

    Source: https://www.postgresql.org/docs/current/wal-async-commit.html
    """
    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def end_if_silent(connection: Connection, seconds: float) -> None:
    """Have the server end this transaction, and the connection, when it hears nothing for so long.

    A process that stands still, or was cut off by the network, would keep its locks until then.
    Source: https://www.postgresql.org/docs/current/runtime-config-client.html
    """
    if not commits_each_statement(connection):
        # LOCAL: behind PgBouncer the connection is another client's next.
        left = max(1, int(seconds * 1000))
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {left}")


def commit_itself(connection: PoolProxiedConnection) -> Callable[[], object] | None:
    """Switch autocommit on, which only the driver has to know.

    Where a listener of the pool's has begun a transaction, that one is committed instead.
    """
    driver = connection.dbapi_connection
    before = getattr(driver, "autocommit", None)
    # 0 is IDLE, of psycopg's and psycopg2's.
    status = getattr(getattr(driver, "info", None), "transaction_status", 0)
    if driver is None or before is not False or status != 0:
        return _leave if before else None
    driver.autocommit = True
    return partial(_end_autocommit, driver)


def _end_autocommit(driver: DBAPIConnection) -> None:
    driver.autocommit = False


def _leave() -> None:
    """Leave the connection as it was."""


def hastened(statement: LoneStatement) -> LoneStatement:
    """Set in the statement itself that the COMMIT of its transaction does not wait for the disk.

    Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-SET
    """
    if not isinstance(statement, Update):
        return statement
    is_set = func.pg_catalog.set_config("synchronous_commit", "off", true())
    return statement.where(is_set == "off")


def claim(
    connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int
) -> Rows:
    """Lease due rows in one statement.

    SKIP LOCKED lets relays pass each other. The CTE is MATERIALIZED because the planner may
    otherwise run the LIMIT again for each row and lease more than it. The time is asked for in a
    subquery, once: a volatile function is no condition of an index scan but a filter behind it,
    which would read every owed task at each look. Sources:
    https://www.postgresql.org/docs/current/sql-select.html#SQL-FOR-UPDATE-SHARE,
    https://www.postgresql.org/docs/current/xfunc-volatility.html
    """
    due = (
        select(table.c.id)
        .where(table.c.queue.is_(None), table.c.due_at <= select(from_now(0)).scalar_subquery())
        .order_by(table.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    statement = (
        update(table)
        .where(table.c.id == due.c.id)
        .values(claim=claim, due_at=from_now(lease_seconds))
        .returning(*publishable(table))
    )
    return connection.execute(statement, execution_options=NOT_TRANSLATED).all()


def take(
    connection: Connection,
    table: Table,
    worker: str,
    queues: Sequence[str],
    limit: int,
    since: Since,
) -> Rows:
    """Take messages for a worker in one statement.

    For each priority, 9 first, and each queue an index scan of its own, begun only while there is
    room: LATERAL goes through the places in their order. One scan over all of them would sort every
    message that waits.
    Source: https://www.postgresql.org/docs/current/queries-table-expressions.html#QUERIES-LATERAL
    """
    places = [(priority, queue) for priority in range(9, -1, -1) for queue in queues]
    parameters = {
        "worker": worker,
        "room": limit,
        "priorities": [priority for priority, _ in places],
        "names": [queue for _, queue in places],
        "since": [since.get(place, _EVER) for place in places],
    }
    statement = _take_statement(table)
    return connection.execute(statement, parameters, execution_options=NOT_TRANSLATED).all()


@lru_cache(maxsize=32)
def _take_statement(table: Table) -> Executable:
    given = func.unnest(
        bindparam("priorities", type_=ARRAY(Integer())),
        bindparam("names", type_=ARRAY(Text())),
        bindparam("since", type_=ARRAY(DateTime(timezone=True))),
    )
    columns = given.table_valued("priority", "queue", "since", with_ordinality="ordinality")
    named = columns.render_derived("given")
    places = select(named).order_by(named.c.ordinality).subquery("places")
    young = _waiting(table, places).where(table.c.due_at >= places.c.since)
    waiting = young.with_for_update(skip_locked=True).lateral("waiting")
    due = (
        select(waiting.c.id, waiting.c.due_at)
        .select_from(places.join(waiting, true()))
        .limit(_ROOM)
        .cte("due")
        .prefix_with("MATERIALIZED", dialect="postgresql")
    )
    return (
        update(table)
        .where(table.c.id == due.c.id)
        .values(claim=bindparam("worker"), due_at=None, sends=table.c.sends + 1)
        .returning(*takeable(table, was_due_at=due.c.due_at))
    )


def is_any_due(table: Table, queues: Sequence[str]) -> ColumnElement[bool]:
    """Return whether a message of these queues is due: one entry of the index for each place.

    A plain EXISTS would go through the whole table, because the planner expects to meet one soon.
    """
    places = _places(bindparam(None, list(queues), type_=ARRAY(Text())))
    first = _waiting(table, places, room=1).lateral("waiting")
    return select(first.c.id).select_from(places.join(first, true())).exists()


def _places(names: BindParameter[Sequence[str]]) -> Subquery:
    """Return each priority, 9 first, with each queue."""
    queues = func.unnest(names).table_valued("value", with_ordinality="ordinality")
    queues = queues.render_derived("queues")
    return (
        select(_PRIORITY.c.value.label("priority"), queues.c.value.label("queue"))
        .select_from(_PRIORITY.join(queues, true()))
        .order_by(_PRIORITY.c.value.desc(), queues.c.ordinality)
        .subquery("places")
    )


def _waiting(table: Table, places: Subquery, room: int | BindParameter[int] | None = None) -> Query:
    """Return the messages of a place that are due, the oldest first."""
    now = select(from_now(0)).scalar_subquery()
    return (
        select(table.c.id, table.c.due_at)
        .where(
            table.c.queue == places.c.queue,
            table.c.priority == places.c.priority,
            table.c.due_at <= now,
        )
        .order_by(table.c.due_at)
        .limit(_ROOM if room is None else room)
    )


#: Before all messages.
_EVER = datetime.min.replace(tzinfo=timezone.utc)

_ROOM = bindparam("room", type_=Integer())
_PRIORITY = func.generate_series(9, 0, -1).table_valued("value").render_derived("priorities")


#: The server itself knows what the transaction has done since it began.
mark = None


def held(connection: Connection, mark: int | None) -> Held | None:
    """Ask the server whether the transaction has an id.

    Its first change, or locked row, gives it one.

    One round trip for a transaction that has only read. What has an id and no lock of a table has
    changed something else, the catalog say: that is a write too. A rollback to a SAVEPOINT gives
    back the locks of tables, but leaves the id, and the locks of sequences, which no rollback
    changes: after one, the catalog's own counters tell.
    Sources: https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT,
    https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-TABLES,
    https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-STATS-VIEWS

    Raises:
        DBAPIError: The transaction is aborted, or the connection is lost.
    """
    if not connection.execute(_HAS_CHANGED).scalar_one():
        return NOTHING
    locks = list(connection.execute(_TABLE_LOCKS))
    if mark == TAKEN_BACK:
        locks = [lock for lock in locks if not lock.is_nextval]
        if not locks:
            return WRITES if connection.execute(_HAS_CHANGED_CATALOG).scalar_one() else NOTHING
    locked = tuple(sorted(lock.relname for lock in locks if lock.mode == "RowShareLock"))
    only_rows = locked and all(lock.mode == "RowShareLock" for lock in locks)
    return Held(writes=False, locked=locked) if only_rows else WRITES


keep_result: Callable[..., None] = partial(on_conflict.keep_result, insert)
insert_or_change: Callable[..., Insert] = partial(on_conflict.insert_or_change, insert)
add_unless_there: Callable[..., bool] = partial(on_conflict.add_unless_there, insert)
tally: Callable[..., Tally] = partial(on_conflict.tally, insert)


def sees_counted(connection: Connection) -> bool:
    """Tell whether the open transaction may count a part: it must see the parts that others commit.

    At the stricter levels it would be refused where another part has ended since it began.
    Source: https://www.postgresql.org/docs/current/transaction-iso.html
    """
    return (
        not commits_each_statement(connection)
        and connection.get_isolation_level() == READS_COMMITTED
    )


#: A statement sees what was committed before it began.
read_counted = read_within


#: A read waits for no lock.
read = read_in_transaction
