"""Steps of two deliveries at once, and a connection that is lost around a step's COMMIT."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import step
from celery_alchemy.operations import dead_tasks
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash
from tests.steps.test_steps import Calls, send, steps_of

SERVERS = ("postgresql", "mariadb")


@pytest.mark.parametrize("owed", [True, False], ids=["owed", "direct"])
@pytest.mark.parametrize("writes", [True, False])
def test_overtaken_delivery_goes_on_from_the_record(stand: OutboxStand, owed: bool, writes: bool) -> None:
    """While its function ran, another delivery has committed the step: its value stands, and what was written here does not."""
    made: list[str] = []
    rivals: list[BaseException] = []

    def work(session: Session, name: str) -> str:
        made.append(name)
        number = len(made)
        if name == "a" and number == 1:
            rivals.append(Crash())
            with pytest.raises(Crash):
                stand.deliver(sent)
        if writes:
            session.add(Effect(name=f"{name} of run {number}"))
        return f"{name} of run {number}"

    @stand.task(name="ingest", once=True)
    def ingest() -> list[str]:
        first = step("a", work, "a")
        if rivals:
            raise rivals.pop()
        return [first, step("b", work, "b")]

    sent = send(stand, ingest, owed=owed)
    ended = stand.deliver(sent)

    assert ended.value == ["a of run 2", "b of run 3"]
    assert made == ["a", "a", "b"]
    assert stand.effects() == (["a of run 2", "b of run 3"] if writes else [])


@pytest.mark.parametrize("writes", [True, False])
def test_delivery_whose_task_was_completed_reports_the_result(stand: OutboxStand, writes: bool) -> None:
    """It finds no row to record its step for, though the completion has taken the step's record away."""
    made: list[int] = []

    def work(session: Session) -> int:
        made.append(len(made))
        number = len(made)
        if number == 1:
            assert stand.deliver(sent).value == 2
        if writes:
            session.add(Effect(name=f"run {number}"))
        return number

    @stand.task(name="ingest", once=True)
    def ingest() -> int:
        return step("a", work)

    sent = send(stand, ingest)
    ended = stand.deliver(sent)

    assert (ended.state, ended.value) == ("SUCCESS", 2)
    assert stand.effects() == (["run 2"] if writes else [])
    assert steps_of(stand) == []


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_many_deliveries_at_once_do_each_step_once(stand: OutboxStand, level: str) -> None:
    """All of them report the same result, and each step's writes are there once."""
    together = threading.Barrier(4, timeout=30)

    def work(session: Session, number: int) -> str:
        session.add(Effect(name=f"step {number}"))
        session.flush()
        return threading.current_thread().name

    @stand.task(name="ingest", once=True, isolation_level=level, transient_retries=20)
    def ingest(session: Session) -> list[str]:
        if together.n_waiting >= 0 and not together.broken and len(met) < 4:
            met.append(1)
            together.wait()
        return [step(f"step {number}", work, number) for number in range(5)]

    met: list[int] = []
    values: list[Any] = []
    sent = send(stand, ingest)
    threads = [threading.Thread(target=lambda: values.append(stand.deliver(sent).value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(stand.effects()) == [f"step {number}" for number in range(5)]
    assert [value == values[0] for value in values] == [True] * 4
    assert isinstance(values[0], list)
    assert steps_of(stand) == []


def _cut_at_commit(stand: OutboxStand, session: Session, *, carried_out: bool) -> None:
    """Lose the connection with the next COMMIT of a session: before it, or after the database has carried it out."""

    def cut(session: Session) -> None:
        connection = session.connection()
        raw: Any = connection.connection.driver_connection
        if carried_out:
            raw.commit()
        ids = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()"}
        backend = connection.exec_driver_sql(ids[stand.database.name]).scalar()
        kills = {
            "postgresql": f"SELECT pg_terminate_backend({backend})",
            "mariadb": f"KILL CONNECTION {backend}",
        }
        stand.database.execute(kills[stand.database.name])

    event.listen(session, "before_commit", cut, once=True)


@pytest.mark.databases(*SERVERS)
@pytest.mark.parametrize("carried_out", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_lost_connection_at_a_step_s_commit_is_resolved_by_looking(stand: OutboxStand, carried_out: bool, writes: bool) -> None:
    """A step that is recorded stands; one that had nothing to write is recorded again; else the task fails, and runs it again."""
    calls: list[int] = []

    def work(session: Session) -> int:
        calls.append(1)
        if writes:
            session.add(Effect(name="a"))
            session.flush()
        if len(calls) == 1:
            _cut_at_commit(stand, session, carried_out=carried_out)
        return len(calls)

    @stand.task(name="ingest", once=True)
    def ingest() -> int:
        return step("a", work)

    sent = send(stand, ingest)
    ended = stand.deliver(sent)

    if writes and not carried_out:
        assert isinstance(ended.value, OperationalError)
        dead_tasks.revive(stand.alchemy.engine)
        assert stand.deliver(sent).value == 2
    else:
        assert (ended.value, calls) == (1, [1])
    assert stand.effects() == (["a"] if writes else [])


@pytest.mark.parametrize("carried_out", [True, False], ids=["behind the COMMIT", "before it"])
def test_soft_limit_in_a_step_s_own_commit(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch, carried_out: bool) -> None:
    """The task is dead by its limit; when it is revived, a step that was committed is not run again, and one that was not is."""
    calls: list[str] = []
    dialect: Any = stand.alchemy.engine.dialect
    really = dialect.do_commit

    def commit(connection: Any) -> None:
        if calls != ["a", "b"] or stand.effects() != ["a"]:
            really(connection)
            return
        if carried_out:
            really(connection)
        monkeypatch.undo()
        raise SoftTimeLimitExceeded

    def work(session: Session, name: str) -> str:
        calls.append(name)
        session.add(Effect(name=name))
        session.flush()
        return name

    @stand.task(name="ingest", once=True)
    def ingest() -> str:
        step("a", work, "a")
        return step("b", work, "b")

    monkeypatch.setattr(dialect, "do_commit", commit)
    sent = send(stand, ingest)
    ended = stand.deliver(sent)
    left = stand.effects()
    [dead] = dead_tasks.dead(stand.alchemy.engine)
    dead_tasks.revive(stand.alchemy.engine)

    assert isinstance(ended.value, SoftTimeLimitExceeded)
    assert left == (["a", "b"] if carried_out else ["a"])
    assert dead["error"].startswith("SoftTimeLimitExceeded in step 'b'")
    assert dead["last_step"] == left[-1]
    assert stand.deliver(sent).value == "b"
    assert stand.effects() == ["a", "b"]
    assert calls == (["a", "b"] if carried_out else ["a", "b", "b"])


def test_committed_step_counts_starts_anew(stand: OutboxStand) -> None:
    """A task that gets on is not given up, however often its process is killed; a step that kills it each time is."""
    calls = Calls(**{f"s{number}": 1 for number in range(6)}, poison=99)

    @stand.task(name="ingest", once=True, max_deliveries=2)
    def ingest() -> None:
        for number in range(6):
            step(f"s{number}", calls.write, f"s{number}")
        step("poison", calls.write, "poison")

    sent = send(stand, ingest)
    for number in range(8):
        with pytest.raises(Crash):
            stand.deliver(sent, delivery_info={"redelivered": number > 0})
    ended = stand.deliver(sent)
    [dead] = dead_tasks.dead(stand.alchemy.engine)

    assert ended.state == "FAILURE"
    assert dead["error"] == "it was started 2 times and its process died each time, after step 's5'"
    assert calls.made.count("poison") == 2
    assert stand.effects() == [f"s{number}" for number in range(6)]
