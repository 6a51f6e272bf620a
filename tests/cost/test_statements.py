"""How many statements sending and ``once`` add, counted on the connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from tests.delivery.stand import Effect, Stand
from tests.services.databases import Database


@pytest.fixture
def stand(database: Database) -> Iterator[Stand]:
    """An app with an outbox."""
    stand = Stand(database)
    yield stand
    stand.close()


@contextmanager
def _counted(stand: Stand) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement.split(maxsplit=1)[0])

    event.listen(stand.alchemy.engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(stand.alchemy.engine, "before_cursor_execute", note)


def _add(session: Session) -> None:
    session.add(Effect(name="one row"))


@pytest.mark.parametrize("sends", [1, 20])
def test_sending_adds_one_insert_to_the_transaction(stand: Stand, sends: int) -> None:
    """All messages of a transaction are one INSERT in it, and one DELETE after it."""
    task = stand.task(name="add")(_add)

    with _counted(stand) as statements, Session(stand.alchemy.engine) as session:
        for _ in range(sends):
            enqueue(session, task.s())
        session.commit()

    assert statements == ["INSERT", "DELETE"]


def test_once_adds_two_statements_to_a_task(stand: Stand) -> None:
    """A once task counts its start with one statement and records its end with one; a plain task sends its own only."""
    counts = {}
    for once in (False, True):
        task = stand.task(name=f"add-{once}", once=once)(_add)
        with Session(stand.alchemy.engine) as session:
            enqueue(session, task.s())
            session.commit()
        [sent] = stand.sent()

        with _counted(stand) as statements:
            ended = stand.deliver(sent)

        assert ended.state == "SUCCESS"
        counts[once] = list(statements)
    assert counts[False] == ["INSERT"]
    assert counts[True] == ["UPDATE", "INSERT", "UPDATE"]
