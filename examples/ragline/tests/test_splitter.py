"""Splitting: what holds for every text, and how structure decides where chunks end."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from office import ebook
from ragline.errors import DocumentError
from ragline.parsers import parse
from ragline.splitter import MAX_TOKENS, Chunk, split
from ragline.text import Heading, ParsedText
from ragline.tokens import EstimatedTokens, TokenCounter, WordPieces

WORDS = st.sampled_from(
    [
        "a",
        "transaction",
        "SAVEPOINT",
        "naïve",
        "don't",
        "x" * 300,
        "事务",
        "提交。",
        "「はい。」",
        "한국어",
        "😀",
        "e.g.",
        "...",
        "\u0301",
    ]
)
SPACES = st.sampled_from([" ", "\n", "\n\n", "\t", "  ", ". ", "! ", "\u3000", "\u00a0", "", "、"])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=120).map(
    lambda parts: "".join(map("".join, parts))
) | st.text(max_size=400)


def structured(text: str, cuts: list[int]) -> ParsedText:
    """The text with headings and pages at some of its offsets."""
    starts = sorted({cut % (len(text) + 1) for cut in cuts})
    headings = tuple(Heading(start, 1, "Title") for start in starts if start < len(text))
    return ParsedText(text=text, headings=headings, page_starts=(0, *(start for start in starts if start)))


def check(parsed: ParsedText, chunks: list[Chunk], counter: TokenCounter, max_tokens: int) -> None:
    """What must hold for every split of every text."""
    covered = [False] * len(parsed.text)
    end = 0
    for chunk in chunks:
        quote = parsed.text[chunk.start : chunk.end]
        assert quote == quote.strip() != ""
        assert chunk.start >= end, "chunks overlap or are out of order"
        end = chunk.end
        assert counter.count([quote]) == [chunk.tokens]
        assert chunk.tokens <= max_tokens
        covered[chunk.start : chunk.end] = [True] * len(quote)
    lost = "".join(character for character, seen in zip(parsed.text, covered, strict=True) if not seen)
    assert lost.strip() == ""


@given(TEXTS, st.lists(st.integers(0, 10_000), max_size=4), st.integers(8, 60))
def test_chunks_quote_the_text_exactly_and_leave_nothing_out(
    text: str, cuts: list[int], max_tokens: int
) -> None:
    """Every chunk is its span of the text, within the limit, and every visible character is in exactly one."""
    parsed = structured(text, cuts)

    chunks = split(parsed, EstimatedTokens(), max_tokens=max_tokens)

    check(parsed, chunks, EstimatedTokens(), max_tokens)


@pytest.fixture(scope="session")
def word_pieces(model_folder: Path) -> WordPieces:
    """The model's own tokens."""
    return WordPieces(model_folder / "tokenizer.json")


@given(text=TEXTS, cuts=st.lists(st.integers(0, 10_000), max_size=4), max_tokens=st.integers(8, 60))
def test_no_chunk_is_longer_than_the_model_reads(
    word_pieces: WordPieces, text: str, cuts: list[int], max_tokens: int
) -> None:
    """The same holds when the model's own tokenizer counts."""
    parsed = structured(text, cuts)

    chunks = split(parsed, word_pieces, max_tokens=max_tokens)

    check(parsed, chunks, word_pieces, max_tokens)


def test_text_is_split_the_same_way_every_time() -> None:
    """A rerun gives the same chunks."""
    parsed = ParsedText("One sentence. " * 400)

    assert split(parsed, EstimatedTokens()) == split(parsed, EstimatedTokens())


def test_a_section_begins_a_chunk_when_the_one_before_is_long_enough() -> None:
    """A heading ends the chunk before it, and names the chunks below it."""
    first, second = "Alpha " * 80 + "\n\n", "Second title\n\n" + "Beta " * 80
    parsed = ParsedText(first + second, headings=(Heading(len(first), 1, "Second title"),))

    chunks = split(parsed, EstimatedTokens())

    assert [chunk.start for chunk in chunks] == [0, len(first)]
    assert [chunk.heading for chunk in chunks] == ["", "Second title"]


def test_a_heading_alone_is_no_chunk() -> None:
    """Short sections share a chunk."""
    parsed = ParsedText("A\n\nshort\n\nB\n\ntoo", headings=(Heading(0, 1, "A"), Heading(10, 1, "B")))

    assert len(split(parsed, EstimatedTokens())) == 1


def test_a_full_chunk_ends_with_a_sentence() -> None:
    """Where sentences fit, none is cut."""
    text = " ".join(f"This is sentence number {number} of a long paragraph." for number in range(200))

    chunks = split(ParsedText(text), EstimatedTokens())

    assert len(chunks) > 5
    assert all(text[chunk.start : chunk.end].endswith(".") for chunk in chunks)


@pytest.mark.parametrize(
    ("sentence", "end"), [("数据库事务必须提交或者回滚。", "。"), ("トランザクションは確定されます！", "！")]
)
def test_chinese_and_japanese_sentences_are_not_cut(sentence: str, end: str) -> None:
    """Full-width marks end a sentence without a space after them."""
    text = sentence * 100

    chunks = split(ParsedText(text), EstimatedTokens())

    assert len(chunks) > 3
    assert all(text[chunk.start : chunk.end].endswith(end) for chunk in chunks)


def test_chunks_know_their_pages() -> None:
    """First and last page of a chunk, counted from 1."""
    page = "Word " * 150
    parsed = ParsedText(page * 3, page_starts=(0, len(page), 2 * len(page)))

    chunks = split(parsed, EstimatedTokens())

    assert chunks[0].pages == (1, 2)
    assert chunks[-1].pages is not None
    assert chunks[-1].pages[1] == 3


