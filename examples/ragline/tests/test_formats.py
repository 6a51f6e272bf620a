"""The formats that people have: what is read of each, in which order, under which headings."""

from __future__ import annotations

import datetime as dt
import json
from email.message import EmailMessage

import pytest

from office import (
    archive,
    docx_with_margins,
    ebook,
    opendocument,
    presentation,
    raw_docx,
    workbook,
)
from ragline.errors import EncryptedError, UnsupportedError
from ragline.parsers import parse
from test_parsers import headings_of, text_or_reason


def test_word_headers_and_footers_are_read_once() -> None:
    """The header stands first, the footer last; a page number alone is no text."""
    parsed = parse(docx_with_margins(), "a.docx")

    assert parsed.text == "ACME Corporation, confidential\n\nThe title\n\nThe body.\n\nContract 4711"
    assert headings_of(parsed) == [(1, "The title")]


def test_word_headings_are_known_by_the_outline_level_of_their_style_in_any_language() -> None:
    """Styles that are based on one another, in a circle too, take time that is linear."""
    namespace = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    styles = (
        f'<w:styles {namespace}><w:style w:styleId="o1"><w:name w:val="Otsikko 1"/><w:pPr><w:outlineLvl w:val="1"/>'
        '</w:pPr></w:style><w:style w:styleId="own"><w:name w:val="Mine"/><w:basedOn w:val="o1"/></w:style>'
        '<w:style w:styleId="a"><w:basedOn w:val="b"/></w:style><w:style w:styleId="b"><w:basedOn w:val="a"/></w:style>'
        "</w:styles>"
    )
    body = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>Text of {style}</w:t></w:r></w:p>'
        for style in ("o1", "own", "a", "none")
    )
    data = archive(
        {
            "word/document.xml": f"<w:document {namespace}><w:body>{body}</w:body></w:document>",
            "word/styles.xml": styles,
            "word/_rels/document.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            '<Relationship Id="r1" Type="http://x/relationships/styles" Target="styles.xml"/></Relationships>',
        }
    )

    assert headings_of(parse(data, "a.docx")) == [(2, "Text of o1"), (2, "Text of own")]


def test_word_text_in_content_controls_is_read_and_deleted_text_is_not() -> None:
    """What a reader sees, wherever Word puts it."""
    body = (
        "<w:sdt><w:sdtContent><w:p><w:r><w:t>In a control</w:t></w:r></w:p></w:sdtContent></w:sdt>"
        "<w:p><w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:ins><w:r><w:t>new</w:t></w:r></w:ins></w:p>"
    )

    assert parse(raw_docx(body), "a.docx").text == "In a control\n\nnew"


def test_strict_open_xml_is_read_as_the_usual_kind() -> None:
    """Word's "Strict Open XML Document" has other namespaces for the same elements."""
    strict = (
        '<w:document xmlns:w="http://purl.oclc.org/ooxml/wordprocessingml/main">'
        "<w:body><w:p><w:r><w:t>strict</w:t></w:r></w:p></w:body></w:document>"
    )

    assert parse(archive({"word/document.xml": strict}), "a.docx").text == "strict"


def test_a_slide_is_a_page_with_its_title_as_heading() -> None:
    """Bullets, tables and the speaker's notes of each slide; the number of a slide is its page."""
    parsed = parse(presentation(), "a.pptx")

    assert parsed.text == (
        "Savepoints\n\nThey nest\nThey roll back alone\n\nSay why this matters.\n\nCosts\n\nitem | price\npen | 3"
    )
    assert headings_of(parsed) == [(1, "Savepoints"), (1, "Costs")]
    assert [parsed.text[start : start + 5] for start in parsed.page_starts] == ["Savep", "Costs"]


