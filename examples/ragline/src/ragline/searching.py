"""Search: keywords and vectors, fused, as passages that cite their document. Use cases with a session."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, exists, select
from sqlalchemy.orm import Session

from ragline.databases import index_of
from ragline.places import labels
from ragline.question import Question
from ragline.ranking import fuse
from ragline.tables import Chunk, Shown, Source, Vector
from ragline.visibility import KEPT_VERSIONS, changes_since, state

if TYPE_CHECKING:  # imported late: searches by keywords need no vectors
    import numpy as np
    import numpy.typing as npt

    from ragline.vectors import GrowingIndex, VectorIndex

CANDIDATES = (200, 800, 3200)
"""How many passages each ranking gives to the fusion: more where many of them turn out to be the same text,
or of documents that searches may not see."""
WANTED = 100
"""How many different texts are enough."""
FARTHER = 0.1
"""By how much less than near a vector may be where passages have the words of the query."""
LOADED_AT_ONCE = 4096
_AT_ONCE = 900
"""Databases limit the parameters of a statement; the smallest limit in use is SQLite's old 999."""


class Mode(str, enum.Enum):
    """What a search goes by."""

    HYBRID = "hybrid"
    KEYWORD = "keyword"
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a passage stands.

    Attributes:
        name: that of its file, with as many folders as tell it from others of that name.
        pages: first and last page, counted from 1, or None for a format without pages.
    """

    document_id: int
    chunk_id: int
    name: str
    uri: str
    heading: str
    pages: tuple[int, int] | None
    start: int
    end: int

    @property
    def citation(self) -> str:
        """Document, page and character range, as a person writes them."""
        pages = "" if self.pages is None else f", p. {self.pages[0]}"
        if self.pages is not None and self.pages[1] != self.pages[0]:
            pages = f", pp. {self.pages[0]}-{self.pages[1]}"
        return f"{self.name}{pages}, characters {self.start}-{self.end}"


@dataclass(frozen=True, slots=True)
class Passage(Place):
    """A passage that answers a query, and the place that is cited for it.

    Attributes:
        quote: exactly `text[start:end]` of the document's text.
        score: comparable within one search only.
        also: the other places where the same words stand.
        is_near: whether it has no word of the query, and others have one: only its meaning is near.
    """

    quote: str
    score: float
    also: tuple[Place, ...] = ()
    is_near: bool = False


@dataclass(frozen=True, slots=True)
class DatabaseIndex:
    """The vectors of an embedder where the database itself searches them."""

    embedder: str


def load_index(session: Session, embedder: str) -> VectorIndex | DatabaseIndex:
    """The vectors that searches may see and that this embedder made, for exact search.

    In memory, unless the database itself searches vectors.
    """
    if has_own_vectors(session):
        return DatabaseIndex(embedder)
    from ragline.vectors import GrowingIndex

    index = GrowingIndex()
    version = bring_up_to_date(session, index, embedder)
    return index.at(version)


def has_own_vectors(session: Session) -> bool:
    """Whether the database itself searches vectors."""
    connection = session.connection()
    return index_of(connection).has_vectors(connection)


def is_too_old(session: Session, index: GrowingIndex) -> bool:
    """Whether an index is so far behind that it has to be read anew."""
    return index.version > 0 and state(session).version - index.version >= KEPT_VERSIONS


def bring_up_to_date(session: Session, index: GrowingIndex, embedder: str) -> int:
    """Give an index the vectors that are new in the session's transaction, and take out those that are gone.

    Returns:
        The version of the index in the transaction. It may be older than what the index has come to by
        other transactions.
    """
    version = state(session).version
    if version <= index.version:
        return version
    if index.version == 0:
        shown = select(Shown.document_id).where(Shown.is_shown)
        _add_vectors(session, index, embedder, Chunk.document_id.in_(shown), from_version=0)
    else:
        changes = changes_since(session, index.version)
        # Also those that are shown: one may have been shown before, and gone in between.
        index.remove(version, [change.document_id for change in changes])
        for some in _portions([change.document_id for change in changes if change.is_shown]):
            _add_vectors(session, index, embedder, Chunk.document_id.in_(some), from_version=version)
    index.version = version
    return version


def _add_vectors(
    session: Session,
    index: GrowingIndex,
    embedder: str,
    which: ColumnElement[bool],
    *,
    from_version: int,
) -> None:
    import numpy as np

    rows = session.execute(
        select(Chunk.document_id, Vector.chunk_id, Vector.data)
        .join(Chunk, Chunk.id == Vector.chunk_id)
        .where(Vector.embedder == embedder, which)
        .execution_options(yield_per=LOADED_AT_ONCE)
    )
    for some in rows.partitions():
        documents, ids, data = zip(*some, strict=True)
        matrix = np.frombuffer(b"".join(data), "<f4").reshape(len(ids), -1)
        index.add(from_version, np.array(documents, np.int64), np.array(ids, np.int64), matrix)


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a search goes through.

    Attributes:
        chunks: (chunk id, score), best first; those with the same text stand together.
        has_words: whether a passage has a word of the query.
        by_words: the ids of those chunks that were found by words.
    """

    chunks: list[tuple[int, float]]
    has_words: bool
    by_words: frozenset[int] = frozenset()


