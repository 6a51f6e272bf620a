"""The pipeline's steps: what each writes, and that late, doubled and overtaken messages do no harm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import (
    BATCH_CHUNKS,
    LETTERS,
    add,
    counter_of,
    embed,
    embedder_of,
    long_text,
    process,
    until_embedding,
)
from ragline import pipeline
from ragline.audit import audit
from ragline.embedders import Embedder
from ragline.errors import ModelUnavailableError, UnsupportedError
from ragline.intake import drop_unused
from ragline.progress import failures, measure
from ragline.states import SETTLED, TRANSITIONS, WORKING, State
from ragline.tables import Chunk, Document, DocumentText, Source, Vector
from ragline.tokens import TokenCounter


def test_a_document_passes_through_its_states_and_is_found_whole(
    session: Session, embedder: LetterEmbedder
) -> None:
    """Every stage is stamped, every chunk has its vector, and the text is quoted exactly."""
    document = process(session, add(session, long_text("whale"), recipe=LETTERS).document_id, embedder)

    assert document.state is State.READY
    stamps = (
        document.queued_at,
        document.parsing_at,
        document.splitting_at,
        document.embedding_at,
        document.ready_at,
    )
    assert None not in stamps
    assert list(stamps) == sorted(stamp for stamp in stamps if stamp)
    chunks = session.scalar(select(func.count(Chunk.id)))
    assert chunks == session.scalar(select(func.count(Vector.chunk_id)))
    assert chunks
    assert chunks > BATCH_CHUNKS
    assert audit(session) == []


def test_progress_is_counted_from_rows(session: Session, embedder: LetterEmbedder) -> None:
    """Half-way, the count of vectors is what is done and the count of chunks what there is to do."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    pipeline.embed(session, document_id, batches[0], embedder_of(embedder))

    progress = measure(session, [document_id])

    assert progress.documents == {State.EMBEDDING: 1}
    assert (progress.total, progress.settled) == (1, 0)
    assert progress.embedded == BATCH_CHUNKS < progress.chunks == progress.embedded + progress.unembedded


