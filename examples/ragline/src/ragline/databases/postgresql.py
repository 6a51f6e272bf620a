"""PostgreSQL: keywords as tsvector behind a GIN index, vectors in pgvector where the server has it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import URL, Connection, Engine, Insert, create_engine, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase

from ragline.words import telling_words, words

ENGINE_OPTIONS: dict[str, Any] = {}
_CREATION_LOCK = 0x7261676C  # any number that nobody else takes for something else: "ragl"

# PostgreSQL's own configuration for English drops stop words: a query of nothing else would find nothing.
_CONFIGURATION = (
    "CREATE TEXT SEARCH DICTIONARY ragline_stem (TEMPLATE = snowball, LANGUAGE = english)",
    "CREATE TEXT SEARCH CONFIGURATION ragline (COPY = simple)",
    "ALTER TEXT SEARCH CONFIGURATION ragline ALTER MAPPING FOR asciiword, word, numword WITH ragline_stem",
)
_TABLES = (
    "CREATE TABLE IF NOT EXISTS chunk_keywords"
    " (chunk_id integer PRIMARY KEY REFERENCES chunk ON DELETE CASCADE, content tsvector NOT NULL)",
    "CREATE INDEX IF NOT EXISTS chunk_keywords_content ON chunk_keywords USING gin (content)",
)
BACKFILLED_AT_ONCE = 1000


@contextmanager
def creation_lock(connection: Connection) -> Iterator[None]:
    """An advisory lock until the end of the transaction."""
    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CREATION_LOCK})
    yield


def create(connection: Connection) -> None:
    """Make the keyword index, and the vector index where the server has pgvector."""
    known = "SELECT 1 FROM pg_ts_config WHERE cfgname = 'ragline' AND pg_ts_config_is_visible(oid)"
    if connection.scalar(text(known)) is None:
        for statement in _CONFIGURATION:
            connection.execute(text(statement))
    for statement in _TABLES:
        connection.execute(text(statement))
    if not has_vectors(connection) and _has_pgvector(connection):
        _create_vectors(connection)


def insert_missing(table: type[DeclarativeBase]) -> Insert:
    """ON CONFLICT DO NOTHING."""
    return postgresql.insert(table).on_conflict_do_nothing()


def add(connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
    """Index the words of chunks."""
    # Words and not the text: PostgreSQL's parser would take `session.commit` for a host and `a/b` for a file.
    rows = [{"id": chunk_id, "content": " ".join(words(content))} for chunk_id, content in chunks]
    if rows:
        insert = (
            "INSERT INTO chunk_keywords (chunk_id, content) VALUES (:id, to_tsvector('ragline', :content))"
        )
        connection.execute(text(insert), rows)


def add_vectors(connection: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    """Copy vectors to pgvector."""
    # Asked after they were stored: the table is made while nobody else can store any.
    if vectors and has_vectors(connection):
        _insert_vectors(connection, vectors)


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Nothing to do: the foreign keys cascade."""


def best(connection: Connection, query: str, *, limit: int) -> list[tuple[int, float]]:
    """Ranked by `ts_rank`, divided by the logarithm of the length; `ts_rank_cd` finds half as well."""
    terms = " | ".join(f"'{word}'" for word in telling_words(query))
    if not terms:
        return []
    found = connection.execute(
        text(
            "SELECT k.chunk_id, ts_rank(k.content, query, 1) AS score"
            " FROM to_tsquery('ragline', :terms) AS query,"
            " chunk_keywords AS k JOIN chunk AS c ON c.id = k.chunk_id"
            " WHERE k.content @@ query AND c.document_id IN (SELECT serving_id FROM source)"
            " ORDER BY score DESC, k.chunk_id LIMIT :limit"
        ),
        {"terms": terms, "limit": limit},
    )
    return [(chunk_id, score) for chunk_id, score in found]


def has_vectors(connection: Connection) -> bool:
    """Whether pgvector's table is there."""
    return connection.scalar(text("SELECT to_regclass('embedding_index')")) is not None


def nearest(
    connection: Connection, embedder: str, vector: npt.NDArray[np.float32], *, limit: int
) -> list[tuple[int, float]]:
    """All vectors compared: an approximate index would give other results after each re-indexing."""
    found = connection.execute(
        text(
            "SELECT n.chunk_id, -(n.vector <#> CAST(:vector AS vector)) AS similarity"
            " FROM embedding_index AS n"
            " JOIN embedding AS v ON v.chunk_id = n.chunk_id JOIN chunk AS c ON c.id = n.chunk_id"
            " WHERE v.embedder = :embedder AND c.document_id IN (SELECT serving_id FROM source)"
            " ORDER BY similarity DESC, n.chunk_id LIMIT :limit"
        ),
        {"vector": _literal(vector), "embedder": embedder, "limit": limit},
    )
    return [(chunk_id, similarity) for chunk_id, similarity in found]


@contextmanager
def scratch(url: URL) -> Iterator[Engine]:
    """A schema with a random name."""
    schema = f"ragline_scratch_{secrets.token_hex(6)}"
    with _administration(url) as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    # Nothing else on the path: the real tables would be taken for those that are to be made. Where pgvector
    # is installed elsewhere, vectors are searched in memory, with the same result.
    engine = create_engine(url, connect_args={"options": f"-c search_path={schema}"})
    try:
        yield engine
    finally:
        engine.dispose()
        with _administration(url) as connection:
            connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))


@contextmanager
def _administration(url: URL) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def _has_pgvector(connection: Connection) -> bool:
    """Whether the extension is installed in the database, or can be now."""
    if connection.scalar(text("SELECT to_regtype('vector')")) is not None:
        return True
    if connection.scalar(text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")) is None:
        return False
    try:
        with connection.begin_nested():
            connection.execute(text("CREATE EXTENSION vector"))
    except DBAPIError:
        return False  # this user may not; vectors are searched in memory then
    return True


def _create_vectors(connection: Connection) -> None:
    """Make the table for pgvector and fill it from `embedding`, which is locked until the commit."""
    connection.execute(text("LOCK TABLE embedding IN SHARE ROW EXCLUSIVE MODE"))
    connection.execute(
        text(
            "CREATE TABLE embedding_index"
            " (chunk_id integer PRIMARY KEY REFERENCES chunk ON DELETE CASCADE, vector vector NOT NULL)"
        )
    )
    last = 0
    while rows := connection.execute(
        text("SELECT chunk_id, data FROM embedding WHERE chunk_id > :last ORDER BY chunk_id LIMIT :limit"),
        {"last": last, "limit": BACKFILLED_AT_ONCE},
    ).all():
        _insert_vectors(connection, [(row.chunk_id, np.frombuffer(row.data, "<f4")) for row in rows])
        last = rows[-1].chunk_id


def _insert_vectors(connection: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    connection.execute(
        text("INSERT INTO embedding_index (chunk_id, vector) VALUES (:id, CAST(:vector AS vector))"),
        [{"id": chunk_id, "vector": _literal(vector)} for chunk_id, vector in vectors],
    )


def _literal(vector: npt.NDArray[np.float32]) -> str:
    # The shortest decimal of the float64 is read back as the same float32.
    return f"[{','.join(map(repr, vector.tolist()))}]"
