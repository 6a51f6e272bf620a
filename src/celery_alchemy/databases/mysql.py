"""MySQL and MariaDB: statement time-outs.

They hold for the connection and are taken back at its check-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Executable,
    Table,
    case,
    func,
    select,
    update,
)
from sqlalchemy.dialects.mysql import insert

from .chord_rows import READS_COMMITTED, Tally, new_part, new_tally, told
from .holding import Held
from .isolation import (
    as_it_is,
    commits_each_statement,
    is_put_back,
    needs_commit,
    put_back_at_checkin,
)
from .on_conflict import no_insert_or_change
from .result_rows import CHANGED, new_values, read_in_transaction
from .result_table import FINAL
from .tables import NOT_TRANSLATED, Found, Query, Rows, Since, from_now, publishable, takeable

_BEFORE = "@celery_alchemy_before"


def configure(engine: Engine) -> None:
    """Nothing: the server's defaults are right for tasks."""


def reading(engine: Engine) -> Engine:
    """Return the engine itself: a statement makes its transactions read-only."""
    return engine


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return the SET statements of a task's transaction.

    MySQL's ``max_execution_time`` (milliseconds) limits SELECT only; MariaDB's
    ``max_statement_time`` (seconds) limits every statement. Both are session variables, in which 0
    is no limit; they work in AUTOCOMMIT too. ``SET TRANSACTION`` without SESSION is for the next
    transaction only; the drivers have sent no BEGIN at this point, so that is this one. Sources:
    https://dev.mysql.com/doc/refman/8.0/en/server-system-variables.html#sysvar_max_execution_time
    https://mariadb.com/kb/en/server-system-variables/#max_statement_time
    """
    statements = []
    if timeout_seconds is not None:
        if getattr(connection.dialect, "is_mariadb", False):
            statements.append(
                _limit(connection, "max_statement_time", f"{max(0.001, timeout_seconds):.3f}")
            )
        else:
            milliseconds = max(1, int(timeout_seconds * 1000))
            statements.append(_limit(connection, "max_execution_time", str(milliseconds)))
    if read_only:
        statements.append("SET TRANSACTION READ ONLY")
    return statements


def _limit(connection: Connection, variable: str, left: str) -> str:
    """Return the SET that limits statements to what is left.

    There is none where the connection limits them more.

    What was set before, by an ``init_command`` for example, is kept in a variable of the
    connection's own, in the same round trip, and put back at its check-in: DEFAULT would be the
    server's. A later transaction of the task finds the limit of the one before, and has less time
    left than that.
    """
    stricter = f"IF(@@SESSION.{variable} = 0, {left}, LEAST(@@SESSION.{variable}, {left}))"
    if is_put_back(connection):
        return f"SET SESSION {variable} = {stricter}"
    put_back_at_checkin(connection, f"SET SESSION {variable} = {_BEFORE}")
    return f"SET {_BEFORE} = @@SESSION.{variable}, SESSION {variable} = {stricter}"


def hasten(connection: Connection) -> None:
    """Nothing: what a COMMIT waits for is the server's setting."""


def end_if_silent(connection: Connection, seconds: float) -> None:
    """Have MariaDB end a transaction, with its connection, when it hears nothing for so long.

    MySQL has no such variable: what a process has locked that stands still is free when the server
    notices that its connection is gone. Source:
    https://mariadb.com/kb/en/server-system-variables/#idle_transaction_timeout
    """
    if not getattr(connection.dialect, "is_mariadb", False) or is_put_back(connection):
        return
    variable, whole_seconds = "idle_transaction_timeout", max(1, ceil(seconds))
    put_back_at_checkin(connection, f"SET SESSION {variable} = {_BEFORE}")
    connection.exec_driver_sql(
        f"SET {_BEFORE} = @@SESSION.{variable}, SESSION {variable} = {whole_seconds}"
    )


#: To switch autocommit on and off would be two round trips, and what its COMMIT waits for is set
#: for the whole server. Source:
#: https://dev.mysql.com/doc/refman/8.0/en/innodb-parameters.html, innodb_flush_log_at_trx_commit
commit_itself = needs_commit
hastened = as_it_is


def claim(
    connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int
) -> Rows:
    """Lease due rows: lock and read, then update by primary key.

    MySQL has no UPDATE ... RETURNING. SKIP LOCKED needs MySQL 8.0.1 or MariaDB 10.6. Leasing by
    UPDATE and not by DELETE keeps concurrent relays from deadlocks on the gaps of deleted rows.
    Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-locking-reads.html
    """
    rows = connection.execute(
        select(*publishable(table))
        .where(table.c.queue.is_(None), table.c.due_at <= from_now(0))
        .order_by(table.c.due_at)
        .limit(limit)
        .with_for_update(skip_locked=True),
        execution_options=NOT_TRANSLATED,
    ).all()
    if rows:
        connection.execute(
            update(table)
            .where(table.c.id.in_([row.id for row in rows]))
            .values(claim=claim, due_at=from_now(lease_seconds)),
            execution_options=NOT_TRANSLATED,
        )
    return rows


