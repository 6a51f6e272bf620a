"""A question answered with passages: the query's vector, the index in memory, one short transaction.

What the command line, the web page and `ask` call; above the wiring, below all that people see.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import cache

from sqlalchemy.orm import Session

from ragline.app import alchemy, settings
from ragline.embedders import NO_EMBEDDER, Embedder, available_embedder, load_embedder
from ragline.errors import EndpointError, ModelUnavailableError
from ragline.minilm.embedder import MiniLM
from ragline.minilm.files import is_fetched
from ragline.ranking import VectorIndex
from ragline.searching import DatabaseIndex, Mode, Passage, index_version, load_index, passages, rank
from ragline.words import STOP_WORDS, paired


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gives.

    Attributes:
        passages: best first.
        note: for the person, when search went by keywords alone though more was asked for; else None.
    """

    passages: list[Passage]
    note: str | None


def find(query: str, *, limit: int, mode: Mode = Mode.HYBRID) -> Found:
    """Answer a query from the index.

    Guarantees:
        No transaction is open while the query is embedded. A model that cannot be had makes it a search by
        keywords with a note, never an error.
    """
    if not query.strip():
        return Found([], "Nothing was asked.")
    embedder, note = None, None
    if mode is not Mode.KEYWORD:
        embedder, note = search_embedder()
    vector = None
    if embedder is not None:
        try:
            vector = embedder.embed([query])[0]
        except EndpointError as error:
            embedder, note = None, f"Keywords only: {error}"
    with alchemy.session() as session:
        index = None if embedder is None else _indexes.current(session, embedder.name)
        ranked = rank(session, query, vector, index, mode=mode if embedder is not None else Mode.KEYWORD)
        return Found(passages(session, ranked[:limit]), note)


def telling_words(query: str) -> list[str]:
    """The words of a query that tell what it is about: those to mark in quotes.

    Pairs of characters where there are no spaces, as in the index; all others as they were typed.
    """
    return [word for word in re.findall(r"\w+", paired(query).lower()) if word not in STOP_WORDS]


def search_embedder() -> tuple[Embedder | None, str | None]:
    """The embedder for queries, without fetching a model; without one, why there is none."""
    if settings.embedder == NO_EMBEDDER:
        return None, None
    try:
        if settings.embeddings is not None and settings.embedder != "minilm":
            name = _endpoint_name()
        elif is_fetched(settings.cache):
            name = MiniLM.name
        else:
            return (
                None,
                "Keywords only: the embedding model is not here (`ragline model fetch` gets it).",
            )
        return load_embedder(name, settings.cache, settings.embeddings), None
    except ModelUnavailableError as error:
        return None, f"Keywords only: {error}"


@cache
def _endpoint_name() -> str:
    # An exception is not kept: an endpoint that was away is asked again.
    return available_embedder(settings.embedder, settings.cache, settings.embeddings)[0]


class _Indexes:
    """The vectors of the version of the index that was searched last: a process reads them once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: tuple[object, VectorIndex | DatabaseIndex] | None = None

    def current(self, session: Session, embedder: str) -> VectorIndex | DatabaseIndex:
        """The vectors as they are in the session's transaction."""
        version = (embedder, index_version(session))
        with self._lock:  # several searches at once would each read them all
            if self._held is None or self._held[0] != version:
                self._held = (version, load_index(session, embedder))
            return self._held[1]


_indexes = _Indexes()