def test_a_workbook_is_its_sheets_with_values_as_excel_shows_them() -> None:
    """Dates, shares, sums that a computer gets wrong; titles above a table; tables with empty rows between."""
    rows: list[list[object]] = [
        ["Sales of the year"],
        [],
        ["day", "share", "sum", "paid"],
        [dt.datetime(2026, 3, 1), 0.25, 0.1 + 0.2, True],
        [],
        ["other", "table"],
        [1, "x"],
    ]
    data = workbook({"Sales": rows, "Empty": [], "Second": [["only"]]}, {"B4": "0%"})

    parsed = parse(data, "a.xlsx")

    assert parsed.text == (
        "Sales\n\nSales of the year\n\nday | share | sum | paid\n2026-03-01 | 25% | 0.3 | TRUE\n\n"
        "other | table\n1 | x\n\nSecond\n\nonly"
    )
    assert headings_of(parsed) == [(1, "Sales"), (1, "Second")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_values_are_divided_by_whatever_divides_them(delimiter: str) -> None:
    """The delimiter is found; quoted cells may hold it, and line ends."""
    rows = ['name{d}town{d}"note"', '"Doe{d} John"{d}Rome{d}"two\nlines"', "Ann{d}Oslo{d}"]
    source = "\r\n".join(rows).replace("{d}", delimiter)

    parsed = parse(source.encode("utf-16"), "a.csv")

    name = " ".join(f"Doe{delimiter} John".split())
    assert parsed.text == f"name | town | note\n{name} | Rome | two lines\nAnn | Oslo"
    assert parsed.encoding == "utf-16"


def test_an_email_is_its_headers_its_text_and_its_documents() -> None:
    """Encoded words and bodies are decoded; what cannot be read is named with the reason."""
    message = EmailMessage()
    message["From"], message["To"] = "Zoë <zoe@example.org>", "b@example.org"
    message["Subject"] = "Überraschung im Büro"
    message["Date"] = "Mon, 02 Mar 2026 10:00:00 +0000"
    message.set_content("Grüße,\nZoë\n", charset="iso-8859-1")
    message.add_alternative("<p>Grüße</p>", subtype="html")
    message.add_attachment(b"# Plan\n\ntext", maintype="text", subtype="markdown", filename="plan.md")
    message.add_attachment(b"\x89PNG\r\n\x1a\n", maintype="image", subtype="png", filename="photo.png")
    inner = EmailMessage()
    inner["Subject"] = "Before"
    inner.set_content("The older message.")
    message.add_attachment(inner)

    parsed = parse(message.as_bytes(), "a.eml")

    assert parsed.text.startswith(
        "Überraschung im Büro\n\nFrom: Zoë <zoe@example.org>\nTo: b@example.org\n"
        "Date: Mon, 02 Mar 2026 10:00:00 +0000\n\nGrüße,\nZoë\n\nplan.md\n\n# Plan\n\ntext\n\nphoto.png\n\n(This is a PNG"
    )
    assert parsed.text.endswith("message.eml\n\nBefore\n\nThe older message.")
    assert headings_of(parsed)[:3] == [(1, "Überraschung im Büro"), (2, "plan.md"), (3, "Plan")]


def test_a_message_without_an_extension_is_known_by_its_first_header() -> None:
    """As mail servers keep them."""
    assert parse(b"Return-Path: <a@b.org>\r\nSubject: Hi\r\n\r\nText\r\n", "1699.M1P2").text == (
        "Return-Path: <a@b.org>\nSubject: Hi\n\nText\n"
    )
    assert parse(b"Return-Path: <a@b.org>\r\nSubject: Hi\r\n\r\nText\r\n", "message").text == "Hi\n\nText"


def test_an_ebook_is_read_in_the_order_of_its_spine() -> None:
    """Not of its archive; without the table of contents; with entities that XML does not know."""
    data = ebook(
        {"two": "<h1>Begin</h1><p>One&nbsp;two &mdash; three.</p>", "one": "<h2>End</h2><p>Last.</p>"}
    )

    parsed = parse(data, "a.epub")

    assert parsed.text == "Begin\n\nOne two — three.\n\nEnd\n\nLast."
    assert headings_of(parsed) == [(1, "Begin"), (2, "End")]
    with pytest.raises(EncryptedError):
        parse(ebook({"one": "<p>x</p>"}, encryption="OEBPS/one.xhtml"), "a.epub")
    assert parse(ebook({"one": "<p>x</p>"}, encryption="OEBPS/font.otf"), "a.epub").text == "x"


def test_an_ebook_keeps_its_notes() -> None:
    """They stand beside the text of a chapter as menus stand beside that of a page."""
    data = ebook(
        {
            "one": "<header><h1>Begin</h1><p>For Ann</p></header><p>One.</p><aside>A note.</aside>",
            "two": "<nav><p>Contents</p></nav>",
        }
    )

    assert parse(data, "a.epub").text == "Begin\n\nFor Ann\n\nOne.\n\nA note."


def test_an_opendocument_text_has_its_headings_lists_notes_tables_and_margins() -> None:
    """The header of its pages stands first, the footer last, a note where its mark is."""
    data = opendocument(
        "text",
        '<text:h text:outline-level="2">Title</text:h><text:p>One<text:s text:c="2"/>two<text:note>'
        "<text:note-citation>1</text:note-citation><text:note-body><text:p>aside</text:p></text:note-body></text:note>."
        "<office:annotation><text:p>no</text:p></office:annotation></text:p>"
        "<text:list><text:list-item><text:p>first</text:p></text:list-item></text:list>"
        "<table:table><table:table-row><table:table-cell><text:p>a</text:p></table:table-cell>"
        "<table:table-cell><text:p>b</text:p></table:table-cell></table:table-row></table:table>",
        styles="<style:header><text:p>Head</text:p></style:header><style:footer><text:p>Foot</text:p></style:footer>",
    )

    parsed = parse(data, "a.odt")

    assert parsed.text == "Head\n\nTitle\n\nOne  two (aside).\n\n- first\n\na | b\n\nFoot"
    assert headings_of(parsed) == [(2, "Title")]
    with pytest.raises(EncryptedError):
        parse(opendocument("text", "", manifest="<encryption-data/>"), "a.odt")


def test_an_opendocument_sheet_that_repeats_an_empty_cell_a_million_times_is_short() -> None:
    """Sheets end so; a cell that is repeated with a value is as many cells."""
    data = opendocument(
        "spreadsheet",
        '<table:table table:name="Sheet"><table:table-row><table:table-cell table:number-columns-repeated="2"><text:p>x'
        '</text:p></table:table-cell><table:table-cell table:number-columns-repeated="16384"/></table:table-row>'
        '<table:table-row table:number-rows-repeated="1048576"><table:table-cell/></table:table-row></table:table>',
    )

    assert parse(data, "a.ods").text == "Sheet\n\nx | x"


def test_opendocument_slides_are_pages() -> None:
    """With the title of each as its heading."""
    slide = (
        '<draw:page><draw:frame presentation:class="title"><draw:text-box><text:p>{0}</text:p></draw:text-box>'
        "</draw:frame><draw:frame><draw:text-box><text:p>body</text:p></draw:text-box></draw:frame></draw:page>"
    )

    parsed = parse(opendocument("presentation", slide.format("One") + slide.format("Two")), "a.odp")

    assert parsed.text == "One\n\nbody\n\nTwo\n\nbody"
    assert (headings_of(parsed), parsed.page_starts) == ([(1, "One"), (1, "Two")], (0, 11))


def test_rich_text_is_its_text_without_control_words() -> None:
    """Pictures, styles and fonts are left out; letters beyond ASCII are decoded in each of the ways they are written."""
    source = (
        rb"{\rtf1\ansi\ansicpg1252{\fonttbl{\f0 Times New Roman;}}{\stylesheet{\s1 Style;}}\f0 Caf\'e9 \u8364? \u-10179?\u-8704?\par "
        rb"{\b Bold} text\par {\pict\pngblip " + b"89504e470d0a1a0a" * 100 + rb"}\trowd A\cell B\cell\row }"
    )

    assert parse(source, "a.doc").text == "Café € 😀\nBold text\nA|B"


def test_data_is_read_with_the_names_that_lead_to_it() -> None:
    """Each record is a paragraph, numbers stay as they are written."""
    data = [
        {"name": "Ann", "born": {"year": 1970, "town": None}, "tags": ["a", "b"]},
        {"name": "Bo", "price": 1.10},
    ]

    expected = "name: Ann\nborn.year: 1970\ntags: a, b\n\nname: Bo\nprice: 1.10"
    source = json.dumps(data).replace("1.1}", "1.10}")
    assert parse(source.encode(), "a.json").text == expected
    lines = "\n".join(line.replace("1.1}", "1.10}") for line in map(json.dumps, data))
    assert parse(lines.encode(), "a.jsonl").text == expected
    assert parse(b'{"no": "JSON",}', "a.json").text == '{"no": "JSON",}'


def test_data_that_is_nested_without_end_is_text_as_it_is_written() -> None:
    """Python's parser of JSON would run out of stack."""
    assert parse(b"[" * 100_000 + b"1", "a.json").text.endswith("[1")


def test_a_notebook_is_its_prose_its_code_and_what_that_printed() -> None:
    """Pictures and settings are left out."""
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Prose."]},
        {
            "cell_type": "code",
            "source": "print(1)",
            "outputs": [{"text": ["1\n"]}, {"data": {"image/png": "iVBOR", "text/plain": "<Figure>"}}],
        },
    ]

    parsed = parse(json.dumps({"cells": cells, "metadata": {"kernel": "x"}}).encode(), "a.ipynb")

    assert parsed.text == "# Title\n\nProse.\n\nprint(1)\n\n1\n\n<Figure>"
    assert headings_of(parsed) == [(1, "Title")]


