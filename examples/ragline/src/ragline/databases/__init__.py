"""All that differs between the databases: how each searches, and how several processes make tables at once.

One module for each behind one protocol; the rest of ragline does not know which it works with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import URL, Connection, Engine, Insert
from sqlalchemy.orm import DeclarativeBase

from ragline.databases import mysql, postgresql, sqlite
from ragline.errors import ConfigurationError
from ragline.question import Question

if TYPE_CHECKING:  # imported late: commands that need no vectors start without them
    import numpy as np
    import numpy.typing as npt


class SearchIndex(Protocol):
    """What a database searches with. Every write is part of the caller's transaction."""

    @property
    def ENGINE_OPTIONS(self) -> dict[str, Any]:  # noqa: N802 - a constant of the module that implements it
        """What `create_engine` is to be told."""
        ...

    def creation_lock(self, connection: Connection) -> AbstractContextManager[None]:
        """Hold off other processes that make tables."""
        ...

    def create(self, connection: Connection) -> None:
        """Make what is missing of the index, below a `creation_lock`, after the tables."""
        ...

    def insert_missing(self, table: type[DeclarativeBase]) -> Insert:
        """An INSERT that does nothing where a row with that key is, or is being inserted."""
        ...

    def add(self, connection: Connection, chunks: Iterable[tuple[int, str]]) -> None:
        """Index the words of chunks, given as (id, content)."""
        ...

    def count(self, connection: Connection, document_id: int, *, sign: int) -> tuple[int, int]:
        """Count a document into the statistics that ranking goes by, with -1 out of them.

        The caller holds the row of `IndexState`: one does so at a time.

        Returns:
            How many chunks the document has, and how many words these have where ranking asks for that.
        """
        ...

    def wrong_counts(self, connection: Connection) -> list[tuple[str, int, int]]:
        """Words whose statistics are not what the index says: word, chunks that have it, chunks counted."""
        ...

    def add_vectors(
        self, connection: Connection, vectors: Sequence[tuple[int, npt.NDArray[np.float32]]]
    ) -> None:
        """Index vectors, given as (chunk id, vector), after they were stored in the table `embedding`."""
        ...

    def remove(self, connection: Connection, document_ids: Sequence[int]) -> None:
        """Forget the chunks of documents, before these are deleted."""
        ...

    def best(self, connection: Connection, question: Question, *, limit: int) -> list[tuple[int, float]]:
        """The chunks that match the question best, as (id, score), best first.

        All have its phrases, and none has what it excludes. Ties are in the order of the ids, so that the
        same query gives the same list. Chunks that searches may not see, of documents that are not ready or
        are replaced, are among them.
        """
        ...

    def having(self, connection: Connection, phrase: str) -> list[int]:
        """The ids of all chunks that have the words of a phrase in this order next to each other."""
        ...

    def has_vectors(self, connection: Connection) -> bool:
        """Whether the database itself can search vectors."""
        ...

    def nearest(
        self,
        connection: Connection,
        embedder: str,
        vector: npt.NDArray[np.float32],
        question: Question,
        *,
        limit: int,
    ) -> list[tuple[int, float]]:
        """The chunks that searches may see and whose vectors are nearest, as (id, similarity), nearest first.

        All have the phrases of the question, and none has what it excludes. Exact, ties in the
        order of the ids; only where the database `has_vectors`.
        """
        ...

    def reading_engine(self, engine: Engine) -> Engine:
        """An engine for transactions that only read: each sees one state, and waits for no writer."""
        ...

    def scratch(self, url: URL) -> AbstractContextManager[Engine]:
        """An engine on a place of its own, beside the real tables, that is gone after the block."""
        ...


_INDEXES: dict[str, SearchIndex] = {
    "sqlite": sqlite,
    "postgresql": postgresql,
    "mysql": mysql,
    "mariadb": mysql,
}

NAMES = tuple(_INDEXES)
"""The dialects of SQLAlchemy that ragline runs on."""


def search_index(dialect: str) -> SearchIndex:
    """The search index of a database.

    Args:
        dialect: the name of its dialect, such as `connection.dialect.name`.

    Raises:
        ConfigurationError: ragline does not run on it.
    """
    if dialect not in _INDEXES:
        raise ConfigurationError(f"ragline does not run on {dialect}: use one of {', '.join(NAMES)}.")
    return _INDEXES[dialect]


def index_of(connection: Connection) -> SearchIndex:
    """The search index of the database of a connection."""
    return search_index(connection.dialect.name)
