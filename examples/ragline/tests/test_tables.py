"""Tables keep their header row with each part, and what is about the page comes without its menus."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import docx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_splitter import check

from office import opendocument, raw_docx, workbook
from ragline.limits import DEFAULT_LIMITS
from ragline.parsers import parse
from ragline.parsers.writer import TextWriter
from ragline.splitter import MAX_TOKENS, split
from ragline.text import ParsedText
from ragline.tokens import EstimatedTokens, TokenCounter, WordPieces
from test_parsers import headings_of, pdf_of

HEADER = ["Station", "Temperature in degrees", "Rainfall"]
ROWS = [[f"Station number {row}", f"{row * 37 % 50}.{row % 7}", f"{row * 91}"] for row in range(120)]


def _word() -> bytes:
    document = docx.Document()
    table = document.add_table(rows=0, cols=3)
    for row in [HEADER, *ROWS]:
        cells = table.add_row().cells
        for cell, text in zip(cells, row, strict=True):
            cell.text = text
    stream = BytesIO()
    document.save(stream)
    return stream.getvalue()


def _html() -> bytes:
    head = "".join(f"<th>{cell}</th>" for cell in HEADER)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in ROWS)
    page = f"<p>Before.</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<html><body>{page}<h2>After</h2><p>Text.</p></body></html>".encode()


def _opendocument() -> bytes:
    def row(cells: list[str]) -> str:
        inner = "".join(f"<table:table-cell><text:p>{cell}</text:p></table:table-cell>" for cell in cells)
        return f"<table:table-row>{inner}</table:table-row>"

    return opendocument("text", f"<table:table>{''.join(map(row, [HEADER, *ROWS]))}</table:table>")


MARKDOWN = "\n".join(
    [
        "Before.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in ROWS),
    ]
)
TABLES = {
    "a.csv": "\n".join(",".join(row) for row in [HEADER, *ROWS]).encode(),
    "a.xlsx": workbook({"Weather": [list(row) for row in [HEADER, *ROWS]]}),
    "a.docx": _word(),
    "a.html": _html(),
    "a.odt": _opendocument(),
    "a.md": MARKDOWN.encode(),
}


@pytest.fixture(params=["estimate", "wordpiece"])
def counter(request: pytest.FixtureRequest) -> TokenCounter:
    """Both ways to count tokens: the model makes more of figures than the estimate."""
    if request.param == "estimate":
        return EstimatedTokens()
    folder: Path = request.getfixturevalue("model_folder")
    return WordPieces(folder / "tokenizer.json")


@pytest.mark.parametrize("name", TABLES)
def test_every_passage_of_a_table_has_its_header_row(name: str, counter: TokenCounter) -> None:
    """A row of figures alone says nothing, to a search or to a person."""
    parsed = parse(TABLES[name], name)

    chunks = split(parsed, counter)

    check(parsed, chunks, counter, MAX_TOKENS)
    quotes = [parsed.text[chunk.start : chunk.end] for chunk in chunks]
    rows = [quote for quote in quotes if "Station number" in quote]
    assert len(rows) > 5
    for quote in rows:
        assert quote.index("Temperature in degrees") < quote.index("Station number")
    assert sum(quote.count("Station number") for quote in quotes) == len(ROWS)


def test_a_short_table_stays_as_it_is() -> None:
    """One header, no parts to repeat it in."""
    short = "\n".join(MARKDOWN.split("\n")[:8])

    assert parse(short.encode(), "a.md").text == short


def test_a_table_of_many_columns_has_the_name_of_the_column_before_each_cell(counter: TokenCounter) -> None:
    """Its header row would fill each passage; so has a row with a long text in it."""
    names = [f"Measurement of kind {column}" for column in range(40)]
    rows = [names, *([f"{row}/{column}" for column in range(40)] for row in range(20))]
    wide = parse("\n".join(",".join(row) for row in rows).encode(), "a.csv")
    long = parse(b"title,description\nshort,one\n" + b"Emma," + b"word " * 900 + b"\nlast,two\n", "a.csv")

    chunks = split(wide, counter)

    check(wide, chunks, counter, MAX_TOKENS)
    for chunk in chunks[1:]:
        for line in filter(None, wide.text[chunk.start : chunk.end].split("\n")):
            assert line.startswith("Measurement of kind "), line
    assert "Measurement of kind 7: 3/7" in wide.text
    assert long.text.startswith("title | description\nshort | one\n\ntitle: Emma\ndescription: word")
    assert long.text.endswith("word\n\ntitle | description\nlast | two")


CELLS = st.lists(st.lists(st.text(max_size=30), min_size=1, max_size=5), max_size=30)


@given(CELLS)
def test_parts_of_tables_are_ranges_of_the_text_in_order(rows: list[list[str]]) -> None:
    """Whatever is in the cells: a part is split off exactly or not at all."""
    writer = TextWriter(DEFAULT_LIMITS)
    writer.block("Before.")
    writer.table(rows)
    writer.block("After.")
    parsed = writer.parsed()

    ends = [offset for part in parsed.table_parts for offset in part]
    check(parsed, split(parsed, EstimatedTokens(), max_tokens=40), EstimatedTokens(), 40)
    assert ends == sorted(ends)
    assert all(start < end <= len(parsed.text) for start, end in parsed.table_parts)


def test_a_table_in_a_table_is_in_its_cell() -> None:
    """Rows of the inner one are no rows of the outer one."""
    inner = "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>in</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
    cell = "<w:tc><w:p><w:r><w:t>out</w:t></w:r></w:p>{}</w:tc>"
    body = f"<w:tbl><w:tr>{cell.format(inner)}{cell.format('')}</w:tr></w:tbl>"

    assert parse(raw_docx(body), "a.docx").text == "out in | out"


ARTICLE = "<p>" + "The transaction is committed when the task returns. " * 6 + "</p>"
LANGUAGES = "<ul>" + "".join(f"<li><a href=/{n}>Language {n}</a></li>" for n in range(154)) + "</ul>"


@pytest.mark.parametrize(
    "page",
    [
        f"<h1>Title</h1><div>{LANGUAGES}</div><main>{ARTICLE}</main><footer>Imprint</footer>",
        f"<main><header><h1>Title</h1><div>{LANGUAGES}</div></header>{ARTICLE}</main>",
        f"<div>{LANGUAGES}</div><article><h1>Title</h1>{ARTICLE}</article>",
        f"<div>{LANGUAGES}</div><div role=main><h1>Title</h1>{ARTICLE}</div><aside>Other pages</aside>",
        f"<header>{LANGUAGES}</header><h1>Title</h1>{ARTICLE}",
    ],
    ids=["main", "header-in-main", "article", "role", "no-main"],
)
def test_a_page_is_what_it_is_about(page: str) -> None:
    """Wikipedia begins with 154 languages."""
    parsed = parse(f"<html><body>{page}</body></html>".encode(), "a.html")

    assert parsed.text.startswith("Title\n\nThe transaction is committed")
    assert headings_of(parsed) == [(1, "Title")]
    assert "Language" not in parsed.text
    assert "Imprint" not in parsed.text


def test_a_page_whose_main_part_is_empty_is_read_whole() -> None:
    """What a script would fill in is not there; a list of links may be what a page is about."""
    page = f"<html><body><main></main><h1>Index</h1>{LANGUAGES}</body></html>"

    assert "Language 153" in parse(page.encode(), "a.html").text


def test_articles_of_a_list_are_all_read() -> None:
    """A blog's first page has several."""
    page = f"<html><body><article>{ARTICLE}</article><article>Second.</article></body></html>"

    assert parse(page.encode(), "a.html").text.endswith("Second.")


