"""Documents followed in a terminal until they are ready or failed, or nobody works on them any more."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable

from rich.console import Console
from sqlalchemy import column, select, table

from ragline.app import app, reading_session, settings
from ragline.bars import Bars
from ragline.errors import NobodyWorksError
from ragline.intake import Outcome
from ragline.progress import Progress as Counts
from ragline.progress import measure
from ragline.workers import served_queues

LOOK_SECONDS = 0.25
"""How often the progress bar counts rows."""
QUIET_SECONDS = 10.0
"""When nothing has changed for so long the workers are asked for, and again after as long."""
UNANSWERED = 3
"""So many questions without an answer are too many: a worker of one process may be too busy for one."""

# The library's table of those who take messages. Of one that was killed the row stays for a while:
# then workers are asked whether they are there, which takes a second.
_WORKERS = table("celery_workers", column("id"))


class Patience:
    """Ends the following of documents that nobody works on.

    Args:
        needed: the queues that have to be worked on.
        ask: names the queues that workers take from, or None where the broker does not answer.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        needed: Collection[str],
        ask: Callable[[], set[str] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._needed, self._ask, self._clock = needed, ask, clock
        self._seen: Counts | None = None
        self._quiet_since = clock()
        self._unanswered = 0

    def look(self, counts: Counts) -> None:
        """Take notice of the counts, and ask for workers when these have not changed for long.

        Raises:
            NobodyWorksError: nothing changes and no worker answers.
        """
        if counts != self._seen:
            self._seen, self._quiet_since, self._unanswered = counts, self._clock(), 0
        elif self._clock() - self._quiet_since >= QUIET_SECONDS:
            error = nobody_works(self._needed, self._ask())
            self._quiet_since = self._clock()
            self._unanswered = 0 if error is None else self._unanswered + 1
            if error is not None and self._unanswered >= UNANSWERED:
                raise error


def nobody_works(needed: Collection[str], served: set[str] | None) -> NobodyWorksError | None:
    """What is wrong when these queues are needed and workers take from those."""
    if served is None:
        return NobodyWorksError(None, broker=settings.broker_name)
    if unserved := set(needed) - served:
        return NobodyWorksError(unserved, is_any_served=bool(served))
    return None


def may_be_there() -> bool:
    """Whether a worker may take messages from the database."""
    with reading_session() as session:
        return session.scalar(select(_WORKERS.c.id).limit(1)) is not None


def missing_workers(needed: Collection[str]) -> NobodyWorksError | None:
    """What is wrong with the workers of these queues now; soon told where there are none at all."""
    if settings.database_is_broker and not may_be_there():
        return NobodyWorksError(needed)
    return nobody_works(needed, served_queues(app))


def patience_with(needed: Collection[str]) -> Callable[[Counts], None]:
    """What to call after each look while workers are at work."""
    return Patience(needed, lambda: served_queues(app)).look


def document_ids(outcomes: Iterable[Outcome]) -> list[int]:
    """The documents that files became, each once."""
    return sorted({outcome.document_id for outcome in outcomes})


def count(outcomes: Iterable[Outcome]) -> Counts:
    """The rows of these documents, counted now, in a transaction that waits for nobody."""
    with reading_session() as session:
        return measure(session, document_ids(outcomes))


def follow(
    outcomes: Iterable[Outcome], console: Console, looked: Callable[[Counts], None] | None = None
) -> Counts:
    """Show a progress bar, counted from rows, until every document is settled.

    Args:
        outcomes: the documents to follow.
        console: where to draw.
        looked: called with the counts of each look but the last; what it raises ends the following.

    Returns:
        The last counts.
    """
    followed = list(outcomes)
    with Bars(console) as bar:
        documents = bar.add_task("documents", total=None, note="")
        chunks = bar.add_task("chunks", total=None, note="")
        while True:
            counts = count(followed)
            states = ", ".join(f"{number} {state.value}" for state, number in counts.documents.items())
            bar.update(documents, completed=counts.settled, total=counts.total, note=states)
            done = counts.chunks - counts.unembedded
            bar.update(chunks, completed=done, total=counts.chunks or None)
            if counts.settled == counts.total:
                return counts
            if looked is not None:
                looked(counts)
            time.sleep(LOOK_SECONDS)
