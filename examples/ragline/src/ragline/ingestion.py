"""`ragline ingest` in a terminal: files taken in, followed with a progress bar, summed up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from ragline import controls
from ragline.app import alchemy, create_tables, settings
from ragline.embedders import available_embedder
from ragline.intake import Intake, Outcome, find_files, read_file
from ragline.progress import Progress as Counts
from ragline.progress import failures, measure
from ragline.recipes import recipe_for
from ragline.transactions import in_transaction

LOOK_SECONDS = 0.25
"""How often the progress bar counts rows."""


def choose_embedder(console: Console) -> str:
    """The name of the embedder to process documents with; says so when it is not the wanted one."""
    with console.status("Looking for the embedding model (84 MB the first time)"):
        embedder, missing = available_embedder(settings.embedder, settings.cache, settings.embeddings)
    if missing:
        console.print(f"[yellow]Keyword search only: {escape(missing)}[/yellow]")
    return embedder


def progress_bar(console: Console) -> Progress:
    """A progress bar as all commands show it; where there is little room it gives way, not the numbers."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=False,
    )


def take_in_files(
    paths: Sequence[Path],
    embedder: str,
    console: Console,
    taken: Callable[[dict[str, Outcome], Progress], None] | None = None,
) -> dict[str, Outcome]:
    """Take in every file below the paths, each in a transaction that also sends its first task.

    Args:
        paths: files and folders.
        embedder: the name of the embedder to process the documents with.
        console: where to draw.
        taken: called after each file, with the outcomes so far and the bar.

    Returns:
        What became of each, by its path.
    """
    create_tables(alchemy)
    recipe = recipe_for(embedder)
    outcomes: dict[str, Outcome] = {}
    left_out: list[Path] = []
    with progress_bar(console) as bar:
        files = list(find_files(paths, left_out))
        task = bar.add_task("taking in", total=len(files), note="")
        for file in files:
            offer = read_file(file, max_bytes=settings.max_bytes)
            outcomes[str(file)] = in_transaction(partial(controls.add, offer=offer, recipe=recipe))
            bar.advance(task)
            if taken is not None:
                taken(outcomes, bar)
    if left_out:
        console.print(_left_out(left_out), soft_wrap=True)
    return outcomes


def _left_out(files: Sequence[Path]) -> str:
    kinds = [kind for kind, _ in Counter(file.suffix.lower() or file.name for file in files).most_common(5)]
    were = "1 file of another kind was" if len(files) == 1 else f"{len(files)} files of other kinds were"
    return escape(f"{were} left out ({', '.join(kinds)}); a file that is named is taken.")


def unsettled(outcomes: dict[str, Outcome]) -> bool:
    """Whether any of the documents is still on its way."""
    counts = count(outcomes)
    return counts.settled < counts.total


def count(outcomes: dict[str, Outcome]) -> Counts:
    """The rows of these documents, counted now, in a transaction of its own."""
    with alchemy.session() as session:
        return measure(session, document_ids(outcomes))


def document_ids(outcomes: dict[str, Outcome]) -> list[int]:
    """The documents that files became, each once."""
    return sorted({outcome.document_id for outcome in outcomes.values()})


def follow(
    outcomes: dict[str, Outcome], console: Console, looked: Callable[[], None] | None = None
) -> Counts:
    """Show a progress bar, counted from rows, until every document is settled.

    Args:
        outcomes: the documents to follow.
        console: where to draw.
        looked: called after each look but the last; what it raises ends the following.

    Returns:
        The last counts.
    """
    with progress_bar(console) as bar:
        documents = bar.add_task("documents", total=None, note="")
        chunks = bar.add_task("chunks", total=None, note="")
        while True:
            counts = count(outcomes)
            states = ", ".join(f"{number} {state.value}" for state, number in counts.documents.items())
            bar.update(documents, completed=counts.settled, total=counts.total, note=states)
            bar.update(chunks, completed=counts.chunks - counts.unembedded, total=counts.chunks or None)
            if counts.settled == counts.total:
                return counts
            if looked is not None:
                looked()
            time.sleep(LOOK_SECONDS)


def print_summary(outcomes: dict[str, Outcome], console: Console) -> int:
    """Print what became of the files, and why some failed.

    Returns:
        How many documents failed.
    """
    with alchemy.session() as session:
        failed = failures(session, document_ids(outcomes))
    # A document that failed on its way was added or replaced first: each file is counted once, by how it
    # ended.
    failed_uris = {failure.uri for failure in failed}
    took = Counter(
        Intake.FAILED if Path(file).absolute().as_uri() in failed_uris else outcome.intake
        for file, outcome in outcomes.items()
    )
    parts = ", ".join(f"{took[intake]} {intake.value}" for intake in Intake if took[intake])
    files = f"{len(outcomes)} file{'s' if len(outcomes) != 1 else ''}"
    console.print(f"{files}: {parts}." if parts else "No files to take in.")
    for failure in failed:
        console.print(f"  [red]failed[/red] {escape(failure.name)}: {escape(failure.reason)}", soft_wrap=True)
    return len(failed)
