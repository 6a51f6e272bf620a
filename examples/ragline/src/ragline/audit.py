"""Whether the counts add up, told from the rows alone: nothing lost, nothing doubled."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import func, or_, select, text
from sqlalchemy.orm import Session

from ragline import visibility
from ragline.databases import index_of
from ragline.states import NO_EMBEDDER, SETTLED, State
from ragline.tables import Chunk, Document, DocumentText, Original, Shown, Source, Vector


def audit(session: Session) -> list[str]:
    """Check a settled index.

    Returns:
        What is wrong, one sentence each; empty when every document is ready, failed for a stated
        reason or was stopped by a person, and ready ones are whole, found once, and quote their text exactly.
    """
    return [
        *_documents(session),
        *_sources(session),
        *_chunks(session),
        *_indexes(session),
        *_visibility(session),
    ]


def _documents(session: Session) -> Iterator[str]:
    for document in session.scalars(select(Document).order_by(Document.id)):
        if document.state not in SETTLED:
            yield f"{document.name} is still {document.state.value}."
        elif document.state is State.FAILED and not document.reason:
            yield f"{document.name} failed without a reason."
    repeated = select(Document.digest).where(Document.digest.is_not(None))
    recipe = (Document.digest, Document.parser, Document.splitter, Document.embedder)
    for digest in session.scalars(repeated.group_by(*recipe).having(func.count() > 1)):
        yield f"The bytes {str(digest)[:12]} are two documents."


def _sources(session: Session) -> Iterator[str]:
    settled = select(Document.id).where(Document.state.in_(SETTLED))
    shown = or_(Source.serving_id.in_(settled), Source.pending_id.in_(settled))
    # With neither id the comparison is unknown, and NOT of it too: hence the coalesce.
    for uri in session.scalars(select(Source.uri).where(~func.coalesce(shown, False)).order_by(Source.id)):
        yield f"{uri} has no document that is settled."
    for uri in session.scalars(select(Source.uri).where(Source.pending_id == Source.serving_id)):
        yield f"{uri} waits for the document that it shows."
    used = or_(Source.serving_id == Document.id, Source.pending_id == Document.id)
    for name in session.scalars(select(Document.name).where(~select(Source.id).where(used).exists())):
        yield f"{name} belongs to no source."


def _chunks(session: Session) -> Iterator[str]:
    counts = (
        select(
            Document.name,
            Document.state,
            Document.embedder,
            func.count(Chunk.id),
            func.count(Chunk.position.distinct()),
            func.coalesce(func.max(Chunk.position) + 1, 0),
            func.count(Vector.chunk_id),
        )
        .outerjoin(Chunk, Chunk.document_id == Document.id)
        .outerjoin(Vector, Vector.chunk_id == Chunk.id)
        .group_by(Document.id, Document.name, Document.state, Document.embedder)
    )
    for name, state, embedder, chunks, positions, numbered, vectors in session.execute(counts):
        if not chunks == positions == numbered:
            yield f"{name} has {chunks} chunks at {positions} positions, numbered to {numbered}."
        if state is not State.READY:
            continue
        if not chunks:
            yield f"{name} is ready without a chunk."
        if vectors != (0 if embedder == NO_EMBEDDER else chunks):
            yield f"{name} has {chunks} chunks and {vectors} vectors."
    quoted = func.substr(DocumentText.text, Chunk.start + 1, Chunk.end - Chunk.start)
    wrong = (
        select(Document.name)
        .join(Chunk, Chunk.document_id == Document.id)
        .outerjoin(DocumentText, DocumentText.document_id == Document.id)
        .where(func.coalesce(quoted, "") != Chunk.content)
        .distinct()
    )
    for name in session.scalars(wrong):
        yield f"{name} has a chunk that is not the text at its offsets."


def _indexes(session: Session) -> Iterator[str]:
    chunks = session.scalar(select(func.count(Chunk.id))) or 0
    indexed = session.scalar(text("SELECT count(*) FROM chunk_keywords")) or 0
    if chunks != indexed:
        yield f"There are {chunks} chunks, and {indexed} in the keyword index."
    connection = session.connection()
    if index_of(connection).has_vectors(connection):
        vectors = session.scalar(select(func.count(Vector.chunk_id))) or 0
        searched = session.scalar(text("SELECT count(*) FROM embedding_index")) or 0
        if vectors != searched:
            yield f"There are {vectors} vectors, and {searched} in the vector index."
    unused = ~select(Document.id).where(Document.digest == Original.digest).exists()
    for digest in session.scalars(select(Original.digest).where(unused)):
        yield f"The bytes {digest[:12]} belong to no document."


def _visibility(session: Session) -> Iterator[str]:
    serving = set(session.scalars(select(Source.serving_id).where(Source.serving_id.is_not(None))))
    shown = set(session.scalars(select(Shown.document_id).where(Shown.is_shown)))
    for document_id in sorted(serving ^ shown, key=str):
        yield f"The journal is wrong about document {document_id}, which a source shows or does not."
    chunks = session.scalar(select(func.count(Chunk.id)).where(Chunk.document_id.in_(serving))) or 0
    counted = visibility.state(session).chunks
    if chunks != counted:
        yield f"Searches see {chunks} chunks, and {counted} are counted."
    connection = session.connection()
    for word, has, said in index_of(connection).wrong_counts(connection):
        yield f"{has} chunks have the word {word!r}, and {said} are counted."
