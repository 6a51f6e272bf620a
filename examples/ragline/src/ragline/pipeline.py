"""The steps from a queued document to a ready one: use cases that take the session of a task.

parse -> split -> embed (batch 1..n) -> ready. A step reads, gives the connection back while it works, and
ends in one short transaction that writes its result and the next state. A step whose document is
gone, or in another state than it expects, does nothing: a message that arrives late or twice resurrects
nothing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import numpy as np
from celery_alchemy import released
from sqlalchemy import ColumnElement, exists, insert, select
from sqlalchemy.orm import Session

from ragline.databases import index_of
from ragline.embedders import Embedder
from ragline.errors import DocumentError, RaglineError
from ragline.formats import detect_format
from ragline.intake import lock_sources, serve
from ragline.parsers import parse as parse_here
from ragline.splitter import split as split_text
from ragline.states import NO_EMBEDDER, State
from ragline.tables import Chunk, Document, DocumentText, Original, Vector, utc_now
from ragline.text import Heading, ParsedText
from ragline.tokens import TokenCounter
from ragline.transitions import move
from ragline.words import text_digest

SHOWN_BYTES = 200_000
"""While a larger document is parsed, people see that it is; a smaller one is parsed before they look."""


def is_shown(session: Session, document_id: int) -> bool:
    """Whether a queued document is large enough to be seen while it is parsed."""
    document = _expect(session, document_id, State.QUEUED)
    return document is not None and document.size_bytes >= SHOWN_BYTES


def admit(session: Session, document_id: int) -> bool:
    """Let people see that the document is being parsed; whether it is to be parsed now."""
    return move(session, document_id, State.PARSING)


def parse(
    session: Session, document_id: int, parse_document: Callable[[bytes, str], ParsedText] = parse_here
) -> bool:
    """Make text of a queued document's bytes, or take it from the same bytes with another splitter or model.

    Args:
        session: the task's session.
        document_id: which document.
        parse_document: makes text of bytes and a file name; workers give one that can be ended.

    Returns:
        Whether it is to be split now.

    Raises:
        DocumentError: it can never be parsed; the text says why.
    """
    document = _expect(session, document_id, State.QUEUED, State.PARSING)
    if document is None:
        return False
    began_at = document.parsing_at if document.state is State.PARSING else utc_now()
    # SQLite gives ids of deleted rows out again: it still is the same document if its bytes are the same.
    is_same = Document.digest == document.digest
    is_parsed = exists().where(DocumentText.document_id == document_id)
    if session.scalar(select(is_parsed)):  # before it was paused, or failed later on
        return _parsed_since(session, document_id, began_at, is_parsed, is_same)
    parsed = _parsed_before(session, document)
    if parsed is None:
        data, name = _bytes(session, document), document.name
        if data is None:
            return False
        with released(session):
            if data.strip():  # the parser says more about an empty one
                detect_format(data, name)
            parsed = parse_document(data, name)
    if not _parsed_since(session, document_id, began_at, ~is_parsed, is_same):
        return False
    session.add(
        DocumentText(
            document_id=document_id,
            text=parsed.text,
            headings=[(heading.start, heading.level, heading.title) for heading in parsed.headings],
            page_starts=list(parsed.page_starts),
            encoding=parsed.encoding,
            table_parts=list(parsed.table_parts),
            blocks=[(block.start, block.end, block.kind.value) for block in parsed.blocks],
        )
    )
    return True


def split(
    session: Session, document_id: int, counter_of: Callable[[str], TokenCounter], *, batch_chunks: int
) -> list[int]:
    """Cut the document's text into chunks and index their words.

    Args:
        session: the task's session.
        document_id: which document.
        counter_of: the token counter of an embedder, by the embedder's name.
        batch_chunks: how many chunks make a batch.

    Returns:
        The numbers of the batches to embed; none for a document that is searched by keywords alone and is
        ready now.
    """
    document = _expect(session, document_id, State.SPLITTING)
    if document is None:
        return []
    is_split = exists().where(Chunk.document_id == document_id)
    if session.scalar(select(is_split)):  # before it was paused, or failed later on
        moved = move(session, document_id, State.EMBEDDING, is_split)
        return _batches_to_embed(session, document_id) if moved else []
    parsed, embedder = _parsed(session, document_id), document.embedder
    if parsed is None:
        return []
    with released(session):
        chunks = split_text(parsed, counter_of(embedder))
    lock_sources(session, document_id)
    if not move(session, document_id, State.EMBEDDING, ~is_split):
        return []
    rows = [
        {
            "document_id": document_id,
            "position": position,
            "batch": position // batch_chunks,
            "start": chunk.start,
            "end": chunk.end,
            "tokens": chunk.tokens,
            "first_page": chunk.pages[0] if chunk.pages else None,
            "last_page": chunk.pages[1] if chunk.pages else None,
            "heading": chunk.heading,
            "content": parsed.text[chunk.start : chunk.end],
            "digest": text_digest(parsed.text[chunk.start : chunk.end]),
        }
        for position, chunk in enumerate(chunks)
    ]
    session.execute(insert(Chunk), rows)
    indexed = session.execute(select(Chunk.id, Chunk.content).where(Chunk.document_id == document_id))
    connection = session.connection()
    index_of(connection).add(connection, [(row.id, row.content) for row in indexed])
    if not rows or embedder == NO_EMBEDDER:
        _finish(session, document_id)
        return []
    return list(range((len(rows) - 1) // batch_chunks + 1))


def embed(
    session: Session, document_id: int, batch: int, embedder_of: Callable[[str], Embedder | None]
) -> bool:
    """Embed one batch of the document's chunks.

    Args:
        session: the task's session.
        document_id: which document.
        batch: the batch's number.
        embedder_of: the embedder of a name; the document says which it wants.

    Returns:
        Whether this was the last batch and the document is ready.
    """
    document = _expect(session, document_id, State.EMBEDDING)
    if document is None:
        return False
    wanted, chunks = document.embedder, _without_vector(session, document_id, batch)
    with released(session):
        embedder = embedder_of(wanted)
        if embedder is None:
            raise RaglineError(f"Document {document_id} is to be embedded without an embedder.")
        vectors = (
            embedder.embed(list(chunks.values())).astype("<f4", copy=False)
            if chunks
            else np.empty((0, 0), "<f4")
        )
    lock_sources(session, document_id)
    # The row lock puts the last two batches of a document in order: the second sees the vectors of the first.
    locked = session.scalar(select(Document.state).where(Document.id == document_id).with_for_update())
    if locked is not State.EMBEDDING:
        return False
    missing = _without_vector(session, document_id, batch)
    new = {
        chunk_id: vector
        for (chunk_id, content), vector in zip(chunks.items(), vectors, strict=True)
        # SQLite gives ids of deleted rows out again: the content says that it still is the same chunk.
        if missing.get(chunk_id) == content
    }
    if new:
        rows = [
            {"chunk_id": key, "embedder": wanted, "data": vector.tobytes()} for key, vector in new.items()
        ]
        session.execute(insert(Vector), rows)
        connection = session.connection()
        index_of(connection).add_vectors(connection, list(new.items()))
    return _finish(session, document_id)


def fail(session: Session, error: BaseException, document_id: int) -> bool:
    """Record why a document could not be processed; for `record_failure`, in a transaction of its own.

    Returns:
        Whether the document is still there.
    """
    is_permanent = isinstance(error, DocumentError)
    reason = str(error) if isinstance(error, RaglineError) else f"{type(error).__name__}: {error}"
    if move(session, document_id, State.FAILED, reason=reason, is_permanent=is_permanent):
        return True
    return session.get(Document, document_id) is not None


def _expect(session: Session, document_id: int, *states: State) -> Document | None:
    document = session.get(Document, document_id)
    return document if document is not None and document.state in states else None


def _parsed_since(
    session: Session, document_id: int, began_at: dt.datetime | None, *conditions: ColumnElement[bool]
) -> bool:
    """Move a document on that was parsed from then on, if nobody stopped it; whether it was moved."""
    move(session, document_id, State.PARSING, *conditions, before=(State.QUEUED,), parsing_at=began_at)
    return move(session, document_id, State.SPLITTING, *conditions)


def _bytes(session: Session, document: Document) -> bytes | None:
    """The document's bytes; None if it was deleted since it was read, which READ COMMITTED lets be seen."""
    return session.scalar(select(Original.data).where(Original.digest == document.digest))


