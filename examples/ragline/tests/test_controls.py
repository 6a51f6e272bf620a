"""What people do with documents: pause, resume, cancel, retry, delete, and what late tasks find then."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from celery_alchemy import Alchemy
from celery_alchemy.testing import captured
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from conftest import LetterEmbedder, empty_tables
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
from ragline.errors import NoSuchDocumentError, NotPossibleError, UnsupportedError
from ragline.intake import Offer
from ragline.naming import find_document
from ragline.parsers import PARSER_VERSION
from ragline.progress import entries, measure
from ragline.searching import Mode, rank
from ragline.states import TRANSITIONS, WORKING, State
from ragline.tables import Base, Chunk, Document, DocumentText, Source, Vector
from ragline.transitions import move


@pytest.fixture(params=("sqlite", "postgresql", "mariadb"))
def database(request: pytest.FixtureRequest, engine_of: Callable[[str], Engine]) -> Iterator[Alchemy]:
    """An empty database that carries the outbox: each kind in turn serves the app."""
    if request.param == "sqlite":
        empty_index()
        yield alchemy
        return
    engine = engine_of(request.param)
    empty_tables(engine)
    # Without a broker of its own it would publish to the first database, at a time of its choosing.
    other = Alchemy(app, engine, broker=True)
    other.create_tables()
    with engine.begin() as connection:
        for table in other.metadata.sorted_tables:
            connection.execute(table.delete())
    yield other
    alchemy.init_app(app)


@pytest.fixture
def session(database: Alchemy) -> Iterator[Session]:
    """A session of the database that serves the app."""
    with database.session() as session:
        yield session


def sent(session: Session) -> list[tuple[str, int]]:
    """The tasks that were sent: name and document, in the order of the documents."""
    rows = session.execute(text("SELECT task_name, body FROM celery_outbox")).all()
    return sorted((name.rpartition(".")[2], json.loads(body)[0][0]) for name, body in rows)


def state_of(session: Session, document_id: int) -> State:
    """The state as it is in the database."""
    return session.execute(select(Document.state).where(Document.id == document_id)).scalar_one()


def put(session: Session, document_id: int, state: State) -> None:
    """Set a state, whatever the table of states says."""
    session.execute(text(f"UPDATE document SET state = '{state.value}' WHERE id = {document_id}"))
    session.commit()


def rows(session: Session) -> dict[str, int]:
    """How many rows each table has, the keyword index included; empty ones are left out."""
    counts = {
        table.name: session.scalar(select(func.count()).select_from(table))
        for table in Base.metadata.sorted_tables
    }
    counts["keywords"] = session.scalar(text("SELECT count(*) FROM chunk_keywords"))
    return {name: count for name, count in counts.items() if count}


def embed(session: Session, document_id: int, batches: list[int], embedder: LetterEmbedder) -> None:
    """Embed some batches, each in a transaction of its own."""
    for batch in batches:
        pipeline.embed(session, document_id, batch, embedder_of(embedder))
        session.commit()


CONTROLS: dict[str, tuple[Callable[[Session, int], None], State, tuple[State, ...]]] = {
    "pause": (controls.pause, State.PAUSED, WORKING),
    "resume": (controls.resume, State.QUEUED, (State.PAUSED,)),
    "cancel": (controls.cancel, State.CANCELLED, (*WORKING, State.PAUSED)),
    "retry": (controls.retry, State.QUEUED, (State.FAILED, State.CANCELLED)),
}


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("state", State)
def test_a_control_does_what_the_table_of_states_allows_and_nothing_else(
    session: Session, name: str, state: State
) -> None:
    """Elsewhere it is refused with the document's name and state, and changes nothing."""
    control, after, allowed = CONTROLS[name]
    document_id = add(session, "some text").document_id
    put(session, document_id, state)

    if state in allowed:
        control(session, document_id)
    else:
        with pytest.raises(NotPossibleError, match=rf"a\.txt is {state.value}"):
            control(session, document_id)
    session.commit()

    assert state_of(session, document_id) is (after if state in allowed else state)
    assert sent(session) == ([("ingest", document_id)] if state in allowed and after is State.QUEUED else [])


