"""Blocks that have a session outside of tasks: what ``alchemy.session()`` and its siblings return.

Beneath ``alchemy.py``, which says where the sessions come from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from .at_hand import AtHand, at_hand
from .closing import abandon, commit
from .sources import SessionSource, is_open
from .transaction import note_rollback

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from .async_engine import AsyncSource

__all__ = ["async_session_block", "begin_block", "session_block"]


class _Block:
    """The session of a block, at hand while the block runs."""

    __slots__ = ("has_ended", "outer", "session")

    registry: object = None
    scope: object = None

    def __init__(self, session: Session, outer: AtHand | None) -> None:
        self.session = session
        self.outer = outer
        self.has_ended = False

    def owner_of(self, session: Session) -> str | None:
        """Return None: what fails after a commit is raised in the block."""
        return None


@contextmanager
def session_block(source: SessionSource) -> Iterator[Session]:
    """Give a session; it is closed at the end, and what was not committed is rolled back."""
    session = source.session()
    outer = at_hand.get()
    block = _Block(session, outer)
    at_hand.set(block)
    try:
        yield session
    except BaseException as exc:
        if is_open(session):
            abandon(session, exc, lambda: "alchemy.session()")
        raise
    else:
        session.close()
    finally:
        block.has_ended = True
        at_hand.set(outer)


@contextmanager
def begin_block(source: SessionSource) -> Iterator[Session]:
    """As ``session_block()``, and commit at the end; roll back if the block raises."""
    with session_block(source) as session:
        yield session
        commit(session, lambda: "alchemy.begin()")


@asynccontextmanager
async def async_session_block(source: AsyncSource) -> AsyncIterator[AsyncSession]:
    """As ``session_block()``, with an AsyncSession on an engine of the running event loop."""
    session = source.opened()
    outer = at_hand.get()
    block = _Block(session.sync_session, outer)
    at_hand.set(block)
    try:
        async with session:
            try:
                yield session
            except BaseException:
                note_rollback(session.sync_session)
                raise
    finally:
        block.has_ended = True
        at_hand.set(outer)
