"""The steps of ragline, killed and delivered twice where they are most vulnerable, in this process."""

from __future__ import annotations

from typing import Any

import pytest
from celery_alchemy import Alchemy
from celery_alchemy.testing import Joined, Sent, captured, joined
from sqlalchemy import func, select

from pipelines import KEYWORDS, empty_index, long_text, offer
from ragline import app, controls, tasks
from ragline.states import State
from ragline.tables import Chunk, Document

POINTS = (
    "body, before",
    "body, after",
    "COMMIT, before",
    "COMMIT, after",
    "result, before",
    "acknowledge, before",
)


@pytest.fixture(scope="module", autouse=True)
def _tables() -> None:
    empty_index()


@pytest.fixture
def alchemy() -> Alchemy:
    """Ragline's own, whose sessions join the test's transaction."""
    return app.alchemy


def _add(alchemy: Alchemy) -> int:
    with alchemy.begin() as session:
        return controls.add(session, offer(long_text("whale")), KEYWORDS).document_id


def _indexed(transaction: Joined) -> tuple[str, int]:
    session = transaction.session()
    return session.scalars(select(Document.state)).one(), session.scalar(select(func.count(Chunk.id))) or 0


@pytest.fixture(scope="module")
def undisturbed() -> tuple[str, int]:
    """What becomes of the document when nothing happens."""
    with joined(app.alchemy) as transaction, captured(app.alchemy) as sent:
        _add(app.alchemy)
        sent.run()
        state, chunks = _indexed(transaction)
    assert chunks > 1
    return state, chunks


@pytest.mark.usefixtures("no_leaks")
def test_step_after_step_is_sent(alchemy: Alchemy, joined_transaction: Joined, sent: Sent) -> None:
    """Each step sends the next one when it has committed, and the last one none."""
    document_id = _add(alchemy)

    assert sent == [tasks.ingest.s(document_id)]
    sent.run_next()
    assert sent == [tasks.split.s(document_id)]
    sent.run()

    assert _indexed(joined_transaction)[0] == State.READY


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("step", [tasks.ingest, tasks.split], ids=lambda step: step.name)
def test_document_is_indexed_once_though_a_step_dies(
    step: Any,
    point: Any,
    undisturbed: tuple[str, int],
    alchemy: Alchemy,
    joined_transaction: Joined,
    sent: Sent,
    crash_at: Any,
    deliver_twice: Any,
) -> None:
    """Wherever the process of a step dies, and though every message comes twice, each chunk is there once."""
    _add(alchemy)

    with crash_at(point, task=step), deliver_twice():
        runs = sent.run()

    assert "LOST" in {run.state for run in runs}
    assert _indexed(joined_transaction) == undisturbed