def rank(
    session: Session,
    query: str | Question,
    vector: npt.NDArray[np.float32] | None,
    index: VectorIndex | DatabaseIndex | None,
    *,
    mode: Mode = Mode.HYBRID,
    near: float = -1.0,
) -> Ranking:
    """Rank chunks for a query.

    Args:
        session: any session.
        query: what the person asks; of a plain text no sign is an operator.
        vector: the embedding of the query's text, or None to go by keywords alone.
        index: the vectors to compare it with; None with `vector` None.
        mode: what to go by.
        near: a vector that is less similar, as a cosine, is about something else.

    Returns:
        The same for the same index and query every time.
    """
    question = Question(query) if isinstance(query, str) else query
    index = None if mode is Mode.KEYWORD or vector is None else _narrowed(session, question, index)
    for candidates in CANDIDATES:
        by_words, exact = _by_words(session, question, 0 if mode is Mode.VECTOR else candidates)
        by_vector = []
        if vector is not None and index is not None:
            by_vector = _by_vector(session, question, vector, index, candidates, near - FARTHER)
        digests = _digests(session, {chunk_id for chunk_id, _ in (*by_words, *by_vector)})
        is_all = len(by_words) < candidates and len(by_vector) < candidates
        if is_all or len(set(digests.values())) >= WANTED:
            break
    has_words = any(chunk_id in digests for chunk_id, _ in by_words)
    if not has_words:
        by_vector = [entry for entry in by_vector if entry[1] >= near]
    found_by_words = frozenset(chunk_id for chunk_id, _ in by_words)
    chunks = _first({digests.get(key) for key in exact}, _fused([by_words, by_vector], digests), digests)
    return Ranking(chunks, has_words, found_by_words)


def _narrowed(
    session: Session, question: Question, index: VectorIndex | DatabaseIndex | None
) -> VectorIndex | DatabaseIndex | None:
    """The vectors of passages that have what the question demands, and nothing that it excludes."""
    if index is None or isinstance(index, DatabaseIndex) or not (question.phrases or question.excluded):
        return index
    connection = session.connection()
    search = index_of(connection)
    demanded, excluded = (
        [search.having(connection, phrase) for phrase in phrases]
        for phrases in (question.phrases, question.excluded)
    )
    return index.among(demanded, excluded)


def _by_words(session: Session, question: Question, limit: int) -> tuple[list[tuple[int, float]], set[int]]:
    """What the words of a question find, and which of it has exactly the identifier that is asked for."""
    if not limit:
        return [], set()
    connection = session.connection()
    best = index_of(connection).best
    found = best(connection, question, limit=limit)
    asked = question.identifier
    if asked is None or question.phrases:
        return found, set()
    # Its words next to each other, and then the signs between them: these are in no index.
    candidates = [key for key, _ in best(connection, replace(question, phrases=(asked,)), limit=limit)]
    exact: set[int] = set()
    for some in _portions(candidates):
        contents = session.execute(select(Chunk.id, Chunk.content).where(Chunk.id.in_(some)))
        exact.update(row.id for row in contents if asked.casefold() in row.content.casefold())
    # They have each of its words, and so are among the best of them, or come behind these.
    last = found[-1][1] if found else 0.0
    return found + [(key, last) for key in sorted(exact - {key for key, _ in found})], exact


def _by_vector(
    session: Session,
    question: Question,
    vector: npt.NDArray[np.float32],
    index: VectorIndex | DatabaseIndex,
    limit: int,
    near: float,
) -> list[tuple[int, float]]:
    if isinstance(index, DatabaseIndex):
        connection = session.connection()
        search = index_of(connection)
        nearest = search.nearest(connection, index.embedder, vector, question, limit=limit)
    else:
        nearest = index.nearest(vector, limit=limit)
    return [(chunk_id, similarity) for chunk_id, similarity in nearest if similarity >= near]


