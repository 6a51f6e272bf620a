"""Parsing: each format to text, every bad document to a reason that a person understands."""

from __future__ import annotations

import re
import zipfile
from email.message import EmailMessage
from io import BytesIO
from pathlib import Path

import docx
import pypdfium2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from office import ebook
from ragline.errors import (
    DamagedError,
    DocumentError,
    EmptyError,
    EncryptedError,
    ScannedError,
    UnsupportedError,
)
from ragline.parsers import parse
from ragline.text import ParsedText


def pdf_of(*pages: str) -> bytes:
    """A PDF with a line of text on each page, written by hand."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for page in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({page}) Tj ET".encode()
        number = len(objects) + 1
        kids.append(f"{number} 0 R")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R /Resources"
            " << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    body = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, len(body))
    return body + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + tail


def headings_of(parsed: ParsedText) -> list[tuple[int, str]]:
    """The levels and titles of all headings; each stands in the text where it says it does."""
    for heading in parsed.headings:
        assert heading.title in parsed.text[heading.start : heading.start + len(heading.title) + 20]
    return [(heading.level, heading.title) for heading in parsed.headings]


def test_markdown_keeps_its_text_and_knows_its_headings() -> None:
    """Both styles of headings count, those in fenced code do not."""
    source = "# One\n\ntext\n\nTwo\n---\n\n```\n# no heading\n```\n\n### Three ###\n"

    parsed = parse(source.encode(), "a.md")

    assert parsed.text == source
    assert headings_of(parsed) == [(1, "One"), (2, "Two"), (3, "Three")]


def test_restructuredtext_ranks_its_headings_by_first_use() -> None:
    """The first style is level 1, overlined ones are a style of their own, tables and literals are no headings."""
    source = "====\nTop\n====\n\nFirst\n-----\n\ntext\n\nDeeper\n~~~~~~\n\nSecond\n------\n\n=== ===\n a   b\n=== ===\n"

    parsed = parse(source.encode(), "a.rst")

    assert parsed.text == source
    assert headings_of(parsed)[:4] == [(1, "Top"), (2, "First"), (3, "Deeper"), (2, "Second")]


def test_html_gives_what_a_reader_sees() -> None:
    """Scripts, styles, comments, menus and permalinks are left out; tables and line breaks are kept apart."""
    source = (
        "<!doctype html><html><head><title>no</title><script>bad()</script></head><body><nav>menu</nav>"
        "<div role=navigation><h3>Table of Contents</h3></div>"
        "<h1>Title &amp; more<a class=headerlink href=#>¶</a></h1><p>One <b>bold</b>\n word.<!-- no --><br>Line</p><style>p{}</style>"
        "<ul><li>first<li>second</ul><table><tr><th>a<th>b</tr><tr><td>1<td>2</tr></table><pre>x\n  y</pre></body>"
    )

    parsed = parse(source.encode(), "page.html")

    assert parsed.text.rstrip() == (
        "Title & more\n\nOne bold word.\nLine\n\n- first\n- second\n\na | b\n1 | 2\n\nx\n  y"
    )
    assert headings_of(parsed) == [(1, "Title & more")]


BESIDE = (
    "<nav>Home</nav>",
    "<header>The site <p>Subscribe now</header>",
    "<footer>Imprint of the site</footer>",
    "<aside>Related pages</aside>",
    "<div role=navigation>Up</div>",
    "<div role=banner>The site</div>",
    "<div role=contentinfo>Terms</div>",
    "<div role=search>Find</div>",
    "<div role=complementary>Related pages</div>",
    "<div hidden>Not yet</div>",
    "<div aria-hidden=true>Icon</div>",
    "<div class=navheader><table><tr><td>Prev<td>Next</table></div>",
    "<div class='menu mainmenu'><ul><li><a>Home</a><li><a>Menu</a><li><a>About</a></ul></div>",
)


@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_the_text_of_a_page_is_left_out(beside: str) -> None:
    """Also where no `<main>` says what it is about, before it and after it."""
    text = "<div><p>Whales sing.</div>"

    assert parse(f"<body>{beside}{text}".encode(), "a.html").text == "Whales sing."
    assert parse(f"<body><div>{beside}</div>{text}{beside}".encode(), "a.html").text == "Whales sing."


@pytest.mark.parametrize("beside", BESIDE)
def test_a_page_of_nothing_else_keeps_its_text(beside: str) -> None:
    """It is what there is to be found; scripts are no text."""
    alone = parse(f"<body>{beside}<script>bad()</script>".encode(), "a.html").text

    seen = re.findall(r">([^<]+)<", beside)
    assert re.findall(r"\w+", alone) == " ".join(seen).split()


def test_the_title_of_a_page_is_kept_wherever_it_stands() -> None:
    """In the header of an article or section all is, and of the page's own header its only title."""
    section = (
        "<header><h2>Whales</h2><p>By Ahab</header><p>They sing.<aside>Not fish.</aside><footer>1851</footer>"
    )
    own = "<header>The site<h1>On whales</h1><p>Subscribe</header><p>They sing.<footer>Imprint</footer>"
    of_site = "<header><h1>The site</h1></header><h1>On whales</h1><p>They sing."

    for tag in ("section", "article"):
        twice = f"<{tag}>{section}</{tag}>" * 2
        kept = "Whales\n\nBy Ahab\n\nThey sing.\n\nNot fish.\n\n1851"
        assert parse(f"<body>{twice}".encode(), "a.html").text == f"{kept}\n\n{kept}"
    assert parse(own.encode(), "a.html").text == "On whales\n\nThey sing."
    assert parse(of_site.encode(), "a.html").text == "On whales\n\nThey sing."


