"""PostgreSQL: a GIN index over tsvectors finds, BM25 in SQL ranks; vectors in pgvector where it is."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, Insert, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase

from ragline.question import Question
from ragline.ranking import K1, B, deciding_words, word_weight
from ragline.words import phrase_words, telling_words, words

if TYPE_CHECKING:  # imported late: commands that need no vectors start without them
    import numpy as np
    import numpy.typing as npt

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
    # Counted when documents are shown: counting at each search would read every chunk with a word.
    "CREATE TABLE IF NOT EXISTS keyword_count"
    ' (word text COLLATE "C" PRIMARY KEY, chunks integer NOT NULL) WITH (fillfactor = 70)',
)
BACKFILLED_AT_ONCE = 1000

# `ts_rank` of one word that occurs n times is 0.1 * (1 + 1/4 + 1/9 + ... + 1/n^2) / 1.64493406685, so it
# tells n, in a twentieth of the time that `unnest` of the whole tsvector takes (Source: PostgreSQL,
# src/backend/utils/adt/tsrank.c, calc_rank_or; the tests compare it with what `unnest` tells).
# These are the values halfway between n - 1 and n; beyond 64, once more makes no difference to BM25.
MAX_COUNT = 64
_HALFWAY = [
    0.1 / 1.64493406685 * (sum(1 / k**2 for k in range(1, n)) + 0.5 / n**2) for n in range(1, MAX_COUNT + 1)
]


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
    from sqlalchemy.dialects import postgresql

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


def count(connection: Connection, document_id: int, *, sign: int) -> tuple[int, int]:
    """Count the document's words in, or out."""
    # By the ids and not joined: of a table that grows fast the planner knows nothing yet, and would
    # read all of it.
    of_document = (
        " FROM chunk_keywords AS k"
        " WHERE k.chunk_id = ANY (ARRAY(SELECT id FROM chunk WHERE document_id = :document_id))"
    )
    connection.execute(
        text(
            "INSERT INTO keyword_count AS n (word, chunks)"
            " SELECT word, :sign * count(*) FROM"
            f" (SELECT unnest(tsvector_to_array(k.content)) AS word{of_document}) AS w"
            " GROUP BY word ORDER BY word"
            " ON CONFLICT (word) DO UPDATE SET chunks = n.chunks + excluded.chunks"
        ),
        {"document_id": document_id, "sign": sign},
    )
    counted = connection.execute(
        text(f"SELECT count(*), coalesce(sum(length(k.content)), 0){of_document}"),
        {"document_id": document_id},
    ).one()
    return int(counted[0]), int(counted[1])


def wrong_counts(connection: Connection) -> list[tuple[str, int, int]]:
    """Count all again."""
    found = connection.execute(
        text(
            "SELECT coalesce(w.word, n.word), coalesce(w.chunks, 0), coalesce(n.chunks, 0) FROM"
            " (SELECT word, count(*) AS chunks FROM"
            " (SELECT unnest(tsvector_to_array(k.content)) AS word"
            " FROM chunk_keywords AS k JOIN chunk AS c ON c.id = k.chunk_id"
            " WHERE c.document_id IN (SELECT serving_id FROM source)) AS u GROUP BY word) AS w"
            " FULL JOIN keyword_count AS n ON n.word = w.word"
            " WHERE coalesce(w.chunks, 0) <> coalesce(n.chunks, 0) ORDER BY 1 LIMIT 10"
        )
    )
    return [(word, int(has), int(said)) for word, has, said in found]


