"""`ragline ingest` in a terminal: files taken in, followed with a progress bar, summed up."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ragline import pruning
from ragline.app import alchemy, create_tables, settings
from ragline.arrivals import Taken, take_in_files
from ragline.embedders import available_embedder
from ragline.errors import MissingFileError, NobodyWorksError
from ragline.following import count, document_ids, follow, missing_workers, patience_with
from ragline.helper import Helper
from ragline.intake import Intake, Outcome
from ragline.places import file_uri, visible
from ragline.progress import Progress as Counts
from ragline.progress import failures
from ragline.states import NO_EMBEDDER
from ragline.transactions import in_transaction

NAMES_SHOWN = 5
"""A list of names in one line has no more."""


def ingest(
    paths: Sequence[Path], console: Console, *, wait: bool, worker: bool, processes: int, prune: bool
) -> int:
    """Take files in and follow them until they can be found.

    Args:
        paths: files and folders, all of which must be there; with `prune` those of the index may be gone.
        console: where to draw.
        wait: follow them; without a worker that would be for ever, and is not done.
        worker: start a worker for the time being where none is running.
        processes: how many documents that worker works on at once.
        prune: forget the documents below these paths whose files are gone.

    Returns:
        The exit code: 0 when all that was asked for is done, 1 when not.

    Raises:
        MissingFileError: a path is not there; nothing was done.
    """
    create_tables(alchemy)
    there = check_paths(paths, prune=prune)
    embedder = choose_embedder(console)
    taken = Taken()
    try:
        with ExitStack() as stack:
            # Another broker is there for workers on other machines, which somebody else starts.
            may_help = wait and worker and settings.database_is_broker
            helper = Helper(stack, console, processes=processes) if may_help else None
            watch = None if helper is None else helper.look
            take_in_files(there, embedder, console, watch, into=taken)
            print_left_out(taken, console)
            deal_with_gone(paths, console, prune=prune)
            queues = queues_for(embedder)
            is_done = wait_for(taken, console, queues, helper) if wait else True
            if not wait:
                tell_if_nobody_works(taken, console, queues)
            failed = print_summary(taken.outcomes, console)
            if helper is not None:
                helper.end()
    except KeyboardInterrupt:
        print_interrupted(taken, paths, console)
        raise
    return 0 if failed == 0 and is_done else 1


def check_paths(paths: Sequence[Path], *, prune: bool) -> list[Path]:
    """The paths that are there.

    Raises:
        MissingFileError: one is not, unless it is to be pruned.
    """
    missing = [path for path in paths if not path.exists()]
    with alchemy.session() as session:
        known = [path for path in missing if pruning.find_gone(session, [path])]
    refused = [path for path in missing if not prune or path not in known]
    if refused:
        raise MissingFileError(
            [str(path) for path in refused], is_known=any(path in known for path in refused)
        )
    return [path for path in paths if path not in missing]


def choose_embedder(console: Console) -> str:
    """The name of the embedder to process documents with; says so when it is not the wanted one."""
    with console.status("Looking for the embedding model (84 MB the first time)"):
        embedder, missing = available_embedder(settings.embedder, settings.cache, settings.embeddings)
    if missing:
        console.print(f"[yellow]Keyword search only: {escape(missing)}[/yellow]", soft_wrap=True)
    return embedder


def queues_for(embedder: str) -> list[str]:
    """The queues that somebody has to work on for documents of an embedder."""
    names = settings.queue_names
    return [names["parsing"]] if embedder == NO_EMBEDDER else list(names.values())


def wait_for(taken: Taken, console: Console, queues: Sequence[str], helper: Helper | None) -> bool:
    """Follow the documents for as long as somebody works on the queues; whether all are settled."""
    outcomes = taken.outcomes.values()
    counts = count(outcomes)
    if counts.settled == counts.total:
        return True
    looked = patience_with(queues)
    if helper is None or not helper.has_started:
        missing = missing_workers(queues)
        if missing is not None:
            if helper is None:
                return _tell_that_they_wait(missing, counts, console)
            helper.start()
    if helper is not None and helper.has_started:
        looked = helper.check
    try:
        follow(outcomes, console, looked)
    except NobodyWorksError as error:
        return _tell_that_they_wait(error, count(outcomes), console)
    return True


def tell_if_nobody_works(taken: Taken, console: Console, queues: Sequence[str]) -> None:
    """Say so where documents wait and there is no worker for them; nobody looks at them else."""
    counts = count(taken.outcomes.values())
    missing = None if counts.settled == counts.total else missing_workers(queues)
    if missing is not None:
        _tell_that_they_wait(missing, counts, console)


def _tell_that_they_wait(error: NobodyWorksError, counts: Counts, console: Console) -> bool:
    waiting = _documents(counts.total - counts.settled)
    console.print(f"[yellow]{escape(str(error))}[/yellow]", soft_wrap=True)
    console.print(f"{waiting} in the queue; `ragline status` shows how far they are.", soft_wrap=True)
    return False


def print_interrupted(taken: Taken, paths: Sequence[Path], console: Console) -> None:
    """Say what is done, what waits, and how to go on."""
    counts = count(taken.outcomes.values())
    left = taken.files - taken.dealt_with
    parts = []
    if left:
        parts.append(f"{left} of {taken.files} files were not taken in yet")
    if waiting := counts.total - counts.settled:
        parts.append(f"{_documents(waiting)} in the queue, and nothing of it is lost")
    console.print(f"[yellow]Interrupted:[/yellow] {'; '.join(parts) or 'all was done'}.", soft_wrap=True)
    if parts:
        ways = [f"`{_command('ingest', paths)}` goes on where it was"]
        if waiting:
            ways.append("`ragline worker` works on what is in the queue")
        console.print(escape(f"{'; '.join(ways)}."), soft_wrap=True)


def print_left_out(taken: Taken, console: Console) -> None:
    """Say what was not taken: files of other kinds, all named, what is no file, and what went away."""
    if files := taken.left_out.other_kinds:
        kinds = Counter(file.suffix.lower() or "without an extension" for file in files)
        named = ", ".join(
            kind if number == 1 else f"{kind} ({number})" for kind, number in kinds.most_common()
        )
        were = "file of another kind was" if len(files) == 1 else "files of other kinds were"
        told = f"{len(files)} {were} left out ({named}); a file that is named is taken."
        console.print(escape(visible(told)), soft_wrap=True)
    if special := taken.left_out.special:
        were = "pipe, socket or device was" if len(special) == 1 else "pipes, sockets or devices were"
        names = _names([str(file) for file in special])
        console.print(escape(f"{len(special)} {were} left out: {names}."), soft_wrap=True)
    if empty := taken.left_out.empty:
        were = "empty file was" if len(empty) == 1 else "empty files were"
        console.print(f"{len(empty)} {were} left out.", soft_wrap=True)
    if taken.vanished:
        names = _names([str(file) for file in taken.vanished])
        console.print(escape(f"Gone before it could be read: {names}."), soft_wrap=True)


def deal_with_gone(paths: Sequence[Path], console: Console, *, prune: bool) -> None:
    """Forget the documents below the paths whose files are gone, or say that there are some."""
    with alchemy.session() as session:
        gone = pruning.find_gone(session, paths)
    if not gone:
        return
    files = f"{len(gone)} file{'s are' if len(gone) != 1 else ' is'} gone"
    names = _names([one.path for one in gone])
    if prune:
        in_transaction(partial(pruning.forget, gone=gone))
        console.print(escape(f"{files}, and forgotten: {names}."), soft_wrap=True)
    else:
        how = f"`{_command('ingest --prune', paths)}` forgets what they held"
        console.print(escape(f"{files} but can still be found: {names}; {how}."), soft_wrap=True)


def print_summary(outcomes: dict[str, Outcome], console: Console) -> int:
    """Print what became of the files, and why some failed.

    Returns:
        How many documents failed.
    """
    uris = {file_uri(Path(file)) for file in outcomes}
    with alchemy.session() as session:
        # Those of other places that hold the same are no news.
        failed = [one for one in failures(session, document_ids(outcomes.values())) if one.uri in uris]
    # A document that failed on its way was added or replaced first: each file is counted once, by how it
    # ended.
    failed_uris = {failure.uri for failure in failed}
    took = Counter(
        Intake.FAILED if file_uri(Path(file)) in failed_uris else outcome.intake
        for file, outcome in outcomes.items()
    )
    parts = ", ".join(f"{took[intake]} {intake.value}" for intake in Intake if took[intake])
    files = f"{len(outcomes)} file{'s' if len(outcomes) != 1 else ''}"
    console.print(f"{files}: {parts}." if parts else "No files to take in.")
    for failure in failed:
        told = f"  [red]failed[/red] {escape(failure.name)}: {escape(failure.reason)}"
        console.print(told, soft_wrap=True)
    return len(failed)


def _documents(number: int) -> str:
    return "1 document waits" if number == 1 else f"{number} documents wait"


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return visible(", ".join(names[:NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _command(command: str, paths: Sequence[Path]) -> str:
    shown = visible(shlex.join(str(path) for path in paths[:NAMES_SHOWN]))
    return f"ragline {command} {shown}{' ...' if len(paths) > NAMES_SHOWN else ''}"
