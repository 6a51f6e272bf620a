"""Step 2: a task class that opens the session in ``before_start`` and ends it in ``after_return``."""

from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from from_hand_written.models import Document, SessionLocal

celery = Celery("hooks", broker="memory://", backend="cache+memory://")


# <class>
class DatabaseTask(Task):  # type: ignore[type-arg]
    """Opens a session before the body and commits it after it."""

    abstract = True
    session: Session  # Bug 6: the task object is one for all threads, so this is one session for all of them.

    def before_start(self, *args: Any) -> None:
        """Open the session."""
        self.session = SessionLocal()

    def after_return(self, status: str, *args: Any) -> None:
        """Commit and close."""
        if status == "SUCCESS":
            self.session.commit()  # Bug 7: the result SUCCESS is stored already, and stays when this fails.
        self.session.close()


# </class>


# <tasks>
@celery.task(shared=False, bind=True, base=DatabaseTask)
def import_document(self: Any, title: str) -> None:
    """Store a document."""
    self.session.add(Document(title=title))


@celery.task(shared=False, bind=True, base=DatabaseTask)
def skip(self: Any, document_id: int) -> None:
    """Find that there is nothing to do."""
    self.session.get_one(Document, document_id)
    raise Ignore  # Bug 8: after_return is not called for it, and the connection is not given back.


# </tasks>
