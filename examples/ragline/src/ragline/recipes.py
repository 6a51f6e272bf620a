"""The recipe that documents are processed by now: the versions of parsers and splitter, and the embedder."""

from __future__ import annotations

from ragline.intake import Recipe
from ragline.minilm.files import NAME as MINILM
from ragline.parsers import PARSER_VERSION
from ragline.splitter import MAX_TOKENS, SPLITTER_VERSION


def recipe_for(embedder: str) -> Recipe:
    """The recipe with an embedder, given by its name.

    The splitter's part names how it counts tokens: without MiniLM's vocabulary it estimates them, and cuts
    elsewhere.
    """
    counter = "wordpiece" if embedder == MINILM else "estimate"
    return Recipe(
        parser=PARSER_VERSION, splitter=f"{SPLITTER_VERSION}:{counter}:{MAX_TOKENS}", embedder=embedder
    )
