"""What people do with the outbox: count it, look at the dead, revive them, prune.

Above the table, below the command line; every function takes an engine and ends its own
transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone

from sqlalchemy import ColumnElement, Engine, Table, and_, case, delete, func, or_, select, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from ..databases.tables import from_now, steps
from ..errors import ConfigurationError
from ..outbox.chord_records import prune_chords
from ..outbox.outbox import missing_table
from ..outbox.place import DEFAULT_PLACE, OutboxTable, Place
from ..outbox.relay import prune
from ..outbox.result_records import prune_results

__all__ = ["dead", "prune_all", "revive", "status"]


@contextmanager
def _begin(engine: Engine, place: Place) -> Iterator[OutboxTable]:
    try:
        with place.begin(engine) as there:
            yield there
    except (OperationalError, ProgrammingError) as exc:
        raise missing_table(exc) or exc from exc


def steps_beside(there: OutboxTable) -> Table:
    """Return the table of steps that is in the same schema."""
    table = there.table
    return table.metadata.tables[
        steps.name if table.schema is None else f"{table.schema}.{steps.name}"
    ]


def status(engine: Engine, place: Place = DEFAULT_PLACE) -> dict[str, object]:
    """Count the rows by what is to be done with them.

    Args:
        engine: The table's database.
        place: Where in it the table is.

    Returns:
        ``waiting``, ``leased``, ``owed``, ``completed``, ``dead``: rows. ``oldest_seconds``: how
        late the oldest waiting row is, None if none waits.

    Raises:
        MissingTableError: The table has not been made.
    """
    with _begin(engine, place) as there:
        c = there.table.c
        due = and_(c.due_at.is_not(None), c.due_at <= from_now(0))
        # What waits in a queue for its time is counted with the queue.
        later = and_(c.queue.is_(None), c.claim.is_(None), c.due_at > from_now(0))
        counted = {
            "waiting": or_(due, and_(c.once.is_(False), later)),
            "leased": and_(c.claim.is_not(None), c.due_at > from_now(0)),
            "owed": and_(c.once.is_(True), later),
            "completed": c.completed_at.is_not(None),
            "dead": c.died_at.is_not(None),
        }
        sums = [
            func.coalesce(func.sum(case((what, 1), else_=0)), 0).label(name)
            for name, what in counted.items()
        ]
        found = there.run(select(*sums)).one()
        first_due = select(func.min(c.due_at)).where(due).scalar_subquery()
        times = there.run(select(first_due.label("oldest"), from_now(0).label("now"))).one()
    late = (
        None if times.oldest is None else (_aware(times.now) - _aware(times.oldest)).total_seconds()
    )
    return {**{name: int(getattr(found, name)) for name in counted}, "oldest_seconds": late}


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def dead(engine: Engine, limit: int = 100, place: Place = DEFAULT_PLACE) -> list[dict[str, object]]:
    """Return the dead, the latest first.

    Each has ``id``, ``task_id``, ``task_name``, ``died_at``, ``error`` and ``sends``.

    And with ``steps``, how many are kept of it, and ``last_step``, the name of the one that was
    committed last.

    Raises:
        MissingTableError: The table has not been made.
    """
    with _begin(engine, place) as there:
        c = there.table.c
        kept = steps_beside(there).c
        of_row = (kept.id == c.id,)
        count = select(func.count()).where(*of_row).scalar_subquery().label("steps")
        last = (
            select(kept.name)
            .where(*of_row)
            .order_by(kept.position.desc())
            .limit(1)
            .scalar_subquery()
            .label("last_step")
        )
        columns = (
            c.id,
            c.task_id,
            c.task_name,
            c.created_at,
            c.died_at,
            c.error,
            c.sends,
            count,
            last,
        )
        found = there.run(
            select(*columns).where(c.died_at.is_not(None)).order_by(c.died_at.desc()).limit(limit)
        )
        return [dict(row._mapping) for row in found]


def revive(
    engine: Engine,
    ids: Sequence[str] | None = None,
    place: Place = DEFAULT_PLACE,
    *,
    from_step: str | None = None,
    fresh: bool = False,
) -> int:
    """Make dead rows due now; a task with recorded steps goes on after the last one.

    Args:
        engine: The outbox's database.
        ids: Row ids or task ids; None for all.
        place: Where in it the table is.
        from_step: Forget this step, and those that were committed after it, so that they are done
            again.
        fresh: Forget all steps.

    Returns:
        How many were revived. A row without a message, kept only to count the starts of a lost
        task, cannot be.

    Raises:
        ConfigurationError: One of the tasks has not recorded ``from_step``; nothing is changed.
        MissingTableError: The table has not been made.
    """
    with _begin(engine, place) as there:
        c = there.table.c
        chosen: list[ColumnElement[bool]] = [c.died_at.is_not(None), c.body.is_not(None)]
        if ids is not None:
            chosen.append(c.id.in_(ids) | c.task_id.in_(ids))
        if fresh or from_step is not None:
            keys = there.run(select(c.id).where(*chosen)).scalars().all()
            for key in keys:
                _forget(there, key, from_step)
        statement = (
            update(there.table)
            .where(*chosen)
            .values(
                died_at=None, error=None, due_at=from_now(0), claim=None, deliveries=0, failures=0
            )
            # Of a message in a queue each delivery has a number: one that was taken long ago must
            # not end another.
            .values(sends=case((c.queue.is_(None), 0), else_=c.sends))
        )
        return there.run(statement).rowcount


def _forget(there: OutboxTable, key: str, from_step: str | None) -> None:
    """Delete the steps of a task, from one of them on or all."""
    kept = steps_beside(there)
    names = there.run(
        select(kept.c.name, kept.c.position).where(kept.c.id == key).order_by(kept.c.position)
    ).all()
    first = (
        0
        if from_step is None
        else next((row.position for row in names if row.name == from_step), None)
    )
    if first is None:
        recorded = ", ".join(repr(row.name) for row in names) or "none"
        raise ConfigurationError(
            f"The task {key} has not recorded a step {from_step!r}; nothing was revived.",
            f"Name one of its recorded steps: {recorded}. Those that are not recorded are run"
            " anyway.",
        )
    there.run(delete(kept).where(kept.c.id == key, kept.c.position >= first))


def prune_all(engine: Engine, window_seconds: float, place: Place = DEFAULT_PLACE) -> int:
    """Delete every completion record older than the window, in batches, and return how many.

    Expired results and chords are deleted too.

    Steps go too whose task has no row any more: somebody has deleted it by hand.
    """
    total = 0
    while deleted := prune(engine, window_seconds, place):
        total += deleted
    while deleted := prune_results(place, engine):
        total += deleted
    while deleted := prune_chords(place, engine):
        total += deleted
    with _begin(engine, place) as there:
        kept = steps_beside(there)
        there.run(delete(kept).where(kept.c.id.not_in(select(there.table.c.id))))
    return total
