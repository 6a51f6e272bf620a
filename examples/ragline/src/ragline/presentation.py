"""Search, status, lists and controls in a terminal: what is asked of the use cases, and how it is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from celery_alchemy.upkeep import status as count_messages
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from sqlalchemy.orm import Session

from ragline import controls
from ragline.app import alchemy, app, create_tables
from ragline.asking import Answer
from ragline.progress import Entry, Failure, Progress, entries, failures, measure
from ragline.retrieval import search_embedder, telling_words
from ragline.searching import Passage
from ragline.states import State
from ragline.transactions import in_transaction
from ragline.words import is_unspaced
from ragline.workers import running_workers


@dataclass(frozen=True, slots=True)
class Status:
    """All that `ragline status` shows."""

    progress: Progress
    failures: list[Failure]
    messages: dict[str, Any]
    workers: list[str] | None
    search: str

    def as_json(self) -> dict[str, object]:
        """The status as JSON has it."""
        return {
            "documents": {state.value: self.progress.documents.get(state, 0) for state in State},
            "chunks": self.progress.chunks,
            "embedded": self.progress.embedded,
            "messages": self.messages,
            "workers": self.workers,
            "search": self.search,
            "failures": [asdict(failure) for failure in self.failures],
        }


def print_passages(found: list[Passage], query: str, console: Console) -> None:
    """Print passages with their citations, the words of the query marked in the quotes."""
    if not found:
        console.print("Nothing found.")
    marks = _marks(query)
    for number, passage in enumerate(found, start=1):
        heading = Text(f"{number}. ", style="bold").append(passage.citation, style="bold cyan")
        if passage.heading:
            heading.append(f"  {passage.heading}", style="italic")
        console.print(heading, soft_wrap=True)
        quote = Text(passage.quote)
        if marks:
            quote.highlight_regex(marks, "bold yellow")
        console.print(Padding(quote, (0, 0, 1, 3)))


_ENDING = re.compile(r"(?<=\w{3})(?:ing|ed|es|s|e)$")


def _marks(query: str) -> re.Pattern[str] | None:
    """The words of a query in a text, also in their other forms: "savepoints" marks SAVEPOINT."""
    words = telling_words(query)
    stems = [re.escape(_ENDING.sub("", word)) for word in words if not is_unspaced(word)]
    alone = [re.escape(word) for word in words if is_unspaced(word)]
    parts = []
    if stems:
        parts.append(rf"\b(?:{'|'.join(stems)})\w*")
    if alone:
        parts.append(f"(?:{'|'.join(alone)})+")
    return re.compile("|".join(parts), re.IGNORECASE) if parts else None


def print_answer(answer: Answer, console: Console) -> None:
    """Print an answer, then the passages that it cites with their numbers, then what is to be known of it."""
    if answer.checked is not None:
        text = Text()
        for part in answer.checked.parts:
            style = "bold cyan" if part.citation else "strike" if part.is_unverified else ""
            text.append(part.text, style=style)
        console.print(text)
        console.print()
        for number in answer.checked.cited:
            passage = answer.passages[number - 1]
            console.print(Text(f"[{number}] ", style="bold cyan").append(passage.citation), soft_wrap=True)
            console.print(Padding(Text(passage.quote), (0, 0, 1, 4)))
    for note in answer.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def read_status() -> Status:
    """Count the rows and ask the workers."""
    create_tables(alchemy)
    with alchemy.session() as session:
        progress, failed = measure(session), failures(session)
    search = "keywords only" if search_embedder()[0] is None else "keywords and vectors"
    return Status(progress, failed, count_messages(alchemy.engine), running_workers(app), search)


def print_status(status: Status, console: Console) -> None:
    """Print documents by state, chunks, workers and failures."""
    table = Table("state", "documents")
    table.columns[1].justify = "right"
    for state in State:
        if number := status.progress.documents.get(state, 0):
            table.add_row(state.value, str(number))
    console.print(
        table if status.progress.total else "No documents yet: add some with `ragline ingest PATH`."
    )
    progress = status.progress
    console.print(f"{progress.chunks} chunks, {progress.embedded} with a vector; search by {status.search}.")
    counts = status.messages
    owed = counts["owed"] + counts["leased"]  # leased: some process is about to hand it over, or was
    console.print(f"Messages: {counts['waiting']} waiting, {owed} owed, {counts['dead']} dead.")
    if status.workers is None:
        console.print("Workers: unknown, the broker does not answer.")
    else:
        names = ", ".join(status.workers) or "none is running (`ragline worker` starts one)"
        console.print(f"Workers: {names}.")
    for failure in status.failures:
        line = Text("  failed ", style="red").append(failure.name, style="bold").append(f": {failure.reason}")
        console.print(line, soft_wrap=True)


def list_documents(state: State | None, limit: int, console: Console, *, as_json: bool) -> None:
    """Print the newest documents with their ids."""
    create_tables(alchemy)
    with alchemy.session() as session:
        found = entries(session, limit=limit, states=tuple(State) if state is None else (state,))
    if as_json:
        rows = [asdict(entry) | {"since": entry.since and entry.since.isoformat()} for entry in found]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    table = Table("id", "document", "state", "chunks", "embedded", "reason")
    for entry in found:
        numbers = (str(entry.chunks), str(entry.embedded))
        table.add_row(str(entry.id), Text(entry.name), entry.state.value, *numbers, Text(entry.reason or ""))
    console.print(table if found else "No documents.")


def act(
    references: Sequence[str], control: Callable[[Session, int], None], done: str, console: Console
) -> None:
    """Do something with the documents that a person named: with all of them, or with none.

    Raises:
        NoSuchDocumentError: one of them is not there.
        NotPossibleError: one of them is in a state in which this cannot be done.
    """
    create_tables(alchemy)

    def act_on_all(session: Session) -> list[Entry]:
        ids = [document_id for reference in references for document_id in controls.find(session, reference)]
        named = entries(session, limit=len(ids), document_ids=ids)
        for document_id in dict.fromkeys(ids):
            control(session, document_id)
        return named

    for entry in reversed(in_transaction(act_on_all)):
        console.print(f"{escape(entry.name)} ({entry.id}): {done}.", soft_wrap=True)


def retry_failed(console: Console) -> None:
    """Queue all documents again that failed for a reason that may pass."""
    create_tables(alchemy)
    retried = in_transaction(controls.retry_failed)
    with alchemy.session() as session:
        left = measure(session).documents.get(State.FAILED, 0)
    console.print(
        f"{len(retried)} queued again; {left} failed for reasons that trying again does not change."
    )