@pytest.mark.parametrize("control", [*(control for control, _, _ in CONTROLS.values()), controls.delete])
def test_a_control_of_a_document_that_is_gone_says_so(
    session: Session, control: Callable[[Session, int], None]
) -> None:
    """Somebody else deleted it meanwhile."""
    with pytest.raises(NoSuchDocumentError, match="There is no document 99"):
        control(session, 99)


def test_the_message_is_part_of_the_transaction(session: Session) -> None:
    """Flushed, sent, then committed (dify#40961): with a rollback neither the document nor its task exists."""
    controls.add(session, offer("some text"), KEYWORDS)
    session.rollback()
    assert (rows(session), sent(session)) == ({}, [])

    outcome = controls.add(session, offer("some text"), KEYWORDS)
    session.commit()
    assert sent(session) == [("ingest", outcome.document_id)]


def test_a_resumed_document_keeps_what_was_done(session: Session, embedder: LetterEmbedder) -> None:
    """Paused after one batch of several: text, chunks and that batch's vectors are not made again."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    pipeline.embed(session, document_id, batches[0], embedder_of(embedder))
    controls.pause(session, document_id)
    session.commit()
    assert not pipeline.embed(session, document_id, batches[1], embedder_of(embedder))
    made = list(session.scalars(select(Vector.chunk_id)))

    controls.resume(session, document_id)
    session.commit()
    left = until_embedding(session, document_id)
    embed(session, document_id, left, embedder)

    assert len(made) == BATCH_CHUNKS
    assert left == batches[1:]
    assert set(made) <= set(session.scalars(select(Vector.chunk_id)))
    assert state_of(session, document_id) is State.READY
    assert audit(session) == []


def test_a_failed_document_that_is_retried_keeps_what_was_done(
    session: Session, embedder: LetterEmbedder
) -> None:
    """The embedding service was away for the last batch: only that one is sent to it again."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    embed(session, document_id, batches[:-1], embedder)
    pipeline.fail(session, ConnectionError("the service is away"), document_id)
    session.commit()

    assert controls.retry_failed(session) == [document_id]
    session.commit()

    assert until_embedding(session, document_id) == batches[-1:]
    assert session.execute(select(Document.reason)).scalar_one() is None


def test_all_that_failed_for_a_passing_reason_are_retried(session: Session) -> None:
    """Those that failed for good are left alone; each can still be retried by itself."""
    passing, lasting = add(session, "text").document_id, add(session, "more", "file:///b.txt").document_id
    pipeline.fail(session, TimeoutError("too slow"), passing)
    pipeline.fail(session, UnsupportedError("This is a picture."), lasting)
    session.commit()

    assert controls.retry_failed(session) == [passing]
    controls.retry(session, lasting)
    session.commit()

    assert sent(session) == [("ingest", passing), ("ingest", lasting)]
    assert measure(session).documents == {State.QUEUED: 2}


@pytest.mark.parametrize(("parser", "is_tried"), [("0", True), (PARSER_VERSION, False)])
def test_what_was_refused_for_good_is_tried_again_by_another_parser(
    session: Session, parser: str, is_tried: bool
) -> None:
    """The same parser would say the same."""
    document_id = add(session, "text", recipe=replace(KEYWORDS, parser=parser)).document_id
    pipeline.fail(session, UnsupportedError("This is a picture."), document_id)
    session.commit()

    if is_tried:
        controls.retry_usefully(session, document_id)
    else:
        with pytest.raises(
            NotPossibleError, match=r"^a\.txt failed for a reason .*: This is a picture\. With"
        ):
            controls.retry_usefully(session, document_id)

    assert state_of(session, document_id) is (State.QUEUED if is_tried else State.FAILED)


def test_a_document_that_was_refused_unread_cannot_be_retried(session: Session) -> None:
    """There are no bytes to try with: the person is told to add it again."""
    refused = Offer("file:///a.txt", "a.txt", None, 0, None, UnsupportedError("It cannot be read."))
    document_id = controls.add(session, refused, KEYWORDS).document_id

    with pytest.raises(NotPossibleError, match="add it again"):
        controls.retry(session, document_id)


