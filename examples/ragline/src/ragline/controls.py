"""What people do with documents: add, pause, resume, cancel, retry, delete. Use cases that take a session.

Each is part of the caller's transaction, and so is the message of the task that it calls for: a command, a
route or a script has such a session from `alchemy.begin()`. A step that runs meanwhile finds another state
than it expects, or no document, when it comes to write, and writes nothing: all of this takes effect within a
batch.
"""

from __future__ import annotations

from collections.abc import Iterable

from celery_alchemy import enqueue
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from ragline import tasks
from ragline.dead import forget_dead_tasks
from ragline.errors import NoSuchDocumentError, NotPossibleError
from ragline.intake import (
    Offer,
    Outcome,
    Recipe,
    delete_document,
    forget_results,
    forget_source,
    take_in,
)
from ragline.naming import Target
from ragline.parsers import PARSER_VERSION
from ragline.states import State
from ragline.tables import Document, Original
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


def retry_usefully(session: Session, document_id: int) -> None:
    """As `retry`, but not where the same parser would refuse it again.

    Raises:
        NoSuchDocumentError: it is gone.
        NotPossibleError: also where it failed for a reason that trying again does not change.
    """
    for_good = select(Document.name, Document.reason).where(
        Document.id == document_id,
        Document.state == State.FAILED,
        Document.is_permanent.is_(True),
        Document.parser == PARSER_VERSION,
    )
    if failed := session.execute(for_good).one_or_none():
        raise NotPossibleError(
            f"{failed.name} failed for a reason that trying again does not change: {failed.reason}"
            " With `--force` it is tried all the same, for instance with another limit."
        )
    retry(session, document_id)


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


def delete_targets(session: Session, targets: Iterable[Target]) -> None:
    """Delete what a person means: documents from everywhere, or places with what no other place shows.

    Raises:
        NoSuchDocumentError: a document is gone.
    """
    targets = list(targets)
    for document_id in sorted({key for one in targets if one.source_ids is None for key in one.document_ids}):
        delete(session, document_id)
    for source_id in sorted({key for one in targets for key in one.source_ids or ()}):
        forget_source(session, source_id)


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
