"""Taking documents in: a file becomes a source and a document, or is found to be one already."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from ragline.databases import index_of
from ragline.dead import forget_dead_tasks
from ragline.errors import DocumentError
from ragline.places import name_of
from ragline.states import State
from ragline.tables import Base, Chunk, Document, DocumentText, Original, Source, utc_now
from ragline.visibility import record


@dataclass(frozen=True, slots=True)
class Recipe:
    """How documents are processed now; one processed otherwise is processed again when it is added again."""

    parser: str
    splitter: str
    embedder: str


@dataclass(frozen=True, slots=True)
class Offer:
    """Something that somebody wants in the index.

    Attributes:
        uri: where it comes from; the same place again is a new generation of the same source.
        name: its file name.
        digest: SHA-256 of its bytes, or None where they could not be read.
        size_bytes: its length, as far as it is known.
        data: its bytes, or None with `problem`.
        problem: why it cannot be processed, when that is known already.
    """

    uri: str
    name: str
    digest: str | None
    size_bytes: int
    data: bytes | None
    problem: DocumentError | None = None


class Intake(str, enum.Enum):
    """What became of an offer."""

    ADDED = "added"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    DUPLICATE = "duplicate"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one offer.

    Attributes:
        is_queued: the document waits for its first task, which the caller sends in the same transaction.
        reason: why it failed, or None.
    """

    intake: Intake
    document_id: int
    is_queued: bool = False
    reason: str | None = None


def take_in(session: Session, offer: Offer, recipe: Recipe) -> Outcome:
    """Enter an offer into the index, or find that it is there.

    Guarantees:
        All of it in the caller's transaction. What the source served before, it serves until the new document
        is ready. Of several transactions that offer the same at once, one adds it and the others find it.
    """
    source = _source(session, offer.uri)
    document, is_new = _document(session, offer, recipe)
    if is_new:
        intake = Intake.REPLACED if source.serving_id or source.pending_id else Intake.ADDED
    elif document.id in (source.serving_id, source.pending_id):
        intake = Intake.UNCHANGED
    else:
        intake = Intake.REPLACED if source.serving_id or source.pending_id else Intake.DUPLICATE
    is_queued = _revive(session, document, offer)
    _point(session, source, document)
    if document.state is State.FAILED:
        return Outcome(Intake.FAILED, document.id, reason=document.reason)
    return Outcome(intake, document.id, is_queued=is_queued)


def lock_sources(session: Session, document_id: int) -> None:
    """Hold what waits for a document, before the document itself is held.

    Who takes in a new generation holds the source and then drops the document that was to come: with locks in
    the same order neither waits for the other.
    """
    waiting = select(Source.id).where(Source.pending_id == document_id)
    session.execute(waiting.order_by(Source.id).with_for_update())


def serve(session: Session, document_id: int) -> None:
    """Let every source that waits for this document show it to searches, and drop what nobody shows any more.

    In the caller's transaction, which also makes it ready: searches see the old document or the new one.
    """
    replaced = []
    # Locked: a source for which a newer generation is taken in at this moment waits for that one.
    waiting = select(Source).where(Source.pending_id == document_id).order_by(Source.id).with_for_update()
    for source in session.scalars(waiting.execution_options(populate_existing=True)):
        if source.serving_id is not None:
            replaced.append(source.serving_id)
        source.serving_id, source.pending_id = document_id, None
        source.generation += 1
    session.flush()
    record(session, [document_id, *replaced])
    drop_unused(session, replaced)


def delete_document(session: Session, document_id: int) -> bool:
    """Delete a document, whoever shows it or waits for it; a source that is left with none goes with it.

    Returns:
        Whether it was there.
    """
    shown = or_(Source.serving_id == document_id, Source.pending_id == document_id)
    # Sources before documents, as everywhere: who locks in one order never waits for each other.
    locked = select(Source).where(shown).order_by(Source.id).with_for_update()
    for source in session.scalars(locked.execution_options(populate_existing=True)):
        source.serving_id = None if source.serving_id == document_id else source.serving_id
        source.pending_id = None if source.pending_id == document_id else source.pending_id
        if source.serving_id is None and source.pending_id is None:
            session.delete(source)
    session.flush()
    record(session, [document_id])
    return bool(drop_unused(session, [document_id]))


def forget_source(session: Session, source_id: int) -> None:
    """Forget a place, with the documents that no other place shows or waits for."""
    locked = select(Source).where(Source.id == source_id).with_for_update()
    source = session.scalar(locked.execution_options(populate_existing=True))
    if source is None:
        return
    used = [document_id for document_id in (source.serving_id, source.pending_id) if document_id]
    session.delete(source)
    session.flush()
    record(session, used)
    drop_unused(session, used)