def test_a_cancelled_document_leaves_nothing_but_itself_and_can_be_taken_up_again(
    session: Session, embedder: LetterEmbedder
) -> None:
    """Chunks, vectors, text and index rows go in the same transaction; a late batch writes nothing."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    batches = until_embedding(session, document_id)
    pipeline.embed(session, document_id, batches[0], embedder_of(embedder))
    session.commit()

    controls.cancel(session, document_id)
    session.commit()
    assert not pipeline.embed(session, document_id, batches[1], embedder_of(embedder))
    session.commit()

    assert rows(session) == {"document": 1, "original": 1, "source": 1}
    assert audit(session) == []
    controls.retry(session, document_id)
    session.commit()
    assert process(session, document_id, embedder).state is State.READY


@pytest.mark.parametrize("state", State)
def test_a_deleted_document_leaves_nothing(session: Session, embedder: LetterEmbedder, state: State) -> None:
    """Store and record drift apart (langchain#39937): here they go together, in one transaction, from any state."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    until_embedding(session, document_id)
    put(session, document_id, state)

    controls.delete(session, document_id)

    assert rows(session) == {}
    session.rollback()
    assert {"document", "chunk", "keywords", "source", "original", "document_text"} <= rows(session).keys()


def test_late_tasks_of_a_deleted_document_resurrect_nothing(
    session: Session, embedder: LetterEmbedder
) -> None:
    """Every message of it that is still on its way finds no document, also its failure."""
    document_id = add(session, long_text("whale"), recipe=LETTERS).document_id
    (batch, *_) = until_embedding(session, document_id)
    controls.delete(session, document_id)
    session.commit()

    assert not pipeline.admit(session, document_id)
    assert not pipeline.parse(session, document_id)
    assert not pipeline.split(session, document_id, counter_of, batch_chunks=BATCH_CHUNKS)
    assert not pipeline.embed(session, document_id, batch, embedder_of(embedder))
    pipeline.fail(session, TimeoutError("too slow"), document_id)
    session.commit()

    assert rows(session) == {}


def die_of_each(session: Session, contents: list[bytes]) -> list[int]:
    """Add bad documents and let their first tasks fail for good, as a worker would."""
    ids = []
    for number, content in enumerate(contents):
        ids.append(controls.add(session, offer(content, f"file:///{number}.pdf"), KEYWORDS).document_id)
    session.commit()
    for task_id, document_id in owed(session):
        tasks.ingest.apply(args=(document_id,), task_id=task_id)
    return ids


def owed(session: Session) -> list[tuple[str, int]]:
    """The ids and documents of the tasks that are neither dead nor done."""
    query = "SELECT task_id, body FROM celery_outbox WHERE died_at IS NULL AND completed_at IS NULL"
    found = [(task_id, json.loads(body)[0][0]) for task_id, body in session.execute(text(query))]
    session.rollback()
    return found


def dead(session: Session) -> list[int]:
    """The documents of the dead tasks that `ragline status` and the page count."""
    query = "SELECT body FROM celery_outbox WHERE died_at IS NOT NULL"
    return sorted(json.loads(body)[0][0] for body in session.scalars(text(query)))


def test_dead_tasks_are_those_of_failed_documents_and_go_with_them(session: Session) -> None:
    """What is counted as dead is what still wants attention: retried or deleted, it does not; rolled back, it does."""
    retried, deleted, left, *others = die_of_each(session, [b"\x01" * (90 + number) for number in range(11)])
    assert dead(session) == [retried, deleted, left, *others]

    controls.retry(session, retried)
    controls.delete(session, deleted)
    assert dead(session) == [left, *others]
    session.rollback()
    assert dead(session) == [retried, deleted, left, *others]
    controls.retry(session, retried)
    controls.delete(session, deleted)
    session.commit()

    assert dead(session) == [left, *others]
    assert [document_id for _, document_id in owed(session)] == [retried]


def test_dead_tasks_of_a_generation_go_when_the_next_one_takes_its_place(session: Session) -> None:
    """Nobody can retry or delete a document that is gone."""
    (bad,) = die_of_each(session, [b"\x01" * 99])

    good = controls.add(session, offer("a text", "file:///0.pdf"), KEYWORDS).document_id
    session.commit()

    assert session.get(Document, bad) is None
    assert dead(session) == []
    assert [document_id for _, document_id in owed(session)] == [good]


def test_a_task_that_dies_after_its_document_was_deleted_leaves_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was at work when the document went."""
    document_id = controls.add(session, offer("a text"), KEYWORDS).document_id
    session.commit()
    ((task_id, _),) = owed(session)

    def parse(own: Session, document_id: int, _: object) -> bool:
        own.rollback()
        controls.delete(session, document_id)
        session.commit()
        raise UnsupportedError("This is a picture.")

    monkeypatch.setattr(pipeline, "parse", parse)
    with captured(alchemy) as sent:
        tasks.ingest.apply(args=(document_id,), task_id=task_id)
        assert sent == [tasks.forget.s(document_id)]
        sent.run()

    assert (dead(session), owed(session)) == ([], [])


def test_deleting_one_generation_leaves_the_other(session: Session) -> None:
    """The one that is found goes on being found when the one under way is deleted, and the other way round."""
    found = process(session, add(session, "about whales").document_id).id
    under_way = add(session, "about dolphins").document_id

    controls.delete(session, under_way)
    session.commit()
    assert rank(session, "whales", None, None, mode=Mode.KEYWORD).chunks
    under_way = add(session, "about zebras").document_id
    controls.delete(session, found)
    session.commit()

    assert not rank(session, "whales", None, None, mode=Mode.KEYWORD).chunks
    assert process(session, under_way).state is State.READY
    assert audit(session) == []


def test_a_person_names_a_document_by_id_path_or_name(session: Session) -> None:
    """Whatever is at hand; an unknown one is an error."""
    found = add(session, "text", "file:///folder/a.txt").document_id
    add(session, "other", "file:///folder/b.txt")

    names = (str(found), "/folder/a.txt", "file:///folder/a.txt", "a.txt")
    assert [find_document(session, name).document_id for name in names] == [found] * 4
    with pytest.raises(NoSuchDocumentError, match=r"c\.txt"):
        find_document(session, "c.txt")


def test_a_list_shows_each_document_with_its_places_and_counts(
    session: Session, embedder: LetterEmbedder
) -> None:
    """The newest first, in pages; what searches see is marked."""
    ready = process(session, add(session, "about whales", recipe=LETTERS).document_id, embedder)
    add(session, "about whales", "file:///copy.txt", recipe=LETTERS)
    queued = add(session, "about dolphins", recipe=LETTERS).document_id

    newest, older = entries(session, limit=9)

    assert (newest.id, newest.state, newest.uris, newest.is_found) == (
        queued,
        State.QUEUED,
        ("file:///a.txt",),
        False,
    )
    assert (older.id, older.uris, older.is_found) == (ready.id, ("file:///a.txt", "file:///copy.txt"), True)
    assert (newest.is_newer, older.is_newer) == (True, False)
    assert (older.chunks, older.embedded, older.since) == (1, 1, ready.ready_at)
    assert (
        entries(session, limit=9, below_id=queued)
        == entries(session, limit=9, states=[State.READY])
        == [older]
    )
    assert entries(session, limit=1) == entries(session, limit=9, document_ids=[queued]) == [newest]


def test_a_move_that_the_table_does_not_allow_is_a_mistake_of_the_caller(session: Session) -> None:
    """Not a document in the wrong state, but code that asks for the impossible."""
    with pytest.raises(ValueError, match="does not go from ready to parsing"):
        move(session, 1, State.PARSING, before=(State.READY,))
    assert State.PARSING not in TRANSITIONS[State.READY]


def test_only_one_of_two_transactions_moves_a_document(session: Session, database: Alchemy) -> None:
    """The second is told that it was not the one; nothing is sent twice."""
    document_id = add(session, "some text").document_id

    assert pipeline.admit(session, document_id)
    session.commit()
    with database.begin() as other:
        assert not pipeline.admit(other, document_id)

    assert session.scalar(select(func.count(Source.id))) == 1
    assert (
        session.scalar(select(func.count(Chunk.id)))
        == session.scalar(select(func.count(DocumentText.document_id)))
        == 0
    )
