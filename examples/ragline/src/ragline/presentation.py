"""Search, status, lists and controls in a terminal: what is asked of the use cases, and how it is printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text
from sqlalchemy.orm import Session

from ragline.app import alchemy, app, create_tables, reading_session, settings
from ragline.excerpts import excerpt
from ragline.progress import Failure, Order, Progress, entries, failures, measure, number_of_documents
from ragline.states import NO_EMBEDDER, State
from ragline.steps import Steps, count_steps
from ragline.text import Span
from ragline.transactions import in_transaction
from ragline.words import marked_spans
from ragline.workers import running_workers

if TYPE_CHECKING:  # imported late: lists need neither vectors nor parsers
    from ragline.asking import Answer
    from ragline.naming import Named, Target
    from ragline.searching import Passage


@dataclass(frozen=True, slots=True)
class Status:
    """All that `ragline status` shows."""

    progress: Progress
    failures: list[Failure]
    steps: Steps
    workers: list[str] | None
    search: str

    def as_json(self) -> dict[str, object]:
        """The status as JSON has it."""
        return {
            "documents": {state.value: self.progress.documents.get(state, 0) for state in State},
            "chunks": self.progress.chunks,
            "embedded": self.progress.embedded,
            "messages": self.steps.rows,
            "workers": self.workers,
            "search": self.search,
            "failures": [asdict(failure) for failure in self.failures],
        }


def print_passages(found: list[Passage], query: str, console: Console, *, is_full: bool = False) -> None:
    """Print passages with their citations, the words of the query marked in the quotes.

    Args:
        found: the passages.
        query: what was asked.
        console: where a terminal shows some lines of each around the first of these words; where there is
            none the quotes are exact.
        is_full: show whole passages in a terminal too.
    """
    marks = partial(marked_spans, query=query)
    for number, passage in enumerate(found, start=1):
        heading = Text(f"{number}. ", style="bold").append(passage.citation, style="bold cyan")
        if passage.heading:
            heading.append(f"  {passage.heading}", style="italic")
        console.print(heading, soft_wrap=True)
        also = [Text("near in meaning", style="cyan")] if passage.is_near else []
        also.extend(Text(f"also in {place.citation}", style="cyan") for place in passage.also[:MAX_ALSO])
        if len(passage.also) > MAX_ALSO:
            also.append(Text(f"and in {len(passage.also) - MAX_ALSO} more places", style="cyan"))
        for line in also:
            console.print(Padding(line, (0, 0, 0, 3)), soft_wrap=True)
        print_quote(passage.quote, marks, console, indent=3, is_full=is_full)


def print_quote(
    quote: str, marks: Callable[[str], Sequence[Span]], console: Console, *, indent: int, is_full: bool
) -> None:
    """Print a quote, the part around the first mark unless it is wanted in full; exactly for programs."""
    if not console.is_terminal:
        console.file.write(f"{quote}\n\n")  # rich would make spaces of tabs
        return
    found = marks(quote)
    shown = Text(quote if is_full else excerpt(quote, found[0][0] if found else 0))
    for start, end in marks(shown.plain):
        shown.stylize("bold yellow", start, end)
    console.print(Padding(shown, (0, 0, 1, indent)))


MAX_ALSO = 3
"""How many of the other places of a passage are named."""


def print_answer(answer: Answer, console: Console, *, is_full: bool = False) -> None:
    """Print an answer, then the passages that it cites with their numbers, then what is to be known of it."""
    if answer.checked is not None:
        text = Text()
        for part in answer.checked.parts:
            style = "bold cyan" if part.citation else "strike" if part.is_unverified else ""
            text.append(part.text, style=style)
        console.print(text, soft_wrap=not console.is_terminal)
        console.print()
        for number in answer.checked.cited:
            passage = answer.passages[number - 1]
            console.print(Text(f"[{number}] ", style="bold cyan").append(passage.citation), soft_wrap=True)
            quoted = [one.text for one in answer.checked.quoted if one.passage == number]
            marks = partial(_quotations, quoted=quoted)
            print_quote(passage.quote, marks, console, indent=4, is_full=is_full)
    for note in answer.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def _quotations(text: str, quoted: Sequence[str]) -> list[Span]:
    found = [(text.find(one), len(one)) for one in quoted]
    return sorted((start, start + length) for start, length in found if start >= 0)


def read_status() -> Status:
    """Count the rows and ask the workers."""
    from ragline.retrieval import has_search_embedder

    create_tables(alchemy)
    with reading_session() as session:
        progress, failed = measure(session), failures(session)
    search = "keywords and vectors" if has_search_embedder() else "keywords only"
    return Status(progress, failed, count_steps(), running_workers(app), search)


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
    steps = status.steps
    console.print(
        f"Steps: {steps.waiting} wait, {steps.begun} begun or about to be,"
        f" {steps.dead} given up with their document."
    )
    if status.workers is None:
        told = f"Workers: unknown, the broker {settings.broker_name} does not answer."
        console.print(told, soft_wrap=True, markup=False, highlight=False)
    else:
        names = ", ".join(status.workers) or "none is running (`ragline worker` starts one)"
        console.print(f"Workers: {names}.")
    places: dict[int, list[Failure]] = {}
    for failure in status.failures:
        places.setdefault(failure.document_id, []).append(failure)
    for first, *others in places.values():
        # One that cannot be read as it is wants no attention every day.
        style = "dim" if first.is_permanent else "red"
        line = Text("  failed ", style=style).append(first.name, style="bold")
        if others:
            line.append(f", also {others[0].name}" + (f" and {len(others) - 1} more" if others[1:] else ""))
        console.print(line.append(f": {first.reason}"), soft_wrap=True)


LISTED = 50
"""How many documents a person is shown who does not say how many."""


def list_documents(
    state: State | None, called: str, order: Order, limit: int | None, console: Console, *, as_json: bool
) -> None:
    """Print documents with their ids, and how many more there are."""
    create_tables(alchemy)
    states = tuple(State) if state is None else (state,)
    with reading_session() as session:
        number = number_of_documents(session, states, called)
        shown = limit or (number if as_json else LISTED)
        found = entries(session, limit=shown, states=states, called=called, order=order)
    if as_json:
        rows = [asdict(entry) | {"since": entry.since and entry.since.isoformat()} for entry in found]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    name = Column("document", overflow="fold")
    table = Table("id", name, "state", "chunks", "embedded", Column("reason", overflow="fold"))
    for entry in found:
        numbers = (str(entry.chunks), str(entry.embedded))
        table.add_row(str(entry.id), Text(entry.name), entry.state.value, *numbers, Text(entry.reason or ""))
    if not found:
        console.print("No document is called so." if called else "No documents.")
        return
    unbounded(console).print(table)
    if number > len(found):
        console.print(f"{number - len(found)} more: `--limit {number}` shows all.")


def unbounded(console: Console) -> Console:
    """The console of a person; for a file or a program one that cuts and wraps nothing."""
    return console if console.is_terminal else Console(file=console.file, width=UNBOUNDED)


UNBOUNDED = 1_000_000


def act(
    references: Sequence[str], control: Callable[[Session, int], None], done: str, console: Console
) -> None:
    """Do something with the documents that a person named: with all of them, or with none.

    Raises:
        NoSuchDocumentError: one of them is not there.
        NotPossibleError: one of them is in a state in which this cannot be done.
    """
    from ragline.naming import find_document

    create_tables(alchemy)

    def act_on_all(session: Session) -> list[Named]:
        named = {one.document_id: one for one in (find_document(session, name) for name in references)}
        for document_id in named:
            control(session, document_id)
        return list(named.values())

    for one in in_transaction(act_on_all):
        told = f"{one.label} ({one.document_id}){_and_others(one.others)}: {done}."
        console.print(escape(told), soft_wrap=True)


def delete(references: Sequence[str], console: Console, *, is_asked: bool) -> bool:
    """Delete what a person named: all of it, or nothing.

    Args:
        references: ids, paths, folders or names.
        console: where to tell of it.
        is_asked: whether the person is asked first; no transaction is open meanwhile.

    Returns:
        Whether it was deleted: not where the person said no.

    Raises:
        NoSuchDocumentError: one of them is not there.
        AmbiguousNameError: several places are called so.
        typer.Abort: the person gave no answer.
    """
    from ragline import controls
    from ragline.naming import find_target

    create_tables(alchemy)

    def find_all(session: Session) -> list[Target]:
        return list(dict.fromkeys(find_target(session, name) for name in references))

    confirmed = _confirmed(find_all, console) if is_asked else None
    if is_asked and not confirmed:
        return False

    def delete_all(session: Session) -> list[Target]:
        targets = confirmed or find_all(session)
        controls.delete_targets(session, targets)
        return targets

    for target in in_transaction(delete_all):
        name, stays = _told_of(target)
        console.print(escape(f"{name}: deleted{stays}."), soft_wrap=True)
    return True


def _confirmed(find_all: Callable[[Session], list[Target]], console: Console) -> list[Target]:
    """What is to be deleted, once the person has read what it is and said yes; else nothing."""
    from ragline.naming import passages_lost

    with reading_session() as session:
        targets = find_all(session)
        lost = passages_lost(session, targets)
    for target in targets:
        console.print(escape("".join(_told_of(target))), soft_wrap=True)
    these = "this" if len(targets) == 1 else "these"
    passages = f", with {lost} passage{'s' if lost != 1 else ''}" if lost else ""
    is_sure = False
    try:
        is_sure = typer.confirm(f"Delete {these}{passages}? It cannot be undone.")
    except typer.Abort:
        console.print()  # it stands behind the question
        raise
    finally:
        if not is_sure:
            console.print("Nothing was deleted.")
    return targets if is_sure else []


def _told_of(target: Target) -> tuple[str, str]:
    """What is deleted, and where it stays."""
    if target.is_folder:
        places = len(target.source_ids or ())
        return f"{target.label} ({places} place{'s' if places != 1 else ''})", ""
    named = f"{target.label} ({', '.join(str(key) for key in target.document_ids)})"
    if target.source_ids is None:
        return f"{named}{_and_others(target.others)}", ""
    return named, f"; it stays in {_others(target.others)}" if target.others else ""


def _and_others(number: int) -> str:
    return f" and {_others(number)}" if number else ""


def _others(number: int) -> str:
    return "1 other place" if number == 1 else f"{number} other places"


def retry_failed(console: Console) -> None:
    """Queue all documents again that failed for a reason that may pass."""
    from ragline import controls

    create_tables(alchemy)
    retried = in_transaction(controls.retry_failed)
    with alchemy.session() as session:
        left = measure(session).documents.get(State.FAILED, 0)
    console.print(
        f"{len(retried)} queued again; {left} failed for reasons that trying again does not change."
    )
    if retried:
        tell_if_nobody_works(console)


def tell_if_nobody_works(console: Console) -> None:
    """Say so where there is no worker for what was queued just now."""
    from ragline.following import missing_workers

    names = settings.queue_names
    needed = [names["parsing"]] if settings.embedder == NO_EMBEDDER else list(names.values())
    missing = missing_workers(needed)
    if missing is not None:
        console.print(f"[yellow]{escape(str(missing))}[/yellow]", soft_wrap=True)
