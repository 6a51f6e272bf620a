"""The session that is at hand without being named: the running request's, or that of a block.

Beneath the transaction, which asks here whose session it is, and the life of a request, which sets
it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from sqlalchemy.orm import Session

__all__ = ["AtHand", "alive", "at_hand", "owner_of"]


class AtHand(Protocol):
    """A session that ``delay_on_commit`` may use: a running request's, or a block's."""

    #: What was at hand before, None if nothing was.
    outer: AtHand | None

    #: The request or the block is over; what it has begun and left behind has it at hand still.
    has_ended: bool

    @property
    def registry(self) -> object:
        """The application's registry that hands out this session.

        None if none does. See ``scope.py``.
        """
        ...

    #: The scope of that registry in which the request began.
    scope: object

    @property
    def session(self) -> Session: ...

    def owner_of(self, session: Session) -> str | None:
        """Return the name of the request that a session was made for; None if it is not its own."""
        ...


# A context variable follows the thread, the greenlet and the asyncio task, each of which is one
# request in its pool; it costs a third of Celery's request stack.
at_hand: ContextVar[AtHand | None] = ContextVar("celery_alchemy_at_hand", default=None)


def alive(held: AtHand | None) -> AtHand | None:
    """Return the innermost of what is at hand that has not ended; None if there is none.

    A context is copied into asyncio tasks, callbacks and generators, which may outlive the request
    or the block in which they began.
    """
    while held is not None and held.has_ended:
        held = held.outer
    return held


def owner_of(session: Session) -> str | None:
    """Return the name of the running request that a session was made for; None if there is none."""
    held = at_hand.get()
    while held is not None:
        owner = held.owner_of(session)
        if owner is not None:
            return owner
        held = held.outer
    return None
