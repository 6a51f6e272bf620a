"""How many statements sending and ``once`` add, counted on the connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.databases import LoneStatement
from celery_alchemy.outbox import lone_statement
from celery_alchemy.outbox.lone_statement import Answer
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.services.databases import Database


@pytest.fixture
def stand(database: Database) -> Iterator[OutboxStand]:
    """An app with an outbox."""
    stand = OutboxStand(database)
    yield stand
    stand.close()


@contextmanager
def _counted(stand: OutboxStand) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement.split(maxsplit=1)[0])

    def note_alone(connection: Any, dialect: Any, statement: LoneStatement, *rest: Any) -> Answer:
        statements.append("SELECT alone" if statement.is_select else "UPDATE alone")
        return execute(connection, dialect, statement, *rest)

    def note_commit(connection: Any) -> None:
        statements.append("COMMIT")

    execute = lone_statement._execute
    listeners = {"before_cursor_execute": note, "commit": note_commit}
    for name, listener in listeners.items():
        event.listen(stand.alchemy.engine, name, listener)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lone_statement, "_execute", note_alone)
            yield statements
    finally:
        for name, listener in listeners.items():
            event.remove(stand.alchemy.engine, name, listener)


def _add(session: Session) -> None:
    session.add(Effect(name="one row"))


@pytest.mark.parametrize("sends", [1, 20])
def test_sending_adds_one_insert_to_the_transaction(stand: OutboxStand, sends: int) -> None:
    """All messages of a transaction are one INSERT in it, and one DELETE after it."""
    task = stand.task(name="add")(_add)

    with _counted(stand) as statements, Session(stand.alchemy.engine) as session:
        for _ in range(sends):
            enqueue(session, task.s())
        session.commit()
        stand.handed_over()

    # On PostgreSQL a SET has the last COMMIT not wait for the disk.
    sent = [statement for statement in statements if statement not in ("SET", "COMMIT")]
    assert sent == ["INSERT", "DELETE"]


def test_once_adds_two_statements_and_no_commit_to_an_owed_task(stand: OutboxStand) -> None:
    """One counts the start by itself, one records the end; a plain task sends its own only."""
    sent = {}
    for once in (False, True):
        task = stand.task(name=f"add-{once}", once=once)(_add)
        with Session(stand.alchemy.engine) as session:
            enqueue(session, task.s())
            session.commit()
        [message] = stand.sent()

        with _counted(stand) as statements:
            ended = stand.deliver(message)

        assert ended.state == "SUCCESS"
        sent[once] = list(statements)
    assert sent[False] == ["INSERT", "COMMIT"]
    assert sent[True] == ["UPDATE alone", "INSERT", "UPDATE", "COMMIT"]


def test_once_adds_a_look_and_a_row_to_a_task_that_is_not_owed(stand: OutboxStand) -> None:
    """Sent past the outbox it looks by itself, and writes its completion in the body's transaction."""
    task = stand.task(name="add", once=True)(_add)
    task.delay()
    [message] = stand.sent()

    with _counted(stand) as statements:
        ended = stand.deliver(message)

    assert ended.state == "SUCCESS"
    assert statements == ["SELECT alone", "INSERT", "INSERT", "COMMIT"]


def test_once_looks_where_the_body_never_touches_its_session(stand: OutboxStand) -> None:
    """A second delivery finds the completion with one statement, and opens no transaction."""
    runs: list[int] = []

    @stand.task(name="looks", once=True)
    def looks() -> None:
        runs.append(1)

    looks.delay()
    [message] = stand.sent()
    stand.deliver(message)

    with _counted(stand) as statements:
        ended = stand.deliver(message)

    assert (ended.state, runs) == ("SUCCESS", [1])
    assert statements == ["SELECT alone"]


@pytest.mark.parametrize("is_owed", [True, False])
def test_once_body_begins_without_a_connection(stand: OutboxStand, is_owed: bool) -> None:
    """Slow work before the first use of the session holds nothing: no transaction, no lock."""
    seen: list[tuple[bool, int]] = []

    @stand.task(name="slow", once=True)
    def slow(session: Session) -> None:
        pool: Any = stand.alchemy.engine.pool
        seen.append((session.in_transaction(), pool.checkedout()))

    with stand.alchemy.begin():
        (slow.delay_on_commit if is_owed else slow.delay)()
    [message] = stand.sent()
    stand.deliver(message)

    assert seen == [(False, 0)]
