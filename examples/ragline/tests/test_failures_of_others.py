"""Failures that others have reported of their ingestion, each with its number there: none of them happens here."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import (
    BATCH_CHUNKS,
    KEYWORDS,
    LETTERS,
    add,
    counter_of,
    embedder_of,
    empty_index,
    long_text,
    offer,
    process,
    until_embedding,
)
from ragline import controls, pipeline, tasks
from ragline.app import alchemy, app
from ragline.audit import audit
from ragline.embedders import Embedder
from ragline.errors import ModelUnavailableError
from ragline.parsers import parse
from ragline.searching import Mode, passages, rank
from ragline.states import State
from ragline.tables import Chunk, Document, Source, Vector
from ragline.text import ParsedText


@pytest.fixture
def session() -> Iterator[Session]:
    """A session of the app's own database, which carries the outbox."""
    empty_index()
    with alchemy.session() as session:
        yield session


def owed(session: Session) -> list[tuple[str, list[int]]]:
    """The tasks that the database owes, committed or in this transaction: name and arguments."""
    rows = session.execute(text("SELECT task_name, body FROM celery_outbox WHERE completed_at IS NULL")).all()
    return sorted((name.rpartition(".")[2], json.loads(body)[0]) for name, body in rows)


def deletion(session: Session, document_id: int, *, fatal: int | None = None) -> int:
    """Delete a document and roll it back; raise KeyboardInterrupt in place of one statement; return how many there are."""
    count = 0

    def before_execute(*_: object) -> None:
        nonlocal count
        if count == fatal:
            raise KeyboardInterrupt
        count += 1

    event.listen(alchemy.engine, "before_cursor_execute", before_execute)
    try:
        controls.delete(session, document_id)
    finally:
        event.remove(alchemy.engine, "before_cursor_execute", before_execute)
        session.rollback()
    return count


def found(session: Session, query: str) -> list[str]:
    """The quotes that a keyword search gives."""
    return [
        passage.quote for passage in passages(session, rank(session, query, None, None, mode=Mode.KEYWORD))
    ]


def test_dify_40961_a_message_never_leaves_before_its_transaction_is_committed(session: Session) -> None:
    """There: flush, send, then commit, so that a worker may look before the row is there. Here both are one commit."""
    outcome = controls.add(session, offer("some text"), KEYWORDS)
    assert owed(session) == []  # nothing has left: the message is written by the commit itself
    session.rollback()
    assert (owed(session), session.scalar(select(func.count(Document.id)))) == ([], 0)

    outcome = controls.add(session, offer("some text"), KEYWORDS)
    session.commit()

    assert owed(session) == [("ingest", [outcome.document_id])]


def test_dify_40961_a_document_is_never_embedded_with_another_model_than_its_own(
    session: Session, embedder: LetterEmbedder
) -> None:
    """There: silently re-embedded with the old model. Here the model is part of the document, or the step fails."""

    def absent(name: str) -> Embedder | None:
        raise ModelUnavailableError(f"{name} is not here.")

    process(session, add(session, "some text", recipe=KEYWORDS).document_id)
    changed = add(session, "some text", recipe=LETTERS).document_id
    (batch,) = until_embedding(session, changed)
    with pytest.raises(ModelUnavailableError, match="letters"):
        pipeline.embed(session, changed, batch, absent)
    session.rollback()
    pipeline.embed(session, changed, batch, embedder_of(embedder))
    session.commit()

    assert set(session.scalars(select(Vector.embedder))) == {"letters"}
    assert set(session.scalars(select(Document.embedder))) == {"letters"}


def test_dify_39975_no_document_waits_without_a_task(session: Session) -> None:
    """There: documents wait for ever. Here each step commits the next state and its task, or neither."""
    with alchemy.begin() as other:
        document_id = controls.add(other, offer(long_text("whale")), KEYWORDS).document_id

    tasks.ingest.apply(args=(document_id,)).get()
    assert ("split", [document_id]) in owed(session)
    session.rollback()
    for control in (controls.pause, controls.resume):
        with alchemy.begin() as other:
            control(other, document_id)

    assert session.scalars(select(Document.state)).one() is State.QUEUED
    assert owed(session).count(("ingest", [document_id])) == 2


