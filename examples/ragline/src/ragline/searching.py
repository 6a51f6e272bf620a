"""Search: keywords and vectors, fused, as passages that cite their document. Use cases with a session."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ragline.databases import index_of
from ragline.ranking import VectorIndex, fuse
from ragline.tables import Chunk, Document, Source, Vector

CANDIDATES = 200
"""How many passages each ranking gives to the fusion."""


class Mode(str, enum.Enum):
    """What a search goes by."""

    HYBRID = "hybrid"
    KEYWORD = "keyword"
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that answers a query, and where it stands.

    Attributes:
        quote: exactly `text[start:end]` of the document's text.
        pages: first and last page, counted from 1, or None for a format without pages.
        score: comparable within one search only.
    """

    document_id: int
    chunk_id: int
    name: str
    uri: str
    heading: str
    pages: tuple[int, int] | None
    start: int
    end: int
    quote: str
    score: float

    @property
    def citation(self) -> str:
        """Document, page and character range, as a person writes them."""
        pages = "" if self.pages is None else f", p. {self.pages[0]}"
        if self.pages is not None and self.pages[1] != self.pages[0]:
            pages = f", pp. {self.pages[0]}-{self.pages[1]}"
        return f"{self.name}{pages}, characters {self.start}-{self.end}"


def index_version(session: Session) -> tuple[object, ...]:
    """Something that is another when the set of documents that searches may see is another.

    The time is part of it since SQLite gives the id of a deleted document again.
    """
    served = select(func.count(), func.sum(Source.serving_id), func.max(Document.ready_at)).join(
        Document, Document.id == Source.serving_id
    )
    return tuple(session.execute(served).one())


@dataclass(frozen=True, slots=True)
class DatabaseIndex:
    """The vectors of an embedder where the database itself searches them."""

    embedder: str


def load_index(session: Session, embedder: str) -> VectorIndex | DatabaseIndex:
    """The vectors that searches may see and that this embedder made, for exact search.

    In memory, unless the database itself searches vectors.
    """
    connection = session.connection()
    if index_of(connection).has_vectors(connection):
        return DatabaseIndex(embedder)
    rows = session.execute(
        select(Vector.chunk_id, Vector.data)
        .join(Chunk, Chunk.id == Vector.chunk_id)
        .where(Vector.embedder == embedder, Chunk.document_id.in_(select(Source.serving_id)))
        .order_by(Vector.chunk_id)
    ).all()
    if not rows:
        return VectorIndex(np.empty(0, np.int64), np.empty((0, 0), np.float32))
    ids = np.fromiter((row.chunk_id for row in rows), np.int64, len(rows))
    matrix = np.frombuffer(b"".join(row.data for row in rows), "<f4").reshape(len(rows), -1)
    return VectorIndex(ids, matrix)


def rank(
    session: Session,
    query: str,
    vector: npt.NDArray[np.float32] | None,
    index: VectorIndex | DatabaseIndex | None,
    *,
    mode: Mode = Mode.HYBRID,
) -> list[tuple[int, float]]:
    """Rank chunks for a query.

    Args:
        session: any session.
        query: what the person typed.
        vector: the query's embedding, or None to go by keywords alone.
        index: the vectors to compare it with; None with `vector` None.
        mode: what to go by.

    Returns:
        (chunk id, score), best first, the same for the same index and query every time.
    """
    connection = session.connection()
    database = index_of(connection)
    rankings: list[list[tuple[int, float]]] = []
    if mode is not Mode.VECTOR:
        rankings.append(database.best(connection, query, limit=CANDIDATES))
    if mode is not Mode.KEYWORD and vector is not None and index is not None:
        if isinstance(index, VectorIndex):
            rankings.append(index.nearest(vector, limit=CANDIDATES))
        else:
            rankings.append(database.nearest(connection, index.embedder, vector, limit=CANDIDATES))
    if len(rankings) == 1:
        return rankings[0]
    return fuse([[chunk_id for chunk_id, _ in ranking] for ranking in rankings])


def passages(session: Session, ranked: Iterable[tuple[int, float]]) -> list[Passage]:
    """The passages of ranked chunks, in their order, each with its citation."""
    scores = dict(ranked)
    # The same bytes from several places are one document: it is cited by the place that was added first.
    first = (
        select(Source.serving_id, func.min(Source.id).label("source_id"))
        .group_by(Source.serving_id)
        .subquery("first")
    )
    rows = session.execute(
        select(Chunk, Document.name, Source.uri)
        .join(Document, Document.id == Chunk.document_id)
        .join(first, first.c.serving_id == Document.id)
        .join(Source, Source.id == first.c.source_id)
        .where(Chunk.id.in_(scores))
    )
    found = {chunk.id: _passage(chunk, name, uri, scores[chunk.id]) for chunk, name, uri in rows}
    return [found[chunk_id] for chunk_id in scores if chunk_id in found]


def _passage(chunk: Chunk, name: str, uri: str, score: float) -> Passage:
    pages = (
        None if chunk.first_page is None or chunk.last_page is None else (chunk.first_page, chunk.last_page)
    )
    return Passage(
        document_id=chunk.document_id,
        chunk_id=chunk.id,
        name=name,
        uri=uri,
        heading=chunk.heading,
        pages=pages,
        start=chunk.start,
        end=chunk.end,
        quote=chunk.content,
        score=score,
    )
