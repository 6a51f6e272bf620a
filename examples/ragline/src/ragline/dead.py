"""Dead tasks: those that failed for good, which the outbox keeps until their document is dealt with."""

from __future__ import annotations

from sqlalchemy import column, delete, select, table
from sqlalchemy.orm import Session

# The library's table; its reference says that rows of dead tasks may be deleted.
_OUTBOX = table("celery_outbox", column("id"), column("died_at"))


def task_id_prefix(document_id: int) -> str:
    """What the id of every task of a document begins with."""
    return f"document-{document_id}-"


def forget_dead_tasks(session: Session, document_id: int) -> None:
    """Give up the dead tasks of a document that begins again or is gone.

    Those that are left, and counted, are of documents that still want somebody's attention.
    """
    of_document = _OUTBOX.c.id.startswith(task_id_prefix(document_id), autoescape=True)
    # Looked for first: there is nearly always none, and a DELETE that finds none may lock what others insert.
    dead = session.scalars(select(_OUTBOX.c.id).where(_OUTBOX.c.died_at.is_not(None), of_document)).all()
    if dead:
        session.execute(delete(_OUTBOX).where(_OUTBOX.c.died_at.is_not(None), _OUTBOX.c.id.in_(dead)))
