"""What pages show of documents: told the same by every database, and read anew only where it changed."""

from __future__ import annotations

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import LETTERS, add, embedder_of, long_text, process, until_embedding
from ragline import pipeline, reading
from ragline.errors import NoSuchDocumentError
from ragline.states import State


def test_a_look_tells_what_has_changed_since_the_one_before(
    session: Session, embedder: LetterEmbedder
) -> None:
    """A document that waits, one that is being embedded and one that is ready, each as it is now."""
    ready = add(session, "some text", "file:///ready.txt", LETTERS).document_id
    process(session, ready, embedder)
    working = add(session, long_text("whale"), "file:///working.txt", LETTERS).document_id
    first = reading.look(session, limit=10)
    batches = until_embedding(session, working)
    pipeline.embed(session, working, batches[0], embedder_of(embedder))
    session.commit()

    second = reading.look(session, first, limit=10)
    third = reading.look(session, second, limit=1)

    assert list(first.documents) == [working, ready]
    assert (first.documents[working].state, first.is_working) == (State.QUEUED, True)
    assert second.documents[working].embedded == 3 < second.documents[working].chunks
    assert second.documents[ready] is first.documents[ready]
    assert (second.states[State.EMBEDDING], second.states[State.READY]) == (1, 1)
    assert list(third.documents) == [working]


def test_a_look_at_documents_that_rest_counts_none_of_their_chunks(
    session: Session, embedder: LetterEmbedder
) -> None:
    """However often a page looks."""
    process(session, add(session, long_text("whale"), recipe=LETTERS).document_id, embedder)
    before = reading.look(session, limit=10)
    statements: list[str] = []
    connection = session.connection()
    event.listen(connection, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))

    again = reading.look(session, before, limit=10)

    assert again == before
    assert len(statements) == 2
    assert not any("chunk" in statement for statement in statements)


def test_a_passage_is_read_in_characters(session: Session, embedder: LetterEmbedder) -> None:
    """Also where the database counts bytes by itself."""
    text = "数据库事务必须提交或者回滚。" * 200
    document_id = add(session, text, recipe=LETTERS).document_id
    process(session, document_id, embedder)

    excerpt = reading.excerpt(session, document_id, 1400, 1407)
    detail = reading.detail(session, document_id)

    assert excerpt.quote == text[1400:1407]
    assert excerpt.before == text[1400 - reading.AROUND_CHARACTERS : 1400]
    assert excerpt.after == text[1407 : 1407 + reading.AROUND_CHARACTERS]
    assert not excerpt.is_start
    assert not excerpt.is_end
    assert detail.characters == len(text)
    assert list(detail.reached)[-1] is State.READY


def test_a_document_that_is_gone_cannot_be_read(session: Session) -> None:
    """It is told by its id."""
    for read in (reading.one, reading.detail):
        with pytest.raises(NoSuchDocumentError, match="99"):
            read(session, 99)
    with pytest.raises(NoSuchDocumentError):
        reading.excerpt(session, 99, 0, 1)
