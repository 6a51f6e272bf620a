"""How far things are, counted from rows: for `ragline status`, the progress bar and the demo."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from sqlalchemy import ColumnElement, UnaryExpression, func, or_, select
from sqlalchemy.orm import Session

from ragline.places import labels
from ragline.states import NO_EMBEDDER, SETTLED, State
from ragline.tables import Chunk, Document, Source, Vector


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts of rows at one moment.

    Attributes:
        documents: how many documents are in each state; states without any are left out.
        chunks: how many chunks the documents have so far.
        embedded: how many of them have their vector.
        unembedded: how many of them wait for theirs; those of documents without an embedder never get one.
    """

    documents: dict[State, int]
    chunks: int
    embedded: int
    unembedded: int

    @property
    def total(self) -> int:
        """All documents."""
        return sum(self.documents.values())

    @property
    def settled(self) -> int:
        """Documents that nothing more happens to by itself."""
        return sum(self.documents.get(state, 0) for state in SETTLED)


@dataclass(frozen=True, slots=True)
class Failure:
    """A place whose document failed, with its name as in lists and the reason."""

    document_id: int
    uri: str
    name: str
    reason: str
    is_permanent: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A document in a list of documents.

    Attributes:
        name: that of its file, with as many folders as tell it from others of that name.
        uris: the places that show it or wait for it, in the order they were added.
        is_found: whether searches see it.
        is_newer: whether searches see another version of it until it is ready.
        since: when it came into its state.
        chunks: how many chunks it has so far.
        embedded: how many of them have their vector.
    """

    id: int
    name: str
    uris: tuple[str, ...]
    size_bytes: int
    state: State
    is_found: bool
    is_newer: bool
    since: dt.datetime | None
    chunks: int
    embedded: int
    reason: str | None
    is_permanent: bool


class Order(str, enum.Enum):
    """How lists of documents are sorted."""

    NEWEST = "newest"
    OLDEST = "oldest"
    NAME = "name"
    LARGEST = "largest"


def _sorted_by(order: Order) -> tuple[UnaryExpression[Any], ...]:
    newest = Document.id.desc()
    return {
        Order.NEWEST: (newest,),
        Order.OLDEST: (Document.id.asc(),),
        Order.NAME: (func.lower(Document.name).asc(), newest),
        Order.LARGEST: (Document.size_bytes.desc(), newest),
    }[order]


def entries(
    session: Session,
    *,
    limit: int,
    below_id: int | None = None,
    states: Collection[State] = tuple(State),
    document_ids: Collection[int] | None = None,
    called: str = "",
    order: Order = Order.NEWEST,
    skip: int = 0,
) -> list[Entry]:
    """List documents, the newest first unless they are wanted in another order.

    Args:
        session: any session.
        limit: how many at most.
        below_id: only older ones: the id of the last one on the page before.
        states: only those in one of these states.
        document_ids: only these.
        called: only those of which a place has each of these words in its path, in any order and case.
        order: how they are sorted.
        skip: how many are left out at the beginning.
    """
    query = select(Document).where(Document.state.in_(states), *_is_called(called))
    query = query.order_by(*_sorted_by(order)).limit(limit).offset(skip)
    if below_id is not None:
        query = query.where(Document.id < below_id)
    if document_ids is not None:
        query = query.where(Document.id.in_(document_ids))
    documents = session.scalars(query.execution_options(populate_existing=True)).all()
    return _entries_of(session, documents)


def number_of_documents(session: Session, states: Collection[State], called: str = "") -> int:
    """How many documents are in one of these states, and have each of these words in the path of a place."""
    wanted = (Document.state.in_(states), *_is_called(called))
    return session.scalar(select(func.count(Document.id)).where(*wanted)) or 0


def _is_called(called: str) -> tuple[ColumnElement[bool], ...]:
    words = called.split()
    if not words:
        return ()
    used = or_(Source.serving_id == Document.id, Source.pending_id == Document.id)
    in_path = [
        or_(
            Source.name.icontains(word, autoescape=True),
            Source.uri.icontains(quote(word), autoescape=True),
        )
        for word in words
    ]
    return (select(Source.id).where(used, *in_path).exists(),)


def _entries_of(session: Session, documents: Sequence[Document]) -> list[Entry]:
    ids = [document.id for document in documents]
    uris: dict[int, list[str]] = {document_id: [] for document_id in ids}
    found: set[int] = set()
    newer: set[int] = set()
    used = or_(Source.serving_id.in_(ids), Source.pending_id.in_(ids))
    for source in session.scalars(select(Source).where(used).order_by(Source.id)):
        for document_id in {source.serving_id or 0, source.pending_id or 0} & uris.keys():
            uris[document_id].append(source.uri)
        found |= {source.serving_id or 0} & uris.keys()
        if source.serving_id is not None:
            newer |= {source.pending_id or 0} & uris.keys()
    counted = (
        select(Chunk.document_id, func.count(Chunk.id), func.count(Vector.chunk_id))
        .outerjoin(Vector, Vector.chunk_id == Chunk.id)
        .where(Chunk.document_id.in_(ids))
        .group_by(Chunk.document_id)
    )
    counts = {document_id: (chunks, embedded) for document_id, chunks, embedded in session.execute(counted)}
    names = labels(session, [places[0] for places in uris.values() if places])
    return [
        Entry(
            document.id,
            names[uris[document.id][0]] if uris[document.id] else document.name,
            tuple(uris[document.id]),
            document.size_bytes,
            document.state,
            document.id in found,
            document.id in newer,
            getattr(document, f"{document.state.value}_at"),
            *counts.get(document.id, (0, 0)),
            document.reason,
            document.is_permanent,
        )
        for document in documents
    ]


def measure(session: Session, document_ids: Sequence[int] | None = None) -> Progress:
    """Count the documents and chunks of the index, or of some documents of it."""
    documents: dict[State, int] = {}
    chunks = embedded = unembedded = 0
    for some in _portions(document_ids):
        only_documents = () if some is None else (Document.id.in_(some),)
        only_chunks = () if some is None else (Chunk.document_id.in_(some),)
        states = select(Document.state, func.count()).where(*only_documents).group_by(Document.state)
        for state, count in session.execute(states):
            documents[state] = documents.get(state, 0) + count
        # Of ready documents every chunk has its vector: only those of the others are looked for.
        is_ready, has_embedder = Document.state == State.READY, Document.embedder != NO_EMBEDDER
        counted = (
            select(is_ready, has_embedder, func.count(Chunk.id))
            .join(Document, Document.id == Chunk.document_id)
            .where(*only_chunks)
            .group_by(is_ready, has_embedder)
        )
        vectors = (
            select(func.count(Vector.chunk_id))
            .join(Chunk, Chunk.id == Vector.chunk_id)
            .join(Document, Document.id == Chunk.document_id)
            .where(~is_ready, *only_chunks)
        )
        with_vector = session.scalar(vectors) or 0
        embedded += with_vector
        unembedded -= with_vector
        for ready, wanted, count in session.execute(counted):
            chunks += count
            embedded += count if ready and wanted else 0
            unembedded += count if wanted and not ready else 0
    return Progress(documents, chunks, embedded, unembedded)


def failures(session: Session, document_ids: Sequence[int] | None = None) -> list[Failure]:
    """The places of the documents that failed, in order."""
    found: list[tuple[int, str, str | None, bool]] = []
    for some in _portions(document_ids):
        query = (
            select(Document.id, Source.uri, Document.reason, Document.is_permanent)
            .join(Document, Document.id == Source.pending_id)
            .where(Document.state == State.FAILED)
            .order_by(Source.uri)
        )
        if some is not None:
            query = query.where(Document.id.in_(some))
        found.extend((id_, uri, reason, lasts) for id_, uri, reason, lasts in session.execute(query))
    names = labels(session, [uri for _, uri, _, _ in found])
    return [Failure(id_, uri, names[uri], reason or "", lasts) for id_, uri, reason, lasts in found]


def _portions(ids: Sequence[int] | None) -> list[Sequence[int] | None]:
    # Databases limit the number of parameters of a statement; the smallest limit in use is SQLite's old 999.
    if ids is None:
        return [None]
    return [ids[at : at + 900] for at in range(0, len(ids), 900)]
