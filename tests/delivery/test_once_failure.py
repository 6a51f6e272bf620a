"""The death of a `once` task and its `record_failure` are one transaction: both are committed, once, or neither."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import DeadTaskError, released
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.requests import failure
from celery_alchemy.requests.once_body import RECORD_STARTS
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start, start, start_past_outbox
from tests.stand import Crash


def fails(stand: OutboxStand, record: Any, **options: Any) -> Any:
    """Make a once task that always fails, with a `record_failure`."""

    @stand.task(name="fails", once=True, record_failure=record, **options)
    def always_fails(session: Session, name: str) -> None:
        session.add(Effect(name=f"rolled back {name}"))
        session.flush()
        raise LookupError(name)

    return always_fails


def dead(stand: OutboxStand) -> list[str]:
    """Return the errors of the dead tasks."""
    return [row["error"] for row in upkeep.dead(stand.alchemy.engine)]


def crash_at_commit(session: Session) -> None:
    """Let the process end when everything is written and nothing is committed."""

    def crash(session: Session) -> None:
        raise Crash

    event.listen(session, "before_commit", crash)


@WAYS
@pytest.mark.parametrize("kills", [False, True], ids=["failed", "killed its process too often"])
def test_process_that_dies_between_leaves_neither(stand: OutboxStand, begin: Start, kills: bool) -> None:
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


def test_rival_that_has_failed_first_has_recorded_it(stand: OutboxStand) -> None:
    """Of two deliveries that fail one after the other the first records; of two at the same time the first that commits."""
    told: list[str] = []
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        told.append(str(exc))
        if str(exc) == "a 1":
            stand.deliver(sent)
        session.add(Effect(name=str(exc)))

    @stand.task(name="fails", once=True, record_failure=record)
    def always_fails(session: Session, name: str) -> None:
        runs.append(len(runs))
        run = runs[-1]
        if run == 0:
            stand.deliver(sent)
        raise LookupError(f"{name} {run}")

    sent = start(stand, always_fails, "a")
    ended = stand.deliver(sent)

    # The third delivery is the first to commit. The second had written what it takes back; the first is not asked at all.
    assert (ended.state, str(ended.value)) == ("FAILURE", "a 0")
    assert told == ["a 1", "a 2"]
    assert stand.effects() == ["a 2"]
    assert dead(stand) == ["LookupError: a 2"]


@WAYS
@pytest.mark.parametrize("when", ["before", "during"])
def test_rival_that_has_succeeded_first_leaves_nothing_to_record(stand: OutboxStand, begin: Start, when: str) -> None:
    """What was written about the failure is rolled back, and this delivery reports the other one's result."""
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        if when == "during":
            stand.deliver(sent)
        session.add(Effect(name=f"{name}: {exc}"))

    @stand.task(name="fails", once=True, record_failure=record)
    def fails_at_first(session: Session, name: str) -> str:
        runs.append(len(runs))
        if runs[-1] == 0:
            if when == "before":
                stand.deliver(sent)
            raise LookupError(name)
        session.add(Effect(name=name))
        return "done"

    sent = begin(stand, fails_at_first, "a")
    ended = stand.deliver(sent)

    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert (stand.effects(), dead(stand)) == (["a"], [])


