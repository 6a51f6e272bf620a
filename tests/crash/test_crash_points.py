"""Whatever dies at whatever named moment: nothing is lost, nothing doubled, nothing sent that was taken back."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from celery_alchemy.databases.tables import outbox
from tests.crash.aftermath import Aftermath
from tests.crash.points import POISON_DELIVERIES
from tests.soak.ledger import Effect, accounts

# The first test of each pair waits for all that dies in it.
pytestmark = pytest.mark.timeout(600)


def test_every_named_point_is_reached_and_strikes(aftermath: Aftermath) -> None:
    """A point that nothing reaches would prove nothing."""
    assert aftermath.faults
    assert aftermath.unstruck() == []


def test_every_committed_send_takes_effect(aftermath: Aftermath) -> None:
    """What a committed transaction sent is done in the end, children and successors of a chain included."""
    assert accounts(aftermath.database).lost == []


def test_no_effect_is_committed_twice(aftermath: Aftermath) -> None:
    """However often a task was delivered, its writes were committed once."""
    assert accounts(aftermath.database).doubled == []


def test_nothing_runs_that_was_taken_back(aftermath: Aftermath) -> None:
    """What was sent in a transaction or SAVEPOINT that rolled back, or was cut before its COMMIT, never ran."""
    assert accounts(aftermath.database).ghosts == []


def test_the_record_of_a_task_and_its_effect_are_committed_together(aftermath: Aftermath) -> None:
    """Every effect has a record, of a completion or of a death with its record_failure, and every record an effect."""
    is_ended = outbox.c.completed_at.is_not(None) | outbox.c.died_at.is_not(None)
    with Session(aftermath.database.engine) as session:
        with_effect = set(session.scalars(select(Effect.task_id)))
        ended = set(session.scalars(select(outbox.c.task_id).where(is_ended)))

    assert with_effect == ended


def test_nothing_is_left_under_way(aftermath: Aftermath) -> None:
    """No row waits, is leased or owed, and no message is in the broker, when everything is done."""
    assert accounts(aftermath.database).open == 0
    assert aftermath.broker.pending() == 0


def test_every_reader_sees_the_result_of_the_run_that_committed(aftermath: Aftermath) -> None:
    """A result is either that of the committed run or, where the broker lost the message with its worker, not there yet."""
    doomed = aftermath.doomed()
    results = {name: aftermath.broker.client.AsyncResult(task_id) for name, task_id in aftermath.task_ids.items()}
    wrong = {
        name: (result.state, result.result)
        for name, result in results.items()
        if result.state != "PENDING"
        and (
            result.state != "FAILURE"
            if name in doomed
            else result.state != "RETRY" and (result.state, result.result) != ("SUCCESS", name)
        )
    }

    assert doomed
    assert wrong == {}


def test_a_task_that_kills_its_process_is_started_no_more_often_than_allowed(aftermath: Aftermath) -> None:
    """The poisonous task is dead after exactly `max_deliveries` starts, and besides only what was sent to die."""
    with Session(aftermath.database.engine) as session:
        dead = session.execute(
            select(outbox.c.task_name, func.count()).where(outbox.c.died_at.is_not(None)).group_by(outbox.c.task_name)
        ).all()

    assert sorted(tuple(row) for row in dead) == [("doomed", len(aftermath.doomed())), ("poison", 1)]
    assert (aftermath.folder / "poisoned").stat().st_size == POISON_DELIVERIES
