"""How a delivery ends: it is done, or it goes back to its queue.

Beside ``claims.py``; many ends are one statement. Each names the worker and the number of the
delivery: a row that was given to another worker meanwhile, or sent again by its task's retry, is
left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import (
    Delete,
    Table,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.sql import ColumnElement

from ..databases.tables import from_now, outbox
from ..error_texts import storable
from .claims import Claim
from .tables import BrokerTables

__all__ = ["acknowledge", "give_back", "note_begun"]

logger: logging.Logger = logging.getLogger(__name__)

_UNRECORDED = "its delivery was acknowledged, and no end of the task was recorded"


def acknowledge(tables: BrokerTables, worker: str, claims: Iterable[Claim]) -> None:
    """Delete messages that are done.

    The row of a ``once`` task is kept. One that is done carries no claim any more, where nothing
    was left to do after its own COMMIT; else, as one that has died, until now. One that has no end
    was given up, such as by a worker that does not know the task: it is dead. So is the message of
    one whose work a guest has done.
    """
    claims = list(claims)
    once = [claim for claim in claims if claim.once]
    _change(tables, worker, [claim for claim in claims if not claim.once], _DELETE)
    freed = _change(tables, worker, once, _FREE)
    if freed > 0:
        _warn_of_unrecorded(tables.messages, tables, once)


def _change(
    tables: BrokerTables,
    worker: str,
    claims: Sequence[Claim],
    statement: Update | Delete,
    parameters: Mapping[str, object] | None = None,
) -> int:
    """Execute a constant statement for the rows of claims; return how many rows there were.

    Most deliveries are the first of their row, so that the statement is executed once.
    """
    numbers: dict[int, list[str]] = {}
    for claim in claims:
        numbers.setdefault(claim.number, []).extend(_ids(claim))
    found = 0
    for number, ids in numbers.items():
        # In the order of the key, so that statements of several workers lock rows in one order.
        ids.sort()
        for start in range(0, len(ids), _MOST_IDS):
            chosen = {"worker": worker, "number": number, "ids": ids[start : start + _MOST_IDS]}
            found += tables.outbox.execute(statement, {**chosen, **(parameters or {})}).rowcount
    return found


def _ids(claim: Claim) -> list[str]:
    return [claim.row_id] if claim.kept_id is None else [claim.row_id, claim.kept_id]


def _freed(table: Table) -> list[tuple[ColumnElement[object], object]]:
    """Return what becomes of the row of a ``once`` task.

    In this order, for MySQL reads what it has just set.
    """
    c = table.c
    is_done = c.completed_at.is_not(None)
    has_ended = or_(is_done, c.died_at.is_not(None))
    return [
        (c.error, case((has_ended, c.error), else_=_UNRECORDED)),
        (c.died_at, case((has_ended, c.died_at), else_=from_now(0))),
        (c.body, case((c.completed_at.is_(None), c.body))),
        (c.envelope, case((c.completed_at.is_(None), c.envelope))),
        (c.due_at, None),
        (c.claim, None),
    ]


#: Rows of one statement. SQLite before 3.32 takes 999 parameters:
#: https://www.sqlite.org/limits.html
_MOST_IDS = 600

_CHOSEN = and_(
    outbox.c.claim == bindparam("worker"),
    outbox.c.sends == bindparam("number"),
    outbox.c.id.in_(bindparam("ids", expanding=True)),
)
_DELETE = delete(outbox).where(_CHOSEN)
_FREE = update(outbox).where(_CHOSEN).ordered_values(*_freed(outbox))


def _warn_of_unrecorded(table: Table, tables: BrokerTables, claims: Iterable[Claim]) -> None:
    ids = sorted(claim.row_id for claim in claims)
    for start in range(0, len(ids), 400):
        unrecorded = (
            table.c.id.in_(ids[start : start + 400]),
            table.c.error == _UNRECORDED,
        )
        number = tables.run(select(func.count()).where(*unrecorded)).scalar_one()
        if number:
            logger.warning("%d once tasks are dead: %s", number, _UNRECORDED)


def note_begun(tables: BrokerTables, worker: str, claims: Iterable[Claim]) -> None:
    """Count a start for messages that run now: a worker that is lost may be so because of them."""
    _change(tables, worker, list(claims), _COUNT)


def give_back(tables: BrokerTables, worker: str, claims: Iterable[Claim]) -> None:
    """Make messages due again; whoever takes them next is told that they were delivered before.

    One whose database was cut is due after a while, and its row says why it went back. One that
    dies is set aside instead.
    """
    groups: dict[Claim, list[Claim]] = {}
    for claim in claims:
        # What becomes of a row, without which one it is.
        groups.setdefault(replace(claim, row_id="", number=0, kept_id=None), []).append(claim)
    for end, alike in groups.items():
        if end.dies:
            ids = ", ".join(claim.row_id for claim in alike)
            logger.error("The messages %s are set aside: %s", ids, end.error)
        why = None if end.error is None else storable(end.error)
        parameters = {"why": why, "begun": int(end.has_begun)}
        statement = _SET_ASIDE if end.dies else _RETURN if why is None else _RETURN_LATER
        _change(tables, worker, alike, statement, parameters)


_c = outbox.c
_COUNT = update(outbox).where(_CHOSEN).values(deliveries=_c.deliveries + 1)

#: What every row that goes back has: the start of a delivery that has begun is not counted.
_BACK: list[tuple[ColumnElement[object], object]] = [
    (_c.claim, None),
    (_c.error, func.coalesce(bindparam("why", type_=_c.error.type), _c.error)),
    (_c.deliveries, _c.deliveries - bindparam("begun", type_=_c.deliveries.type)),
]

#: Seconds that a message waits which was cut off: 1, 4, 9 and 16, then 30.
_WAIT_SECONDS = case((_c.failures < 4, (_c.failures + 1) * (_c.failures + 1)), else_=30)

_SET_ASIDE = (
    update(outbox)
    .where(_CHOSEN)
    .ordered_values(*_BACK, (_c.died_at, from_now(0)), (_c.due_at, None))
)
_RETURN, _RETURN_LATER = (
    # In this order, for MySQL reads what it has just set.
    update(outbox)
    .where(_CHOSEN)
    .ordered_values(*_BACK, (_c.due_at, from_now(wait)), (_c.failures, _c.failures + 1))
    for wait in (0, _WAIT_SECONDS)
)
