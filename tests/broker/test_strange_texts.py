"""Texts that a database would not keep as they are: in names, arguments, results and errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.operations.dead_tasks import dead
from tests.broker.broker_stand import BrokerStand
from tests.services.databases import Database


@pytest.fixture
def western(database: Database) -> Iterator[Database]:
    """A database whose tables have Western letters only, unless they say what they have."""
    database.execute("ALTER DATABASE CHARACTER SET latin1")
    yield database
    database.execute("ALTER DATABASE CHARACTER SET utf8mb4")


@pytest.mark.databases("mariadb")
def test_tables_take_every_letter_whatever_the_database_has(western: Database) -> None:
    """The name of a task, its error and its traceback: a text that is refused would lose the end of the task."""
    stand = BrokerStand(western)

    def fails(session: Session, text: str) -> None:
        raise ValueError(text)

    plain, once = stand.task(fails, name="задача"), stand.task(fails, name="一度", once=True)
    with stand.alchemy.begin() as session:
        enqueue(session, plain.s("日本 🎉"))
    for task in (plain, once):
        result = stand.result_of(task, "日本 🎉")
        assert result.state == "FAILURE"
        assert "日本 🎉" in str(result.traceback)

    assert western.rows("SELECT task_name FROM celery_outbox WHERE died_at IS NULL") == [("задача",)]
    assert [(row["task_name"], row["error"]) for row in dead(stand.alchemy.engine)] == [("一度", "ValueError: 日本 🎉")]


def test_long_name_of_a_task_fails_none_of_its_ends(stand: BrokerStand) -> None:
    """The tables show the begin of it, whichever way the task came."""
    name = "shop." + "x" * 300

    def done(session: Session) -> str:
        return "done"

    task = stand.task(done, name=name, once=True)

    assert stand.result_of(task).result == "done"
    assert stand.database.rows("SELECT task_name FROM celery_outbox") == [(name[:255],)]
