"""A step is committed with what it wrote, and later runs get its value instead of running it."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask, enqueue, on_commit, released, step
from celery_alchemy.operations import dead_tasks
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash


def steps_of(stand: OutboxStand) -> list[str]:
    """Return the names of the recorded steps of all tasks, in order."""
    return [row[0] for row in stand.database.rows("SELECT name FROM celery_steps ORDER BY position, name")]


def send(stand: OutboxStand, task: Any, *args: Any, owed: bool = True) -> Any:
    """Send a task through the outbox, or past it; return the message."""
    if owed:
        with stand.alchemy.begin() as session:
            enqueue(session, task.s(*args))
    else:
        task.delay(*args)
    return stand.sent()[0]


def busy() -> OperationalError:
    """Return an error that may pass on every database."""
    original = sqlite3.OperationalError("database is locked")
    # SQLITE_BUSY, which sqlite3 names from Python 3.11 on.
    original.sqlite_errorcode = 5
    return OperationalError("UPDATE", None, original)


class Calls:
    """Functions of steps that note their calls, and fail as often as they are told.

    Attributes:
        made: What was called, in order.
        left: How often each still fails.
    """

    def __init__(self, **left: int) -> None:
        self.made: list[str] = []
        self.left = left

    def write(self, session: Session, name: str) -> str:
        """Write an effect, then fail if it is to."""
        self.made.append(name)
        session.add(Effect(name=name))
        session.flush()
        if self.left.get(name, 0) > 0:
            self.left[name] -= 1
            raise Crash(name)
        return f"wrote {name}"


@pytest.mark.parametrize("owed", [True, False], ids=["owed", "direct"])
def test_committed_steps_are_not_run_again(stand: OutboxStand, owed: bool) -> None:
    """A run that was killed in its third step has left two; the next one runs the third, once, and completes."""
    calls = Calls(c=2)
    values: list[str] = []

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> list[str]:
        values[:] = [step(name, calls.write, name) for name in ("a", "b", "c")]
        return values

    sent = send(stand, ingest, owed=owed)
    for _ in range(2):
        with pytest.raises(Crash):
            stand.deliver(sent)
        assert (stand.effects(), steps_of(stand)) == (["a", "b"], ["a", "b"])
    ended = stand.deliver(sent)
    again = stand.deliver(sent)

    assert calls.made == ["a", "b", "c", "c", "c"]
    assert (ended.state, ended.value, again.value) == (
        "SUCCESS",
        *[["wrote a", "wrote b", "wrote c"]] * 2,
    )
    assert stand.effects() == ["a", "b", "c"]
    assert steps_of(stand) == []


def test_no_transaction_is_open_after_a_step(stand: OutboxStand) -> None:
    """Neither after one that ran nor after one that is recorded, and objects that were loaded stay usable without a reload."""
    calls = Calls(b=1)
    seen: list[Any] = []

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> None:
        effect = session.scalar(select(Effect).where(Effect.name == "old"))
        assert effect is not None
        step("a", calls.write, "a")
        seen.append((session.in_transaction(), effect.name, session.in_transaction()))
        step("b", calls.write, "b")

    stand.database.execute("INSERT INTO effect (name) VALUES ('old')")
    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    stand.deliver(sent)

    assert seen == [(False, "old", False)] * 2


def test_writes_between_steps_belong_to_the_next_one(stand: OutboxStand) -> None:
    """They are committed with it, and undone in a later run, which had them committed before."""
    calls = Calls(b=1)

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> None:
        session.add(Effect(name="between"))
        session.flush()
        step("a", calls.write, "a")
        session.add(Effect(name="after"))
        step("b", calls.write, "b")
        session.add(Effect(name="end"))

    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    first = stand.effects()
    stand.deliver(sent)

    assert first == ["between", "a"]
    assert stand.effects() == ["between", "a", "after", "b", "end"]


def test_values_are_what_json_gives_back_the_first_time_too(stand: OutboxStand) -> None:
    """A run that goes on sees the same values as the one that made them."""
    seen: list[Any] = []

    @stand.task(name="ingest", once=True, bind=True)
    def ingest(self: SessionTask) -> None:
        seen.append(
            [
                step("tuple", lambda: (1, 2)),
                step("keys", lambda: {1: None}),
                step("none", lambda: None),
                step("none as well", lambda: None),
            ]
        )
        if len(seen) == 1:
            raise Crash

    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    stand.deliver(sent)

    assert seen == [[[1, 2], {"1": None}, None, None]] * 2


def test_sends_in_a_step_go_with_its_commit(stand: OutboxStand) -> None:
    """Each once: not again by the run that finds the step recorded, and not at all by a step that did not commit."""
    said: list[str] = []

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> None:
        step("a", notify, "a")
        step("b", notify, "b")

    def notify(session: Session, name: str) -> None:
        stand.effect.delay_on_commit(f"{name} by delay_on_commit")
        enqueue(session, stand.effect.s(f"{name} by enqueue"))
        on_commit(session, lambda: said.append(name))
        if name == "b" and crashes:
            raise crashes.pop()

    crashes: list[BaseException] = [Crash()]
    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    first = [message.args for message in stand.sent()]
    stand.deliver(sent)

    assert first == [["a by delay_on_commit"], ["a by enqueue"]]
    assert [message.args for message in stand.sent()] == [
        ["b by delay_on_commit"],
        ["b by enqueue"],
    ]
    assert said == ["a", "b"]


def test_released_gives_the_connection_back_inside_of_a_step(stand: OutboxStand) -> None:
    """What was read before stays usable, and the step commits what is written after it."""

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> None:
        step("a", read_and_write)

    def read_and_write(session: Session) -> None:
        session.scalars(select(Effect)).all()
        with released(session):
            assert not session.in_transaction()
        session.add(Effect(name="a"))

    assert stand.deliver(send(stand, ingest)).state == "SUCCESS"
    assert stand.effects() == ["a"]


def test_failing_step_that_is_caught_leaves_nothing(stand: OutboxStand) -> None:
    """What it wrote is not committed by the next one, and its name may be tried again."""
    tries: list[int] = []

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> int:
        for _ in range(3):
            try:
                return step("a", fail_twice)
            except ValueError:
                step(f"note {len(tries)}", lambda: None)
        return 0

    def fail_twice(session: Session) -> int:
        tries.append(len(tries))
        session.add(Effect(name=f"try {len(tries)}"))
        session.flush()
        if len(tries) < 3:
            raise ValueError
        return len(tries)

    ended = stand.deliver(send(stand, ingest))

    assert ended.value == 3
    assert stand.effects() == ["try 3"]


def test_retry_goes_on_after_the_last_step(stand: OutboxStand) -> None:
    """The message of another attempt finds the records of the one before."""
    calls = Calls()

    @stand.task(name="ingest", once=True, bind=True)
    def ingest(self: SessionTask) -> int:
        step("a", calls.write, "a")
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    first = stand.deliver(send(stand, ingest, owed=False))
    ended = stand.deliver(stand.sent()[0])

    assert (first.state, ended.state, ended.value) == ("RETRY", "SUCCESS", 1)
    assert calls.made == ["a"]
    assert stand.outbox("completed_at IS NOT NULL") == [True]


def test_retry_of_a_task_past_the_outbox_is_sent_again_if_its_message_is_lost(stand: OutboxStand) -> None:
    """Its first step has made it a row; the retry's message in it is one that a relay can send."""

    @stand.task(name="ingest", once=True, bind=True)
    def ingest(self: SessionTask) -> int:
        step("a", lambda: None)
        if self.request.retries == 0:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    stand.deliver(send(stand, ingest, owed=False))
    stand.sent()
    stand.make_due()
    handled = stand.relay_all()

    assert handled == 1
    assert dead_tasks.dead(stand.alchemy.engine) == []
    assert stand.deliver(stand.sent()[0]).value == 1


