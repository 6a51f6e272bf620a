"""SQLite: keywords in FTS5. Vectors are searched in memory: sqlite-vec cannot be loaded in many Pythons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import URL, Connection, Engine, Insert, create_engine, event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import StaticPool

from ragline.words import paired, telling_words

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


def match_expression(query: str) -> str | None:
    """An FTS5 expression that finds passages with any telling word of a query, or None for one without words.

    Every word is quoted: nothing that a person types is read as an operator.
    """
    return " OR ".join(f'"{word}"' for word in telling_words(query)) or None


def insert_missing(table: type[DeclarativeBase]) -> Insert:
    """ON CONFLICT DO NOTHING."""
    return sqlite.insert(table).on_conflict_do_nothing()


def add(connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
    """Index the words of chunks."""
    rows = [{"id": chunk_id, "content": paired(content)} for chunk_id, content in chunks]
    if rows:
        connection.execute(text("INSERT INTO chunk_keywords (rowid, content) VALUES (:id, :content)"), rows)


def add_vectors(_: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    """Nothing to do: the table `embedding` has them."""


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Forget the chunks of documents; a virtual table has no foreign keys."""
    connection.execute(
        text("DELETE FROM chunk_keywords WHERE rowid IN (SELECT id FROM chunk WHERE document_id = :id)"),
        [{"id": document_id} for document_id in document_ids],
    )


def best(connection: Connection, query: str, *, limit: int) -> list[tuple[int, float]]:
    """Ranked by BM25."""
    expression = match_expression(query)
    if expression is None:
        return []
    found = connection.execute(
        text(
            "SELECT k.rowid, bm25(chunk_keywords) AS score"
            " FROM chunk_keywords AS k JOIN chunk AS c ON c.id = k.rowid"
            " WHERE chunk_keywords MATCH :expression"
            " AND c.document_id IN (SELECT serving_id FROM source)"
            " ORDER BY score, k.rowid LIMIT :limit"
        ),
        {"expression": expression, "limit": limit},
    )
    # bm25() is the more negative the better (Source: FTS5 documentation, 5.1.1).
    return [(chunk_id, -score) for chunk_id, score in found]


def has_vectors(_: Connection) -> bool:
    """SQLite searches no vectors."""
    return False


def nearest(
    connection: Connection, embedder: str, vector: npt.NDArray[np.float32], *, limit: int
) -> list[tuple[int, float]]:
    """Never called: `has_vectors` is False."""
    raise NotImplementedError


@contextmanager
def scratch(_: URL) -> Iterator[Engine]:
    """A database in memory, set up as `Alchemy` sets up one in a file."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    event.listen(engine, "connect", _set_up)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    yield engine
    engine.dispose()


def _set_up(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver would not begin a transaction before a SAVEPOINT
    connection.execute("PRAGMA foreign_keys = ON")
