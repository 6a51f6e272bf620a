"""Step 1: a ``with`` block in each task."""

from typing import Any

from celery import Celery

from from_hand_written import models
from from_hand_written.models import Document, SessionLocal

celery = Celery("with_block", broker="memory://", backend="cache+memory://")


# <import>
@celery.task(shared=False)
def import_document(title: str) -> int:
    """Store a document and have it indexed."""
    with SessionLocal() as session:
        document = Document(title=title)
        session.add(document)
        session.flush()
        index.delay(document.id)  # Bug 1: the worker looks for a row that is not committed yet,
        if not title:  # Bug 2: or that never will be.
            raise ValueError("a document needs a title")
        session.commit()
        return document.id


# </import>


# <index>
@celery.task(shared=False, bind=True)
def index(self: Any, document_id: int) -> None:
    """Index a document."""
    with SessionLocal() as session:
        document = session.get_one(Document, document_id)
        try:
            document.title = models.slow_work(document.title)  # Bug 3: a connection waits meanwhile.
        except Exception:
            document.state = "failed"  # Bug 4: rolled back with everything else.
            raise
        document.state = "indexed"
        session.commit()


# </index>


# <count>
@celery.task(shared=False)
def append(document_id: int, text: str) -> None:
    """Append to a title."""
    with SessionLocal() as session:
        document = session.get_one(Document, document_id)
        document.title += text  # Bug 5: twice, when the message is delivered twice.
        session.commit()


# </count>
