"""Counts the words of some texts, in workers."""

from celery import group
from sqlalchemy import select

from celery_alchemy import enqueue
from script.tasks import Base, Text, alchemy, count

TEXTS = ("It is a truth universally acknowledged", "that a single man in possession of a good fortune", "must be in want of a wife")


def main() -> int:
    """Store the texts, have all of them counted, and return the sum."""
    Base.metadata.create_all(alchemy.engine)
    alchemy.create_tables()

    with alchemy.begin() as session:
        texts = [Text(content=content) for content in TEXTS]
        session.add_all(texts)
        session.flush()
        result = enqueue(session, group(count.s(text.id) for text in texts))

    total: int = sum(result.get(timeout=60))
    with alchemy.session() as session:
        for text in session.scalars(select(Text).where(Text.id.in_([text.id for text in texts]))):
            print(f"{text.words:3} {text.content}")
    print(f"{total:3} words")
    return total