def test_dify_9986_a_message_that_comes_again_indexes_nothing_again(
    session: Session, embedder: LetterEmbedder
) -> None:
    """There: redelivery re-indexes endlessly. Here the second delivery of any step finds nothing to do."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    for batch in batches:
        pipeline.embed(session, document_id, batch, embedder_of(embedder))
        session.commit()
    ids = list(session.scalars(select(Chunk.id).order_by(Chunk.id)))

    assert not pipeline.admit(session, document_id)
    assert not pipeline.parse(session, document_id)
    assert not pipeline.split(session, document_id, counter_of, batch_chunks=BATCH_CHUNKS)
    assert not any(pipeline.embed(session, document_id, batch, embedder_of(embedder)) for batch in batches)

    session.commit()
    assert list(session.scalars(select(Chunk.id).order_by(Chunk.id))) == ids
    assert session.scalar(select(func.count(Vector.chunk_id))) == len(ids)


def test_onyx_1625_no_session_is_held_open_through_long_work(
    session: Session, embedder: LetterEmbedder
) -> None:
    """There: sessions open through parsing and embedding. Here the connection is back in the pool meanwhile."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    in_transaction: list[bool] = []

    def looking(_: str) -> LetterEmbedder:
        in_transaction.append(session.in_transaction())
        return embedder

    def parsing(data: bytes, name: str) -> ParsedText:
        in_transaction.append(session.in_transaction())
        return parse(data, name)

    pipeline.admit(session, document_id)
    session.commit()
    pipeline.parse(session, document_id, parsing)
    session.commit()
    batches = pipeline.split(
        session, document_id, lambda name: looking(name).counter, batch_chunks=BATCH_CHUNKS
    )
    session.commit()
    pipeline.embed(session, document_id, batches[0], looking)

    assert in_transaction == [False, False, False]  # parsing, splitting, embedding


def test_ragflow_15805_a_task_whose_worker_is_gone_is_not_orphaned(session: Session) -> None:
    """There: a crashed worker's tasks stay its own. Here they are acknowledged late and owed until they are done.

    `test_crashes.py` and `test_worker.py` kill the workers.
    """
    for task in (tasks.ingest, tasks.split, tasks.embed):
        assert task.acks_late
        assert task.reject_on_worker_lost
        assert task.once

    outcome = controls.add(session, offer("some text"), KEYWORDS)
    session.commit()
    task_id = session.scalars(text("SELECT task_id FROM celery_outbox")).one()
    assert owed(session) == [("ingest", [outcome.document_id])]
    session.rollback()
    tasks.ingest.apply(args=(outcome.document_id,), task_id=task_id).get()

    assert owed(session) == [("split", [outcome.document_id])]


def test_ragflow_8575_no_queue_is_lost_without_its_documents(session: Session) -> None:
    """There: the queue is gone with Redis, and documents "run" for ever. Here it is rows beside the documents."""
    controls.add(session, offer("some text"), KEYWORDS)
    session.rollback()
    assert owed(session) == []
    document_id = controls.add(session, offer("some text"), KEYWORDS).document_id
    session.commit()

    with app.connection_for_write() as connection:
        message = connection.default_channel.basic_get(app.conf.task_default_queue)
        assert message is not None
        assert message.payload[0] == [document_id]
        # Its worker is gone without a word, with everything that it held in memory.

    assert owed(session) == [("ingest", [document_id])]


def test_llama_index_19579_nothing_is_marked_as_done_before_it_is(
    session: Session, embedder: LetterEmbedder
) -> None:
    """There: marked first, then worked. Here only the batch that ends last makes the document ready."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    for batch in [*batches[1:], batches[0]]:
        assert session.scalars(select(Document.state)).one() is State.EMBEDDING
        assert found(session, "whale") == []
        pipeline.embed(session, document_id, batch, embedder_of(embedder))
        session.commit()

    assert session.scalars(select(Document.state)).one() is State.READY
    assert found(session, "whale")


def test_llama_index_22639_the_old_text_is_found_until_the_new_one_is(session: Session) -> None:
    """There: deleted, then replaced, with nothing in between. Here both change places in one transaction."""
    process(session, add(session, "about whales").document_id)
    replaced = add(session, "about dolphins").document_id

    pipeline.admit(session, replaced)
    session.commit()
    pipeline.parse(session, replaced)
    session.commit()
    assert found(session, "whales dolphins") == ["about whales"]
    pipeline.split(session, replaced, counter_of, batch_chunks=BATCH_CHUNKS)
    session.commit()

    assert found(session, "whales dolphins") == ["about dolphins"]


def test_langchain_39937_store_and_record_cannot_drift_apart(
    session: Session, embedder: LetterEmbedder
) -> None:
    """There: two stores, and a crash between their writes. Here one transaction: any statement may fail, nothing differs."""
    document_id = process(session, add(session, long_text("whale"), recipe=LETTERS).document_id, embedder).id
    statements = deletion(session, document_id)
    assert statements > 5

    for fatal in range(statements):
        with pytest.raises(KeyboardInterrupt):
            deletion(session, document_id, fatal=fatal)
        assert audit(session) == []
        assert session.scalar(select(func.count(Vector.chunk_id)))

    controls.delete(session, document_id)
    session.commit()
    for table in (Document, Source, Chunk, Vector):
        assert session.scalar(select(func.count()).select_from(table)) == 0
    assert session.scalar(text("SELECT count(*) FROM chunk_keywords")) == 0
