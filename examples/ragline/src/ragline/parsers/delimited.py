"""CSV and its kin to text: a table that keeps its header row, whatever stands between the cells."""

from __future__ import annotations

import csv
from collections import Counter
from io import StringIO

from ragline.errors import DamagedError
from ragline.limits import Limits
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText, decode

_DELIMITERS = (",", ";", "\t", "|")
_SAMPLED_ROWS = 50


def parse_delimited(data: bytes, limits: Limits) -> ParsedText:
    """The rows of a file of values, one a line, cells apart by ` | `.

    Raises:
        DamagedError: it cannot be divided into rows.
        TooLargeError: it goes beyond a limit.
    """
    text, encoding = decode(data)
    limits.check("characters", len(text))
    csv.field_size_limit(limits.characters)
    writer = TextWriter(limits)
    try:
        writer.table(csv.reader(StringIO(text, newline=""), delimiter=_delimiter(text)))
    except csv.Error as error:
        raise DamagedError(f"The file cannot be read as a table: {error}.") from error
    return writer.parsed(encoding)


def _delimiter(text: str) -> str:
    """What divides the first rows most often into the same number of cells, more than one.

    `csv.Sniffer` takes letters for delimiters where a column has few values.
    """
    best, best_score = ",", (0, 0)
    for delimiter in _DELIMITERS:
        widths: Counter[int] = Counter()
        try:
            reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter)
            for row, _ in zip(reader, range(_SAMPLED_ROWS), strict=False):
                widths[len(row)] += 1
        except csv.Error:
            continue
        widths.pop(1, None)
        widths.pop(0, None)
        if widths:
            width, rows = widths.most_common(1)[0]
            best, best_score = max((best, best_score), (delimiter, (rows, width)), key=lambda pair: pair[1])
    return best
