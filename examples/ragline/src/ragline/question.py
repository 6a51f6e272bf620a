"""A question as a person types it, taken apart: what it is about, exact words, and words to leave out."""

from __future__ import annotations

import re
from dataclasses import dataclass

SIGNS = (
    'A question, or words. Words in "quotation marks" stand in each passage next to each other in this order.'
    " A word or phrase with a minus before it stands in none: whales -blue."
)
"""What a person may type."""
NOTHING_ASKED = "Nothing was asked: type a question, or words."
ONLY_EXCLUDED = "The question only says what to leave out: add a word to look for."
MAX_OPERATORS = 50
TOO_MANY = f"The question has more than {MAX_OPERATORS} exact phrases and words to leave out: use fewer."

_QUOTES = '"“”„'
_OPERATOR = re.compile(
    rf"(?P<sign>(?<!\S)-)?[{_QUOTES}](?P<phrase>[^{_QUOTES}]*)[{_QUOTES}]"
    rf"|(?<!\S)-(?P<word>[^\W\d_][^\s{_QUOTES}]*)"
)
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
# Hyphens and apostrophes are inside of words too.
_IDENTIFIER = re.compile(r"\S*(?:\d|[^\W_][@./\\:_#=&?%+~$]+[^\W_])\S*")
_ENDS = re.compile(r"^[\W_]+|[\W_]+$")


@dataclass(frozen=True, slots=True)
class Question:
    """What a person asks.

    Attributes:
        text: what it is about, for the embedder and for the words that find and rank: without the signs
            of phrases, and without what is left out.
        phrases: each passage has all of these, each with its words in this order next to each other.
        excluded: no passage has one of these, of which each may be several words too.
    """

    text: str
    phrases: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def refusal(self) -> str | None:
        """Why nothing can be searched for, in a sentence for the person; None where something can."""
        if len(self.phrases) + len(self.excluded) > MAX_OPERATORS:
            return TOO_MANY
        if self.excluded and not _LETTER_OR_DIGIT.search(self.text):
            return ONLY_EXCLUDED
        return None if self.text.strip() else NOTHING_ASKED

    @property
    def identifier(self) -> str | None:
        """What is asked for where it is one thing as programs write it: an address, a path, a number.

        Without the signs at its ends, which may be those of a sentence.
        """
        only = self.text.strip()
        return _ENDS.sub("", only) if _IDENTIFIER.fullmatch(only) else None


def question_of(asked: str) -> Question:
    """Take a question apart.

    Words in quotation marks are a phrase. A minus at the start or after white space, directly before a letter
    or a quotation mark, leaves out the word or phrase. All else is plain text: a question without such signs
    is the text as it was typed.
    """
    phrases: list[str] = []
    excluded: list[str] = []

    def taken(operator: re.Match[str]) -> str:
        sign, phrase, word = operator.group("sign", "phrase", "word")
        if word is not None and word[0].isalpha():  # ½ is no letter
            excluded.append(word)
            return " "
        if phrase is None or not _LETTER_OR_DIGIT.search(phrase):
            return operator[0]
        (excluded if sign else phrases).append(phrase)
        return " " if sign else f" {phrase} "

    text = _OPERATOR.sub(taken, asked)
    if not phrases and not excluded:
        return Question(asked)
    return Question(" ".join(text.split()), tuple(phrases), tuple(excluded))