def add_vectors(connection: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]) -> None:
    """Copy vectors to pgvector."""
    # Asked after they were stored: the table is made while nobody else can store any.
    if vectors and has_vectors(connection):
        _insert_vectors(connection, vectors)


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Nothing to do: the foreign keys cascade."""


def best(connection: Connection, question: Question, *, limit: int) -> list[tuple[int, float]]:
    """Found by the GIN index, ranked by BM25 in SQL."""
    chunks_with = _chunks_with(connection, telling_words(question.text))
    finding, ranking = deciding_words(chunks_with)
    if not finding and not question.phrases:
        return []
    chunks, all_words = connection.execute(text("SELECT chunks, words FROM index_state")).one()
    parameters: dict[str, object] = {
        "found": " | ".join(map(_quoted, finding)),
        "halfway": _HALFWAY,
        # k1 * (1 - b + b * words / mean), as a constant and a factor of the words
        "shortest": K1 * (1 - B),
        "longer": K1 * B * chunks / max(all_words, 1),
        "limit": limit,
        **_parameters(question),
    }
    conditions = _conditions(question)
    if not question.phrases:
        conditions.append("k.content @@ CAST(:found AS tsquery)")
    scores = ["0"] if question.phrases else []
    for at, word in enumerate(finding + ranking):
        parameters[f"word{at}"] = _quoted(word)
        parameters[f"weight{at}"] = word_weight(chunks_with[word], chunks) * (K1 + 1)
        counted = (
            f"width_bucket(ts_rank(k.content, CAST(:word{at} AS tsquery))::float8,"
            " CAST(:halfway AS float8[]))"
        )
        scores.append(f":weight{at} * (1 - l.length / (l.length + {counted}))")
    found = connection.execute(
        text(
            f"SELECT k.chunk_id, {' + '.join(scores)} AS score FROM chunk_keywords AS k,"
            " LATERAL (SELECT :shortest + :longer * length(k.content)) AS l (length)"
            f" WHERE {' AND '.join(conditions)}"
            " ORDER BY score DESC, k.chunk_id LIMIT :limit"
        ),
        parameters,
    )
    return [(chunk_id, float(score)) for chunk_id, score in found]


def _conditions(question: Question) -> list[str]:
    """What a question demands and excludes of the keywords `k`, a condition each."""
    has = "k.content @@ phraseto_tsquery('ragline', :{}{})"
    demanded = [has.format("phrase", at) for at in range(len(question.phrases))]
    return demanded + ["NOT " + has.format("excluded", at) for at in range(len(question.excluded))]


def _parameters(question: Question) -> dict[str, str]:
    """The parameters of these conditions."""
    # Words and not the text, as in the index.
    named = [(f"phrase{at}", phrase) for at, phrase in enumerate(question.phrases)]
    named += [(f"excluded{at}", phrase) for at, phrase in enumerate(question.excluded)]
    return {name: " ".join(phrase_words(phrase)) for name, phrase in named}


def having(connection: Connection, phrase: str) -> list[int]:
    """By the GIN index and the positions in the tsvectors that it finds."""
    question = Question("", phrases=(phrase,))
    (has,) = _conditions(question)
    found = text(f"SELECT k.chunk_id FROM chunk_keywords AS k WHERE {has}")
    return list(connection.scalars(found, _parameters(question)))


def _chunks_with(connection: Connection, words: Sequence[str]) -> dict[str, int]:
    """How many chunks have each lexeme of some words."""
    counted = connection.execute(
        text(
            "SELECT w.word, coalesce(n.chunks, 0)"
            " FROM unnest(tsvector_to_array(to_tsvector('ragline', :asked))) AS w (word)"
            " LEFT JOIN keyword_count AS n ON n.word = w.word"
        ),
        {"asked": " ".join(words)},
    )
    return {word: int(chunks) for word, chunks in counted}


def _quoted(word: str) -> str:
    """A lexeme as a query has it."""
    escaped = word.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def has_vectors(connection: Connection) -> bool:
    """Whether pgvector's table is there."""
    return connection.scalar(text("SELECT to_regclass('embedding_index')")) is not None


def nearest(
    connection: Connection,
    embedder: str,
    vector: npt.NDArray[np.float32],
    question: Question,
    *,
    limit: int,
) -> list[tuple[int, float]]:
    """All vectors compared: an approximate index would give other results after each re-indexing."""
    conditions = _conditions(question)
    keywords = " JOIN chunk_keywords AS k ON k.chunk_id = n.chunk_id" if conditions else ""
    found = connection.execute(
        text(
            "SELECT n.chunk_id, -(n.vector <#> CAST(:vector AS vector)) AS similarity"
            " FROM embedding_index AS n"
            " JOIN embedding AS v ON v.chunk_id = n.chunk_id JOIN chunk AS c ON c.id = n.chunk_id"
            f"{keywords}"
            " WHERE v.embedder = :embedder AND c.document_id IN (SELECT serving_id FROM source)"
            f"{''.join(f' AND {condition}' for condition in conditions)}"
            " ORDER BY similarity DESC, n.chunk_id LIMIT :limit"
        ),
        {"vector": _literal(vector), "embedder": embedder, "limit": limit, **_parameters(question)},
    )
    return [(chunk_id, similarity) for chunk_id, similarity in found]


def reading_engine(engine: Engine) -> Engine:
    """The same engine: every statement of a transaction sees what was committed when it began."""
    return engine.execution_options(isolation_level="REPEATABLE READ")


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
    import numpy as np

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
