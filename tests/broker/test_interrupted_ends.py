"""A process that is killed between two transactions of an end: the next delivery does what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chord
from celery.result import AsyncResult
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.broker.results import AlchemyBackend
from celery_alchemy.operations.dead_tasks import revive
from celery_alchemy.requests.deliveries import give_up
from tests.broker.broker_stand import write
from tests.broker.chord_stand import ChordStand, OutOfStockError, chords
from tests.broker.test_once_starts import worker
from tests.services.databases import Database
from tests.stand import Crash
from tests.waiting import eventually

__all__ = ["chords"]

#: What is due, or claimed.
OPEN = "SELECT task_name, claim, due_at FROM celery_outbox WHERE due_at IS NOT NULL OR claim IS NOT NULL"


CLAIMED = "SELECT id FROM celery_outbox WHERE claim IS NOT NULL"


def fail(session: Session, name: str) -> None:
    write(session, name)
    raise OutOfStockError(name)


def kill_before(patch: pytest.MonkeyPatch, method: str) -> None:
    """Have the process killed, once, when it comes to a method of the result backend."""
    killed: list[str] = []
    act = getattr(AlchemyBackend, method)

    def act_or_die(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not killed:
            killed.append(method)
            raise Crash
        return act(self, *args, **kwargs)

    patch.setattr(AlchemyBackend, method, act_or_die)


def sent(stand: ChordStand, signature: Any) -> Any:
    """Send a signature on commit."""
    with stand.alchemy.begin() as session:
        return enqueue(session, signature)


def run_all(stand: ChordStand) -> list[str]:
    """Run what is due until nothing is, as workers do; return how each delivery has ended."""
    states = []
    due = "SELECT id FROM celery_outbox WHERE due_at IS NOT NULL OR claim IS NOT NULL"
    with worker(stand) as run:
        while stand.database.rows(due) and len(states) < 10:
            states.append(run())
            eventually(lambda: stand.database.rows(CLAIMED) == [], what="the delivery has ended")
    return states


def test_death_whose_result_is_not_written_is_reported_again(
    chords: ChordStand, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message of a dead task is there until its delivery is acknowledged."""
    runs: list[int] = []

    def fails(session: Session) -> None:
        runs.append(1)
        raise OutOfStockError("none left")

    result: AsyncResult = sent(chords, chords.task(fails, once=True, name="fails").s())
    kill_before(monkeypatch, "mark_as_failure")

    assert run_all(chords) == ["killed", "FAILURE"]
    assert (result.state, runs) == ("FAILURE", [1])
    assert "none left" in str(result.result)
    assert database.rows(OPEN) == []
    dead = "SELECT error FROM celery_outbox WHERE died_at IS NOT NULL"
    assert [error for (error,) in database.rows(dead)] == ["OutOfStockError: none left"]
    assert revive(chords.alchemy.engine, [result.id]) == 1


def test_chord_of_a_part_that_was_killed_after_its_death_ends(chords: ChordStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its body has failed."""
    chords.task(fail, once=True, name="once fails")
    body = chords.sign("collect").on_error(chords.sign("note error"))
    result = sent(chords, chord([chords.sign("once fails", "a"), chords.sign("once", "b")], body))
    kill_before(monkeypatch, "mark_as_failure")

    run_all(chords)

    assert result.state == "FAILURE"
    assert [name for name, _ in chords.errors] == ["ChordError"]


def test_revoked_task_whose_result_is_not_written_is_reported(chords: ChordStand, database: Database) -> None:
    """A worker has set it aside and was killed."""

    def pay() -> None:
        raise AssertionError

    task = chords.task(pay, once=True, name="pay")
    result = sent(chords, task.s())
    with worker(chords) as run:
        monkey = pytest.MonkeyPatch()

        def revoked_and_killed(*args: Any, **kwargs: Any) -> None:
            give_up(task.session_plan, task.request, "revoked", 5.0)
            raise Crash

        monkey.setattr("celery_alchemy.requests.once_body._attempt_once", revoked_and_killed)
        assert run() == "killed"
        monkey.undo()

    assert run_all(chords) == ["FAILURE"]
    assert result.state == "FAILURE"
    assert "revoked" in str(result.result)
    assert database.rows(OPEN) == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.databases("postgresql", "mariadb")
def test_part_that_is_noted_after_its_commit_is_counted(chords: ChordStand, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    """Where its own transaction does not see the other parts."""

    def part(session: Session, name: str) -> str:
        write(session, name)
        return name

    chords.task(part, once=True, name="strict", isolation_level=level)
    result = sent(chords, chord(chords.parts("ab", "strict"), chords.sign("collect")))
    kill_before(monkeypatch, "on_chord_part_return")

    run_all(chords)

    assert result.get(timeout=1) == ["a", "b"]
    assert sorted(chords.database.rows("SELECT name FROM effect")) == [("a",), ("b",)]


def test_chord_is_ended_whose_last_part_was_killed_before(
    chords: ChordStand, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part has failed, and the last one has committed."""
    body = chords.sign("collect").on_error(chords.sign("note error"))
    result = sent(chords, chord([chords.sign("fail", "a"), chords.sign("once", "b")], body))
    kill_before(monkeypatch, "_end")

    run_all(chords)

    assert result.state == "FAILURE"
    assert [name for name, _ in chords.errors] == ["ChordError"]
    assert database.rows("SELECT body, envelope, claim FROM celery_outbox WHERE once = :yes", yes=True) == [(None, None, None)]
