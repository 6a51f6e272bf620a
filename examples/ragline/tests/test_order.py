"""In which order documents are worked on, and what people see of it meanwhile."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sqlalchemy import select
from sqlalchemy.orm import Session

from pipelines import KEYWORDS, empty_index, offer
from ragline import controls, pipeline, tasks
from ragline.app import alchemy, app, reading_session
from ragline.arrivals import FILES_AT_ONCE, take_in_files
from ragline.intake import Outcome
from ragline.parsers import parse
from ragline.states import NO_EMBEDDER, State
from ragline.tables import Document
from ragline.text import ParsedText
from ragline.transactions import in_transaction


@pytest.fixture(autouse=True)
def _empty() -> None:
    empty_index()


def add(*contents: str) -> list[int]:
    """Take texts in."""
    with alchemy.begin() as session:
        offers = [offer(content, f"file:///{at}.txt") for at, content in enumerate(contents)]
        return [controls.add(session, one, KEYWORDS).document_id for one in offers]


def test_a_document_that_was_begun_is_ended_before_the_next_one_is_begun() -> None:
    """The first is ready at once, and not when all have been parsed: its next step goes first."""
    first, _ = add("about whales", "about bees")
    tasks.ingest.apply(args=(first,)).get()

    with app.connection_for_write() as connection:
        channel: Any = connection.default_channel  # kombu types what all have in common
        message = channel.basic_get(app.conf.task_default_queue)

    assert message is not None
    assert (message.headers["task"], message.payload[0]) == (tasks.split.name, [first])


@pytest.mark.parametrize(("characters", "seen"), [(10, State.QUEUED), (pipeline.SHOWN_BYTES, State.PARSING)])
def test_a_large_document_is_seen_while_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, characters: int, seen: State
) -> None:
    """A small one is parsed before anybody looks, and saves a transaction."""
    states: list[State] = []

    def parsing(data: bytes, name: str) -> ParsedText:
        with reading_session() as session:
            states.extend(session.scalars(select(Document.state)))
        return parse(data, name)

    monkeypatch.setattr(tasks.confinement, "parse", parsing)
    (document_id,) = add("a" * characters)
    tasks.ingest.apply(args=(document_id,)).get()

    assert states == [seen]
    with reading_session() as session:
        document = session.get_one(Document, document_id)
        assert document.state is State.SPLITTING
        assert document.queued_at is not None
        assert document.parsing_at is not None
        assert document.splitting_at is not None
        assert document.queued_at <= document.parsing_at <= document.splitting_at


def test_small_files_share_a_transaction_behind_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is on its way at once; each further transaction would cost the disk a flush."""
    for number in range(FILES_AT_ONCE + 5):
        (tmp_path / f"{number:03}.md").write_text(f"Note {number}.")
    sizes: list[int] = []

    def counting(use_case: Callable[[Session], list[Outcome]]) -> list[Outcome]:
        outcomes = in_transaction(use_case)
        sizes.append(len(outcomes))
        return outcomes

    monkeypatch.setattr("ragline.arrivals.in_transaction", counting)
    outcomes = take_in_files([tmp_path], NO_EMBEDDER, Console(file=io.StringIO()))

    assert len(outcomes) == FILES_AT_ONCE + 5
    assert sizes == [1, FILES_AT_ONCE, 4]
