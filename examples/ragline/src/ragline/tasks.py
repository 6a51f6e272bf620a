"""The Celery tasks: each is one step of the pipeline in one transaction, and sends the next from it.

`once`: however often a message is delivered, and whatever is killed meanwhile, a step is committed once, and
the next messages with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery_alchemy import SessionTask
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from ragline import pipeline
from ragline.app import app, settings
from ragline.embedders import load_embedder, token_counter
from ragline.errors import DocumentError


def document_failed(session: Session, error: BaseException, document_id: int, *_: Any) -> None:
    """Write the reason where the person who added the document looks for it."""
    pipeline.fail(session, error, document_id)


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


@app.task(base=Step, once=True)
def ingest(session: Session, document_id: int) -> None:
    """Check a queued document and have it parsed."""
    if pipeline.admit(session, document_id):
        parse.delay_on_commit(document_id)


@app.task(base=Step, once=True)
def parse(session: Session, document_id: int) -> None:
    """Make text of a document and have it split."""
    if pipeline.parse(session, document_id):
        split.delay_on_commit(document_id)


@app.task(base=Step, once=True)
def split(session: Session, document_id: int) -> None:
    """Cut a document into chunks and have each batch of them embedded."""
    counter_of = partial(token_counter, cache=settings.cache)
    for batch in pipeline.split(session, document_id, counter_of, batch_chunks=settings.batch_chunks):
        embed.delay_on_commit(document_id, batch)


@app.task(base=Step, once=True)
def embed(session: Session, document_id: int, batch: int) -> None:
    """Embed one batch of a document; the last one makes it ready."""
    pipeline.embed(session, document_id, batch, partial(load_embedder, cache=settings.cache))
