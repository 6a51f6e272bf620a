"""Step 3: a ``scoped_session`` for all, removed when a task has ended."""

from typing import Any

from celery import Celery
from celery.signals import task_postrun
from sqlalchemy.orm import scoped_session

from from_hand_written.models import Document, SessionLocal

celery = Celery("scoped", broker="memory://", backend="cache+memory://")


# <scoped>
session = scoped_session(SessionLocal)


@task_postrun.connect
def remove_session(**kwargs: Any) -> None:
    """End the thread's session."""
    session.remove()


@celery.task(shared=False)
def rename(document_id: int, title: str) -> None:
    """Rename a document."""
    session.get_one(Document, document_id).title = title
    session.commit()


@celery.task(shared=False)
def import_document(title: str) -> None:
    """Store a document and rename another one, both or neither."""
    session.add(Document(title=title))
    rename.apply((1, "renamed"))  # Bug 9: the same session. It commits half of this task's work, and is removed.
    if title == "bad":
        raise ValueError(title)
    session.commit()


# </scoped>