@pytest.mark.parametrize(
    "formula",
    [
        "<span class=katex><span><math>m</math></span><span aria-hidden=true>E = mc2</span></span>",
        "<span class=MathJax><nobr aria-hidden=true>E = mc2</nobr><span><math>m</math></span></span>",
    ],
)
def test_formulas_are_read_as_they_are_seen(formula: str) -> None:
    """What is hidden from screen readers, which read MathML, is what others see."""
    assert parse(f"<p>So {formula}, you see.".encode(), "a.html").text == "So E = mc2, you see."


def test_real_pages_are_without_their_menus(documents: Path) -> None:
    """Of PostgreSQL's manual and SQLite's, and nothing else of them is gone."""
    for name, gone, kept in (
        ("pg15-mvcc-caveats.html", ("Prev", "Next", "Home"), "13.6. Caveats\n\nSome DDL commands"),
        ("sqlite-wal.html", ("- Purchase", "- Home"), "Choose any three.\n\nWrite-Ahead Logging"),
    ):
        text = parse((documents / name).read_bytes(), name).text
        assert not any(word in text for word in gone)
        assert kept in text


def test_html_is_recognised_by_its_content_and_read_in_its_declared_encoding() -> None:
    """A page without an extension in windows-1251 is read right."""
    source = '<!DOCTYPE html><meta charset="windows-1251"><p>Транзакция завершена'.encode("cp1251")

    assert parse(source, "download").text == "Транзакция завершена"


@pytest.mark.parametrize(
    "page",
    [
        '<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en"><body>{}',
        '<html xmlns:o="urn:schemas-microsoft-com:office:office"><body>{}<o:p></o:p>',
        '<svg xlink:href="#a"/>{}',
        '<div @click="go" :class="x" v-on:key.up="y">{}</div>',
        "<jane@example.org>{}",
        '<p "x">{}</p>',
        "<fb:like>{}</fb:like>",
        '<p 1="2" v:foo="bar">{}',
    ],
)
def test_names_that_xml_does_not_know_are_read(page: str) -> None:
    """As browsers do: of pages that Word, Vue or a person has written, of mail and of books."""
    text = "Whales sing in the sea."
    page = page.format(text)
    message = EmailMessage()
    message["Subject"] = "Whales"
    message.set_content(page, subtype="html")

    assert parse(page.encode(), "a.html").text == text
    assert text in parse(message.as_bytes(), "a.eml").text
    assert text in parse(ebook({"one": page}), "a.epub").text


def test_deeply_nested_html_is_read_without_recursion() -> None:
    """Fifty thousand open tags are no reason to fail."""
    parsed = parse(b"<html>" + b"<div>" * 50_000 + b"deep", "a.html")

    assert isinstance(parsed.text, str)
    assert "deep" in parsed.text