@pytest.mark.parametrize("owed", [True, False], ids=["owed", "direct"])
def test_revived_task_goes_on_after_the_last_step(stand: OutboxStand, owed: bool) -> None:
    """It died in its second step, which its error names; the first one is not run again."""
    calls = Calls()
    broken = [True]

    @stand.task(name="ingest", once=True)
    def ingest() -> str:
        step("a", calls.write, "a")
        return step("b", fail)

    def fail() -> str:
        if broken:
            raise LookupError("no such document")
        return "done"

    failed = stand.deliver(send(stand, ingest, owed=owed))
    [dead] = dead_tasks.dead(stand.alchemy.engine)
    broken.clear()
    revived = dead_tasks.revive(stand.alchemy.engine, [dead["id"]])
    stand.relay_all()
    ended = stand.deliver(stand.sent()[0])

    assert failed.state == "FAILURE"
    assert dead["error"] == "LookupError in step 'b': no such document"
    assert (dead["steps"], dead["last_step"]) == (1, "a")
    assert (revived, ended.value) == (1, "done")
    assert calls.made == ["a"]


def test_record_failure_sees_at_which_step_the_task_stopped(stand: OutboxStand) -> None:
    """The error has a note with the step's name."""
    notes: list[str] = []

    def record(session: Session, exc: BaseException) -> None:
        notes.extend(getattr(exc, "__notes__", []))

    @stand.task(name="ingest", once=True, record_failure=record)
    def ingest() -> None:
        step("parse", fail)

    def fail() -> None:
        raise LookupError("no such document")

    stand.deliver(send(stand, ingest))

    assert notes == ["Failed in step 'parse'"]


