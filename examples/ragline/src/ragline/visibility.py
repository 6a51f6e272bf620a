"""What searches may see, and since when: a journal beside the sources, in the same transactions.

Searches ask it what is new instead of reading everything again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from ragline.databases import index_of
from ragline.tables import Document, IndexState, Shown, Source

KEPT_VERSIONS = 10_000
"""For so many versions it is remembered that a document is gone; who is further behind reads all again."""
_ROW = 1


@dataclass(frozen=True, slots=True)
class State:
    """How far the index has come.

    Attributes:
        version: another one whenever searches may see other documents; it only grows.
        chunks: how many chunks searches see.
        words: how many different words each of those has, summed; 0 where the database keeps that itself.
    """

    version: int
    chunks: int
    words: int


@dataclass(frozen=True, slots=True)
class Change:
    """A document that searches see, or do not see any more, since a version."""

    document_id: int
    version: int
    is_shown: bool


def state(session: Session) -> State:
    """How far the index has come in the session's transaction."""
    row = session.execute(select(IndexState.version, IndexState.chunks, IndexState.words)).one_or_none()
    return State(0, 0, 0) if row is None else State(*row)


def changes_since(session: Session, version: int) -> list[Change]:
    """The documents whose last change came after that version, in the order of the changes."""
    rows = session.execute(
        select(Shown.document_id, Shown.version, Shown.is_shown)
        .where(Shown.version > version)
        .order_by(Shown.version, Shown.document_id)
    )
    return [Change(*row) for row in rows]


def record(session: Session, document_ids: Iterable[int]) -> None:
    """Enter into the journal which of these documents searches see now and did not, or the other way round.

    To be called after the sources were changed and before documents are deleted, in that transaction.
    """
    ids = sorted(set(document_ids))
    # Locked: whoever begins or ceases to show one of them at this moment comes before, or after.
    session.execute(select(Document.id).where(Document.id.in_(ids)).order_by(Document.id).with_for_update())
    serving = set(session.scalars(select(Source.serving_id).where(Source.serving_id.in_(ids))))
    shown = set(session.scalars(select(Shown.document_id).where(Shown.document_id.in_(ids), Shown.is_shown)))
    changed = [document_id for document_id in ids if (document_id in serving) != (document_id in shown)]
    if not changed:
        return
    version = _next_version(session)
    chunks = words = 0
    for document_id in changed:
        sign = 1 if document_id in serving else -1
        connection = session.connection()
        counted = index_of(connection).count(connection, document_id, sign=sign)
        chunks, words = chunks + sign * counted[0], words + sign * counted[1]
    session.execute(delete(Shown).where(Shown.document_id.in_(changed)))
    session.execute(
        insert(Shown),
        [{"document_id": key, "version": version, "is_shown": key in serving} for key in changed],
    )
    session.execute(
        update(IndexState)
        .values(chunks=IndexState.chunks + chunks, words=IndexState.words + words)
        .execution_options(synchronize_session=False)
    )
    session.execute(delete(Shown).where(Shown.version <= version - KEPT_VERSIONS, ~Shown.is_shown))


def _next_version(session: Session) -> int:
    """Count the version up; the row stays locked until the commit."""
    grow = update(IndexState).values(version=IndexState.version + 1).where(IndexState.id == _ROW)
    grow = grow.execution_options(synchronize_session=False)
    if session.connection().execute(grow).rowcount == 0:
        missing = index_of(session.connection()).insert_missing(IndexState)
        session.execute(missing.values(id=_ROW, version=0, chunks=0, words=0))
        session.execute(grow)
    return session.scalars(select(IndexState.version)).one()
