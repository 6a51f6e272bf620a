"""The steps that documents have before them, counted: for `ragline status`, the page and the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from celery_alchemy.broker.overview import queues_and_workers
from celery_alchemy.operations.dead_tasks import status

from ragline.app import alchemy, settings


@dataclass(frozen=True, slots=True)
class Steps:
    """Counts of messages at one moment.

    Attributes:
        waiting: for a worker, for their time, or to be handed to another broker.
        begun: a worker has them, or another broker, or they are about to be handed to it.
        dead: given up with their document.
        rows: the rows of the outbox by what is to be done with them, as `celery alchemy status` names them.
    """

    waiting: int
    begun: int
    dead: int
    rows: dict[str, Any]


def count_steps() -> Steps:
    """Count the messages of all documents."""
    rows: dict[str, Any] = status(alchemy.engine)
    running = scheduled = 0
    if settings.database_is_broker:
        # What a worker has taken from a queue of the database is in none of the counts above, nor is what
        # is in a queue for later: a batch that an endpoint wants again in a minute.
        queues = queues_and_workers(alchemy.engine, alchemy.place)["queues"]
        ours = [queue for queue in queues if queue["queue"] in settings.queue_names.values()]
        running = sum(queue["taken"] for queue in ours)
        scheduled = sum(queue["scheduled"] for queue in ours)
    return Steps(
        waiting=rows["waiting"] + scheduled,
        begun=rows["owed"] + rows["leased"] + running,
        dead=rows["dead"],
        rows=rows | {"running": running, "scheduled": scheduled},
    )
