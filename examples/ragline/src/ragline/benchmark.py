"""`ragline eval`: a collection split, embedded and indexed in memory, and searched in every mode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import Engine, create_engine, event, insert
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from ragline import fulltext
from ragline.embedders import Embedder, load_embedder, token_counter
from ragline.endpoints import Endpoint
from ragline.evaluation import Collection, Measures, measure_ranking
from ragline.searching import Mode, load_index, rank
from ragline.splitter import split
from ragline.states import State
from ragline.tables import Base, Chunk, Document, Source, Vector
from ragline.text import ParsedText, clean
from ragline.tokens import TokenCounter

EMBEDDED_AT_ONCE = 64


def evaluate(
    collection: Collection,
    embedder_name: str,
    cache: Path,
    advanced: Callable[[int], object],
    *,
    endpoint: Endpoint | None = None,
) -> dict[Mode, Measures]:
    """Index a collection in memory and measure every way of searching it.

    Args:
        collection: documents, queries, judgements.
        embedder_name: as `available_embedder` gives it.
        cache: where models are kept.
        advanced: called with a number of documents each time so many are indexed.
        endpoint: the one whose embedder that is, if it is one's.

    Returns:
        The measures of each mode that the embedder allows.
    """
    embedder = load_embedder(embedder_name, cache, endpoint)
    counter = token_counter(embedder_name, cache, endpoint)
    texts = [(name, clean(text)) for name, text in collection.documents.items()]
    engine = memory_engine()
    with Session(engine) as session:
        names = _index(session, texts, counter, embedder, advanced)
        queries = list(collection.queries)
        vectors = (
            None if embedder is None else embedder.embed([collection.queries[query] for query in queries])
        )
        index = load_index(session, embedder_name)
        results = {}
        for mode in [Mode.KEYWORD] if vectors is None else list(Mode):
            rankings = {}
            for at, query in enumerate(queries):
                vector = None if vectors is None else vectors[at]
                ranked = rank(session, collection.queries[query], vector, index, mode=mode)
                # A document is found where its best passage is.
                rankings[query] = list(dict.fromkeys(names[chunk_id] for chunk_id, _ in ranked))
            results[mode] = measure_ranking(rankings, collection)
    engine.dispose()
    return results


def memory_engine() -> Engine:
    """A database in memory with all tables, set up as `Alchemy` sets up one in a file."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"))
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        fulltext.create_index(connection)
    return engine


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
        fulltext.add(session.connection(), [(int(chunk["id"]), str(chunk["content"])) for chunk in chunks])
        if embedder is not None:
            vectors = embedder.embed([str(chunk["content"]) for chunk in chunks])
            rows = zip(chunks, vectors.astype("<f4", copy=False), strict=True)
            values = [
                {"chunk_id": chunk["id"], "embedder": embedder.name, "data": vector.tobytes()}
                for chunk, vector in rows
            ]
            session.execute(insert(Vector), values)
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
    return {"id": number, "uri": name, "uri_digest": digest, "generation": 1, "serving_id": number}


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
            }
