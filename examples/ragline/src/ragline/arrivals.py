"""Files that arrive: read, and taken in some at a time, while a bar shows how many are ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from sqlalchemy.orm import Session

from ragline import controls
from ragline.app import alchemy, create_tables, settings
from ragline.bars import Bars
from ragline.files import LeftOut, find_files, read_file
from ragline.following import LOOK_SECONDS, count
from ragline.intake import Offer, Outcome, Recipe
from ragline.recipes import recipe_for
from ragline.transactions import in_transaction

FILES_AT_ONCE = 4
BYTES_AT_ONCE = 200_000
"""What one transaction takes in: each costs the disk a flush, and all others wait for it on SQLite.
With 20 files the first document is ready half a second later, and all are taken in a fifth sooner."""


@dataclass(slots=True)
class Taken:
    """What has become of the files so far.

    Attributes:
        outcomes: by path.
        files: how many there are to take in.
        left_out: what is in folders and of no known format, no file, or empty.
        vanished: files that were there when the folder was listed.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    files: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    vanished: list[Path] = field(default_factory=list)

    @property
    def dealt_with(self) -> int:
        """How many of them something has become of."""
        return len(self.outcomes) + len(self.vanished) + len(self.left_out.empty)


Watch = Callable[[dict[str, Outcome], Progress], None]


def take_in_files(
    paths: Sequence[Path],
    embedder: str,
    console: Console,
    watch: Watch | None = None,
    *,
    into: Taken | None = None,
) -> dict[str, Outcome]:
    """Take in every file below the paths, each in a transaction that also sends its first task.

    Small files share a transaction, but the first one has its own: work on it begins at once.

    Args:
        paths: files and folders.
        embedder: the name of the embedder to process the documents with.
        console: where to draw.
        watch: called after each file, with the outcomes so far and the bar.
        into: is told as files are taken in, for who is interrupted.

    Returns:
        What became of each, by its path.
    """
    create_tables(alchemy)
    recipe = recipe_for(embedder)
    taken = into or Taken()
    with Bars(console) as bar:
        files = list(find_files(paths, taken.left_out))
        taken.files = len(files)
        task = bar.add_task("taking in", total=len(files), note="")
        ready = _Ready(bar)
        named = {path for path in paths if not path.is_dir()}
        for some in _batches(files, taken, named):
            outcomes = in_transaction(partial(_add_all, offers=list(some.values()), recipe=recipe))
            for file, outcome in zip(some, outcomes, strict=True):
                taken.outcomes[str(file)] = outcome
                if watch is not None:
                    watch(taken.outcomes, bar)
            bar.update(task, completed=taken.dealt_with)
            ready.look(taken.outcomes.values())
        bar.update(task, completed=len(files))
    return taken.outcomes


def _add_all(session: Session, offers: Sequence[Offer], recipe: Recipe) -> list[Outcome]:
    return [controls.add(session, offer, recipe) for offer in offers]


def _batches(files: Iterable[Path], taken: Taken, named: Collection[Path]) -> Iterator[dict[Path, Offer]]:
    """The files that one transaction takes in; others are told: gone, or empty and not named."""
    some: dict[Path, Offer] = {}
    size_bytes, most = 0, 1
    for file in files:
        try:
            offer = read_file(file, max_bytes=settings.max_bytes)
        except FileNotFoundError:
            taken.vanished.append(file)
            continue
        if file not in named and (offer.data == b"" or (offer.data or b"").isspace()):
            taken.left_out.empty.append(file)
            continue
        some[file] = offer
        size_bytes += len(offer.data or b"")
        if len(some) >= most or size_bytes >= BYTES_AT_ONCE:
            yield some
            some, size_bytes, most = {}, 0, FILES_AT_ONCE
    if some:
        yield some


class _Ready:
    """The number of documents that are done already, while others are still taken in.

    How many there are shows at the end: several files may be one.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar, self._looked_at = bar, time.monotonic()
        self._task = bar.add_task("documents", total=None, note="")

    def look(self, outcomes: Iterable[Outcome]) -> None:
        """Count rows, unless that was done a moment ago."""
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            counts = count(outcomes)
            self._bar.update(self._task, completed=counts.settled)
            self._looked_at = time.monotonic()