@pytest.mark.databases("postgresql", "mariadb")
@WAYS
def test_many_that_fail_at_the_same_time_record_one_failure_each(
    stand: OutboxStand, begin: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies of one task record it once, which is no error; different tasks do not cost each other their reasons."""
    copies, tasks = 3, 4
    barrier = threading.Barrier(copies * tasks, timeout=30)

    def record(session: Session, exc: BaseException, name: str) -> None:
        session.add(Effect(name=name))
        session.flush()
        time.sleep(0.02)

    @stand.task(name="fails", once=True, record_failure=record)
    def always_fails(session: Session, name: str) -> None:
        barrier.wait()
        raise LookupError(name)

    sent = [begin(stand, always_fails, f"task {number}") for number in range(tasks)]
    threads = [threading.Thread(target=stand.deliver, args=(one,)) for one in sent for _ in range(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(stand.effects()) == [f"task {number}" for number in range(tasks)]
    assert len(dead(stand)) == tasks
    assert "record_failure of task" not in caplog.text


@WAYS
def test_record_failure_that_kills_its_process_is_bounded(stand: OutboxStand, begin: Start, caplog: pytest.LogCaptureFixture) -> None:
    """In the end the task is dead without it, and the log says so."""
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        runs.append(len(runs))
        raise Crash

    sent = begin(stand, fails(stand, record, max_deliveries=2), "a")
    for number in range(10):
        with contextlib.suppress(Crash):
            stand.deliver(sent, delivery_info={"redelivered": number > 0})

    assert 2 <= len(runs) <= 2 + RECORD_STARTS + 1
    assert dead(stand) == ["it was started 2 times and its process died each time"]
    assert "is recorded as dead without its record_failure" in caplog.text


@pytest.mark.parametrize("said", ["bad byte \0", "name \udcff", None], ids=["NUL", "half a surrogate pair", "no text"])
def test_error_that_no_database_takes_is_recorded(stand: OutboxStand, said: str | None) -> None:
    """Or that cannot even be written as text: the task is dead, and its record_failure has run."""

    class WordlessError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    # Expected, so that the text is not in a log, which the tests' own processes cannot pass on.
    options: dict[str, Any] = {"throws": (ValueError, WordlessError)}

    @stand.task(name="fails", once=True, record_failure=lambda session, exc: session.add(Effect(name="told")), **options)
    def always_fails(session: Session) -> None:
        raise WordlessError if said is None else ValueError(said)

    ended = stand.deliver(start(stand, always_fails))

    assert ended.state == "FAILURE"
    assert type(ended.value).__name__ in ("ValueError", "WordlessError", "UnpickleableExceptionWrapper")
    assert stand.effects() == ["told"]
    [error] = dead(stand)
    assert error.startswith("WordlessError: " if said is None else "ValueError: ")


def test_session_of_record_failure_is_new(stand: OutboxStand) -> None:
    """It has no transaction and no writes yet: it can begin one, and be released around a slow call."""

    def record(session: Session, exc: BaseException, name: str) -> None:
        with released(session):
            assert not session.in_transaction()
        with session.begin():
            session.add(Effect(name=name))

    stand.deliver(start(stand, fails(stand, record), "a"))

    assert stand.effects() == ["a"]
    assert dead(stand) == ["LookupError: a"]


@pytest.mark.parametrize(("commits", "runs_expected"), [("nothing", 3), ("a savepoint", 3), ("all", 1)])
def test_commit_of_its_own_is_not_repeated(stand: OutboxStand, commits: str, runs_expected: int) -> None:
    """What it has committed would be there twice."""
    runs: list[int] = []

    def record(session: Session, exc: BaseException, name: str) -> None:
        runs.append(len(runs))
        with session.begin_nested() if commits == "a savepoint" else contextlib.nullcontext():
            session.add(Effect(name=name))
            session.flush()
        if commits == "all":
            session.commit()
        if len(runs) < 3:
            raise OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))

    stand.deliver(start(stand, fails(stand, record), "a"))

    assert len(runs) == runs_expected
    assert stand.effects() == ["a"]
    assert dead(stand) == ["LookupError: a"]


def test_eager_task_that_fails_is_not_run_again(stand: OutboxStand) -> None:
    """There was no message to keep, and to make one would run the task."""
    runs: list[int] = []

    @stand.task(name="fails", once=lambda name: f"fails:{name}")
    def always_fails(session: Session, name: str) -> None:
        runs.append(len(runs))
        raise LookupError(name)

    stand.app.conf.task_always_eager = True
    ended = always_fails.delay("a")

    assert (ended.state, runs) == ("FAILURE", [0])
    assert dead(stand) == []


@pytest.mark.parametrize("keeps", [True, False])
def test_what_record_failure_sends_is_kept(make_stand: MakeStand, keeps: bool) -> None:
    """As what the body of a `once` task sends, whether the Alchemy keeps everything or not."""
    stand = make_stand(outbox=keeps)
    sent = start(stand, fails(stand, lambda session, exc, name: stand.effect.delay_on_commit(name) and None), "a")

    with stand.broker_down():
        stand.deliver(sent)
    stand.make_due()
    stand.relay_all()
    stand.run_all()

    assert stand.effects() == ["a"]


@pytest.mark.parametrize("records", [True, False])
def test_task_that_fails_on_its_arguments_is_recorded(stand: OutboxStand, records: bool) -> None:
    """As one is that was sent plainly, by code of yesterday: dead, with what came; nothing checks that for a worker."""
    told: list[tuple[Any, ...]] = []

    def record(session: Session, exc: BaseException, *args: Any) -> None:
        told.append((type(exc), *args))

    @stand.task(name="charge", once=True, record_failure=record if records else None)
    def charge(session: Session, order: int, currency: str) -> None:
        raise AssertionError("it cannot begin")

    stand.app.send_task("charge", args=(7,))
    ended = [stand.deliver(sent).state for sent in stand.sent()]

    [error] = dead(stand)
    assert ended == ["FAILURE"]
    assert "currency" in error
    assert told == ([(TypeError, 7)] if records else [])
    with pytest.raises(TypeError):
        charge.delay(7)


def test_late_copy_does_not_record_again(stand: OutboxStand) -> None:
    """The task is dead; a copy of its message reports that."""
    told: list[str] = []
    sent = start(stand, fails(stand, lambda session, exc, name: told.append(name)), "a")

    first, second = stand.deliver(sent), stand.deliver(sent)

    assert (type(first.value), type(second.value)) == (LookupError, DeadTaskError)
    assert told == ["a"]


def test_error_that_may_pass_runs_record_failure_again(stand: OutboxStand) -> None:
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


def test_record_failure_that_waits_in_vain_is_not_run_again(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_record_failure_that_fails_leaves_the_task_dead(
    stand: OutboxStand, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
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


def test_what_record_failure_sends_is_sent_with_the_death(stand: OutboxStand) -> None:
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
def test_record_failure_that_ends_the_transaction_leaves_the_task_dead(stand: OutboxStand, end: str) -> None:
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


def test_session_of_record_failure_may_be_left_alone(stand: OutboxStand) -> None:
    """The death needs one all the same."""
    told: list[str] = []
    sent = start(stand, fails(stand, lambda session, exc, name: told.append(name)), "a")

    stand.deliver(sent)

    assert (told, dead(stand)) == (["a"], ["LookupError: a"])
