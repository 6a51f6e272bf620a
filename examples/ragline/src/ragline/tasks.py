"""The Celery tasks: each is one step of the pipeline in one transaction, and sends the next from it.

`once`: however often a message is delivered, and whatever is killed meanwhile, a step is committed once, and
the next messages with it.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from celery.utils import uuid
from celery_alchemy import SessionTask, step
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from ragline import pipeline
from ragline.app import app, settings
from ragline.confinement import Confinement
from ragline.dead import forget_dead_tasks, task_id_prefix
from ragline.embedders import load_embedder, token_counter
from ragline.errors import DocumentError, EndpointBusyError

ENDPOINT_RETRIES = 20
"""About two hours of pauses: an endpoint that is busy for longer fails the document, which can be retried."""

confinement = Confinement(settings.limits)


def document_failed(session: Session, error: BaseException, document_id: int, *_: Any) -> None:
    """Write the reason where the person who added the document looks for it."""
    if not pipeline.fail(session, error, document_id):
        # Deleted while its task failed: nobody will look. The task is dead when this is committed.
        forget.delay_on_commit(document_id)


class Step(SessionTask):
    """What all steps have in common."""

    abstract = True
    record_failure = staticmethod(document_failed)
    # Expected: told to the person who added the document, not logged with a traceback.
    throws = (DocumentError,)
    # A database that is busy or away; retried with growing pauses.
    autoretry_for = (OperationalError,)
    retry_backoff = True
    max_retries = 5

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, *more: Any, **options: Any
    ) -> Any:
        """Send it under an id that names its document: if it dies, that is how it is found again."""
        return super().apply_async(
            args, kwargs, task_id or task_id_prefix(args[0]) + uuid(), *more, **options
        )


@app.task(base=SessionTask)
def forget(session: Session, document_id: int) -> None:
    """Give up the dead tasks of a document that is gone."""
    forget_dead_tasks(session, document_id)


@app.task(base=Step, once=True)
def ingest(session: Session, document_id: int) -> None:
    """Make text of a queued document and have it split."""
    if pipeline.is_shown(session, document_id):
        step("admit", pipeline.admit, document_id)
    if pipeline.parse(session, document_id, confinement.parse):
        split.delay_on_commit(document_id)


@app.task(base=Step, once=True)
def split(session: Session, document_id: int) -> None:
    """Cut a document into chunks and have each batch of them embedded."""
    counter_of = partial(token_counter, cache=settings.cache, endpoint=settings.embeddings)
    for batch in pipeline.split(session, document_id, counter_of, batch_chunks=settings.batch_chunks):
        embed.delay_on_commit(document_id, batch)


@app.task(base=Step, bind=True, once=True)
def embed(self: Step, session: Session, document_id: int, batch: int) -> None:
    """Embed one batch of a document; the last one makes it ready."""
    embedder_of = partial(load_embedder, cache=settings.cache, endpoint=settings.embeddings)
    try:
        pipeline.embed(session, document_id, batch, embedder_of)
    except EndpointBusyError as busy:
        pause = pause_seconds(busy.retry_after_seconds, self.request.retries)
        raise self.retry(exc=busy, countdown=pause, max_retries=ENDPOINT_RETRIES) from busy


def pause_seconds(asked_for: float | None, retries: int) -> float:
    """How long to leave an endpoint alone: at least what it asks for, and each batch a little different.

    Without that all batches that were refused at once would come back at once.
    """
    grown = min(2.0**retries, 600.0)
    return (grown if asked_for is None else max(asked_for, 1.0)) * random.uniform(1.0, 1.5)
