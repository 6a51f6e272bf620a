"""Keyword search with SQLite's FTS5: what is indexed of a text, and what is asked for a query."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, text

STOP_WORDS = frozenset(
    """
    a about after all also am an and any are as at be because been before being between both but by can
    could did do does doing done during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just may me might more most must my no nor not of off on
    once only or other our ours out over own same shall she should so some such than that the their
    theirs them then there these they this those through to too under until up upon very was we were
    what when where whether which while who whom whose why will with would you your yours
    """.split()
)
"""Words that ask without saying about what: dropped from queries, never from the index."""

# Scripts that are written without spaces: CJK ideographs with their extensions, kana, and Hangul, whose
# particles stick to the word before them.
_CJK = (
    "\u3005\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    "\U00020000-\U0003134f"
)
_CJK_RUN = re.compile(f"[{_CJK}]+")
_WORD = re.compile(f"[{_CJK}]+|[^\\W_{_CJK}]+")

CREATE = "CREATE VIRTUAL TABLE IF NOT EXISTS chunk_keywords USING fts5(content, tokenize='porter unicode61')"


def create_index(connection: Connection) -> None:
    """Make the keyword index; does nothing when it is there."""
    connection.execute(text(CREATE))


def indexed_text(content: str) -> str:
    """The text as FTS5 gets it: runs of Chinese, Japanese, Korean as overlapping pairs, the rest as it is."""
    return _CJK_RUN.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", content)


def match_expression(query: str) -> str | None:
    """An FTS5 expression that finds passages with any word of the query, or None where it has no words.

    Every word is quoted: nothing that a person types is read as an operator.
    """
    words = [word.lower() for word in _WORD.findall(query)]
    telling = [word for word in words if word not in STOP_WORDS] or words
    terms: list[str] = []
    for word in telling:
        terms.extend(_pairs(word) if _CJK_RUN.match(word) else [word])
    return " OR ".join(f'"{term}"' for term in dict.fromkeys(terms)) or None


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(len(run) - 1)] or [run]


def add(connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
    """Index chunks, given as (id, content), in the caller's transaction."""
    rows = [{"id": chunk_id, "content": indexed_text(content)} for chunk_id, content in chunks]
    if rows:
        connection.execute(text("INSERT INTO chunk_keywords (rowid, content) VALUES (:id, :content)"), rows)


def remove(connection: Connection, document_ids: Sequence[int]) -> None:
    """Forget the chunks of documents, in the caller's transaction, before the chunks are deleted."""
    connection.execute(
        text("DELETE FROM chunk_keywords WHERE rowid IN (SELECT id FROM chunk WHERE document_id = :id)"),
        [{"id": document_id} for document_id in document_ids],
    )


def best(connection: Connection, query: str, *, limit: int) -> list[tuple[int, float]]:
    """The chunks that searches may see and that match the query best, as (id, score), best first.

    Ties are in the order of the ids, so that the same query gives the same list.
    """
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