def drop_unused(session: Session, document_ids: Iterable[int]) -> list[int]:
    """Delete those documents that no source shows or waits for, with all that was made of them.

    Returns:
        The ids of those that were there and are gone.
    """
    dropped = []
    for document_id in sorted(set(document_ids)):
        # Locked before the question who uses it, so that nobody begins to between question and answer.
        locked = select(Document.id).where(Document.id == document_id).with_for_update()
        if session.scalar(locked) is None:
            continue
        used = or_(Source.serving_id == document_id, Source.pending_id == document_id)
        if session.scalar(select(Source.id).where(used).limit(1)) is not None:
            continue
        digest = session.scalar(select(Document.digest).where(Document.id == document_id))
        index_of(session.connection()).remove(session.connection(), [document_id])
        session.execute(delete(Document).where(Document.id == document_id))
        forget_dead_tasks(session, document_id)
        dropped.append(document_id)
        # Locked for the same reason: another recipe's document may be taken in from the same bytes now.
        session.execute(select(Original.digest).where(Original.digest == digest).with_for_update())
        if session.scalar(select(Document.id).where(Document.digest == digest).limit(1)) is None:
            session.execute(delete(Original).where(Original.digest == digest))
    return dropped


def forget_results(session: Session, document_id: int) -> None:
    """Delete what was made of a document, which stays."""
    index_of(session.connection()).remove(session.connection(), [document_id])
    session.execute(delete(Chunk).where(Chunk.document_id == document_id))
    session.execute(delete(DocumentText).where(DocumentText.document_id == document_id))


def uri_digest(uri: str) -> str:
    """What a source is looked up by: URIs are longer than databases index."""
    return hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()


def _insert_missing(session: Session, table: type[Base], **values: object) -> None:
    """Insert a row unless one with that key is there, also one that another transaction inserts right now."""
    session.execute(index_of(session.connection()).insert_missing(table).values(values))


def _source(session: Session, uri: str) -> Source:
    digest = uri_digest(uri)
    known = select(Source).where(Source.uri_digest == digest).with_for_update()
    known = known.execution_options(populate_existing=True)
    # Again where another transaction has deleted, in between, the row that it had inserted before.
    while (source := session.scalar(known)) is None:
        name = name_of(uri)
        _insert_missing(session, Source, uri_digest=digest, uri=uri, name=name, generation=0)
    return source


def _document(session: Session, offer: Offer, recipe: Recipe) -> tuple[Document, bool]:
    """The document of an offer, and whether it was not there before."""
    # Its state decides what becomes of the offer: locked, so that it does not change meanwhile.
    known = select(Document).where(
        Document.digest == offer.digest,
        Document.parser == recipe.parser,
        Document.splitter == recipe.splitter,
        Document.embedder == recipe.embedder,
    )
    known = known.with_for_update().execution_options(populate_existing=True)
    document = None if offer.digest is None else session.scalar(known)
    if document is not None:
        return document, False
    values = _document_values(offer, recipe)
    if offer.digest is None:
        document = Document(**values)
        session.add(document)
        session.flush()
    else:
        # As a source: whoever had inserted it may have deleted it.
        while (found := session.scalar(known)) is None:
            _insert_missing(session, Document, **values)
        document = found
    _keep_bytes(session, offer)
    return document, True


def _document_values(offer: Offer, recipe: Recipe) -> dict[str, Any]:
    now = utc_now()
    values: dict[str, Any] = {
        "digest": offer.digest,
        "name": offer.name,
        "size_bytes": offer.size_bytes,
        "parser": recipe.parser,
        "splitter": recipe.splitter,
        "embedder": recipe.embedder,
        "state": State.QUEUED,
        "is_permanent": False,
        "queued_at": now,
    }
    if offer.problem is not None:
        failed = {"state": State.FAILED, "reason": str(offer.problem), "is_permanent": True, "failed_at": now}
        values |= failed
    return values


def _keep_bytes(session: Session, offer: Offer) -> bool:
    """Store the offered bytes unless they are there; whether they are new."""
    if offer.data is None or offer.digest is None:
        return False
    # Locked: whoever deletes the last other document of these bytes sees this one first.
    known = select(Original.digest).where(Original.digest == offer.digest).with_for_update(read=True)
    if session.scalar(known) is not None:
        return False
    while session.scalar(known) is None:  # it may be deleted until it is locked
        _insert_missing(session, Original, digest=offer.digest, data=offer.data)
    return True


def _revive(session: Session, document: Document, offer: Offer) -> bool:
    """Queue a document that can be tried again; whether it waits for its first task now.

    It was cancelled, it failed for a reason that passes, or it was refused unread, as too large, and is not
    any more. The steps keep what was done already.
    """
    refused_unread = document.state is State.FAILED and _keep_bytes(session, offer)
    failed_for_now = document.state is State.FAILED and not document.is_permanent
    if document.state is State.CANCELLED or failed_for_now or refused_unread:
        document.state, document.queued_at = State.QUEUED, utc_now()
        document.reason, document.is_permanent = None, False
    return document.state is State.QUEUED


def _point(session: Session, source: Source, document: Document) -> None:
    superseded = source.pending_id
    if source.serving_id == document.id:
        source.pending_id = None
    else:
        source.pending_id = document.id
    session.flush()
    if document.state is State.READY:
        serve(session, document.id)
    if superseded is not None and superseded != document.id:
        drop_unused(session, [superseded])