def test_the_last_batch_makes_the_document_ready_whatever_the_order(
    session: Session, embedder: LetterEmbedder
) -> None:
    """Marked before done (llama_index#19579): no batch but the last one to end finishes the document."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = list(until_embedding(session, document_id))

    finished = [embed(session, document_id, batch, embedder) for batch in [*batches[1:], batches[0]]]

    assert finished == [False] * (len(batches) - 1) + [True]


def test_every_message_delivered_twice_changes_nothing(session: Session, embedder: LetterEmbedder) -> None:
    """Redelivery re-indexes endlessly (dify#9986): here the second delivery of any step finds nothing to do."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    for batch in batches:
        embed(session, document_id, batch, embedder)
        embed(session, document_id, batch, embedder)
    before = measure(session)

    assert not pipeline.admit(session, document_id)
    assert not pipeline.parse(session, document_id)
    assert len(pipeline.split(session, document_id, counter_of, batch_chunks=BATCH_CHUNKS)) == 0
    assert not any(pipeline.embed(session, document_id, batch, embedder_of(embedder)) for batch in batches)

    session.commit()
    assert measure(session) == before
    assert audit(session) == []


STEPS: dict[State, Callable[[Session, int, LetterEmbedder], object]] = {
    State.QUEUED: lambda session, document_id, _: pipeline.admit(session, document_id),
    State.PARSING: lambda session, document_id, _: pipeline.parse(session, document_id),
    State.SPLITTING: lambda session, document_id, _: pipeline.split(
        session, document_id, counter_of, batch_chunks=3
    ),
    State.EMBEDDING: lambda session, document_id, embedder: pipeline.embed(
        session, document_id, 0, embedder_of(embedder)
    ),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", State)
def test_a_step_works_only_on_a_document_in_its_state(
    session: Session, embedder: LetterEmbedder, step: State, state: State
) -> None:
    """A message that comes late finds its document paused, cancelled, failed or further on, and leaves it so."""
    # A small document is parsed as it is taken from the queue.
    if step is state or (step, state) == (State.PARSING, State.QUEUED):
        return
    document_id = add(session, "some text", recipe=LETTERS).document_id
    session.execute(update(Document).values(state=state))
    session.commit()

    assert not STEPS[step](session, document_id, embedder)

    session.commit()
    session.expire_all()
    assert session.get_one(Document, document_id).state is state
    assert session.scalar(select(func.count(DocumentText.document_id))) == 0


@pytest.mark.parametrize("step", STEPS)
def test_a_message_for_a_deleted_document_resurrects_nothing(
    session: Session, embedder: LetterEmbedder, step: State
) -> None:
    """The document's id is all that a late task has, and it leads nowhere."""
    assert not STEPS[step](session, 99, embedder)

    assert session.scalar(select(func.count(Document.id))) == 0


class Interruption:
    """A token counter and embedder that something happens behind the back of."""

    def __init__(
        self, session: Session, happens: Callable[[Session], object], embedder: LetterEmbedder
    ) -> None:
        self._session, self._happens, self._embedder = session, happens, embedder
        self.was_in_transaction: bool | None = None

    def __call__(self, _: str) -> LetterEmbedder:
        self.was_in_transaction = self._session.in_transaction()
        with Session(self._session.get_bind()) as other:
            self._happens(other)
            other.commit()
        return self._embedder

    def counter_of(self, name: str) -> TokenCounter:
        """As `pipeline.split` wants it."""
        return self(name).counter

    def embedder_of(self, name: str) -> Embedder:
        """As `pipeline.embed` wants it."""
        return self(name)


def forget_all(session: Session) -> None:
    """Delete the document, as a person does while it is being worked on."""
    document_id = session.scalars(select(Document.id)).one()
    session.execute(delete(Source))
    drop_unused(session, [document_id])


def test_a_document_deleted_while_it_is_split_stays_deleted(
    session: Session, embedder: LetterEmbedder
) -> None:
    """The step notices when it comes to write, and writes nothing."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    pipeline.admit(session, document_id)
    session.commit()
    pipeline.parse(session, document_id)
    session.commit()
    interruption = Interruption(session, forget_all, embedder)

    batches = pipeline.split(session, document_id, interruption.counter_of, batch_chunks=3)

    session.commit()
    assert len(batches) == 0
    assert session.scalar(select(func.count(Chunk.id))) == 0


def test_a_document_deleted_while_it_is_embedded_stays_deleted(
    session: Session, embedder: LetterEmbedder
) -> None:
    """No vector of a chunk that is gone, no error, no document."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    until_embedding(session, document_id)
    interruption = Interruption(session, forget_all, embedder)

    assert not pipeline.embed(session, document_id, 0, interruption.embedder_of)

    session.commit()
    assert session.scalar(select(func.count(Vector.chunk_id))) == 0
    assert audit(session) == []


def test_a_batch_that_was_overtaken_by_a_pause_writes_nothing(
    session: Session, embedder: LetterEmbedder
) -> None:
    """A step does nothing for a document that is not in its state any more when it comes to write."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    until_embedding(session, document_id)

    def pause(other: Session) -> None:
        other.execute(update(Document).values(state=State.PAUSED))

    assert not pipeline.embed(session, document_id, 0, Interruption(session, pause, embedder).embedder_of)

    assert session.scalar(select(func.count(Vector.chunk_id))) == 0


def test_two_workers_on_the_same_batch_write_it_once(session: Session, embedder: LetterEmbedder) -> None:
    """The slower one finds the vectors there and adds none."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)

    def embed_too(other: Session) -> None:
        pipeline.embed(other, document_id, 0, embedder_of(embedder))

    pipeline.embed(session, document_id, 0, Interruption(session, embed_too, embedder).embedder_of)
    session.commit()
    for batch in batches[1:]:
        embed(session, document_id, batch, embedder)

    assert audit(session) == []


def test_no_transaction_is_held_while_splitting_and_embedding(
    session: Session, embedder: LetterEmbedder
) -> None:
    """Sessions held open through long work (onyx#1625): the connection is back in its pool meanwhile."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    pipeline.admit(session, document_id)
    session.commit()
    pipeline.parse(session, document_id)
    session.commit()
    splitting = Interruption(session, lambda _: None, embedder)
    pipeline.split(session, document_id, splitting.counter_of, batch_chunks=3)
    session.commit()
    embedding = Interruption(session, lambda _: None, embedder)
    pipeline.embed(session, document_id, 0, embedding.embedder_of)

    assert splitting.was_in_transaction is False
    assert embedding.was_in_transaction is False


def test_a_failure_is_told_in_words_and_never_overwrites_a_ready_document(session: Session) -> None:
    """A late failure of an overtaken delivery does not take away what is there."""
    ready = process(session, add(session, "some text").document_id)
    failing = add(session, "other text", "file:///b.txt")

    for document_id in (ready.id, failing.document_id, 99):
        pipeline.fail(session, UnsupportedError("This is a picture."), document_id)
    session.commit()

    assert ready.state is State.READY
    assert [(failure.name, failure.reason) for failure in failures(session)] == [
        ("b.txt", "This is a picture.")
    ]


def test_a_worker_without_the_documents_model_does_not_use_another(session: Session) -> None:
    """Vectors of two models never meet in one index."""

    def absent(name: str) -> Embedder | None:
        raise ModelUnavailableError(f"{name} is not here.")

    document_id = add(session, "some text", recipe=LETTERS).document_id
    until_embedding(session, document_id)

    with pytest.raises(ModelUnavailableError, match="letters"):
        pipeline.embed(session, document_id, 0, absent)


def test_states_lead_somewhere_and_nowhere_else() -> None:
    """Every state is in the table, every working one can fail, pause and be cancelled, and ready is the end."""
    assert set(TRANSITIONS) == set(State) == {*WORKING, *SETTLED}
    assert all({State.FAILED, State.PAUSED, State.CANCELLED} <= TRANSITIONS[state] for state in WORKING)
    assert TRANSITIONS[State.READY] == frozenset()
    assert all(hasattr(Document, f"{state.value}_at") for state in State)
