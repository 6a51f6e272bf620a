"""A question answered with passages: the query's vector, the index in memory, one short transaction.

What the command line, the web page and `ask` call; above the wiring, below all that people see.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from ragline.app import reading_session, settings
from ragline.embedders import Embedder, available_embedder, load_embedder
from ragline.errors import EndpointError, ModelUnavailableError
from ragline.minilm.files import NAME as MINILM
from ragline.minilm.files import is_fetched
from ragline.question import Question, question_of
from ragline.searching import (
    DatabaseIndex,
    Mode,
    Passage,
    Ranking,
    bring_up_to_date,
    has_own_vectors,
    is_too_old,
    passages,
    rank,
)
from ragline.states import NO_EMBEDDER
from ragline.visibility import state
from ragline.words import marked_spans

if TYPE_CHECKING:  # imported late: searches by keywords need no vectors
    from ragline.vectors import GrowingIndex, VectorIndex

EMPTY = "The index is empty: no document is ready to be searched yet."
NOTHING = "Nothing found: no passage has a word of the query."
NOTHING_NEAR = "Nothing found: no passage has a word of the query, and none is near it in meaning."
NOTHING_EXACT = "Nothing found: no passage has the words in quotation marks next to each other in this order."
NOTHING_EXACT_NEAR = (
    "Nothing found: no passage that is near in meaning has the words in quotation marks next to each other."
)
ONLY_NEAR = "No passage has a word of the query; these are the nearest in meaning."


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gives.

    Attributes:
        passages: best first.
        note: for the person: that search went by keywords alone though more was asked for, that nothing was
            found and why, or that no passage has a word of the query; else None.
    """

    passages: list[Passage]
    note: str | None


def find(query: str, *, limit: int, mode: Mode = Mode.HYBRID) -> Found:
    """Answer a query from the index, with its phrases and what it leaves out.

    Guarantees:
        No transaction is open while the query is embedded. A model that cannot be had makes it a search by
        keywords with a note, never an error.
    """
    question = question_of(query)
    if question.refusal:
        return Found([], question.refusal)
    with reading_session() as session:
        if state(session).chunks == 0:
            return Found([], EMPTY)
    embedder, note = None, None
    if mode is not Mode.KEYWORD:
        embedder, note = search_embedder()
    vector = None
    if embedder is not None:
        try:
            vector = embedder.embed([question.text])[0]
        except EndpointError as error:
            embedder, note = None, f"Keywords only: {error}"
    with reading_session() as session:
        index = None if embedder is None else _indexes.current(session, embedder.name)
        by = mode if embedder is not None else Mode.KEYWORD
        near = -1.0 if embedder is None else embedder.near
        ranking = rank(session, question, vector, index, mode=by, near=near)
        found = passages(session, ranking, limit=limit)
    return Found(_told_near(found, ranking, question), _joined(note, _note(ranking, by, question)))


def _told_near(found: list[Passage], ranking: Ranking, question: Question) -> list[Passage]:
    """Passages of which those are told that have no word of the question, where others have some."""

    def is_near(passage: Passage) -> bool:
        # The best by words are not all that have one: the text tells it of the others.
        is_by_words = passage.chunk_id in ranking.by_words
        return ranking.has_words and not is_by_words and not marked_spans(passage.quote, question.text)

    return [replace(passage, is_near=is_near(passage)) for passage in found]


def _note(ranking: Ranking, mode: Mode, question: Question) -> str | None:
    """What is to be known of a ranking before it is believed."""
    if ranking.chunks:
        note = ONLY_NEAR if mode is Mode.HYBRID and not ranking.has_words else None
    elif question.phrases:
        note = NOTHING_EXACT if mode is not Mode.VECTOR else NOTHING_EXACT_NEAR
    else:
        note = NOTHING if mode is Mode.KEYWORD else NOTHING_NEAR
    if note and question.excluded:
        note = re.sub("(?<=[Nn]o passage)", " without the words that are left out", note, count=1)
    return note


def _joined(*notes: str | None) -> str | None:
    return " ".join(filter(None, notes)) or None


def search_embedder() -> tuple[Embedder | None, str | None]:
    """The embedder for queries, without fetching a model; without one, why there is none."""
    try:
        name, note = _embedder_name()
        if name is None:
            return None, note
        return load_embedder(name, settings.cache, settings.embeddings), None
    except ModelUnavailableError as error:
        return None, f"Keywords only: {error}"


def has_search_embedder() -> bool:
    """Whether searches go by vectors too, without loading the model."""
    try:
        return _embedder_name()[0] is not None
    except ModelUnavailableError:
        return False  # a search says why


def _embedder_name() -> tuple[str | None, str | None]:
    """The name of the embedder for queries; without one, why there is none that is wanted."""
    if settings.embedder == NO_EMBEDDER:
        return None, None
    if settings.embeddings is not None and settings.embedder != "minilm":
        return _endpoint_name(), None
    if is_fetched(settings.cache):
        return MINILM, None
    return None, "Keywords only: the embedding model is not here (`ragline model fetch` gets it)."


@cache
def _endpoint_name() -> str:
    # An exception is not kept: an endpoint that was away is asked again.
    return available_embedder(settings.embedder, settings.cache, settings.embeddings)[0]


class _Indexes:
    """The vectors of the embedder that was searched with last: a process reads each of them once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._embedder = ""
        self._held: GrowingIndex | None = None

    def current(self, session: Session, embedder: str) -> VectorIndex | DatabaseIndex:
        """The vectors as they are in the session's transaction."""
        if has_own_vectors(session):
            return DatabaseIndex(embedder)
        from ragline.vectors import GrowingIndex

        with self._lock:  # several searches at once would each read what is new
            held = self._held
            if held is None or self._embedder != embedder or is_too_old(session, held):
                held = GrowingIndex()
                self._embedder, self._held = embedder, held
            return held.at(bring_up_to_date(session, held, embedder))


_indexes = _Indexes()
