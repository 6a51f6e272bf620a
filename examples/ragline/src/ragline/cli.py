"""The command line: what a person does with ragline, each command a few calls to the use cases."""

from __future__ import annotations

import enum
import json
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from ragline import __version__
from ragline.errors import ConfigurationError, RaglineError
from ragline.question import SIGNS, question_of
from ragline.states import State

cli = typer.Typer(
    no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)
model = typer.Typer(no_args_is_help=True, help="The embedding model.")
cli.add_typer(model, name="model")
console = Console()
errors = Console(stderr=True)

INTERRUPTED = 130
"""The exit code of what Ctrl-C ended, as shells have it."""

LOGGING = ("worker", "serve")
"""The commands whose log somebody reads."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Full = Annotated[bool, typer.Option("--full", help="Show whole passages, not some lines of each.")]


# What `searching`, `progress` and `settings` know, which take a second to import.
ModeName = Literal["hybrid", "keyword", "vector"]
OrderName = Literal["newest", "oldest", "name", "largest"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


class QueueName(str, enum.Enum):
    """What `--queue` takes."""

    PARSING = "parsing"
    EMBEDDING = "embedding"


def main() -> None:
    """Run the command line; an error of ragline's own, or a server that is away, is told in one line."""
    try:
        cli()
    except Exception as error:
        text = _told(error)
        if text is None:
            raise
        from ragline.places import visible

        errors.print(f"[red]{escape(visible(text))}[/red]", soft_wrap=True)
        raise SystemExit(1) from error


def _told(error: Exception) -> str | None:
    from kombu.exceptions import OperationalError as BrokerError
    from sqlalchemy.exc import DatabaseError, OperationalError

    if isinstance(error, RaglineError):
        return str(error)
    # Its subclasses but one are mistakes of ragline's own, which are to be seen whole.
    if type(error) is DatabaseError or isinstance(error, OperationalError):
        where = " (RAGLINE_HOME and RAGLINE_DATABASE_URL say where it is)"
        return f"The database cannot be used: {' '.join(str(error.orig).split())}{where}"
    if isinstance(error, BrokerError):
        from ragline.settings import settings_from

        return f"The broker {settings_from().broker_name} does not answer: {error}"
    if isinstance(error, OSError) and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}."
    return None


def _checked_question(asked: str) -> str:
    """The question, refused as any argument that cannot be used where it asks nothing."""
    if refusal := question_of(asked).refusal:
        raise typer.BadParameter(refusal)
    return asked


AskedFor = Annotated[str, typer.Argument(callback=_checked_question, help=SIGNS, show_default=False)]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"ragline {__version__}", highlight=False)
        raise typer.Exit


@cli.callback()
def ragline(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Documents in, cited passages out."""
    if context.invoked_subcommand not in LOGGING and logging.lastResort is not None:
        # What a library warns of, a command tells in its own words, or it is mended by itself.
        logging.lastResort.setLevel(logging.ERROR)


@cli.command()
def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)],
    wait: Annotated[bool, typer.Option(help="Wait until all documents are ready or failed.")] = True,
    worker: Annotated[
        bool, typer.Option(help="Start a worker for the time being if none is running.")
    ] = True,
    processes: Annotated[int, typer.Option(min=1, help="Processes of such a worker.")] = 2,
    prune: Annotated[
        bool, typer.Option("--prune", help="Forget documents below PATHS whose files are gone.")
    ] = False,
) -> None:
    """Take documents in and follow them until they can be found."""
    from ragline import ingestion

    try:
        code = ingestion.ingest(paths, console, wait=wait, worker=worker, processes=processes, prune=prune)
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


@cli.command()
def search(
    query: AskedFor,
    limit: Annotated[int, typer.Option(min=1, help="How many passages.")] = 5,
    mode: Annotated[ModeName, typer.Option(help="What to go by.")] = "hybrid",
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Find passages, each with its document, page, character range and exact quote."""
    from ragline import presentation
    from ragline.app import alchemy, create_tables
    from ragline.retrieval import find
    from ragline.searching import Mode

    create_tables(alchemy)
    found = find(query, limit=limit, mode=Mode(mode))
    if found.note:
        errors.print(f"[yellow]{escape(found.note)}[/yellow]", soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(passage) for passage in found.passages], ensure_ascii=False, indent=2))
        return
    presentation.print_passages(found.passages, query, console, is_full=full)


@cli.command()
def ask(
    question: AskedFor,
    full: Full = False,
    as_json: Json = False,
) -> None:
    """Answer a question from the documents, with citations that are checked."""
    from ragline import presentation
    from ragline.app import alchemy, create_tables
    from ragline.asking import answer

    create_tables(alchemy)
    with errors.status("Asking the model"):
        answered = answer(question)
    if as_json:
        print(json.dumps(asdict(answered), ensure_ascii=False, indent=2))
    else:
        presentation.print_answer(answered, console, is_full=full)


@cli.command()
def status(as_json: Json = False) -> None:
    """Documents by state, chunks, workers, and the reason of every failure."""
    from ragline import presentation

    report = presentation.read_status()
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False, indent=2))
    else:
        presentation.print_status(report, console)


@cli.command(name="list")
def list_documents(
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    called: Annotated[str, typer.Option(help="Only those with these words in name or folder.")] = "",
    order: Annotated[OrderName, typer.Option(help="How they are sorted.")] = "newest",
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many; a program gets all.", show_default="50")
    ] = None,
    as_json: Json = False,
) -> None:
    """The documents, each with the id that the commands below take."""
    from ragline import presentation
    from ragline.progress import Order

    presentation.list_documents(state, called, Order(order), limit, console, as_json=as_json)


