"""A database that the package has no module for.

Sessions work; statement time-outs and read-only mode are not available.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from sqlalchemy import ColumnElement, Connection, Engine, Table, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ..errors import ConfigurationError
from .chord_rows import Tally, new_part, new_tally, read_within, told
from .holding import Held
from .isolation import as_it_is, needs_commit
from .on_conflict import no_insert_or_change
from .result_rows import CHANGED, new_values, read_in_transaction
from .result_table import FINAL
from .tables import NOT_TRANSLATED, Query, Rows, Since, from_now, publishable, takeable


def configure(engine: Engine) -> None:
    """Nothing is known of this database that would need setting."""


def reading(engine: Engine) -> Engine:
    """Return the engine itself: a statement makes its transactions read-only."""
    return engine


def begin_statements(
    connection: Connection, timeout_seconds: float | None, read_only: bool
) -> Sequence[str]:
    """Return nothing; a read-only transaction is refused rather than silently writable."""
    if read_only:
        raise ConfigurationError(
            f"read_only=True is not supported on {connection.dialect.name}.",
            "Remove it, or use a database user that may only read.",
        )
    return ()


def hasten(connection: Connection) -> None:
    """Nothing that every database knows."""


def end_if_silent(connection: Connection, seconds: float) -> None:
    """Nothing that every database knows."""


#: Nothing is known of this database that would be cheaper.
commit_itself = needs_commit
hastened = as_it_is


def claim(
    connection: Connection, table: Table, claim: str, lease_seconds: float, limit: int
) -> Rows:
    """Lease due rows one relay at a time, with what standard SQL has."""
    rows = connection.execute(
        select(*publishable(table))
        .where(table.c.queue.is_(None), table.c.due_at <= from_now(0))
        .order_by(table.c.due_at)
        .limit(limit)
        .with_for_update(),
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
    """Take messages for a worker, one worker at a time, with what standard SQL has."""
    c = table.c
    waiting = (
        select(*takeable(table, before_update=True))
        .where(c.queue.in_(queues), c.due_at <= from_now(0))
        .order_by(c.priority.desc(), c.due_at)
        .limit(limit)
        .with_for_update()
    )
    rows = connection.execute(waiting, execution_options=NOT_TRANSLATED).all()
    if rows:
        connection.execute(
            update(table)
            .where(c.id.in_([row.id for row in rows]))
            .values(claim=worker, due_at=None, sends=c.sends + 1),
            execution_options=NOT_TRANSLATED,
        )
    return rows


def is_any_due(table: Table, queues: Sequence[str]) -> ColumnElement[bool]:
    """Return whether a message of these queues is due."""
    c = table.c
    return select(c.id).where(c.queue.in_(queues), c.due_at <= from_now(0)).exists()


#: Nothing to compare with.
mark = None


def held(connection: Connection, mark: int | None) -> Held | None:
    """Return None: nothing is known of this database that could be asked."""
    return None


def keep_result(connection: Connection, table: Table, values: dict[str, object]) -> None:
    """Write the result of a task, or its next state; a success that is there stays."""
    new = new_values(table)
    changed = update(table).where(table.c.id == new["id"], table.c.status != FINAL)
    if connection.execute(changed.values({name: new[name] for name in CHANGED}), values).rowcount:
        return
    if connection.execute(select(table.c.id).where(table.c.id == values["new_id"])).first() is None:
        connection.execute(insert(table).values(new), values)


#: Nothing that every database knows.
insert_or_change = no_insert_or_change


def add_unless_there(connection: Connection, table: Table, values: dict[str, object]) -> bool:
    """Insert a part of a chord; False if it is there."""
    try:
        with connection.begin_nested():
            connection.execute(insert(table).values(new_part(table)), values)
    except IntegrityError:
        return False
    return True


def tally(connection: Connection, table: Table, values: dict[str, object]) -> Tally:
    """Add to the numbers of a chord, whose row is the transaction's from then on."""
    new, c = new_tally(table), table.c
    none = {**values, "new_added": 0, "new_counted": 0}
    with suppress(IntegrityError), connection.begin_nested():
        connection.execute(insert(table).values(new), none)
    changed = {
        "size": func.coalesce(c.size, new["size"]),
        "added": c.added + new["added"],
        "counted": c.counted + new["counted"],
        "expires_at": new["expires_at"],
    }
    connection.execute(update(table).where(c.id == new["id"]).values(changed), values)
    look: Query = select(*told(table)).where(c.id == values["new_id"]).with_for_update()
    return Tally(*connection.execute(look).one())


def sees_counted(connection: Connection) -> bool:
    """Tell whether the open transaction may count a part; of this database nobody knows."""
    return False


#: In a transaction of its own at READ COMMITTED.
read_counted = read_within


#: Nothing is known of this database that a read would wait for.
read = read_in_transaction
