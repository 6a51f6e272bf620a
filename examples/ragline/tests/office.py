"""Small documents of office formats, made by a library, or by hand."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO

import docx
import openpyxl
import pptx

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_ODF = " ".join(
    f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{long}:1.0"'
    for name, long in (
        ("office", "office"),
        ("text", "text"),
        ("table", "table"),
        ("draw", "drawing"),
        ("presentation", "presentation"),
        ("style", "style"),
    )
)


def archive(members: Mapping[str, str | bytes], *, stored: tuple[str, ...] = ("mimetype",)) -> bytes:
    """A ZIP archive."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content, zipfile.ZIP_STORED if name in stored else None)
    return stream.getvalue()


def raw_docx(body: str) -> bytes:
    """A Word document with this XML as its body."""
    document = f'<w:document xmlns:w="{_WORD}"><w:body>{body}</w:body></w:document>'
    return archive({"word/document.xml": document})


def docx_with_margins() -> bytes:
    """A Word document with a header, a footer, and a page number."""
    document = docx.Document()
    document.add_heading("The title", 1)
    document.add_paragraph("The body.")
    section = document.sections[0]
    section.header.paragraphs[0].text = "ACME Corporation, confidential"
    section.footer.paragraphs[0].text = "Contract 4711"
    section.different_first_page_header_footer = True
    section.first_page_header.paragraphs[0].text = "ACME Corporation, confidential"
    section.first_page_footer.paragraphs[0].text = "- 1 -"
    stream = BytesIO()
    document.save(stream)
    return stream.getvalue()


def presentation() -> bytes:
    """Two slides: a title with bullets and notes, a table."""
    deck = pptx.Presentation()
    first = deck.slides.add_slide(deck.slide_layouts[1])
    first.shapes.title.text = "Savepoints"
    first.placeholders[1].text = "They nest\nThey roll back alone"
    first.notes_slide.notes_text_frame.text = "Say why this matters."
    second = deck.slides.add_slide(deck.slide_layouts[5])
    second.shapes.title.text = "Costs"
    table = second.shapes.add_table(2, 2, 0, 0, 100, 100).table
    for row, column, text in ((0, 0, "item"), (0, 1, "price"), (1, 0, "pen"), (1, 1, "3")):
        table.cell(row, column).text = text
    stream = BytesIO()
    deck.save(stream)
    return stream.getvalue()


def workbook(sheets: Mapping[str, list[list[object]]], formats: Mapping[str, str] | None = None) -> bytes:
    """A workbook; `formats` gives cells of its first sheet a number format."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    for cell, number_format in (formats or {}).items():
        book.worksheets[0][cell].number_format = number_format
    stream = BytesIO()
    book.save(stream)
    return stream.getvalue()


def opendocument(kind: str, body: str, styles: str = "", manifest: str = "") -> bytes:
    """An OpenDocument file: `kind` is text, spreadsheet or presentation."""
    members = {
        "mimetype": f"application/vnd.oasis.opendocument.{kind}",
        "content.xml": f"<office:document-content {_ODF}><office:body><office:{kind}>{body}</office:{kind}>"
        "</office:body></office:document-content>",
        "styles.xml": f"<office:document-styles {_ODF}>{styles}</office:document-styles>",
        "META-INF/manifest.xml": f"<manifest>{manifest}</manifest>",
    }
    return archive(members)


def ebook(chapters: Mapping[str, str], encryption: str = "") -> bytes:
    """An e-book whose spine has the chapters in the order of the mapping."""
    items = "".join(
        f'<item id="{name}" href="{name}.xhtml" media-type="application/xhtml+xml"/>' for name in chapters
    )
    spine = "".join(f'<itemref idref="{name}"/>' for name in ("nav", *chapters))
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
        '<rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        "OEBPS/book.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest>'
        '<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
        f"{items}</manifest><spine>{spine}</spine></package>",
        "OEBPS/nav.xhtml": "<html><body><p>Table of contents</p></body></html>",
    }
    for name, body in sorted(chapters.items()):
        members[f"OEBPS/{name}.xhtml"] = (
            '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml">'
            f"<head><title>x</title></head><body>{body}</body></html>"
        )
    if encryption:
        members["META-INF/encryption.xml"] = (
            '<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#">'
            f'<enc:CipherReference URI="{encryption}"/></encryption>'
        )
    return archive(members)
