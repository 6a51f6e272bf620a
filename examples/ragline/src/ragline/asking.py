"""`ask`: passages found, a language model asked, its answer checked against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ragline.answers import CheckedAnswer, Excerpt, check, messages_for
from ragline.app import settings
from ragline.endpoints import Endpoint, ask, open_client
from ragline.errors import ConfigurationError, EndpointError
from ragline.retrieval import find
from ragline.searching import Passage

PASSAGES = 8
"""About 2000 tokens: small models read that too."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what it rests on.

    Attributes:
        checked: the answer; None where no passage was found and so nobody was asked.
        passages: those that the model was given; citation [1] is the first.
        notes: what the person should know of it, one sentence each.
    """

    checked: CheckedAnswer | None
    passages: list[Passage]
    notes: list[str]


def answer(question: str, *, endpoint: Endpoint | None = settings.chat, limit: int = PASSAGES) -> Answer:
    """Answer a question from the documents.

    Guarantees:
        No transaction is open while the model thinks. No citation in the answer names a passage that it was
        not given.

    Raises:
        ConfigurationError: no endpoint is set.
        EndpointBusyError: the model's server gives no answer now.
        EndpointError: it refuses, or gives no text.
    """
    if endpoint is None:
        raise ConfigurationError(
            "No language model is set up to answer: set RAGLINE_CHAT_URL and RAGLINE_CHAT_MODEL"
            " (and RAGLINE_CHAT_KEY) to an OpenAI-compatible endpoint. Search finds the passages without one."
        )
    found = find(question, limit=limit)
    notes = [found.note] if found.note else []
    if not found.passages:
        return Answer(None, [], [*notes, "Nothing was found, so no model was asked."])
    excerpts = [Excerpt(passage.name, passage.quote) for passage in found.passages]
    with open_client(endpoint) as client:
        said = ask(client, endpoint, "chat/completions", {"messages": messages_for(question, excerpts)})
    text, is_whole = _text(said, endpoint)
    checked = check(text, [passage.quote for passage in found.passages])
    return Answer(checked, found.passages, [*notes, *_notes(checked, is_whole=is_whole)])


def _text(said: Any, endpoint: Endpoint) -> tuple[str, bool]:
    """The text of a chat completion, and whether the model came to its end."""
    try:
        choice = said["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise EndpointError(f"{endpoint.host} gives no text as its answer.")
    return text.strip(), choice.get("finish_reason") != "length"


def _notes(checked: CheckedAnswer, *, is_whole: bool) -> list[str]:
    notes = []
    if not is_whole:
        notes.append("The model stopped before its answer was complete.")
    if checked.removed:
        numbers = ", ".join(f"[{number}]" for number in checked.removed)
        notes.append(f"Citations of passages that do not exist were removed: {numbers}.")
    if checked.unverified:
        notes.append(f"Not found in the passages word for word: {', '.join(checked.unverified)}.")
    if not checked.cited:
        notes.append("The answer cites no passage: nothing shows that it rests on the documents.")
    return notes