def test_a_megabyte_without_a_space_becomes_chunks_of_bounded_length() -> None:
    """A word that is one unknown token to the model is cut all the same."""

    class OneToken:
        name = "one"

        def count(self, texts: Sequence[str]) -> list[int]:
            return [1 for _ in texts]

    chunks = split(ParsedText("x" * 1_000_000), OneToken())

    assert max(chunk.end - chunk.start for chunk in chunks) <= MAX_TOKENS * 16


@pytest.mark.parametrize(
    "text", ["." * 200_000, "\n" * 200_000 + "x", " " * 200_000 + "x", "a. " * 70_000, "。" * 200_000]
)
def test_hostile_repetition_takes_linear_time(text: str) -> None:
    """No pattern goes quadratic: 200,000 characters take well under ten seconds where a quadratic one takes hours."""
    started = time.monotonic()

    split(ParsedText(text), EstimatedTokens())

    assert time.monotonic() - started < 10


def test_real_documents_are_split_exactly(documents: Path, word_pieces: WordPieces) -> None:
    """Every real file, in the model's tokens and its limit: each chunk is its span of the text, nothing is left out."""
    for file in sorted(documents.iterdir()):
        try:
            parsed = parse(file.read_bytes(), file.name)
        except DocumentError:
            continue
        chunks = split(parsed, word_pieces)

        check(parsed, chunks, word_pieces, MAX_TOKENS)
        assert all((chunk.pages is not None) is bool(parsed.page_starts) for chunk in chunks), file.name


def test_the_row_of_a_table_is_no_sentence_that_ends_within_it() -> None:
    """A cell may end in a full stop; a quotation that begins with the rest of its row says nothing."""
    rows = [f"MODE {number} EXCL. |   | X | ROW EXCL. | what? | no" for number in range(40)]

    chunks = split(ParsedText(text="\n".join(rows)), EstimatedTokens(), max_tokens=64)

    text = "\n".join(rows)
    quotes = [text[chunk.start : chunk.end] for chunk in chunks]
    assert len(quotes) > 1
    assert all(line in rows for quote in quotes for line in quote.split("\n"))


def test_a_part_of_a_table_is_not_cut_where_it_fits() -> None:
    """Not even where the text before it leaves no room for it, and its cells end as sentences do."""
    before = "Some words before the table. " * 12
    table = "station | note\n" + "\n".join(f"number {row} | It was windy. Very." for row in range(22))
    parsed = ParsedText(
        before + "\n\n" + table, table_parts=((len(before) + 2, len(before) + 2 + len(table)),)
    )
    assert EstimatedTokens().count([table])[0] > MAX_TOKENS * 0.8

    chunks = split(parsed, EstimatedTokens())

    assert [parsed.text[chunk.start : chunk.end] for chunk in chunks] == [before.strip(), table]


def test_a_chunk_is_named_by_all_headings_above_it() -> None:
    """The outermost first; one that begins with headings alone is of the section below them."""
    text = "# Guide\n\n## Animals\n\n### Fish\n\nsome text\n\n## Plants\n\nmore text\n"
    headings = tuple(
        Heading(text.index(f"{'#' * level} {title}"), level, title)
        for level, title in ((1, "Guide"), (2, "Animals"), (3, "Fish"), (2, "Plants"))
    )
    chunks = split(ParsedText(text, headings=headings), EstimatedTokens(), max_tokens=8)

    named = {text[chunk.start : chunk.end].split("\n")[-1]: chunk.heading for chunk in chunks}
    assert named["some text"] == "Guide › Animals › Fish"
    assert named["more text"] == "Guide › Plants"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ("A1 B1", "A – B"),
        ("A1 B1 C1", "A – C"),
        ("A1 B2 C3", "A – B › C"),
        ("A1 B2 C1", "A – C"),
        ("A2 B1", "A – B"),
        ("A1 A1", "A"),
        ("A1 B2 A1", "A"),
    ],
)
def test_a_chunk_of_several_sections_is_named_by_the_first_and_the_last(sections: str, named: str) -> None:
    """What is said in the last of them is not cited as if it were said in the first."""
    text = "\n\n".join(f"{title}\n\nsome words" for title, _ in sections.split())
    starts = [found.start() for found in re.finditer("[A-Z]", text)]
    headings = tuple(
        Heading(start, int(level), title)
        for start, (title, level) in zip(starts, sections.split(), strict=True)
    )

    (chunk,) = split(ParsedText(text, headings=headings), EstimatedTokens())

    assert chunk.heading == named


def test_sections_of_one_parent_are_named_below_it() -> None:
    """What both have in common is told once."""
    text = "# Guide\n\n## Animals\n\nsome text\n\n## Plants\n\nmore text\n"
    headings = tuple(
        Heading(text.index(title) - level - 1, level, title)
        for level, title in ((1, "Guide"), (2, "Animals"), (2, "Plants"))
    )

    (chunk,) = split(ParsedText(text, headings=headings), EstimatedTokens())

    assert chunk.heading == "Guide › Animals – Plants"


def test_short_chapters_of_a_book_are_cited_by_both_their_names() -> None:
    """They share a chunk: a word of the second is not cited as one of the first."""
    chapters = {name: f"<h1>{name.title()}</h1><p>The {name} chapter.</p>" for name in ("first", "second")}

    (chunk,) = split(parse(ebook(chapters), "book.epub"), EstimatedTokens())

    assert chunk.heading == "First – Second"


def test_a_chunk_that_begins_before_all_headings_is_of_the_whole_document() -> None:
    """Its first words stand below none of them."""
    parsed = ParsedText("Before.\n\nA\n\nshort", headings=(Heading(9, 1, "A"),))

    (chunk,) = split(parsed, EstimatedTokens())

    assert chunk.heading == ""
