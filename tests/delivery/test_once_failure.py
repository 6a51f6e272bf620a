"""The death of a `once` task and its `record_failure` are one transaction: both are committed, once, or neither."""

from __future__ import annotations

import sqlite3
import time
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import DeadTaskError, failure, upkeep
from tests.delivery.stand import Crash, Effect, Stand
from tests.delivery.test_once import WAYS, Start, start, start_past_outbox


def fails(stand: Stand, record: Any, **options: Any) -> Any:
    """Make a once task that always fails, with a `record_failure`."""

    @stand.task(name="fails", once=True, record_failure=record, **options)
    def always_fails(session: Session, name: str) -> None:
        session.add(Effect(name=f"rolled back {name}"))
        session.flush()
        raise LookupError(name)

    return always_fails


def dead(stand: Stand) -> list[str]:
    """Return the errors of the dead tasks."""
    return [row["error"] for row in upkeep.dead(stand.alchemy.engine)]


def crash_at_commit(session: Session) -> None:
    """Let the process end when everything is written and nothing is committed."""

    def crash(session: Session) -> None:
        raise Crash

    event.listen(session, "before_commit", crash)


@WAYS
@pytest.mark.parametrize("kills", [False, True], ids=["failed", "killed its process too often"])
def test_process_that_dies_between_leaves_neither(stand: Stand, begin: Start, kills: bool) -> None:
    """Else the task would be dead and the document's reason never written: nobody would run `record_failure` again."""
    crashes = [True]

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.add(Effect(name=f"{name}: {type(exc).__name__}"))
        if crashes and crashes.pop():
            crash_at_commit(session)

    @stand.task(name="fails", once=True, max_deliveries=1, record_failure=record)
    def always_fails(session: Session, name: str) -> None:
        raise Crash if kills else LookupError(name)

    sent = begin(stand, always_fails, "a")
    # Past the outbox the first start is not counted: nobody knows of it.
    for number in range((2 if begin is start_past_outbox else 1) if kills else 0):
        with pytest.raises(Crash):
            stand.deliver(sent, delivery_info={"redelivered": number > 0})
    with pytest.raises(Crash):
        stand.deliver(sent, delivery_info={"redelivered": True})
    left = stand.effects(), dead(stand)
    # A start whose process died is counted: the next one finds that there were too many.
    ended = stand.deliver(sent, delivery_info={"redelivered": True})

    assert left == ([], [])
    assert ended.state == "FAILURE"
    assert stand.effects() == ["a: DeadTaskError"]
    assert len(dead(stand)) == 1


def test_rival_that_has_failed_first_has_recorded_it(stand: Stand) -> None:
    """Of two deliveries that fail at the same time one records."""
    told: list[str] = []
    runs: list[int] = []

    @stand.task(name="fails", once=True, record_failure=lambda session, exc, name: told.append(str(exc)))
    def always_fails(session: Session, name: str) -> None:
        runs.append(len(runs))
        run = runs[-1]
        if run == 0:
            stand.deliver(sent)
        raise LookupError(f"{name} {run}")

    sent = start(stand, always_fails, "a")
    ended = stand.deliver(sent)

    assert (ended.state, str(ended.value)) == ("FAILURE", "a 0")
    assert told == ["a 1"]
    assert dead(stand) == ["LookupError: a 1"]


@WAYS
def test_rival_that_has_succeeded_first_leaves_nothing_to_record(stand: Stand, begin: Start) -> None:
    """`record_failure` is not called, and this delivery reports the other one's result."""
    told: list[str] = []
    runs: list[int] = []

    @stand.task(name="fails", once=True, record_failure=lambda session, exc, name: told.append(name))
    def fails_at_first(session: Session, name: str) -> str:
        runs.append(len(runs))
        if runs[-1] == 0:
            stand.deliver(sent)
            raise LookupError(name)
        session.add(Effect(name=name))
        return "done"

    sent = begin(stand, fails_at_first, "a")
    ended = stand.deliver(sent)

    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert (stand.effects(), told, dead(stand)) == (["a"], [], [])