def test_pdf_knows_where_each_page_begins() -> None:
    """The offset of a page is where its text stands."""
    parsed = parse(pdf_of("First page", "Second page"), "a.pdf")

    assert len(parsed.page_starts) == 2
    assert parsed.text[parsed.page_starts[1] :].startswith("Second page")


def test_docx_keeps_headings_tables_and_order() -> None:
    """Paragraphs and tables come in the order of the document."""
    document = docx.Document()
    document.add_heading("The title", 1)
    document.add_paragraph("Before the table.")
    table = document.add_table(rows=1, cols=2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.add_paragraph("After\tit.")
    stream = BytesIO()
    document.save(stream)

    parsed = parse(stream.getvalue(), "a.docx")

    assert parsed.text == "The title\n\nBefore the table.\n\nleft | right\n\nAfter\tit."
    assert headings_of(parsed) == [(1, "The title")]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Ελληνικά: η συναλλαγή ολοκληρώθηκε και τα δεδομένα αποθηκεύτηκαν στη βάση.", "cp1253"),
        ("Транзакция завершена, и данные сохранены в базе без ошибок и потерь.", "koi8-r"),
        ("資料庫交易必須提交或者回滾，否則資料會遺失。每一步都是一個交易。", "big5"),
        ("データベースのトランザクションは確定されるか、取り消されます。", "shift_jis"),
        ("데이터베이스 트랜잭션은 커밋되거나 롤백되어야 합니다. 그렇지 않으면 사라집니다.", "cp949"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-8"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-8-sig"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-16"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-16-be"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-16-le"),
        ("Ein Käfer läuft über die Straße; größer als früher.", "utf-32"),
    ],
)
def test_text_is_read_in_any_encoding(text: str, encoding: str) -> None:
    """Nobody says which encoding a file has; it is found."""
    assert parse((text * 3).encode(encoding), "a.txt").text == text * 3


@pytest.mark.parametrize("damage", [b"\xff", b"\xe2\x80", b"caf\xe9 "])
@pytest.mark.parametrize("place", [0, 70, 10_000])
def test_utf_8_with_a_bad_byte_is_utf_8(damage: bytes, place: int) -> None:
    """One byte makes no other text of all the others: it is shown as U+FFFD where it stands."""
    text = "Ein Käfer läuft über die Straße; größer als früher. "
    data = text.encode() * 3

    parsed = parse(data[:place] + damage + data[place:], "a.txt")
    page = parse(b'<meta charset="utf-8"><p>' + data + damage, "a.html")

    assert (parsed.encoding, parsed.text.count("\ufffd")) == ("utf-8", 1)
    assert parsed.text.replace("caf\ufffd ", "").replace("\ufffd", "") == text * 3
    assert page.text.startswith(text + text)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Käfer laufen über große Straßen, und Mäuse hören zu. ", "latin-1"),
        ("“Déjà vu” – l’été à la plage, où les élèves étaient. ", "cp1252"),
        ("Транзакция завершена, и данные сохранены. ", "koi8-r"),
        ("数据库事务必须提交或者回滚，否则数据会丢失。", "gb18030"),
        ("データベースのトランザクションは確定されます。", "shift_jis"),
        ("데이터베이스 트랜잭션은 커밋되거나 롤백되어야 합니다. ", "cp949"),
    ],
)
def test_words_of_a_code_page_are_no_damaged_utf_8(text: str, encoding: str) -> None:
    """Some pairs of their bytes are valid in it by chance: never so many."""
    assert "\ufffd" not in parse((text * 3).encode(encoding), "a.txt").text


def test_english_prose_with_much_punctuation_is_no_binary() -> None:
    """READMEs with tables, badges and code, which a guess by letters takes for binary data, are text."""
    source = b"\n".join([b"+" + b"=" * 75 + b"+", b"\t>>> # ''\"\"", b"|x| |y|", b"!~*  *.swp /*/ `x`_"] * 30)

    assert parse(source, "README.rst").text.startswith("+==")


def text_or_reason(data: bytes, name: str) -> str:
    """What a parser says: the text, or why there is none."""
    try:
        return parse(data, name).text
    except DocumentError as error:
        return str(error)


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_either_parsed_or_refused_with_a_reason(data: bytes) -> None:
    """No input makes a parser fail in another way, and what is parsed can be stored."""
    for name in ("a.txt", "a.md", "a.rst", "a.html"):
        text = text_or_reason(data, name)
        assert text.strip()
        assert text.encode("utf-8")
        assert "\x00" not in text
        assert "\r" not in text


