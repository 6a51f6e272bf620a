"""What people see of the broker: what waits in its queues, and what its workers have taken.

Beside the tables, below the command line.
"""

from __future__ import annotations

from sqlalchemy import Engine, case, func, select

from ..databases.tables import Found, from_now
from ..messages.celery_types import Fields
from ..outbox.place import Place
from .tables import BrokerTables, seen

__all__ = ["queues_and_workers"]


def queues_and_workers(engine: Engine, place: Place) -> dict[str, list[Fields]]:
    """Count the messages of each queue and each worker.

    Args:
        engine: The broker's database.
        place: Where in it the tables are.

    Returns:
        ``queues``: each with ``queue``, ``waiting``, ``scheduled`` (not due yet), ``taken``, and
        ``oldest_seconds``: how late the oldest waiting message is, None if none waits.
        ``workers``: each with ``name``, ``started_at``, ``taken`` and ``is_late`` (its heart should
        have beaten).

    Raises:
        MissingTableError: One of the tables has not been made.
    """
    with seen(place, engine) as tables:
        return {"queues": _queues(tables), "workers": _workers(tables)}


def _queues(tables: BrokerTables) -> list[Fields]:
    c, now = tables.messages.c, select(from_now(0)).scalar_subquery()
    counted = {
        "waiting": c.due_at <= now,
        "scheduled": c.due_at > now,
        "taken": c.claim.is_not(None),
    }
    sums = [func.sum(case((what, 1), else_=0)).label(name) for name, what in counted.items()]
    oldest = func.min(case((counted["waiting"], c.due_at))).label("oldest")
    in_queue = c.queue.is_not(None) & (c.due_at.is_not(None) | c.claim.is_not(None))
    asked = select(c.queue, *sums, oldest, now.label("now"))
    rows = tables.run(asked.where(in_queue).group_by(c.queue).order_by(c.queue))
    found: dict[str, Fields] = {
        row.queue: {name: int(row._mapping[name]) for name in counted} | _age(row) for row in rows
    }
    q = tables.queues.c
    stay = select(q.queue).where(q.exchange == "", q.expires_at.is_(None)).order_by(q.queue)
    for name in tables.run(stay).scalars():
        found.setdefault(name, dict.fromkeys(counted, 0) | {"oldest_seconds": None})
    return [{"queue": name, **counts} for name, counts in sorted(found.items())]


def _age(row: Found) -> Fields:
    return {
        "oldest_seconds": None if row.oldest is None else (row.now - row.oldest).total_seconds()
    }


def _workers(tables: BrokerTables) -> list[Fields]:
    w, c = tables.workers.c, tables.messages.c
    taken = select(func.count()).where(c.queue.is_not(None), c.claim == w.id).scalar_subquery()
    is_late = case((w.expires_at < from_now(0), 1), else_=0).label("is_late")
    rows = tables.run(select(w.name, w.started_at, taken.label("taken"), is_late).order_by(w.name))
    return [{**row._mapping, "is_late": bool(row.is_late)} for row in rows]