def test_record_failure_sees_the_death(stand: Stand) -> None:
    """It may give it up there and then: what nobody is to look at need not stay."""

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.execute(text("DELETE FROM celery_outbox WHERE died_at IS NOT NULL"))

    ended = stand.deliver(start(stand, fails(stand, record), "a"))

    assert ended.state == "FAILURE"
    assert stand.outbox() == []


def test_late_copy_does_not_record_again(stand: Stand) -> None:
    """The task is dead; a copy of its message reports that."""
    told: list[str] = []
    sent = start(stand, fails(stand, lambda session, exc, name: told.append(name)), "a")

    first, second = stand.deliver(sent), stand.deliver(sent)

    assert (type(first.value), type(second.value)) == (LookupError, DeadTaskError)
    assert told == ["a"]


def test_error_that_may_pass_runs_record_failure_again(stand: Stand) -> None:
    """A connection that is cut in it must not cost the reason; nothing of the first run is left."""
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        runs.append(len(runs))
        session.add(Effect(name=f"run {runs[-1]}"))
        session.flush()
        if len(runs) < 3:
            raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))

    ended = stand.deliver(start(stand, fails(stand, record), "a"))

    assert ended.state == "FAILURE"
    assert (runs, stand.effects()) == ([0, 1, 2], ["run 2"])
    assert dead(stand) == ["LookupError: a"]


def test_record_failure_that_waits_in_vain_is_not_run_again(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent process of a worker runs it too, and does nothing else meanwhile."""
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        runs.append(len(runs))
        time.sleep(0.02)
        raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))

    monkeypatch.setattr(failure, "RECORD_SECONDS", 0.01)
    stand.deliver(start(stand, fails(stand, record), "a"))

    assert runs == [0]
    assert dead(stand) == ["LookupError: a"]


@pytest.mark.parametrize("error", [ValueError("a bug"), OperationalError("", {}, sqlite3.OperationalError("database is locked"))])
def test_record_failure_that_fails_leaves_the_task_dead(stand: Stand, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Its error is logged, the task's own stands and is kept; nothing that it wrote is."""

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.add(Effect(name=name))
        session.flush()
        raise error

    ended = stand.deliver(start(stand, fails(stand, record), "a"))

    assert isinstance(ended.value, LookupError)
    assert stand.effects() == []
    assert dead(stand) == ["LookupError: a"]
    assert "record_failure of task fails failed" in caplog.text


def test_what_record_failure_sends_is_sent_with_the_death(stand: Stand) -> None:
    """Its sends are part of the same transaction too."""
    crashes = [True]

    def record(session: Session, exc: BaseException, name: str) -> None:
        stand.effect.delay_on_commit(f"told of {name}")
        if crashes and crashes.pop():
            crash_at_commit(session)

    sent = start(stand, fails(stand, record), "a")
    with pytest.raises(Crash):
        stand.deliver(sent)
    before = stand.sent()
    stand.deliver(sent)
    stand.run_all()

    assert before == []
    assert stand.effects() == ["told of a"]


@pytest.mark.parametrize("end", ["rollback", "commit"])
def test_record_failure_that_ends_the_transaction_leaves_the_task_dead(stand: Stand, end: str) -> None:
    """A rollback of its own takes back what it wrote, and not that the task has failed for good."""

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.add(Effect(name="first"))
        session.flush()
        getattr(session, end)()
        session.add(Effect(name="second"))

    sent = start(stand, fails(stand, record), "a")
    first, second = stand.deliver(sent), stand.deliver(sent)

    assert (type(first.value), type(second.value)) == (LookupError, DeadTaskError)
    assert stand.effects() == ["first", "second"][end == "rollback" :]
    assert dead(stand) == ["LookupError: a"]


def test_session_of_record_failure_may_be_left_alone(stand: Stand) -> None:
    """The death needs one all the same."""
    told: list[str] = []
    sent = start(stand, fails(stand, lambda session, exc, name: told.append(name)), "a")

    stand.deliver(sent)

    assert (told, dead(stand)) == (["a"], ["LookupError: a"])
