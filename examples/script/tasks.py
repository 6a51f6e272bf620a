"""The table, the Celery app, its Alchemy and the task; ``celery -A script.tasks worker`` runs it."""

from celery import Celery
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_alchemy import Alchemy
from without_servers import celery_settings, database_url


class Base(DeclarativeBase):
    """All tables."""


class Text(Base):
    """A text, and how many words it has; None until they were counted."""

    __tablename__ = "texts"

    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str] = mapped_column(String(1000))
    words: Mapped[int | None]


celery = Celery("script")
celery.conf.update(celery_settings("script"))
alchemy = Alchemy(celery, database_url("script"), outbox=True)


@celery.task(once=True)
def count(session: Session, text_id: int) -> int:
    """Count the words of a text."""
    text = session.get_one(Text, text_id)
    text.words = len(text.content.split())
    return text.words