def test_xhtml_is_read_as_a_page_whatever_it_is_called() -> None:
    """With its XML declaration before it."""
    page = '<?xml version="1.0" encoding="iso-8859-1"?>\n<!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><body><p>Größe</p></body></html>'

    assert parse(page.encode("latin-1"), "download").text == "Größe"
    assert parse(page.encode("latin-1"), "a.xhtml").text == "Größe"


def outlined(data: bytes, *entries: tuple[str, int]) -> bytes:
    """A PDF of `pdf_of` with an outline: titles, and the numbers of the page objects."""
    body = data[: data.rindex(b"\nxref\n") + 1].replace(
        b"/Pages 2 0 R >>", b"/Pages 2 0 R /Outlines 90 0 R >>", 1
    )
    last = 90 + len(entries)
    body += b"90 0 obj\n<< /First 91 0 R /Last %d 0 R /Count %d >>\nendobj\n" % (last, len(entries))
    for number, (title, page) in enumerate(entries, start=91):
        after = b"/Next %d 0 R" % (number + 1) if number < last else b""
        body += b"%d 0 obj\n<< /Title (%s) /Parent 90 0 R /Dest [%d 0 R /Fit] %s >>\nendobj\n" % (
            number,
            title.encode(),
            page,
            after,
        )
    return body + b"trailer << /Root 1 0 R >>\n%%EOF"


def test_the_outline_of_a_pdf_is_its_headings() -> None:
    """Where the title stands on its page, with its number; else where the page begins; not in mid-sentence."""
    data = pdf_of("2 Methods", "Results of the methods", "Other")

    parsed = parse(outlined(data, ("Methods", 3), ("Results", 5), ("Missing", 7)), "a.pdf")

    assert [(heading.level, heading.title) for heading in parsed.headings] == [
        (1, "Methods"),
        (1, "Results"),
        (1, "Missing"),
    ]
    assert tuple(heading.start for heading in parsed.headings) == parsed.page_starts
    assert isinstance(parsed, ParsedText)
