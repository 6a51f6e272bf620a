"""SQLite: keywords in FTS5. Vectors are searched in memory: sqlite-vec cannot be loaded in many Pythons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, Insert, create_engine, event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import StaticPool

from ragline.question import Question
from ragline.ranking import deciding_words
from ragline.words import paired, phrase_words, telling_words

if TYPE_CHECKING:  # imported late: commands that need no vectors start without them
    import numpy as np
    import numpy.typing as npt

ENGINE_OPTIONS: dict[str, Any] = {}


@contextmanager
def creation_lock(_: Connection) -> Iterator[None]:
    """Nothing to do: each transaction begins with BEGIN IMMEDIATE, which is such a lock."""
    yield


def create(connection: Connection) -> None:
    """Make the keyword index."""
    connection.execute(
        text(
            "CREATE VIRTUAL TABLE IF NOT EXISTS chunk_keywords"
            " USING fts5(content, tokenize='porter unicode61')"
        )
    )


def insert_missing(table: type[DeclarativeBase]) -> Insert:
    """ON CONFLICT DO NOTHING."""
    return sqlite.insert(table).on_conflict_do_nothing()


def add(connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
    """Index the words of chunks."""
    rows = [{"id": chunk_id, "content": paired(content)} for chunk_id, content in chunks]
    if rows:
        connection.execute(text("INSERT INTO chunk_keywords (rowid, content) VALUES (:id, :content)"), rows)


def count(connection: Connection, document_id: int, *, sign: int) -> tuple[int, int]:
    """Only the chunks: FTS5 counts words by itself."""
    of_document = text("SELECT count(*) FROM chunk WHERE document_id = :document_id")
    return connection.scalar(of_document, {"document_id": document_id}) or 0, 0


def wrong_counts(_: Connection) -> list[tuple[str, int, int]]:
    """None: FTS5 counts by itself."""
    return []


def add_vectors(_: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    """Nothing to do: the table `embedding` has them."""


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Forget the chunks of documents; a virtual table has no foreign keys."""
    connection.execute(
        text("DELETE FROM chunk_keywords WHERE rowid IN (SELECT id FROM chunk WHERE document_id = :id)"),
        [{"id": document_id} for document_id in document_ids],
    )


def best(connection: Connection, question: Question, *, limit: int) -> list[tuple[int, float]]:
    """Ranked by FTS5's BM25, which takes a microsecond and a half for each chunk that it scores."""
    chunks_with = {word: _chunks_with(connection, word) for word in telling_words(question.text)}
    rare, common = deciding_words(chunks_with)
    finding, ranking = _any_of(rare), _any_of(common)
    if question.phrases:
        finding, ranking = " AND ".join(map(_next_to_each_other, question.phrases)), _any_of(rare + common)
    if not finding:
        return []
    but = f" NOT ({' OR '.join(map(_next_to_each_other, question.excluded))})" if question.excluded else ""
    if not ranking:
        return _scored(connection, f"({finding}){but}" if but else finding, limit)
    # Between them these find each chunk with a finding word once, and every word of the query counts.
    found = [
        *_scored(connection, f"({finding}) AND ({ranking}){but}", limit),
        *_scored(connection, f"({finding}) NOT ({ranking}){but}", limit),
    ]
    return sorted(found, key=lambda entry: (-entry[1], entry[0]))[:limit]


def having(connection: Connection, phrase: str) -> list[int]:
    """By a phrase of FTS5."""
    found = text("SELECT rowid FROM chunk_keywords WHERE chunk_keywords MATCH :phrase")
    return list(connection.scalars(found, {"phrase": _next_to_each_other(phrase)}))


def _next_to_each_other(phrase: str) -> str:
    """An FTS5 expression."""
    return f'"{" ".join(phrase_words(phrase))}"'


def _chunks_with(connection: Connection, word: str) -> int:
    counted = text("SELECT count(*) FROM chunk_keywords WHERE chunk_keywords MATCH :word")
    return connection.scalar(counted, {"word": _any_of([word])}) or 0


def _scored(connection: Connection, expression: str, limit: int) -> list[tuple[int, float]]:
    # `rank` is bm25(), which is the more negative the better (Source: FTS5 documentation, 5.1.1).
    found = connection.execute(
        text(
            "SELECT rowid, -rank FROM chunk_keywords WHERE chunk_keywords MATCH :expression"
            " ORDER BY rank, rowid LIMIT :limit"
        ),
        {"expression": expression, "limit": limit},
    )
    return [(chunk_id, score) for chunk_id, score in found]


def _any_of(words: Iterable[str]) -> str:
    """An FTS5 expression: each word is quoted, so that nothing a person types is read as an operator."""
    return " OR ".join(f'"{word}"' for word in words)


def has_vectors(_: Connection) -> bool:
    """SQLite searches no vectors."""
    return False


def nearest(
    connection: Connection,
    embedder: str,
    vector: npt.NDArray[np.float32],
    question: Question,
    *,
    limit: int,
) -> list[tuple[int, float]]:
    """Never called: `has_vectors` is False."""
    raise NotImplementedError


def reading_engine(engine: Engine) -> Engine:
    """Another engine, whose transactions begin deferred: they wait for no writer, and cannot write."""
    if engine.url.database in (None, "", ":memory:"):
        return engine
    reader = create_engine(engine.url)
    event.listen(reader, "connect", _set_up_reading)
    event.listen(reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return reader


@contextmanager
def scratch(_: URL) -> Iterator[Engine]:
    """A database in memory, set up as `Alchemy` sets up one in a file."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    yield engine
    engine.dispose()


def _set_up_reading(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would begin no transaction before a SELECT
    connection.execute("PRAGMA query_only = ON")


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would not begin a transaction before a SAVEPOINT
    connection.execute("PRAGMA foreign_keys = ON")