@pytest.mark.parametrize(
    ("name", "source", "titles"),
    [
        (
            "a.py",
            "import os\n\nclass A:\n    def b(self):\n        ...\n",
            [(1, "class A"), (2, "def b(self)")],
        ),
        ("a.rs", "pub async fn run() {\n}\nimpl Foo {\n", [(1, "pub async fn run()"), (1, "impl Foo")]),
        ("a.ts", "export default class X {\n", [(1, "export default class X")]),
        ("a.sql", "CREATE TABLE book (\n  id int\n);\n", [(1, "CREATE TABLE book")]),
        ("a.php", "namespace app\\models;\n", [(1, "namespace app\\models;")]),
        ("a.cpp", "class EXPORT Foo : public Bar {\n", [(1, "class EXPORT Foo : public Bar")]),
        ("a.go", "func (r *Row) Name(a int) error {\n", [(1, "func (r *Row) Name(a int) error")]),
        ("a.yaml", "class: none\nkey: value\n", []),
    ],
)
def test_source_code_stays_as_written_and_its_definitions_are_headings(
    name: str, source: str, titles: list[tuple[int, str]]
) -> None:
    """A passage of code then says of which function it is."""
    parsed = parse(source.encode(), name)

    assert (parsed.text, headings_of(parsed)) == (source, titles)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", 'def a(\n    b,\n):\n    """About\n\n    class and\n    def c(d):\n    """\n'),
        ("a.pyi", "# it's\n# here\ndef a(\n): ...\nb = '''\nclass X:\n'''\n"),
        ("b.py", "fn = tmp / 'a'\nfunc = b(fn)\nsub = c[0]\ndef a(\n): ...\n"),
        ("a.js", "/*\nfunction is called when\nobject with the key\n*/\nfunction a(\nb) {\n}\n"),
    ],
)
def test_sentences_of_source_code_define_nothing(name: str, source: str) -> None:
    """Nor do names that are keywords of other languages."""
    (title,) = [title for _, title in headings_of(parse(source.encode(), name))]

    assert title in ("def a", "function a")


COMPOUND = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "WebP"),
        (b"\x00\x00\x00\x18ftypmp42" + b"\0" * 100, "MP4"),
        (b"\x00\x00\x00\x18ftypheic" + b"\0" * 100, "HEIC"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
        (b"(\xb5/\xfd" + b"x" * 40, "Zstandard"),
        (b"PAR1" + b"\0" * 40, "Parquet"),
        (COMPOUND + "WordDocument".encode("utf-16-le"), r"Word document \(.doc\)"),
        (COMPOUND + "__substg1.0_0037001F".encode("utf-16-le"), "Outlook"),
        (archive({"META-INF/MANIFEST.MF": "x"}), "Java archive"),
        (archive({"xl/workbook.bin": "x"}), "xlsb"),
        (archive({"a/b.txt": "x"}), "ZIP archive"),
    ],
)
def test_what_is_not_taken_is_named_with_its_true_kind(data: bytes, kind: str) -> None:
    """Whatever its name says."""
    with pytest.raises(UnsupportedError, match=kind):
        parse(data, "report.txt")


@pytest.mark.parametrize("word", ["MZ", "OTTO", "RIFF", "PAR1", "GIF8", "ID3", "BZh"])
def test_text_that_begins_as_a_kind_of_binary_data_does_is_text(word: str) -> None:
    """Magic numbers of letters are words too."""
    assert parse(f"{word} is a word.".encode(), "a.txt").text == f"{word} is a word."


def test_any_name_with_any_bytes_is_parsed_or_refused_with_a_reason() -> None:
    """Each format is given the bytes of each other, whole and cut off."""
    samples = [
        docx_with_margins(),
        presentation(),
        workbook({"a": [["b"]]}),
        ebook({"a": "b"}),
        b"{\\rtf1 {x",
        b'{"a',
    ]
    for data in samples:
        for part in (data, data[: len(data) // 2], data[:-10]):
            for name in ("a.docx", "a.csv", "a.eml", "a.json", "a.ipynb", "a.py", "a.odt", "a.html"):
                assert text_or_reason(part, name).strip()
