"""Excel workbooks to text: a heading for each sheet, each block of cells a table."""

from __future__ import annotations

import datetime as dt
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from io import BytesIO

import openpyxl
from openpyxl.utils.exceptions import InvalidFileException

from ragline.errors import DamagedError
from ragline.limits import Limits
from ragline.parsers.archives import Archive
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText

_SIGNIFICANT_DIGITS = 15
"""As many as Excel shows: 0.1 + 0.2 is 0.3 there."""


def parse_xlsx(data: bytes, limits: Limits) -> ParsedText:
    """The cells of a workbook as they were calculated last, sheet by sheet, row by row.

    Raises:
        DamagedError: it is a ZIP archive, but no readable workbook.
        TooLargeError: it goes beyond a limit.
    """
    archive = Archive(data, "Excel workbook", limits)
    for name in archive.names:
        if name.endswith(".xml"):
            archive.measure(name)  # openpyxl unpacks without a limit
    writer = TextWriter(limits)
    try:
        with warnings.catch_warnings():
            # Of what openpyxl cannot write again: nothing is written here.
            warnings.simplefilter("ignore", UserWarning)
            _write_sheets(data, limits, writer)
    except (
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        SyntaxError,
        zipfile.BadZipFile,
    ) as error:
        # openpyxl has no error of its own for most of what can be wrong; SyntaxError is its XML parser's.
        raise archive.damaged() from error
    except InvalidFileException as error:
        raise DamagedError(
            "The Excel workbook is of a kind that cannot be read: save it as .xlsx."
        ) from error
    return writer.parsed()


def _write_sheets(data: bytes, limits: Limits, writer: TextWriter) -> None:
    workbook = openpyxl.load_workbook(BytesIO(data), read_only=True, data_only=True, keep_links=False)
    for sheet in workbook.worksheets:
        # The size that the file claims would be filled with empty cells: a stray one makes it 17 billion.
        sheet.reset_dimensions()
        tables = list(_blocks(_rows(sheet.iter_rows())))
        if tables:
            writer.block(sheet.title, level=1)
        for rows in tables:
            while len(rows) > 1 and len(list(filter(None, rows[0]))) == 1 < len(list(filter(None, rows[1]))):
                writer.block(" ".join(filter(None, rows.pop(0))))  # a title above the header row
            writer.table(rows)


def _blocks(rows: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Tables: runs of rows with an empty row between."""
    block: list[list[str]] = []
    for row in rows:
        if any(row):
            block.append(row)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _rows(rows: Iterable[tuple[object, ...]]) -> Iterator[list[str]]:
    for row in rows:
        cells = [_text(getattr(cell, "value", None), getattr(cell, "number_format", "")) for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        yield cells


def _text(value: object, number_format: str) -> str:
    """A value as Excel would show it, or a date as ISO 8601 writes it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, dt.datetime):
        at_midnight = value.time() == dt.time()
        return value.date().isoformat() if at_midnight else value.isoformat(" ", "seconds")
    if isinstance(value, int | float):
        is_share = number_format.rstrip().endswith("%")
        shown = value * 100 if is_share else value
        return f"{shown:.{_SIGNIFICANT_DIGITS}g}%" if is_share else _number(shown)
    return str(value).strip()


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.{_SIGNIFICANT_DIGITS}g}"
