"""MariaDB and MySQL: an InnoDB FULLTEXT index finds, BM25 ranks. Vectors are searched in memory."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, Insert, bindparam, create_engine, insert, text
from sqlalchemy.orm import DeclarativeBase

from ragline.errors import DatabaseError
from ragline.question import Question
from ragline.ranking import bm25, deciding_words
from ragline.words import english_stem, phrase_words, telling_words, words

if TYPE_CHECKING:  # imported late: commands that need no vectors start without them
    import numpy as np
    import numpy.typing as npt

# As on the other databases: each statement sees what is committed, and locks only the rows that it finds.
ENGINE_OPTIONS: dict[str, Any] = {"isolation_level": "READ COMMITTED"}
LOCK_SECONDS = 60
CANDIDATES = 1000
"""How many of the best by InnoDB's rank are ranked by BM25."""
MAX_WORD_CHARACTERS = 80
"""InnoDB ignores words of more than 84 (Source: MariaDB documentation, `innodb_ft_max_token_size`)."""


@contextmanager
def creation_lock(connection: Connection) -> Iterator[None]:
    """A named lock: DDL commits here, so that no lock of a transaction would last."""
    # The name is the server's, not the database's.
    name = {"name": f"ragline:{connection.engine.url.database}"[:64], "seconds": LOCK_SECONDS}
    if connection.scalar(text("SELECT GET_LOCK(:name, :seconds)"), name) != 1:
        raise DatabaseError(f"Another process makes tables since {LOCK_SECONDS} seconds.")
    try:
        yield
    finally:
        connection.execute(text("SELECT RELEASE_LOCK(:name)"), name)


