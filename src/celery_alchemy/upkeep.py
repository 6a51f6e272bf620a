"""What people do with the outbox: count it, look at the dead, revive them, prune.

Above the table, below the command line; every function takes an engine and ends its own transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection, Engine, and_, case, func, or_, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from .outbox import missing_table
from .relay import prune
from .tables import from_now, outbox

__all__ = ["dead", "prune_all", "revive", "status"]


@contextmanager
def _begin(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.begin() as connection:
            yield connection
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def status(engine: Engine) -> dict[str, Any]:
    """Count the rows by what is to be done with them.

    Returns:
        ``waiting``, ``leased``, ``owed``, ``completed``, ``dead``: rows. ``oldest_seconds``: how late the oldest waiting row is,
        None if none waits.

    Raises:
        MissingTableError: The table has not been made.
    """
    c = outbox.c
    due = and_(c.due_at.is_not(None), c.due_at <= from_now(0))
    leased = and_(c.claim.is_not(None), c.due_at > from_now(0))
    owed = and_(c.once.is_(True), c.claim.is_(None), c.due_at > from_now(0))
    backing_off = and_(c.once.is_(False), c.claim.is_(None), c.due_at > from_now(0))
    counted = {
        "waiting": or_(due, backing_off),
        "leased": leased,
        "owed": owed,
        "completed": c.completed_at.is_not(None),
        "dead": c.died_at.is_not(None),
    }
    with _begin(engine) as connection:
        sums = [func.coalesce(func.sum(case((what, 1), else_=0)), 0).label(name) for name, what in counted.items()]
        found = connection.execute(select(*sums)).one()
        oldest, now = connection.execute(select(select(func.min(c.due_at)).where(due).scalar_subquery(), from_now(0))).one()
    late = None if oldest is None else (_aware(now) - _aware(oldest)).total_seconds()
    return {**{name: int(getattr(found, name)) for name in counted}, "oldest_seconds": late}


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def dead(engine: Engine, limit: int = 100) -> list[dict[str, Any]]:
    """Return the dead, the latest first, each with ``id``, ``task_id``, ``task_name``, ``died_at``, ``error``, ``sends``.

    Raises:
        MissingTableError: The table has not been made.
    """
    c = outbox.c
    columns = (c.id, c.task_id, c.task_name, c.created_at, c.died_at, c.error, c.sends)
    with _begin(engine) as connection:
        found = connection.execute(select(*columns).where(c.died_at.is_not(None)).order_by(c.died_at.desc()).limit(limit))
        return [dict(row._mapping) for row in found]


def revive(engine: Engine, ids: Sequence[str] | None = None) -> int:
    """Make dead rows due now.

    Args:
        engine: The outbox's database.
        ids: Row ids or task ids; None for all.

    Returns:
        How many were revived. A row without a message, kept only to count the starts of a lost task, cannot be.
    """
    c = outbox.c
    statement = (
        update(outbox)
        .where(c.died_at.is_not(None), c.body.is_not(None))
        .values(died_at=None, error=None, due_at=from_now(0), claim=None, deliveries=0, failures=0, sends=0)
    )
    if ids is not None:
        statement = statement.where(c.id.in_(ids) | c.task_id.in_(ids))
    with _begin(engine) as connection:
        return connection.execute(statement).rowcount


def prune_all(engine: Engine, window_seconds: float) -> int:
    """Delete every completion record older than the window, in batches, and return how many."""
    total = 0
    while deleted := prune(engine, window_seconds):
        total += deleted
    return total