def _digests(session: Session, chunk_ids: Iterable[int]) -> dict[int, int]:
    """The digests of the texts of those chunks that searches may see."""
    digests: dict[int, int] = {}
    is_served = exists().where(Source.serving_id == Chunk.document_id)
    for some in _portions(sorted(chunk_ids)):
        found = session.execute(select(Chunk.id, Chunk.digest).where(Chunk.id.in_(some), is_served))
        digests.update((row.id, row.digest) for row in found)
    return digests


def _fused(
    rankings: Iterable[Sequence[tuple[int, float]]], digests: dict[int, int]
) -> list[tuple[int, float]]:
    """One ranking of several, in which the same text is one item, so that copies do not crowd out others."""
    rankings = [ranking for ranking in rankings if ranking]
    scores: dict[int, float] = {}
    chunks: dict[int, set[int]] = {}
    for ranking in rankings:
        for chunk_id, score in ranking:
            if chunk_id in digests:
                scores.setdefault(digests[chunk_id], score)
                chunks.setdefault(digests[chunk_id], set()).add(chunk_id)
    if len(rankings) > 1:
        # Ties are in the order of the ids: a text has the number of its first chunk.
        first = {digest: min(ids) for digest, ids in chunks.items()}
        texts = [[first[digests[key]] for key, _ in ranking if key in digests] for ranking in rankings]
        fused = fuse([list(dict.fromkeys(ranking)) for ranking in texts])
        scores = {digests[chunk_id]: score for chunk_id, score in fused}
    return [(chunk_id, score) for digest, score in scores.items() for chunk_id in sorted(chunks[digest])]


def _first(
    exact: Collection[int | None], ranked: list[tuple[int, float]], digests: dict[int, int]
) -> list[tuple[int, float]]:
    """The same ranking, with texts of these digests before all others.

    The best score is added to theirs: a passage that comes sooner never has a lower one.
    """
    best = max((score for _, score in ranked), default=0.0)
    sooner = [(chunk_id, score + best) for chunk_id, score in ranked if digests[chunk_id] in exact]
    return sooner + [entry for entry in ranked if digests[entry[0]] not in exact]


def passages(session: Session, ranking: Ranking, *, limit: int | None = None) -> list[Passage]:
    """The first passages of a ranking, each text once, with all the places where it stands."""
    found: dict[int, Passage] = {}
    scores = dict(ranking.chunks)
    for some in _portions(list(scores), at_once=_AT_ONCE if limit is None else 4 * limit):
        chunks = {chunk.id: chunk for chunk in session.scalars(select(Chunk).where(Chunk.id.in_(some)))}
        sources = _sources(session, {chunk.document_id for chunk in chunks.values()})
        for chunk in (chunks[chunk_id] for chunk_id in some if chunk_id in chunks):
            # The same bytes from several places are one document: cited by the place that was added first.
            places = [_place(chunk, name, uri) for name, uri in sources.get(chunk.document_id, ())]
            if not places:
                continue
            known = found.get(chunk.digest)
            if known is None:
                if len(found) == limit:
                    return list(found.values())
                first, *others = places
                found[chunk.digest] = _passage(first, chunk.content, scores[chunk.id], others)
            else:
                found[chunk.digest] = replace(known, also=(*known.also, *places))
    return list(found.values())


def _sources(session: Session, document_ids: Iterable[int]) -> dict[int, list[tuple[str, str]]]:
    """Label and URI of each place that shows a document, in the order they were added."""
    found: list[tuple[int, str]] = []
    for some in _portions(sorted(document_ids)):
        shown = select(Source.serving_id, Source.uri).where(Source.serving_id.in_(some))
        found.extend((row.serving_id, row.uri) for row in session.execute(shown.order_by(Source.id)))
    names = labels(session, [uri for _, uri in found])
    sources: dict[int, list[tuple[str, str]]] = {}
    for document_id, uri in found:
        sources.setdefault(document_id, []).append((names[uri], uri))
    return sources


def _place(chunk: Chunk, name: str, uri: str) -> Place:
    first, last = chunk.first_page, chunk.last_page
    return Place(
        document_id=chunk.document_id,
        chunk_id=chunk.id,
        name=name,
        uri=uri,
        heading=chunk.heading,
        pages=None if first is None or last is None else (first, last),
        start=chunk.start,
        end=chunk.end,
    )


def _passage(place: Place, quote: str, score: float, also: Iterable[Place]) -> Passage:
    values = {field.name: getattr(place, field.name) for field in fields(Place)}
    return Passage(**values, quote=quote, score=score, also=tuple(also))


def _portions(ids: Sequence[int], *, at_once: int = _AT_ONCE) -> Iterator[Sequence[int]]:
    at_once = min(at_once, _AT_ONCE)
    for start in range(0, len(ids), at_once):
        yield ids[start : start + at_once]
