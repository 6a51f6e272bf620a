"""The same tasks with celery-alchemy."""

from celery import Celery
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, enqueue, released
from from_hand_written import models
from from_hand_written.models import Document, SessionLocal

celery = Celery("ours", broker="memory://", backend="cache+memory://")
# <tasks>
alchemy = Alchemy(celery, SessionLocal, outbox=True)


@celery.task(shared=False)
def import_document(session: Session, title: str) -> int:
    """Store a document and have it indexed."""
    document = Document(title=title)
    session.add(document)
    session.flush()
    enqueue(session, index.s(document.id))  # 1, 2: sent if, and only if, this commits
    if not title:
        raise ValueError("a document needs a title")
    return document.id  # 7: committed here, before SUCCESS is stored


def note_failure(session: Session, exc: Exception, document_id: int) -> None:
    """Write down that a document could not be indexed."""
    session.get_one(Document, document_id).state = "failed"


@celery.task(shared=False, record_failure=note_failure)  # 4: in a transaction of its own
def index(session: Session, document_id: int) -> None:
    """Index a document."""
    document = session.get_one(Document, document_id)
    with released(session):  # 3: no connection waits
        title = models.slow_work(document.title)
    document.title = title
    document.state = "indexed"


@celery.task(shared=False, once=True)  # 5: its writes are committed once
def append(session: Session, document_id: int, text: str) -> None:
    """Append to a title."""
    session.get_one(Document, document_id).title += text


@celery.task(shared=False)
def skip(session: Session, document_id: int) -> None:
    """Find that there is nothing to do."""
    session.get_one(Document, document_id)
    raise Ignore  # 8: the session is closed on every outcome


@celery.task(shared=False)
def rename(session: Session, document_id: int, title: str) -> None:
    """Rename a document."""
    session.get_one(Document, document_id).title = title


@celery.task(shared=False)
def import_and_rename(session: Session, title: str) -> None:
    """Store a document and rename another one, both or neither."""
    rename(session=session, document_id=1, title="renamed")  # 9: a session by keyword is the caller's; else it has its own
    session.add(Document(title=title))
    if title == "bad":
        raise ValueError(title)


# </tasks>