def blank_pdf() -> bytes:
    """A PDF with a page and nothing on it, as a scan without recognised text is."""
    document = pypdfium2.PdfDocument.new()
    document.new_page(300, 300)
    stream = BytesIO()
    document.save(stream)
    return stream.getvalue()


def zip_of(name: str) -> bytes:
    """An archive with one file."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "<broken")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind", "reason"),
    [
        ("a.txt", b"", EmptyError, "empty"),
        ("a.txt", b" \n\t ", EmptyError, "white space"),
        ("a.html", b"<html><script>x()</script>", EmptyError, "no text"),
        ("a.txt", bytes(range(256)) * 20, UnsupportedError, "binary"),
        ("a.txt", b"\x89PNG\r\n\x1a\n...", UnsupportedError, "PNG"),
        ("a.pdf", b"not a PDF at all", DamagedError, r"\.pdf"),
        ("a.pdf", b"%PDF-1.7 broken", DamagedError, "damaged"),
        ("a.pdf", blank_pdf(), ScannedError, "scan"),
        ("a.docx", b"PK\x03\x04 broken", DamagedError, "broken"),
        ("a.docx", zip_of("word/document.xml"), DamagedError, "damaged"),
        ("a.zip", zip_of("a.txt"), UnsupportedError, "ZIP"),
        ("a.xlsx", zip_of("xl/workbook.xml"), DamagedError, "Excel"),
        ("a.pptx", zip_of("ppt/presentation.xml"), DamagedError, "PowerPoint"),
        ("a.odt", zip_of("content.xml"), UnsupportedError, "ZIP"),
        ("a.epub", zip_of("META-INF/container.xml"), DamagedError, "e-book"),
        ("a.rtf", b"no RTF", DamagedError, r"\.rtf"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, EncryptedError, "password"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600, UnsupportedError, "old"),
    ],
)
def test_a_bad_document_is_refused_with_its_reason(
    name: str, data: bytes, kind: type[DocumentError], reason: str
) -> None:
    """Each kind of bad document has an error of its own, in a whole sentence."""
    with pytest.raises(kind, match=reason) as caught:
        parse(data, name)

    assert str(caught.value).endswith(".")


REFUSED = {
    "markitdown-random.bin": UnsupportedError,
    "markitdown-scan-no-text.pdf": ScannedError,
    "pypdf-encrypted.pdf": EncryptedError,
}
ENCODINGS = {
    "legacy-chinese.txt": "big5",
    "legacy-greek.txt": "cp1253",
    "legacy-hebrew-2.txt": "cp1255",
    "legacy-korean.txt": "cp949",
    "legacy-russian.txt": "mac_cyrillic",
    "legacy-turkish.txt": "cp1254",
    "ragflow-readme-zh.gb18030.md": "gb18030",
    "ragflow-readme-zh.utf16.txt": "utf-16",
}


def test_real_documents_are_parsed_or_refused_as_they_should(documents: Path) -> None:
    """Every one of the real files gives text in its encoding, but for the three that cannot."""
    for file in sorted(documents.iterdir()):
        if file.name in REFUSED:
            with pytest.raises(REFUSED[file.name]):
                parse(file.read_bytes(), file.name)
            continue
        parsed = parse(file.read_bytes(), file.name)
        assert len(parsed.text) > 100, file.name
        if file.name in ENCODINGS:
            assert parsed.encoding == ENCODINGS[file.name], file.name


def test_the_same_text_in_three_encodings_is_the_same(documents: Path) -> None:
    """UTF-8, GB 18030 and UTF-16 of one document give one text."""
    names = ("ragflow-readme-zh.md", "ragflow-readme-zh.gb18030.md", "ragflow-readme-zh.utf16.txt")

    texts = {parse((documents / name).read_bytes(), name).text for name in names}

    assert len(texts) == 1


def test_equations_of_word_documents_are_kept(documents: Path) -> None:
    """What python-docx leaves out of a paragraph's text is there."""
    parsed = parse((documents / "markitdown-equations.docx").read_bytes(), "equations.docx")

    assert "sin" in parsed.text
    assert "2.2×10" in parsed.text
