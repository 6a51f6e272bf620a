"""How long a text is for an embedder: the model's own tokens, or an estimate where there is no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class TokenCounter(Protocol):
    """Counts the tokens that an embedder makes of a text, without the ones that frame it ([CLS], [SEP])."""

    @property
    def name(self) -> str:
        """Part of the splitter's fingerprint: another counter cuts other chunks."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, in order."""
        ...


# A run of letters and digits of scripts with spaces, or any other single character.
_PIECE = re.compile(r"[A-Za-z0-9À-ɏͰ-ӿ]+|\S")
_CHARACTERS_PER_TOKEN = 4


class EstimatedTokens:
    """A count where there is no model: one token for four letters, or for any other sign."""

    name = "estimate"

    def count(self, texts: Sequence[str]) -> list[int]:
        """The estimated number of tokens of each text; splitting a text never makes the sum smaller."""
        return [
            sum(-(-len(piece) // _CHARACTERS_PER_TOKEN) for piece in _PIECE.findall(text)) for text in texts
        ]


class WordPieces:
    """The tokens of a BERT model, counted by its `tokenizer.json`."""

    name = "wordpiece"

    def __init__(self, tokenizer_file: Path) -> None:
        """Load the tokenizer and lift the limit of 128 tokens that the file carries."""
        from tokenizers import Tokenizer  # late: most commands count nothing

        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def count(self, texts: Sequence[str]) -> list[int]:
        """The exact number of tokens of each text."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encoded]

    def ids(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """The token ids of each text with [CLS] and [SEP], at most `max_tokens` of them in all."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return [_framed(list(encoding.ids), max_tokens) for encoding in encoded]


def _framed(ids: list[int], max_tokens: int) -> list[int]:
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]
