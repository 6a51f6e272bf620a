"""The command line: what a person does with ragline, each command a few calls to the use cases."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ragline.errors import ConfigurationError, RaglineError

cli = typer.Typer(no_args_is_help=True, add_completion=False, help="Documents in, cited passages out.")
model = typer.Typer(no_args_is_help=True, help="The embedding model.")
cli.add_typer(model, name="model")
console = Console()
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def main() -> None:
    """Run the command line; an error of ragline's own, or a server that is away, is told in one line."""
    try:
        cli()
    except Exception as error:
        text = _told(error)
        if text is None:
            raise
        errors.print(f"[red]{escape(text)}[/red]")
        raise SystemExit(1) from error


def _told(error: Exception) -> str | None:
    from kombu.exceptions import OperationalError as BrokerError
    from sqlalchemy.exc import OperationalError as DatabaseError

    if isinstance(error, RaglineError):
        return str(error)
    if isinstance(error, DatabaseError):
        return f"The database does not answer: {error.orig}"
    if isinstance(error, BrokerError):
        return f"The broker does not answer: {error}"
    return None


@cli.command()
def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.", show_default=False)],
    wait: Annotated[bool, typer.Option(help="Wait until all documents are ready or failed.")] = True,
    worker: Annotated[
        bool, typer.Option(help="Start a worker for the time being if none is running.")
    ] = True,
    processes: Annotated[int, typer.Option(min=1, help="Processes of such a worker.")] = 2,
) -> None:
    """Take documents in and follow them until they can be found."""
    from ragline import ingestion
    from ragline.app import app, settings
    from ragline.workers import check_runs, running_workers, temporary_worker

    embedder = ingestion.choose_embedder(console)
    outcomes = ingestion.take_in_files(paths, embedder, console)
    with ExitStack() as stack:
        if wait and ingestion.unsettled(outcomes):
            check = None
            if not (workers := running_workers(app)):
                if worker and settings.has_own_broker:
                    own = stack.enter_context(temporary_worker(home=settings.home, processes=processes))
                    check = partial(check_runs, own, settings.home)
                else:
                    missing = "The broker does not answer" if workers is None else "No worker is running"
                    console.print(f"[yellow]{missing}: the documents wait.[/yellow]")
            ingestion.follow(outcomes, console, check)
    if ingestion.print_summary(outcomes, console):
        raise typer.Exit(1)


@cli.command()
def search(
    query: Annotated[str, typer.Argument(help="A question, or words.", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="How many passages.")] = 5,
    mode: Annotated[str, typer.Option(help="hybrid, keyword or vector.")] = "hybrid",
    as_json: Json = False,
) -> None:
    """Find passages, each with its document, page, character range and exact quote."""
    from ragline import presentation
    from ragline.app import alchemy, create_tables
    from ragline.retrieval import find
    from ragline.searching import Mode

    if mode not in tuple(Mode):
        raise ConfigurationError(f"--mode {mode}: use one of {', '.join(Mode)}.")
    create_tables(alchemy)
    found = find(query, limit=limit, mode=Mode(mode))
    if as_json:
        print(json.dumps([asdict(passage) for passage in found.passages], ensure_ascii=False, indent=2))
        return
    if found.note:
        errors.print(f"[yellow]{escape(found.note)}[/yellow]")
    presentation.print_passages(found.passages, query, console)


@cli.command()
def ask(
    question: Annotated[str, typer.Argument(help="A question.", show_default=False)],
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
        presentation.print_answer(answered, console)


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
    state: Annotated[str | None, typer.Option(help="Only those in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 50,
    as_json: Json = False,
) -> None:
    """The documents, each with the id that the commands below take."""
    from ragline import presentation
    from ragline.states import State

    if state not in (None, *tuple(State)):
        raise ConfigurationError(f"--state {state}: use one of {', '.join(State)}.")
    presentation.list_documents(None if state is None else State(state), limit, console, as_json=as_json)


Documents = Annotated[
    list[str], typer.Argument(metavar="DOCUMENT...", help="Ids, paths or names.", show_default=False)
]


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


@cli.command()
def cancel(documents: Documents) -> None:
    """Stop working on documents and drop what was made of them."""
    from ragline import controls, presentation

    presentation.act(documents, controls.cancel, "cancelled", console)


@cli.command()
def retry(
    documents: Annotated[
        list[str] | None,
        typer.Argument(metavar="DOCUMENT...", help="Ids, paths or names.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that failed for a reason that may pass.")] = False,
) -> None:
    """Try failed or cancelled documents again."""
    from ragline import controls, presentation

    if bool(documents) is every:
        raise ConfigurationError("Name documents, or give --all.")
    if documents:
        presentation.act(documents, controls.retry, "queued again", console)
    else:
        presentation.retry_failed(console)


@cli.command()
def delete(documents: Documents) -> None:
    """Delete documents with all that was made of them."""
    from ragline import controls, presentation

    presentation.act(documents, controls.delete, "deleted", console)


@cli.command()
def worker(
    processes: Annotated[int, typer.Option(min=1, help="How many documents are worked on at once.")] = 2,
    queue: Annotated[
        list[str] | None,
        typer.Option(help="Take from this queue only, parsing or embedding; all by default."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="Celery's log level.")] = "info",
) -> None:
    """Run a worker until it is interrupted."""
    from ragline import ingestion
    from ragline.app import alchemy, app, create_tables, settings
    from ragline.workers import worker_arguments

    names = settings.queue_names
    if unknown := set(queue or ()) - set(names):
        raise ConfigurationError(f"--queue {min(unknown)}: use one of {', '.join(names)}.")
    create_tables(alchemy)
    alchemy.engine.dispose()  # the worker's processes make their own
    ingestion.choose_embedder(console)
    queues = [names[kind] for kind in queue or names]
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
    from ragline.benchmark import evaluate as measure
    from ragline.embedders import available_embedder
    from ragline.evaluation import read_collection
    from ragline.ingestion import progress_bar
    from ragline.settings import settings_from

    settings = settings_from()
    collection = read_collection(dataset)
    embedder, missing = available_embedder(settings.embedder, settings.cache, settings.embeddings)
    if missing:
        errors.print(f"[yellow]Keywords only: {escape(missing)}[/yellow]")
    with progress_bar(errors) as bar:
        task = bar.add_task("indexing", total=len(collection.documents), note="")
        results = measure(
            collection,
            embedder,
            settings.cache,
            lambda count: bar.advance(task, count),
            endpoint=settings.embeddings,
            database_url=settings.database_url,
        )
    if as_json:
        print(json.dumps({mode.value: asdict(measures) for mode, measures in results.items()}, indent=2))
        return
    table = Table("search", "nDCG@10", "MAP", "recall@100", title=f"{len(collection.judgements)} queries")
    for mode, measures in results.items():
        table.add_row(mode.value, *(f"{value:.4f}" for value in asdict(measures).values()))
    console.print(table)


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
