"""Who takes messages, when it counts as lost, and what becomes of its messages then.

Between the table of workers and ``heart.py``, which beats. All times are the database's.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import delete, insert, or_, select, update

from ..databases.column_types import ID_MAX_LENGTH
from ..databases.tables import Query, from_now
from ..error_texts import storable
from .life_sign import is_shown
from .tables import BrokerTables

__all__ = [
    "Released",
    "beat",
    "dismiss",
    "enlist",
    "own_name",
    "poison_reason",
    "release_lost",
]

logger: logging.Logger = logging.getLogger(__name__)

#: Rows of one statement: SQLite before 3.32 takes 999 parameters.
_KEYS = 400


class Released(NamedTuple):
    """What lost workers had taken.

    Attributes:
        due: How many messages are due again.
        poisonous: How many are to be set aside.
    """

    due: int
    poisonous: int


def own_name() -> str:
    """Return what this process is shown as: its host, its id and its program."""
    program = os.path.basename(sys.argv[0] or "python")  # noqa: PTH119 - a text, perhaps no path.
    return storable(f"{socket.gethostname()}:{os.getpid()} {program}", ID_MAX_LENGTH)


def enlist(tables: BrokerTables, worker: str, seconds: float, lock_file: str | None) -> None:
    """Write the row of a worker, before it takes anything.

    Args:
        tables: In a transaction.
        worker: Its id, which no other one ever has.
        seconds: Without a heartbeat for so long it counts as lost.
        lock_file: What shows its life beside the heartbeat.
    """
    values = {"id": worker, "name": own_name(), "started_at": from_now(0), "lock_file": lock_file}
    tables.run(insert(tables.workers).values(**values, expires_at=from_now(seconds)))


def beat(tables: BrokerTables, worker: str, seconds: float) -> bool:
    """Put off the time at which a worker counts as lost; False if it does already."""
    t = tables.workers
    found = tables.run(update(t).where(t.c.id == worker).values(expires_at=from_now(seconds)))
    return found.rowcount == 1


def dismiss(tables: BrokerTables, worker: str) -> None:
    """Delete the row of a worker that has given everything back."""
    tables.run(delete(tables.workers).where(tables.workers.c.id == worker))


def release_lost(tables: BrokerTables, worker: str, max_deliveries: int) -> Released:
    """Make the messages of lost workers due again, and return how many they were.

    A worker may stand still in mid-transaction, with all of its machine: what that has locked is
    left for a later time, or the hearts of all others would wait for it and stand still as well.

    Those that had begun have been counted as starts, those of ``once`` tasks by themselves. One
    that was begun by too many lost workers may be what has killed them: no other one takes it, the
    worker that has found it out has it until it is set aside. If that is lost too, the next one
    does it. One whose task has ended, and only its result had to be told, is given up.

    Args:
        tables: In a transaction.
        worker: The id of the worker that looks.
        max_deliveries: How many starts are too many.
    """
    t = tables.workers
    late = t.c.expires_at < from_now(0)
    looks = (select(t.c.id).where(late).exists(), _lost(tables).exists())
    if not tables.run(select(or_(*looks))).scalar():
        return Released(0, 0)
    silent = select(t.c.id, t.c.name, t.c.lock_file).where(late).with_for_update(skip_locked=True)
    for row in tables.run(silent).all():
        if row.lock_file and is_shown(row.lock_file):
            continue
        if tables.run(delete(t).where(t.c.id == row.id)).rowcount:
            logger.warning("The worker %s is lost: what it had taken is due again", row.name)
    return _release(tables, worker, max_deliveries)


def _lost(tables: BrokerTables) -> Query:
    """Return a query for the messages whose worker has no row."""
    c = tables.messages.c
    alive = select(tables.workers.c.id)
    has_ended = or_(c.completed_at.is_not(None), c.died_at.is_not(None)).label("has_ended")
    return select(c.id, c.once, c.deliveries, c.failures, has_ended).where(
        c.queue.is_not(None), c.claim.is_not(None), c.claim.not_in(alive)
    )


def poison_reason(max_deliveries: int) -> str:
    """Return what the row of a message says that was begun by too many lost workers."""
    return f"it was begun {max_deliveries} times by workers that were lost with it"


def _release(tables: BrokerTables, worker: str, max_deliveries: int) -> Released:
    """Release what was taken by workers that have no row; what one takes later, next time."""
    found = tables.run(_lost(tables).with_for_update(skip_locked=True)).all()
    often = [row for row in found if row.deliveries >= max_deliveries and not row.once]
    untold = [row.id for row in found if row.has_ended and row.failures >= max_deliveries]
    reason = poison_reason(max_deliveries)
    if untold:
        logger.error("The ends of %d tasks are not told again: %s", len(untold), reason)
    kills = {row.id for row in often}.difference(untold)
    c = tables.messages.c
    _change(tables, untold, {"claim": None})
    kept = {"claim": worker, "error": reason}
    _change(tables, sorted(kills), kept)
    due = [row.id for row in found if row.id not in kills.union(untold)]
    released = {"claim": None, "due_at": from_now(0), "failures": c.failures + 1}
    _change(tables, due, released)
    return Released(len(due), len(kills))


def _change(tables: BrokerTables, keys: Sequence[str], values: Mapping[str, object]) -> None:
    for start in range(0, len(keys), _KEYS):
        c = tables.messages.c
        chosen = c.id.in_(keys[start : start + _KEYS])
        tables.run(update(tables.messages).where(chosen).values(**values))
