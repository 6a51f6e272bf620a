"""`ragline eval`: a collection indexed as documents are, beside the tables, and searched in every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, insert, make_url
from sqlalchemy.orm import Session

from ragline.databases import index_of, search_index
from ragline.embedders import Embedder, load_embedder, token_counter
from ragline.endpoints import Endpoint
from ragline.evaluation import Collection, Measures, measure_ranking
from ragline.searching import Mode, load_index, rank
from ragline.splitter import split
from ragline.states import State
from ragline.tables import Base, Chunk, Document, Source, Vector
from ragline.text import ParsedText, clean
from ragline.tokens import TokenCounter
from ragline.visibility import record
from ragline.words import text_digest

EMBEDDED_AT_ONCE = 64


def evaluate(
    collection: Collection,
    embedder_name: str,
    cache: Path,
    advanced: Callable[[int], object],
    *,
    endpoint: Endpoint | None = None,
    database_url: str = "sqlite://",
) -> dict[Mode, Measures]:
    """Index a collection in a place of its own and measure every way of searching it.

    Args:
        collection: documents, queries, judgements.
        embedder_name: as `available_embedder` gives it.
        cache: where models are kept.
        advanced: called with a number of documents each time so many are indexed.
        endpoint: the one whose embedder that is, if it is one's.
        database_url: which database; its tables are not touched, SQLite is in memory.

    Returns:
        The measures of each mode that the embedder allows.
    """
    embedder = load_embedder(embedder_name, cache, endpoint)
    counter = token_counter(embedder_name, cache, endpoint)
    texts = [(name, clean(text)) for name, text in collection.documents.items()]
    with scratch_engine(database_url) as engine, Session(engine) as session:
        names = _index(session, texts, counter, embedder, advanced)
        queries = list(collection.queries)
        vectors = (
            None if embedder is None else embedder.embed([collection.queries[query] for query in queries])
        )
        index = load_index(session, embedder_name)
        near = -1.0 if embedder is None else embedder.near
        results = {}
        for mode in [Mode.KEYWORD] if vectors is None else list(Mode):
            rankings = {}
            for at, query in enumerate(queries):
                vector = None if vectors is None else vectors[at]
                ranked = rank(session, collection.queries[query], vector, index, mode=mode, near=near)
                # A document is found where its best passage is.
                rankings[query] = list(dict.fromkeys(names[chunk_id] for chunk_id, _ in ranked.chunks))
            results[mode] = measure_ranking(rankings, collection)
    return results


@contextmanager
def scratch_engine(database_url: str) -> Iterator[Engine]:
    """An engine with all of ragline's tables, empty, beside the real ones and gone after the block."""
    url = make_url(database_url)
    with search_index(url.get_backend_name()).scratch(url) as engine:
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            index_of(connection).create(connection)
        yield engine


def _index(
    session: Session,
    texts: list[tuple[str, str]],
    counter: TokenCounter,
    embedder: Embedder | None,
    advanced: Callable[[int], object],
) -> dict[int, str]:
    """Index all texts at once, as the pipeline would one by one; the name of the document of each chunk."""
    documents = [_document(number, name, len(text)) for number, (name, text) in enumerate(texts, start=1)]
    session.execute(insert(Document), documents)
    session.execute(
        insert(Source), [_source(number, name) for number, (name, _) in enumerate(texts, start=1)]
    )
    names: dict[int, str] = {}
    for start in range(0, len(texts), EMBEDDED_AT_ONCE):
        some = texts[start : start + EMBEDDED_AT_ONCE]
        chunks = [
            {"id": len(names) + number, **chunk}
            for number, chunk in enumerate(_chunks(some, start + 1, counter), start=1)
        ]
        names |= {int(chunk["id"]): texts[int(chunk["document_id"]) - 1][0] for chunk in chunks}
        session.execute(insert(Chunk), chunks)
        connection = session.connection()
        index_of(connection).add(connection, [(int(chunk["id"]), str(chunk["content"])) for chunk in chunks])
        if embedder is not None:
            vectors = embedder.embed([str(chunk["content"]) for chunk in chunks])
            rows = [
                (int(chunk["id"]), vector)
                for chunk, vector in zip(chunks, vectors.astype("<f4", copy=False), strict=True)
            ]
            values = [
                {"chunk_id": key, "embedder": embedder.name, "data": row.tobytes()} for key, row in rows
            ]
            session.execute(insert(Vector), values)
            index_of(connection).add_vectors(connection, rows)
        record(session, range(start + 1, start + 1 + len(some)))
        session.commit()
        advanced(len(some))
    return names


def _document(number: int, name: str, characters: int) -> dict[str, object]:
    recipe = {"parser": "", "splitter": "", "embedder": ""}
    return {
        "id": number,
        "name": name,
        "size_bytes": characters,
        "state": State.READY,
        "is_permanent": False,
        **recipe,
    }


def _source(number: int, name: str) -> dict[str, object]:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {
        "id": number,
        "uri": name,
        "name": name,
        "uri_digest": digest,
        "generation": 1,
        "serving_id": number,
    }


def _chunks(
    texts: list[tuple[str, str]], first_id: int, counter: TokenCounter
) -> Iterator[dict[str, int | str]]:
    for document_id, (_, text) in enumerate(texts, start=first_id):
        for position, chunk in enumerate(split(ParsedText(text), counter)):
            yield {
                "document_id": document_id,
                "position": position,
                "batch": 0,
                "start": chunk.start,
                "end": chunk.end,
                "tokens": chunk.tokens,
                "heading": chunk.heading,
                "content": text[chunk.start : chunk.end],
                "digest": text_digest(text[chunk.start : chunk.end]),
            }