def create(connection: Connection) -> None:
    """Make the keyword index."""
    # Compared byte by byte: case and accents are gone from the words before they come here.
    connection.execute(
        text(
            "CREATE TABLE IF NOT EXISTS chunk_keywords"
            " (chunk_id integer PRIMARY KEY, content text NOT NULL, words integer NOT NULL,"
            " FULLTEXT INDEX chunk_keywords_content (content),"
            " FOREIGN KEY (chunk_id) REFERENCES chunk (id) ON DELETE CASCADE"
            ") ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
    )
    # Counted when documents are shown: counting at each search would read every chunk with a word.
    connection.execute(
        text(
            "CREATE TABLE IF NOT EXISTS keyword_count"
            " (word varchar(100) PRIMARY KEY, chunks integer NOT NULL)"
            " ENGINE = InnoDB CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
        )
    )


def insert_missing(table: type[DeclarativeBase]) -> Insert:
    """INSERT IGNORE: ON DUPLICATE KEY UPDATE would count the row that was there as inserted."""
    return insert(table).prefix_with("IGNORE")


def add(connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
    """Index the words of chunks; searches see them after the commit."""
    rows = []
    for chunk_id, content in chunks:
        terms = [_indexed(word) for word in words(content)]
        rows.append({"id": chunk_id, "content": " ".join(terms), "words": len(set(terms))})
    if rows:
        insert_all = "INSERT INTO chunk_keywords (chunk_id, content, words) VALUES (:id, :content, :words)"
        connection.execute(text(insert_all), rows)


def count(connection: Connection, document_id: int, *, sign: int) -> tuple[int, int]:
    """Count the document's words in, or out."""
    rows = connection.execute(
        text(
            "SELECT k.content, k.words FROM chunk_keywords AS k JOIN chunk AS c ON c.id = k.chunk_id"
            " WHERE c.document_id = :document_id"
        ),
        {"document_id": document_id},
    ).all()
    counts: Counter[str] = Counter()
    for content, _ in rows:
        counts.update(set(content.split()))
    if counts:
        connection.execute(
            text(
                "INSERT INTO keyword_count (word, chunks) VALUES (:word, :chunks)"
                " ON DUPLICATE KEY UPDATE chunks = chunks + VALUES(chunks)"
            ),
            [{"word": word, "chunks": sign * n} for word, n in sorted(counts.items())],
        )
    return len(rows), sum(number for _, number in rows)


def wrong_counts(connection: Connection) -> list[tuple[str, int, int]]:
    """Count all again."""
    shown = connection.scalars(
        text(
            "SELECT k.content FROM chunk_keywords AS k JOIN chunk AS c ON c.id = k.chunk_id"
            " WHERE c.document_id IN (SELECT serving_id FROM source)"
        )
    )
    has = Counter(word for content in shown for word in set(content.split()))
    rows = connection.execute(text("SELECT word, chunks FROM keyword_count WHERE chunks <> 0"))
    said = {word: int(chunks) for word, chunks in rows}
    wrong = sorted(word for word in has.keys() | said.keys() if has[word] != said.get(word, 0))
    return [(word, has[word], said.get(word, 0)) for word in wrong[:10]]


def add_vectors(_: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    """Nothing to do: the table `embedding` has them."""


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Nothing to do: the foreign key cascades."""


def best(connection: Connection, question: Question, *, limit: int) -> list[tuple[int, float]]:
    """Found by the FULLTEXT index and ranked by BM25.

    InnoDB's own rank goes by an estimate of how many rows there are, which is another one later.
    """
    terms = list(dict.fromkeys(map(_indexed, telling_words(question.text))))
    if not terms:
        return []
    known = text("SELECT word, chunks FROM keyword_count WHERE word IN :terms")
    chunks_with = {
        word: int(chunks)
        for word, chunks in connection.execute(
            known.bindparams(bindparam("terms", expanding=True)), {"terms": terms}
        )
    }
    finding, _ = deciding_words(chunks_with)
    if not finding and not question.phrases:
        return []
    conditions, parameters = _conditions(question)
    if not question.phrases:
        conditions.append("MATCH (content) AGAINST (:finding)")
    # Ids first: with the contents in it the server would sort these too, hundreds of megabytes of them.
    ids = connection.scalars(
        text(
            f"SELECT chunk_id FROM chunk_keywords WHERE {' AND '.join(conditions)}"
            " ORDER BY MATCH (content) AGAINST (:finding) DESC, chunk_id LIMIT :candidates"
        ),
        {"finding": " ".join(finding), "candidates": max(limit, CANDIDATES), **parameters},
    ).all()
    if not ids:
        return []
    contents = text("SELECT chunk_id, content FROM chunk_keywords WHERE chunk_id IN :ids")
    found = connection.execute(
        contents.bindparams(bindparam("ids", expanding=True)), {"ids": list(ids)}
    ).all()
    chunks, all_words = connection.execute(text("SELECT chunks, words FROM index_state")).one()
    texts = [(chunk_id, content.split()) for chunk_id, content in found]
    mean_words = max(float(all_words), 1.0) / max(int(chunks), 1)
    return bm25(texts, chunks_with, rows=int(chunks), mean_words=mean_words)[:limit]


def having(connection: Connection, phrase: str) -> list[int]:
    """By the FULLTEXT index and, of several words, by the texts that it finds."""
    (has,), parameters = _conditions(Question("", phrases=(phrase,)))
    return list(connection.scalars(text(f"SELECT chunk_id FROM chunk_keywords WHERE {has}"), parameters))


def _conditions(question: Question) -> tuple[list[str], dict[str, str]]:
    """What a question demands and excludes, a condition each, and their parameters."""
    conditions, parameters = [], {}
    demanded = [("", phrase) for phrase in question.phrases]
    for at, (sign, phrase) in enumerate(demanded + [("NOT ", phrase) for phrase in question.excluded]):
        terms = list(map(_indexed, phrase_words(phrase)))
        has = f"MATCH (content) AGAINST (:all{at} IN BOOLEAN MODE)"
        parameters[f"all{at}"] = " ".join(f"+{term}" for term in dict.fromkeys(terms))
        if len(terms) > 1:
            # The content is these terms and the spaces between them. Bytes are found in a fifth of the time
            # that characters take.
            has = f"({has} AND LOCATE(CAST(:next{at} AS BINARY), CONCAT(' ', content, ' ')) > 0)"
            parameters[f"next{at}"] = f" {' '.join(terms)} "
        conditions.append(f"{sign}{has}")
    return conditions, parameters


def has_vectors(_: Connection) -> bool:
    """Neither searches vectors in the versions that ragline supports."""
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
    """The same engine: every statement of a transaction sees what was committed when it began."""
    return engine.execution_options(isolation_level="REPEATABLE READ")


@contextmanager
def scratch(url: URL) -> Iterator[Engine]:
    """A database with a random name, for which the user must be allowed to make databases."""
    name = f"ragline_scratch_{secrets.token_hex(6)}"
    with _administration(url) as connection:
        connection.execute(text(f"CREATE DATABASE {name} CHARACTER SET utf8mb4"))
    engine = create_engine(url.set(database=name), **ENGINE_OPTIONS)
    try:
        yield engine
    finally:
        engine.dispose()
        with _administration(url) as connection:
            connection.execute(text(f"DROP DATABASE {name}"))


@contextmanager
def _administration(url: URL) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


@lru_cache(maxsize=50_000)
def _indexed(word: str) -> str:
    """The stem of a word, with underscores so that InnoDB takes it: no stop word, not too short."""
    return f"{english_stem(word[:MAX_WORD_CHARACTERS])}_".ljust(3, "_")