def test_transient_retries_run_the_step_again_and_not_those_before(stand: OutboxStand) -> None:
    """A committed step is no commit of the body's own, which would forbid another run."""
    calls = Calls()

    @stand.task(name="ingest", once=True, transient_retries=2)
    def ingest() -> None:
        step("a", calls.write, "a")
        step("b", deadlocked)

    def deadlocked(session: Session) -> None:
        calls.write(session, "b")
        if calls.made.count("b") < 3:
            raise busy()

    ended = stand.deliver(send(stand, ingest))

    assert ended.state == "SUCCESS"
    assert calls.made == ["a", "b", "b", "b"]
    assert stand.effects() == ["a", "b"]


def test_steps_that_are_not_asked_for_any_more_are_reported(stand: OutboxStand, caplog: pytest.LogCaptureFixture) -> None:
    """Once, at the end of the task; they go with its completion."""
    names = ["a", "b"]

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        for name in names:
            step(name, lambda: None)
        if "b" in names:
            raise Crash

    sent = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(sent)
    names[:] = ["c"]
    with caplog.at_level(logging.WARNING, "celery_alchemy"):
        ended = stand.deliver(sent)

    assert ended.state == "SUCCESS"
    [record] = [r for r in caplog.records if r.name == "celery_alchemy.step_records"]
    assert "2 of its recorded steps" in record.getMessage()
    assert "'a', 'b'" in record.getMessage()
    assert steps_of(stand) == []


def test_a_step_costs_one_insert_and_one_commit(stand: OutboxStand) -> None:
    """Recorded values are read by one statement for each run, whatever their number."""
    statements: list[str] = []

    def listen(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        statements.append(statement.split(maxsplit=1)[0])

    @stand.task(name="ingest", once=True)
    def ingest(count: int) -> None:
        for number in range(count):
            step(f"embed {number}", lambda: None)
        if crashes:
            raise crashes.pop()

    def counted(act: Callable[[], Any]) -> list[str]:
        statements.clear()
        event.listen(stand.alchemy.engine, "before_cursor_execute", listen)
        event.listen(stand.alchemy.engine, "commit", commit)
        try:
            act()
        finally:
            event.remove(stand.alchemy.engine, "before_cursor_execute", listen)
            event.remove(stand.alchemy.engine, "commit", commit)
        return list(statements)

    def commit(connection: Any) -> None:
        statements.append("COMMIT")

    crashes: list[BaseException] = []
    none = counted(lambda: stand.deliver(send(stand, ingest, 0)))
    one = counted(lambda: stand.deliver(send(stand, ingest, 1)))
    many = counted(lambda: stand.deliver(send(stand, ingest, 11)))

    def crash() -> None:
        with pytest.raises(Crash):
            stand.deliver(sent)

    crashes.append(Crash())
    sent = send(stand, ingest, 11)
    crash()
    again = counted(lambda: stand.deliver(sent))

    assert len(many) - len(one) == 20
    assert many.count("INSERT") - one.count("INSERT") == 10
    assert many.count("COMMIT") - one.count("COMMIT") == 10
    assert sorted(one) == sorted([*none, "SELECT", "COMMIT", "INSERT", "COMMIT", "DELETE"])
    assert again.count("SELECT") == 1
    assert again.count("INSERT") == 0