def _parsed_before(session: Session, document: Document) -> ParsedText | None:
    """What the same parser made of the same bytes: a new splitter or model needs no parsing."""
    equal = (
        Document.digest == document.digest,
        Document.parser == document.parser,
        Document.id != document.id,
    )
    parsed = select(DocumentText).join(Document, Document.id == DocumentText.document_id).where(*equal)
    row = session.scalar(parsed.order_by(Document.id).limit(1))
    return None if row is None else _text(row)


def _parsed(session: Session, document_id: int) -> ParsedText | None:
    """The document's text; None if it was deleted since it was read, which READ COMMITTED lets be seen."""
    row = session.get(DocumentText, document_id)
    return None if row is None else _text(row)


def _text(row: DocumentText) -> ParsedText:
    headings = tuple(Heading(*heading) for heading in row.headings)
    return ParsedText(
        text=row.text,
        headings=headings,
        page_starts=tuple(row.page_starts),
        encoding=row.encoding,
        table_parts=tuple((start, end) for start, end in row.table_parts),
    )


def _finish(session: Session, document_id: int) -> bool:
    """Make the document ready and let it be found, unless one of its chunks still waits for its vector."""
    waiting = exists().where(
        Chunk.document_id == document_id,
        Document.embedder != NO_EMBEDDER,
        ~exists().where(Vector.chunk_id == Chunk.id),
    )
    if not move(session, document_id, State.READY, ~waiting):
        return False
    serve(session, document_id)
    return True


def _batches_to_embed(session: Session, document_id: int) -> list[int]:
    """The batches with chunks that are not embedded yet."""
    waiting = (
        select(Chunk.batch)
        .outerjoin(Vector, Vector.chunk_id == Chunk.id)
        .where(Chunk.document_id == document_id, Vector.chunk_id.is_(None))
    )
    return list(session.scalars(waiting.distinct().order_by(Chunk.batch)))


def _without_vector(session: Session, document_id: int, batch: int) -> dict[int, str]:
    """The chunks of a batch that are not embedded yet: id to content, in order."""
    rows = session.execute(
        select(Chunk.id, Chunk.content)
        .outerjoin(Vector, Vector.chunk_id == Chunk.id)
        .where(Chunk.document_id == document_id, Chunk.batch == batch, Vector.chunk_id.is_(None))
        .order_by(Chunk.id)
    )
    return {row.id: row.content for row in rows}
