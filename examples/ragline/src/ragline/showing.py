"""One document in the terminal: what is known of it, and its text."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from ragline.app import alchemy, create_tables, reading_session
from ragline.errors import ConfigurationError
from ragline.naming import find_document
from ragline.places import shown_path, visible
from ragline.reading import Detail, detail, excerpt
from ragline.states import State
from ragline.text import Span


def show(
    reference: str, console: Console, errors: Console, *, characters: str = "", as_json: bool = False
) -> bool:
    """Print the text of a document, and what is known of it to people beside it.

    Args:
        reference: an id, path or name.
        console: where the text goes, as it is.
        errors: where the rest goes, so that a program or a file gets the text alone.
        characters: only these of the text, such as 0-1200; all if it is empty.
        as_json: print all of it as JSON for programs.

    Returns:
        Whether there is a text.

    Raises:
        NoSuchDocumentError: it is not there.
        AmbiguousNameError: several documents are called so.
        ConfigurationError: the characters are no range.
    """
    span = _span_of(characters)
    create_tables(alchemy)
    with reading_session() as session:
        known = detail(session, find_document(session, reference).document_id)
        start, end = _within(known, span)
        text = None
        if known.characters is not None:
            text = excerpt(session, known.entry.id, start, end, around=0).quote
    if as_json:
        print(json.dumps(_as_json(known, start, text), ensure_ascii=False, indent=2))
        return text is not None
    _print_facts(known, errors)
    if text is None:
        errors.print(Text(_why_there_is_none(known), style="yellow"), soft_wrap=True)
        return False
    if console.is_terminal:  # a document tells it nothing; a program gets the text exactly
        text = "\n".join(visible(line.expandtabs()) for line in text.split("\n"))
    console.file.write(text if text.endswith("\n") else f"{text}\n")
    return True


def _span_of(characters: str) -> Span | None:
    """What search results say: 1200-1500; the page's commas and dash are understood too."""
    if not characters:
        return None
    found = re.fullmatch(r"(\d{1,9})[-–](\d{1,9})", characters.replace(",", "").strip())
    if found is None or int(found[1]) > int(found[2]):
        raise ConfigurationError(f"--characters {characters} is no range such as 0-1200.")
    return int(found[1]), int(found[2])


def _within(known: Detail, span: Span | None) -> Span:
    length = known.characters or 0
    if span is None:
        return 0, length
    return min(span[0], length), min(span[1], length)


def _print_facts(known: Detail, errors: Console) -> None:
    entry = known.entry
    errors.print(Text(f"{entry.name} ({entry.id})", style="bold"), soft_wrap=True)
    facts = [f"{entry.state.value}", f"{entry.size_bytes:,} bytes"]
    for count, what in ((known.pages, "page"), (known.characters, "character"), (entry.chunks, "passage")):
        if count:
            facts.append(f"{count:,} {what}{'s' if count != 1 else ''}")
    if known.encoding and known.encoding != "utf-8":
        facts.append(known.encoding)
    errors.print(Text(", ".join(facts), style="dim"), soft_wrap=True)
    for uri in entry.uris:
        errors.print(Text(shown_path(uri), style="dim"), soft_wrap=True)
    errors.print()


def _why_there_is_none(known: Detail) -> str:
    if known.entry.reason:
        return known.entry.reason
    if known.entry.state is State.CANCELLED:
        return "It was cancelled: its text is not kept."
    return "Its text is not read yet."


def _as_json(known: Detail, start: int, text: str | None) -> dict[str, object]:
    row = asdict(known.entry)
    return row | {
        "since": known.entry.since and known.entry.since.isoformat(),
        "reached": {state.value: at.isoformat() for state, at in known.reached.items()},
        "characters": known.characters,
        "pages": known.pages,
        "encoding": known.encoding,
        "embedder": known.embedder,
        "headings": [asdict(heading) for heading in known.headings],
        "start": start,
        "text": text,
    }