def take(
    connection: Connection,
    table: Table,
    worker: str,
    queues: Sequence[str],
    limit: int,
    since: Since,
) -> Rows:
    """Take messages for a worker: see where any are due, lock and read, then update by primary key.

    The first statement reads one entry of the index for each queue and priority, the others only
    run where something is due. MariaDB has no LATERAL. Source:
    https://dev.mysql.com/doc/refman/8.0/en/group-by-optimization.html#loose-index-scan
    """
    c, rows = table.c, list[Found]()
    places = _places(table, queues).order_by(c.priority.desc(), "first")
    for place in connection.execute(places, execution_options=NOT_TRANSLATED).all():
        if len(rows) < limit:
            waiting = (
                select(*takeable(table, before_update=True))
                .where(
                    c.queue == place.queue, c.priority == place.priority, c.due_at <= from_now(0)
                )
                .order_by(c.due_at)
                .limit(limit - len(rows))
                .with_for_update(skip_locked=True)
            )
            rows += connection.execute(waiting, execution_options=NOT_TRANSLATED).all()
    if rows:
        connection.execute(
            update(table)
            .where(c.id.in_([row.id for row in rows]))
            .values(claim=worker, due_at=None, sends=c.sends + 1),
            execution_options=NOT_TRANSLATED,
        )
    return rows


def is_any_due(table: Table, queues: Sequence[str]) -> ColumnElement[bool]:
    """Return whether a message of these queues is due: one entry of the index for each place."""
    places = _places(table, queues).subquery("places")
    return select(places.c.queue).exists()


def _places(table: Table, queues: Sequence[str]) -> Query:
    c = table.c
    first = func.min(c.due_at).label("first")
    return (
        select(c.queue, c.priority, first)
        .where(c.queue.in_(queues), c.due_at.is_not(None))
        .group_by(c.queue, c.priority)
        .having(first <= from_now(0))
    )


#: Nothing to compare with.
mark = None


def held(connection: Connection, mark: int | None) -> Held | None:
    """Return None: MySQL and MariaDB cannot be asked by the connection itself.

    ``information_schema.innodb_trx`` counts the rows that a transaction has changed, but it is read
    with the PROCESS privilege only, and what it says may be a tenth of a second old.
    Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-information-schema-internal-data.html
    """
    return None


def keep_result(connection: Connection, table: Table, values: dict[str, object]) -> None:
    """Write the result of a task, or its next state; a success that is there stays."""
    connection.execute(_result_statement(table), values, execution_options=NOT_TRANSLATED)


@lru_cache(maxsize=32)
def _result_statement(table: Table) -> Executable:
    new, c = insert(table).values(new_values(table)), table.c
    # Source: https://dev.mysql.com/doc/refman/8.0/en/insert-on-duplicate.html
    changed = [
        (name, case((c.status == FINAL, c[name]), else_=new.inserted[name])) for name in CHANGED
    ]
    return new.on_duplicate_key_update(changed)


#: ON DUPLICATE KEY UPDATE takes no condition, and does not say what it did. An INSERT that fails
#: takes back itself alone. Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-error-handling.html
insert_or_change = no_insert_or_change


def add_unless_there(connection: Connection, table: Table, values: dict[str, object]) -> bool:
    """Insert a part of a chord; False if it is there.

    IGNORE would shorten texts that are too long, and these fit. What ON DUPLICATE KEY UPDATE counts
    depends on the driver's flags.
    """
    statement = _part_statement(table)
    return connection.execute(statement, values, execution_options=NOT_TRANSLATED).rowcount == 1


@lru_cache(maxsize=32)
def _part_statement(table: Table) -> Executable:
    return insert(table).values(new_part(table)).prefix_with("IGNORE")


def tally(connection: Connection, table: Table, values: dict[str, object]) -> Tally:
    """Add to the numbers of a chord, whose row is the transaction's from then on.

    ON DUPLICATE KEY UPDATE takes the exclusive lock at once: two that first shared it would wait
    for each other.
    Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-locks-set.html
    """
    change, look = _tally_statements(table)
    connection.execute(change, values, execution_options=NOT_TRANSLATED)
    key = {"new_id": values["new_id"]}
    return Tally(*connection.execute(look, key, execution_options=NOT_TRANSLATED).one())


@lru_cache(maxsize=32)
def _tally_statements(table: Table) -> tuple[Executable, Executable]:
    values, c = new_tally(table), table.c
    new = insert(table).values(values)
    changed = [
        ("size", func.coalesce(c.size, new.inserted.size)),
        ("added", c.added + new.inserted.added),
        ("counted", c.counted + new.inserted.counted),
        ("expires_at", new.inserted.expires_at),
    ]
    look = select(*told(table)).where(c.id == values["id"]).with_for_update()
    return new.on_duplicate_key_update(changed), look


def sees_counted(connection: Connection) -> bool:
    """Tell whether the open transaction may count a part: it must see the parts that others commit.

    At REPEATABLE READ a statement that locks does see them, unless MariaDB refuses it because the
    row has changed since the snapshot.
    Sources: https://dev.mysql.com/doc/refman/8.0/en/innodb-consistent-read.html,
    https://mariadb.com/kb/en/innodb-system-variables/#innodb_snapshot_isolation
    """
    if commits_each_statement(connection):
        return False
    level = connection.get_isolation_level()
    if level != "REPEATABLE READ":
        return level == READS_COMMITTED
    refuses = connection.exec_driver_sql("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'").first()
    return refuses is None or str(refuses[1]).upper() == "OFF"


def read_counted(connection: Connection, statement: Query) -> Rows:
    """Read the parts of a chord with locks: a plain SELECT reads the transaction's snapshot."""
    locking = statement.with_for_update(read=True)
    return connection.execute(locking, execution_options=NOT_TRANSLATED).all()


#: A read waits for no lock.
read = read_in_transaction
