"""The states of a document and the moves between them: the one table that all else goes by."""

from __future__ import annotations

import enum


class State(str, enum.Enum):
    """Where a document is on its way into the index."""

    QUEUED = "queued"
    PARSING = "parsing"
    SPLITTING = "splitting"
    EMBEDDING = "embedding"
    READY = "ready"
    FAILED = "failed"
    PAUSED = "paused"
    CANCELLED = "cancelled"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset((State.PARSING, State.FAILED, State.PAUSED, State.CANCELLED)),
    State.PARSING: frozenset((State.SPLITTING, State.FAILED, State.PAUSED, State.CANCELLED)),
    State.SPLITTING: frozenset((State.EMBEDDING, State.FAILED, State.PAUSED, State.CANCELLED)),
    State.EMBEDDING: frozenset((State.READY, State.FAILED, State.PAUSED, State.CANCELLED)),
    State.READY: frozenset(),
    State.FAILED: frozenset((State.QUEUED,)),
    State.PAUSED: frozenset((State.QUEUED, State.CANCELLED)),
    State.CANCELLED: frozenset((State.QUEUED,)),
}
"""From each state, the states that may follow; entering one stamps the document's `<state>_at`."""

NO_EMBEDDER = "none"
"""The embedder of documents that are searched by keywords alone."""

WORKING = (State.QUEUED, State.PARSING, State.SPLITTING, State.EMBEDDING)
"""A task is on its way or running for a document in one of these."""

SETTLED = tuple(state for state in State if state not in WORKING)
"""Nothing happens to a document in one of these until somebody asks for it."""
