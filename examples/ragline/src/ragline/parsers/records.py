"""JSON to text: each value on a line with the names that lead to it; notebooks as their cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Union

from ragline.limits import Limits
from ragline.parsers.markup import parse_markdown
from ragline.parsers.writer import TextWriter
from ragline.text import ParsedText, decode

_MAX_OUTPUT_CHARACTERS = 10_000
"""Of what a cell printed: logs of a training run are no text that anybody looks for."""

# Not `|`, which Python 3.10 cannot put between a type and a name of one.
Json = Union[dict[str, "Json"], list["Json"], str, bool, None]  # noqa: UP007


def parse_json(data: bytes, limits: Limits) -> ParsedText:
    """The values of a JSON document, or of one a line; as it is written where it is not valid.

    Raises:
        TooLargeError: it has more values or characters than the limits allow.
    """
    text, encoding = decode(data)
    limits.check("characters", len(text))
    limits.check("elements", text.count(":") + text.count(","))
    documents = _documents(text)
    if documents is None:
        return ParsedText(text=text, encoding=encoding)
    writer = TextWriter(limits)
    for document in documents:
        for record in document if isinstance(document, list) else [document]:
            writer.block("\n".join(_lines(record)))
    return writer.parsed(encoding)


def parse_notebook(data: bytes, limits: Limits) -> ParsedText:
    """The cells of a Jupyter notebook: prose with its headings, code, and what it printed.

    Raises:
        TooLargeError: it goes beyond a limit.
    """
    text, encoding = decode(data)
    notebook = _loaded(text)
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        return parse_json(data, limits)
    writer = TextWriter(limits)
    for cell in cells:
        if not isinstance(cell, dict):
            continue
        source = _joined(cell.get("source"))
        if cell.get("cell_type") == "markdown":
            writer.insert(parse_markdown(source.encode("utf-8", "replace"), limits))
        else:
            writer.block(source, is_code=cell.get("cell_type") == "code")
        outputs = cell.get("outputs")
        for output in outputs if isinstance(outputs, list) else []:
            writer.block(_output(output)[:_MAX_OUTPUT_CHARACTERS], is_code=True)
    return writer.parsed(encoding)


def _output(output: Json) -> str:
    if not isinstance(output, dict):
        return ""
    shown = output.get("data")
    return _joined(output.get("text")) or (
        _joined(shown.get("text/plain")) if isinstance(shown, dict) else ""
    )


def _joined(lines: Json) -> str:
    if isinstance(lines, list):
        return "".join(line for line in lines if isinstance(line, str))
    return lines if isinstance(lines, str) else ""


def _documents(text: str) -> list[Json] | None:
    whole = _loaded(text)
    if whole is not None:
        return [whole]
    lines = [line for line in text.split("\n") if line.strip()]
    loaded = [_loaded(line) for line in lines]
    return None if not loaded or None in loaded else loaded


def _loaded(text: str) -> Json:
    """The document; None where it is none, or nested too deeply."""
    try:
        # Numbers as they are written: 1.10 is no 1.1, and one of a million digits takes no time.
        document: Json = json.loads(text, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        return None
    return document


def _lines(document: Json) -> Iterator[str]:
    stack: list[tuple[str, Json]] = [("", document)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, dict):
            prefix = f"{path}." if path else ""
            stack.extend((f"{prefix}{name}", value[name]) for name in reversed(value))
        elif isinstance(value, list) and any(isinstance(member, dict | list) for member in value):
            stack.extend((path, member) for member in reversed(value))
        else:
            values = value if isinstance(value, list) else [value]
            shown = ", ".join(_shown(member) for member in values)
            if shown:
                yield f"{path}: {shown}" if path else shown


def _shown(value: Json) -> str:
    if value is None:
        return ""
    return ("true" if value else "false") if isinstance(value, bool) else str(value)
