"""What people do with documents: add, pause, resume, cancel, retry, delete. Use cases that take a session.

Each is part of the caller's transaction, and so is the message of the task that it calls for: a command, a
route or a script has such a session from `alchemy.begin()`. A step that runs meanwhile finds another state
than it expects, or no document, when it comes to write, and writes nothing: all of this takes effect within a
batch.
"""

from __future__ import annotations

from pathlib import Path

from celery_alchemy import enqueue
from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from ragline import tasks
from ragline.dead import forget_dead_tasks
from ragline.errors import NoSuchDocumentError, NotPossibleError
from ragline.intake import Offer, Outcome, Recipe, delete_document, forget_results, take_in, uri_digest
from ragline.states import State
from ragline.tables import Document, Original, Source
from ragline.transitions import move, states_before


def add(session: Session, offer: Offer, recipe: Recipe) -> Outcome:
    """Take an offer in and send its first task.

    Returns:
        What became of it; a bad offer is an outcome, not an exception.
    """
    outcome = take_in(session, offer, recipe)
    if outcome.is_queued:
        _start(session, outcome.document_id)
    return outcome


def pause(session: Session, document_id: int) -> None:
    """Keep a document that is being worked on where it is, until `resume`.

    Raises:
        NoSuchDocumentError: it is gone.
        NotPossibleError: nothing is being done for it.
    """
    _move(session, document_id, State.PAUSED)


def resume(session: Session, document_id: int) -> None:
    """Go on with a paused document; what was done stays done.

    Raises:
        NoSuchDocumentError: it is gone.
        NotPossibleError: it is not paused.
    """
    _move(session, document_id, State.QUEUED, before=(State.PAUSED,))
    _start(session, document_id)


def cancel(session: Session, document_id: int) -> None:
    """Stop working on a document and drop what was made of it; searches keep the generation before it.

    Raises:
        NoSuchDocumentError: it is gone.
        NotPossibleError: nothing is being done for it, nor would be.
    """
    _move(session, document_id, State.CANCELLED)
    forget_results(session, document_id)


def retry(session: Session, document_id: int) -> None:
    """Try a failed or cancelled document again, whatever the reason was; what was done stays done.

    Raises:
        NoSuchDocumentError: it is gone.
        NotPossibleError: it is neither failed nor cancelled, or its bytes were never read.
    """
    has_bytes = select(Original.digest).where(Original.digest == Document.digest).exists()
    before = (State.FAILED, State.CANCELLED)
    _move(session, document_id, State.QUEUED, has_bytes, before=before, reason=None, is_permanent=False)
    _start(session, document_id)


def retry_failed(session: Session) -> list[int]:
    """Try all documents again that failed for a reason that may pass.

    Returns:
        Their ids. Those that failed for good, such as encrypted ones, are left alone.
    """
    may_pass = select(Document.id).where(Document.state == State.FAILED, Document.is_permanent.is_(False))
    retried = []
    for document_id in session.scalars(may_pass.order_by(Document.id)).all():
        if move(session, document_id, State.QUEUED, before=(State.FAILED,), reason=None):
            _start(session, document_id)
            retried.append(document_id)
    return retried


def delete(session: Session, document_id: int) -> None:
    """Delete a document in any state, with its chunks, vectors, index rows and bytes.

    A source that is left with no document is forgotten with it. A task that comes later finds nothing to do.

    Raises:
        NoSuchDocumentError: it is gone.
    """
    if not delete_document(session, document_id):
        raise NoSuchDocumentError(document_id)


def find(session: Session, reference: str) -> list[int]:
    """The documents that a person means: by id, by path or URI, or by name.

    Returns:
        Their ids, ascending; a source whose next generation is under way has two.

    Raises:
        NoSuchDocumentError: there is none.
    """
    if reference.isdecimal():
        found = select(Document.id).where(Document.id == int(reference))
    else:
        uris = (uri_digest(reference), uri_digest(Path(reference).absolute().as_uri()))
        used = or_(Source.serving_id == Document.id, Source.pending_id == Document.id)
        of_source = select(Source.id).where(Source.uri_digest.in_(uris), used)
        found = select(Document.id).where(or_(Document.name == reference, of_source.exists()))
    ids = list(session.scalars(found.order_by(Document.id)))
    if not ids:
        raise NoSuchDocumentError(reference)
    return ids


def _start(session: Session, document_id: int) -> None:
    forget_dead_tasks(session, document_id)
    enqueue(session, tasks.ingest.s(document_id))


def _move(
    session: Session,
    document_id: int,
    after: State,
    *conditions: ColumnElement[bool],
    before: tuple[State, ...] | None = None,
    **values: object,
) -> None:
    if move(session, document_id, after, *conditions, before=before, **values):
        return
    row = session.execute(
        select(Document.name, Document.state).where(Document.id == document_id)
    ).one_or_none()
    if row is None:
        raise NoSuchDocumentError(document_id)
    if row.state in (before or states_before(after)):
        raise NotPossibleError(f"{row.name} was refused unread: add it again.")
    raise NotPossibleError(f"{row.name} is {row.state.value}: it cannot be {_DONE[after]} now.")


_DONE = {State.PAUSED: "paused", State.QUEUED: "queued again", State.CANCELLED: "cancelled"}
