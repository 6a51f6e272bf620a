"""What the tests of the use cases share: offers, recipes, the pipeline step by step without Celery."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from sqlalchemy.orm import Session

from conftest import empty_tables
from ragline import pipeline
from ragline.app import alchemy, create_tables
from ragline.embedders import Embedder
from ragline.intake import Offer, Outcome, Recipe, take_in
from ragline.parsers import parse as parse_here
from ragline.tables import Document
from ragline.text import ParsedText
from ragline.tokens import EstimatedTokens, TokenCounter

KEYWORDS = Recipe(parser="1", splitter="1", embedder="none")
LETTERS = Recipe(parser="1", splitter="1", embedder="letters")
BATCH_CHUNKS = 3
Parse = Callable[[bytes, str], ParsedText]


def empty_index() -> None:
    """Make the tables of the app's own database where they are missing, and empty them."""
    create_tables(alchemy)
    empty_tables(alchemy.engine)
    with alchemy.begin() as session:
        for table in alchemy.metadata.sorted_tables:
            if table.name not in ("celery_queues", "celery_workers"):  # which stand for what is there
                session.execute(table.delete())


def offer(content: str | bytes, uri: str = "file:///a.txt") -> Offer:
    """An offer of a text."""
    data = content.encode() if isinstance(content, str) else content
    name = uri.rpartition("/")[2]
    return Offer(uri, name, hashlib.sha256(data).hexdigest(), len(data), data)


def long_text(word: str, sentences: int = 120) -> str:
    """A text of several batches of chunks."""
    return " ".join(
        f"Sentence {number} is about the {word} and about nothing else at all." for number in range(sentences)
    )


def add(
    session: Session, content: str | bytes, uri: str = "file:///a.txt", recipe: Recipe = KEYWORDS
) -> Outcome:
    """Take a text in, in a transaction."""
    outcome = take_in(session, offer(content, uri), recipe)
    session.commit()
    return outcome


def counter_of(_: str) -> TokenCounter:
    """The token counter of every embedder of the tests."""
    return EstimatedTokens()


def embedder_of(embedder: Embedder) -> Callable[[str], Embedder | None]:
    """What `pipeline.embed` asks for the embedder of a document."""
    return lambda name: embedder if name == embedder.name else None


def until_embedding(session: Session, document_id: int, parse: Parse = parse_here) -> list[int]:
    """Run the pipeline up to the batches, which are returned."""
    assert pipeline.admit(session, document_id)
    session.commit()
    assert pipeline.parse(session, document_id, parse)
    session.commit()
    batches = pipeline.split(session, document_id, counter_of, batch_chunks=BATCH_CHUNKS)
    session.commit()
    return batches


def embed(session: Session, document_id: int, batch: int, embedder: Embedder) -> bool:
    """Run the step of one batch in a transaction of its own, as a worker does; whether it was the last one."""
    is_last = pipeline.embed(session, document_id, batch, embedder_of(embedder))
    session.commit()
    return is_last


def process(
    session: Session, document_id: int, embedder: Embedder | None = None, parse: Parse = parse_here
) -> Document:
    """Run the whole pipeline for a document."""
    for batch in until_embedding(session, document_id, parse):
        assert embedder is not None
        embed(session, document_id, batch, embedder)
    session.expire_all()
    return session.get_one(Document, document_id)
