"""A parsed document to chunks: exact offsets, cut by structure, never longer than the embedder reads."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ragline.text import Heading, ParsedText, Span
from ragline.tokens import TokenCounter

MAX_TOKENS = 254
"""MiniLM reads 256 tokens, [CLS] and [SEP] among them, and silently drops the rest."""
MIN_SECTION_TOKENS = 64
"""A section shorter than this is joined to the next one: a heading alone is no passage."""
MAX_CHARACTERS_PER_TOKEN = 16
"""A word of more than 100 letters is one unknown token to MiniLM, however long."""
HEADING_SEPARATOR = " › "
SECTION_RANGE = " – "
SPLITTER_VERSION = "4"
"""Raised whenever the same text gives other passages: documents are then split again."""

_PARAGRAPH_END = re.compile(r"\n[ \t]*\n\s*")
# The sentence ends with its closing quotes and brackets; full-width marks need no space after them. The
# look-behind keeps a run of a hundred thousand dots from being tried from each dot. Before the next cell of a
# table's row no sentence ends: half a row says nothing.
_SENTENCE_END = re.compile(r"""(?<![.!?…])[.!?…]+["'”’»)\]]*\s+(?![\s|])|[。！？｡]+[”’」』）】》]*\s*""")
_LINE_END = re.compile(r"\n\s*")
_WORD_END = re.compile(r"\s+|(?<=[、，；：,;/|\-_])(?=\S)")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage: `text[start:end]` of its document, without white space at either end.

    Attributes:
        tokens: its length as the token counter measures it, at most the limit.
        pages: first and last page that it stands on, counted from 1; None for a format without pages.
        heading: the titles of the sections in which it begins, the outermost first, and of those in which it
            ends where these are others; "" if it begins in none.
    """

    start: int
    end: int
    tokens: int
    pages: tuple[int, int] | None
    heading: str


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    tokens: int
    opens: (
        int  # what begins here: 0 a heading, 1 a paragraph, 2 a sentence, 3 a line, 4 a word, 5 a character
    )


def split(parsed: ParsedText, counter: TokenCounter, *, max_tokens: int = MAX_TOKENS) -> list[Chunk]:
    """Cut a document into chunks of at most `max_tokens` tokens.

    Args:
        parsed: the text and its structure.
        counter: measures a text; one character must never be more than `max_tokens` tokens.
        max_tokens: the limit, at least 8.

    Guarantees:
        Chunks are in ascending order and do not overlap; every character that is not white space is in
        exactly one.
    """
    spans: list[tuple[int, int, int]] = []
    for group in _pack(_pieces(parsed, counter, max_tokens), max_tokens):
        spans.extend(_fit(parsed.text, group[0].start, group[-1].end, counter, max_tokens))
    sections, paths = _sections(parsed), list(_paths(parsed.headings))
    chunks = []
    for start, end, tokens in spans:
        first, last = (bisect_right(sections, offset) - 1 for offset in (start, end - 1))
        title = _range(paths[first], paths[last]) if first >= 0 else ""
        chunks.append(Chunk(start, end, tokens, _pages(parsed.page_starts, start, end), title))
    return chunks


def _range(first: Sequence[str], last: Sequence[str]) -> str:
    """The sections from one to another; what is above both is told once."""
    ends = [HEADING_SEPARATOR.join(first)]
    if last != first:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        ends.append(HEADING_SEPARATOR.join(last[min(shared, len(last) - 1) :]))
    return SECTION_RANGE.join(ends)


def _sections(parsed: ParsedText) -> list[int]:
    """Where each section begins: with those headings above its own that have no text of theirs."""
    starts = [heading.start for heading in parsed.headings]
    for at in range(len(starts) - 1):
        heading, next_start = parsed.headings[at], parsed.headings[at + 1].start
        below = parsed.text[heading.start : next_start].replace(heading.title, "", 1)
        if not any(sign.isalnum() for sign in below):
            starts[at + 1] = starts[at]
    return starts


def _paths(headings: Sequence[Heading]) -> Iterator[tuple[str, ...]]:
    """For each heading the titles above it and its own."""
    open_sections: list[Heading] = []
    for heading in headings:
        while open_sections and open_sections[-1].level >= heading.level:
            open_sections.pop()
        open_sections.append(heading)
        yield tuple(section.title for section in open_sections)


def _pages(page_starts: Sequence[int], start: int, end: int) -> tuple[int, int] | None:
    if not page_starts:
        return None
    return bisect_right(page_starts, start), bisect_right(page_starts, end - 1)


def _pieces(parsed: ParsedText, counter: TokenCounter, max_tokens: int) -> list[_Piece]:
    """The document cut into its sentences, and those too long for a chunk into lines, words, characters."""
    text = parsed.text
    spans = list(_spans(parsed))
    counts = _sizes(counter, [text[start:end] for (start, end), _ in spans])
    pieces: list[_Piece] = []
    for ((start, end), opens), tokens in zip(spans, counts, strict=True):
        if tokens <= max_tokens:
            pieces.append(_Piece(start, end, tokens, opens))
        else:
            pieces.extend(_divide(text, (start, end), counter, max_tokens, opens))
    return pieces


def _spans(parsed: ParsedText) -> Iterator[tuple[Span, int]]:
    """Sentences, and parts of tables as they are, each with what begins there."""
    text = parsed.text
    heads, wholes = {heading.start for heading in parsed.headings}, set(parsed.table_parts)
    ends = {offset for whole in wholes for offset in whole}
    for section in _cut_at((0, len(text)), sorted(heads | ends)):
        if section in wholes:
            yield from ((whole, 0 if whole[0] in heads else 1) for whole in _trimmed(text, [section]))
            continue
        for paragraph in _cut(text, section, _PARAGRAPH_END):
            for number, sentence in enumerate(_cut(text, paragraph, _SENTENCE_END)):
                yield sentence, 2 if number else (0 if sentence[0] in heads else 1)


def _divide(text: str, span: Span, counter: TokenCounter, max_tokens: int, opens: int) -> Iterator[_Piece]:
    """A sentence that is too long, as pieces that are not: lines, else words, else runs of characters."""
    level, parts = 3, list(_cut(text, span, _LINE_END))
    if len(parts) == 1:
        level, parts = 4, list(_cut(text, span, _WORD_END))
    if len(parts) == 1:
        # No character is more than a few tokens; `_fit` halves what is too long all the same.
        level, parts = 5, list(_trimmed(text, _cut_at(span, range(span[0], span[1], max_tokens // 2))))
    counts = _sizes(counter, [text[start:end] for start, end in parts])
    for number, ((start, end), tokens) in enumerate(zip(parts, counts, strict=True)):
        begins = level if number else opens
        if tokens > max_tokens and level < 5:
            yield from _divide(text, (start, end), counter, max_tokens, begins)
        else:
            yield _Piece(start, end, tokens, begins)


def _pack(pieces: Iterable[_Piece], max_tokens: int) -> Iterator[list[_Piece]]:
    """Fill chunks in order; a full one is ended at its last paragraph or sentence in its second half."""
    group: list[_Piece] = []
    tokens = 0
    for piece in pieces:
        if group and piece.opens == 0 and tokens >= MIN_SECTION_TOKENS:
            yield group
            group, tokens = [], 0
        while group and tokens + piece.tokens > max_tokens:
            keep = _best_end(group, piece, tokens)
            yield group[:keep]
            group = group[keep:]
            tokens = sum(kept.tokens for kept in group)
        group.append(piece)
        tokens += piece.tokens
    if group:
        yield group


def _best_end(group: list[_Piece], following: _Piece, tokens: int) -> int:
    """How many pieces of a full group stay in it: to the best boundary that leaves it at least half full."""
    best, best_opens = len(group), following.opens
    filled = tokens
    for count in range(len(group) - 1, 0, -1):
        filled -= group[count].tokens
        if filled * 2 < tokens:
            break
        if group[count].opens < min(best_opens, 2):
            best, best_opens = count, group[count].opens
    return best


def _fit(
    text: str, start: int, end: int, counter: TokenCounter, max_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """The span itself if it fits: joined pieces can be longer than their sum where a word was cut."""
    trimmed = _trim(text, (start, end))
    if trimmed is None:
        return
    start, end = trimmed
    (tokens,) = counter.count([text[start:end]])
    if _size(tokens, end - start) <= max_tokens or end - start == 1:
        yield start, end, tokens
        return
    middle = (start + end) // 2
    space = max(text.rfind(" ", start + 1, middle), text.rfind("\n", start + 1, middle))
    middle = space if space > start else middle
    yield from _fit(text, start, middle, counter, max_tokens)
    yield from _fit(text, middle, end, counter, max_tokens)


def _sizes(counter: TokenCounter, texts: Sequence[str]) -> list[int]:
    return [_size(tokens, len(text)) for text, tokens in zip(texts, counter.count(texts), strict=True)]


def _size(tokens: int, characters: int) -> int:
    return max(tokens, -(-characters // MAX_CHARACTERS_PER_TOKEN))


def _cut(text: str, span: Span, boundary: re.Pattern[str]) -> Iterator[Span]:
    """The parts of a span between boundaries, trimmed, none of them empty."""
    return _trimmed(text, _cut_at(span, (found.end() for found in boundary.finditer(text, *span))))


def _cut_at(span: Span, offsets: Iterable[int]) -> Iterator[Span]:
    start, end = span
    for offset in offsets:
        if start < offset < end:
            yield start, offset
            start = offset
    if start < end:
        yield start, end


def _trimmed(text: str, spans: Iterable[Span]) -> Iterator[Span]:
    for span in spans:
        if trimmed := _trim(text, span):
            yield trimmed


def _trim(text: str, span: Span) -> Span | None:
    part = text[span[0] : span[1]]
    body = part.strip()
    if not body:
        return None
    start = span[0] + len(part) - len(part.lstrip())
    return start, start + len(body)
