"""What is code or a table in a text."""

from __future__ import annotations

import itertools
import json
import time
from email.message import EmailMessage

import pytest

from ragline.parsers import parse
from ragline.text import Kind


def found(name: str, text: str | bytes) -> list[tuple[Kind, str]]:
    """The kinds of the blocks of a document, and what stands in them."""
    parsed = parse(text.encode() if isinstance(text, str) else text, name)
    blocks = parsed.blocks
    assert all(0 <= one.start < one.end <= len(parsed.text) for one in blocks)
    assert all(one.end <= other.start for one, other in itertools.pairwise(blocks))
    return [(one.kind, parsed.text[one.start : one.end]) for one in blocks]


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


def test_code_far_on_in_a_text_is_found() -> None:
    """However much stands before it."""
    assert found("a.md", "Prose of many words.\n\n" * 60_000 + "```\ncode\n```\n") == [
        (Kind.CODE, "```\ncode\n```")
    ]


def test_literal_blocks_and_tables_of_restructuredtext_are_found() -> None:
    """Not a note, which is prose, nor what is no more indented."""
    text = (
        "Title::\n\n    code\n\n      more\n\nProse\n\n.. note::\n\n    A note.\n\n.. code-block:: python\n\n"
        "   one = 1\n\n+---+---+\n| a | b |\n+---+---+\n\n=== ===\na   b\n=== ===\n1   2\n=== ===\n\n"
        "Source::\n\n   === ===\n   a   b\n   === ===\n\nEnd::\nno\n"
    )

    assert found("a.rst", text) == [
        (Kind.CODE, "    code\n\n      more"),
        (Kind.CODE, "   one = 1"),
        (Kind.CODE, "+---+---+\n| a | b |\n+---+---+"),
        (Kind.CODE, "=== ===\na   b\n=== ===\n1   2\n=== ==="),
        (Kind.CODE, "   === ===\n   a   b\n   === ==="),
    ]


def test_code_of_a_page_is_found() -> None:
    """As its author indented it, also where one block is within another."""
    page = (
        "<p>Do this:<pre>\n  one\n    two\n\n</pre> and <pre></pre><pre> \n</pre>"
        "<pre>a <pre>b</pre> c</pre><p>End"
    )

    assert found("a.html", page) == [(Kind.CODE, "  one\n    two"), (Kind.CODE, "a \n\nb\n\n c")]


@pytest.mark.parametrize(
    "head", ["<tr><th>a<th>b</tr>", "<tr><td>a<td>b</tr>", "<tr><td>a<td><code>b</code></tr>"]
)
def test_short_tables_of_a_page_are_found(head: str) -> None:
    """With and without names of their columns."""
    page = f"<p>Before<table><caption>About</caption>{head}<tr><td>1<td>2</tr></table>After"

    assert found("a.html", page) == [(Kind.TABLE, "a | b\n1 | 2")]


def test_code_in_a_cell_is_code() -> None:
    """As where the numbers of its lines stand beside it."""
    page = "<table><tr><td><pre>1\n2</pre><td><pre>one\ntwo</pre></tr><tr><td>a<td>b</tr></table>"

    assert found("a.html", page) == [(Kind.CODE, "1\n2"), (Kind.CODE, "one\ntwo")]


def test_long_tables_of_a_page_are_found_in_their_parts() -> None:
    """Each begins with the header."""
    rows = "".join(f"<tr><td>{number}<td>{'word ' * 20}</tr>" for number in range(20))

    blocks = found("a.html", f"<table><tr><th>number<th>words</tr>{rows}</table>")

    assert len(blocks) > 1
    assert all(kind is Kind.TABLE and words.startswith("number | words\n") for kind, words in blocks)


@pytest.mark.parametrize(
    "page",
    [
        "<table><tr><td>A<p>paragraph</td><td>b</tr><tr><td>c<td>d</tr></table>",
        "<table><tr><td>one</tr><tr><td>two</tr></table>",
        "<table><tr><td>one<td>row</tr></table>",
        "<table><tr><td><h2>A title</h2><td>b</tr><tr><td>c<td>d</tr></table>",
    ],
)
def test_tables_that_lay_a_page_out_are_prose(page: str) -> None:
    """Their cells hold paragraphs, headings, or all there is of a line."""
    assert found("a.html", f"<p>Text</p>{page}") == []


def test_table_within_a_layout_is_found() -> None:
    """The one around it is none."""
    inner = "<table><tr><td>1<td>2</tr><tr><td>3<td>4</tr></table>"

    assert found("a.html", f"<table><tr><td>x<td>{inner}</tr><tr><td>y<td>z</tr></table>") == [
        (Kind.TABLE, "1 | 2\n3 | 4")
    ]


def test_cells_of_a_notebook_are_code() -> None:
    """Its prose is Markdown, with code of its own."""
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Title\n", "```\n", "inner\n", "```"]},
            {"cell_type": "code", "source": "one = 1\n", "outputs": [{"text": ["  1\n", " 10"]}]},
            {"cell_type": "raw", "source": "As it is."},
        ]
    }

    assert found("a.ipynb", json.dumps(notebook)) == [
        (Kind.CODE, "```\ninner\n```"),
        (Kind.CODE, "one = 1"),
        (Kind.CODE, "  1\n 10"),
    ]


def test_what_is_attached_keeps_its_blocks() -> None:
    """At its place in the text around it."""
    message = EmailMessage()
    message["Subject"] = "With code"
    message.set_content("See below.")
    message.add_attachment("```\ncode\n```\n", filename="a.md")

    assert found("a.eml", message.as_bytes()) == [(Kind.CODE, "```\ncode\n```")]


def test_source_code_is_one_block() -> None:
    """All of it."""
    assert found("a.py", "def one():\n    pass\n") == [(Kind.CODE, "def one():\n    pass\n")]


def test_tables_of_other_kinds_are_found() -> None:
    """As their parser writes them."""
    assert found("a.csv", "x,y\n1,2\n") == [(Kind.TABLE, "x | y\n1 | 2")]


def test_nothing_is_guessed_of_plain_text() -> None:
    """What only looks like a table is none."""
    assert found("a.txt", "```\na | b\n```\n\nx | y\n1 | 2") == []


def test_long_texts_take_no_time() -> None:
    """Whatever the lines are made of."""
    for name in ("a.md", "a.rst"):
        for line in (
            "=== ===\n",
            "a::\n\n",
            "    \n",
            "| a |\n",
            "|-|-|\n",
            "+--+\n",
            "```\n",
            " " * 50 + "::\n",
            "::" * 100,
        ):
            began = time.monotonic()
            parse(b"x\n" + (line * (200_000 // len(line))).encode(), name)
            assert time.monotonic() - began < 5, line
