"""The audit: whatever is broken in the rows is told, so that a demo or a soak cannot end well by chance."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from conftest import LetterEmbedder
from pipelines import LETTERS, add, long_text, process
from ragline.audit import audit


@pytest.fixture
def ready(session: Session, embedder: LetterEmbedder) -> Session:
    """An index with a document that is whole."""
    process(session, add(session, long_text("whale") + " 😀 鯨", recipe=LETTERS).document_id, embedder)
    assert audit(session) == []
    return session


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE document SET state = 'embedding'", "is still embedding"),
        ("UPDATE document SET state = 'failed'", "failed without a reason"),
        ("UPDATE source SET serving_id = NULL", "has no document that is settled"),
        ("UPDATE source SET serving_id = NULL", "belongs to no source"),
        ("UPDATE source SET pending_id = serving_id", "waits for the document that it shows"),
        ("DELETE FROM embedding WHERE chunk_id = (SELECT min(id) FROM chunk)", "vectors"),
        ("UPDATE chunk SET position = 99 WHERE position = 0", "positions"),
        ("UPDATE chunk SET start = start + 1 WHERE position = 3", "not the text at its offsets"),
        ("DELETE FROM document_text", "not the text at its offsets"),
        ("DELETE FROM chunk", "ready without a chunk"),
        ("DELETE FROM chunk_keywords", "in the keyword index"),
        ("UPDATE original SET digest = 'x'", "belong to no document"),
        (
            "INSERT INTO document (digest, name, size_bytes, parser, splitter, embedder, state, is_permanent)"
            " SELECT NULL, 'twin', 1, parser, splitter, embedder, 'ready', is_permanent FROM document",
            "twin is ready without a chunk",
        ),
    ],
)
def test_every_kind_of_damage_is_told(ready: Session, damage: str, told: str) -> None:
    """One broken row is enough."""
    ready.execute(text(damage))

    assert any(told in problem for problem in audit(ready))
