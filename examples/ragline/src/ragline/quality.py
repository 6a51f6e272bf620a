"""Search quality on a collection with judgements, measured and printed: `ragline eval`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ragline.bars import Bars
from ragline.benchmark import evaluate
from ragline.embedders import available_embedder
from ragline.evaluation import read_collection
from ragline.settings import settings_from


def measure(dataset: Path, console: Console, errors: Console, *, as_json: bool) -> None:
    """Index a collection, ask its queries, and print how good the answers are.

    Args:
        dataset: the folder of a Cranfield or TREC collection.
        console: where the result goes.
        errors: where the progress goes.
        as_json: print JSON for programs.
    """
    settings = settings_from()
    collection = read_collection(dataset)
    embedder, missing = available_embedder(settings.embedder, settings.cache, settings.embeddings)
    if missing:
        errors.print(f"[yellow]Keywords only: {escape(missing)}[/yellow]")
    with Bars(errors) as bar:
        task = bar.add_task("indexing", total=len(collection.documents), note="")
        results = evaluate(
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
