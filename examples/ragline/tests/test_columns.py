"""What is code or a table in a text."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from ragline.columns import Block, Kind, blocks


def found(name: str, text: str, table_parts: Sequence[tuple[int, int]] = ()) -> list[tuple[Kind, str]]:
    """The kinds of the blocks of a text, and what stands in them."""
    return [
        (one.kind, text[one.start : one.end])
        for one in blocks(name, (0, len(text)), text=text, table_parts=table_parts)
    ]


def test_fenced_code_and_tables_of_markdown_are_found() -> None:
    """A table within code is code, a fence that is longer is not closed by a shorter one."""
    code = "````\n| a | b |\n|---|---|\n```\n| 1 | 2 |\n````"
    table = "a | b\n--|--\n1 | 2"

    assert found("a.md", f"One | two\n\n{code}\n\nText\n{table}\n\nEnd") == [
        (Kind.CODE, code),
        (Kind.TABLE, f"{table}"),
    ]


def test_code_that_nothing_closes_goes_to_the_end() -> None:
    """As Markdown has it."""
    assert found("a.md", "Text\n~~~\ncode") == [(Kind.CODE, "~~~\ncode")]


def test_literal_blocks_and_tables_of_restructuredtext_are_found() -> None:
    """Not a note, which is prose, nor what is no more indented."""
    text = (
        "Title::\n\n    code\n\n      more\n\nProse\n\n.. note::\n\n    A note.\n\n.. code-block:: python\n\n"
        "   one = 1\n\n+---+---+\n| a | b |\n+---+---+\n\n=== ===\na   b\n=== ===\n1   2\n=== ===\n\nEnd::\nno\n"
    )

    assert [words for kind, words in found("a.rst", text) if kind is Kind.CODE] == [
        "    code\n\n      more",
        "   one = 1",
        "+---+---+\n| a | b |\n+---+---+",
        "=== ===\na   b\n=== ===\n1   2\n=== ===",
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.pdf", "README"])
def test_other_kinds_have_the_tables_that_their_parser_wrote(name: str) -> None:
    """And nothing that only looks like one."""
    assert found(name, "```\na | b\n```\n\nx | y\n1 | 2", table_parts=[(15, 26)]) == [
        (Kind.TABLE, "x | y\n1 | 2")
    ]


def test_blocks_are_cut_to_the_range() -> None:
    """A passage may begin within code, and end within a table."""
    text = "```\ncode here\n```\n\na | b\n--|--\n1 | 2\n"

    assert blocks("a.md", (9, 24), text=text) == [Block(9, 17, Kind.CODE), Block(19, 24, Kind.TABLE)]
    assert blocks("a.py", (5, 9)) == [Block(5, 9, Kind.CODE)]


def test_long_texts_take_no_time() -> None:
    """Whatever the lines are made of."""
    for name in ("a.md", "a.rst"):
        for line in (
            "=== ===\n",
            "a::\n\n",
            "    \n",
            "| a |\n",
            "+--+\n",
            "```\n",
            " " * 50 + "::\n",
            "::" * 100,
        ):
            began = time.monotonic()
            blocks(name, (0, 100), text=line * (200_000 // len(line)))
            assert time.monotonic() - began < 5, line