_DOCUMENTS = typer.Argument(
    metavar="DOCUMENT...", help="Ids, paths, or names as lists show them.", show_default=False
)
Documents = Annotated[list[str], _DOCUMENTS]


@cli.command()
def show(
    document: Annotated[
        str,
        typer.Argument(metavar="DOCUMENT", help="An id, path, or name as lists show it.", show_default=False),
    ],
    characters: Annotated[
        str,
        typer.Option(metavar="START-END", help="Only these characters, as search results name them."),
    ] = "",
    as_json: Json = False,
) -> None:
    """Print the text of a document, and what is known of it."""
    from ragline import showing

    is_there = showing.show(document, console, errors, characters=characters, as_json=as_json)
    raise typer.Exit(int(not is_there))


@cli.command()
def pause(documents: Documents) -> None:
    """Stop working on documents until `resume`; what was done stays done."""
    from ragline import controls, presentation

    presentation.act(documents, controls.pause, "paused", console)


@cli.command()
def resume(documents: Documents) -> None:
    """Go on with paused documents."""
    from ragline import controls, presentation

    presentation.act(documents, controls.resume, "queued again", console)
    presentation.tell_if_nobody_works(console)


@cli.command()
def cancel(documents: Documents) -> None:
    """Stop working on documents and drop what was made of them."""
    from ragline import controls, presentation

    presentation.act(documents, controls.cancel, "cancelled", console)


@cli.command()
def retry(
    documents: Annotated[list[str] | None, _DOCUMENTS] = None,
    every: Annotated[bool, typer.Option("--all", help="All that failed for a reason that may pass.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what was refused for good.")] = False,
) -> None:
    """Try failed or cancelled documents again."""
    from ragline import controls, presentation

    if bool(documents) is every:
        raise ConfigurationError("Name documents, or give --all.")
    if documents:
        control = controls.retry if force else controls.retry_usefully
        presentation.act(documents, control, "queued again", console)
        presentation.tell_if_nobody_works(console)
    else:
        presentation.retry_failed(console)


@cli.command()
def delete(
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT...",
            help="Ids; or paths, folders, or names as lists show them.",
            show_default=False,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first, as a terminal does.")] = False,
) -> None:
    """Delete documents with all that was made of them.

    With an id from everywhere; with a path, folder or name what is there, and other places keep their copies.
    """
    from ragline import presentation

    is_asked = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        raise typer.Exit(int(not presentation.delete(documents, console, is_asked=is_asked)))
    except typer.Abort:  # Ctrl-C, or the end of the input, at the question
        raise typer.Exit(INTERRUPTED) from None


@cli.command()
def worker(
    processes: Annotated[int, typer.Option(min=1, help="How many documents are worked on at once.")] = 2,
    queue: Annotated[
        list[QueueName] | None, typer.Option(help="Take from this queue only; all by default.")
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(help="Celery's log level.")] = "info",
) -> None:
    """Run a worker until it is interrupted."""
    from ragline import ingestion
    from ragline.app import alchemy, app, create_tables, settings
    from ragline.workers import worker_arguments

    names = settings.queue_names
    create_tables(alchemy)
    alchemy.engine.dispose()  # the worker's processes make their own
    ingestion.choose_embedder(console)
    queues = [names[kind] for kind in queue or QueueName]
    app.worker_main(worker_arguments(processes=processes, log_level=log_level, queues=queues))


@cli.command()
def serve(
    host: Annotated[
        str, typer.Option(help="With any but a loopback address a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    worker: Annotated[bool, typer.Option(help="Run a worker too: everything in one command.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of that worker.")] = 2,
) -> None:
    """Serve the web page and its API."""
    try:
        from ragline.web import serving
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ragline":
            raise
        raise ConfigurationError(f"{error.name} is missing: pip install 'ragline[web]'") from error

    serving.serve(console, host=host, port=port, worker=worker, processes=processes)


@model.command()
def fetch() -> None:
    """Fetch the embedding model, check it and make it ready to run."""
    from ragline.minilm.embedder import has_onnx
    from ragline.minilm.files import fetch as fetch_files
    from ragline.minilm.graph import graph_file
    from ragline.settings import settings_from

    with console.status("Fetching all-MiniLM-L6-v2 (84 MB)"):
        folder = fetch_files(settings_from().cache)
        if has_onnx():
            graph_file(folder)
    console.print(f"all-MiniLM-L6-v2 is in {folder}.", soft_wrap=True)


@cli.command(name="eval")
def evaluate(
    dataset: Annotated[
        Path, typer.Argument(help="Folder of a Cranfield or TREC collection.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Measure search quality on a collection with judgements."""
    from ragline import quality

    quality.measure(dataset, console, errors, as_json=as_json)


@cli.command()
def demo(
    keep: Annotated[bool, typer.Option(help="Keep the folder that it worked in.")] = False,
) -> None:
    """Show all of it on documents that are on every machine, and kill worker processes on the way."""
    home = Path(tempfile.mkdtemp(prefix="ragline-demo-"))
    try:
        # Before anything reads the settings: a fresh home, and no server however this shell is set up.
        os.environ["RAGLINE_HOME"] = str(home)
        for name in ("DATABASE_URL", "BROKER_URL", "EMBEDDINGS_URL", "EMBEDDINGS_MODEL"):
            os.environ.pop(f"RAGLINE_{name}", None)
        from ragline.demo import run

        problems = run(console)
    finally:
        if keep:
            console.print(f"Kept: {home}", soft_wrap=True)
        else:
            shutil.rmtree(home)
    raise typer.Exit(1 if problems else 0)
