"""Moving a document from one state to the next: one conditional UPDATE, allowed by the table of states."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, update
from sqlalchemy.orm import Session
from sqlalchemy.orm.util import identity_key

from ragline.states import TRANSITIONS, State
from ragline.tables import Document, utc_now


def states_before(after: State) -> frozenset[State]:
    """The states that may lead to this one."""
    return frozenset(before for before, followers in TRANSITIONS.items() if after in followers)


def move(
    session: Session,
    document_id: int,
    after: State,
    *conditions: ColumnElement[bool],
    before: Collection[State] | None = None,
    **values: object,
) -> bool:
    """Move a document on, if it still is where it is expected and the conditions hold.

    Args:
        session: any session; the UPDATE is part of its transaction.
        document_id: which document; one that is gone is not moved.
        after: the state to enter, whose `<state>_at` is stamped.
        conditions: more that must hold of the row.
        before: the states to leave; by default all that may lead to `after`.
        values: other columns to set.

    Returns:
        Whether it was moved. Of several transactions that try, at most one is told so.

    Raises:
        ValueError: the table of states does not allow the move.
    """
    allowed = states_before(after)
    leaving = allowed if before is None else frozenset(before)
    if not leaving <= allowed:
        names = ", ".join(sorted(state.value for state in leaving - allowed))
        raise ValueError(f"A document does not go from {names} to {after.value}.")
    moved = session.execute(
        update(Document)
        .where(Document.id == document_id, Document.state.in_(leaving), *conditions)
        .values({"state": after, f"{after.value}_at": utc_now(), **values})
        .execution_options(synchronize_session=False)
    )
    known = session.identity_map.get(identity_key(Document, document_id))
    if known is not None:
        session.expire(known)
    return cast("CursorResult[Any]", moved).rowcount == 1
