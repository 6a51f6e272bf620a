"""A `once` task that does not succeed: it stays owed, or it is dead, kept with its error until it is revived."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_alchemy import DeadTaskError
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import relay as relay_module
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start, start, start_past_outbox
from tests.stand import Crash

OWED = "due_at IS NOT NULL AND completed_at IS NULL AND died_at IS NULL"


def owed(stand: OutboxStand) -> int:
    return len(stand.database.rows(f"SELECT id FROM celery_outbox WHERE {OWED}"))


@WAYS
def test_retry_keeps_the_task_owed(stand: OutboxStand, begin: Start) -> None:
    """The message of the next attempt takes the place of the first; lost by the broker, it is sent again as it was."""

    @stand.task(name="again", once=True, bind=True)
    def again(self: Any, session: Session, name: str) -> int:
        session.add(Effect(name=name))
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    first = begin(stand, again, "a")
    retried = stand.deliver(first)
    lost = stand.sent()
    owed_after_retry = owed(stand)
    stand.make_due()
    stand.relay_all()
    [second] = stand.sent()
    stand.deliver(second)
    [third] = stand.sent()
    ended = stand.deliver(third)
    late = stand.deliver(first)

    assert retried.state == "RETRY"
    assert [one.headers["retries"] for one in (*lost, second, third)] == [1, 1, 2]
    assert {one.id for one in (first, *lost, second, third)} == {first.id}
    assert owed_after_retry == 1
    assert (ended.value, late.value) == (2, 2)
    assert stand.effects() == ["a"]
    assert owed(stand) == 0


@WAYS
def test_autoretry_keeps_the_task_owed_until_it_has_failed_for_good(stand: OutboxStand, begin: Start) -> None:
    """With retries left it is owed; without, it is dead with the last error."""

    @stand.task(name="fails", once=True, autoretry_for=(LookupError,), max_retries=1, default_retry_delay=0)
    def fails(session: Session) -> None:
        session.add(Effect(name="ghost"))
        raise LookupError("no such book")

    first = stand.deliver(begin(stand, fails))
    between = owed(stand)
    [second] = stand.sent()
    last = stand.deliver(second)

    assert (first.state, between, last.state) == ("RETRY", 1, "FAILURE")
    assert [(row["task_id"], row["error"]) for row in upkeep.dead(stand.alchemy.engine)] == [(second.id, "LookupError: no such book")]
    assert stand.effects() == []


@WAYS
def test_autoretry_does_not_revive_a_dead_task(stand: OutboxStand, begin: Start) -> None:
    """A copy of the first message has retries left, and the error that it meets is an Exception too."""
    runs: list[int] = []
    told: list[str] = []

    @stand.task(
        name="fails",
        once=True,
        bind=True,
        autoretry_for=(Exception,),
        max_retries=1,
        default_retry_delay=0,
        record_failure=lambda session, exc: told.append(str(exc)),
    )
    def fails(self: Any, session: Session) -> None:
        runs.append(self.request.retries)
        raise LookupError("no such book")

    first = begin(stand, fails)
    stand.deliver(first)
    [second] = stand.sent()
    stand.deliver(second)
    late = [stand.deliver(sent) for sent in (first, second)]

    assert [(ended.state, type(ended.value)) for ended in late] == [("FAILURE", DeadTaskError)] * 2
    assert runs == [0, 1]
    assert told == ["no such book"]
    assert [row["error"] for row in upkeep.dead(stand.alchemy.engine)] == ["LookupError: no such book"]
    assert stand.sent() == []


@WAYS
def test_dead_task_is_not_run_until_it_is_revived(stand: OutboxStand, begin: Start) -> None:
    """Its error is kept, a late copy reports it, and the revived one does the work once."""
    broken = [True]

    @stand.task(name="fails", once=True)
    def fails(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        if broken:
            raise LookupError(name)
        return "done"

    sent = begin(stand, fails, "a")
    failed = stand.deliver(sent)
    broken.clear()
    late = stand.deliver(sent)
    dead = upkeep.dead(stand.alchemy.engine)
    revived = upkeep.revive(stand.alchemy.engine, [sent.id])
    stand.relay_all()
    [again] = stand.sent()
    ended, copy = stand.deliver(again), stand.deliver(sent)

    assert (failed.state, late.state) == ("FAILURE", "FAILURE")
    assert isinstance(late.value, DeadTaskError)
    assert "LookupError: a" in str(late.value)
    assert [(row["task_id"], row["task_name"], row["error"]) for row in dead] == [(sent.id, "fails", "LookupError: a")]
    assert (revived, again.id, again.args) == (1, sent.id, ["a"])
    assert (ended.value, copy.value) == ("done", "done")
    assert stand.effects() == ["a"]
    assert upkeep.dead(stand.alchemy.engine) == []


@WAYS
def test_task_that_kills_its_process_each_time_is_dead_in_the_end(stand: OutboxStand, begin: Start) -> None:
    """max_deliveries bounds it; record_failure is told once; a late copy does not start it again."""
    starts: list[int] = []
    told: list[str] = []

    def tell(session: Session, exc: BaseException) -> None:
        told.append(type(exc).__name__)
        session.add(Effect(name="failed"))

    @stand.task(name="kills", once=True, max_deliveries=3, record_failure=tell)
    def kills(session: Session) -> None:
        starts.append(1)
        raise Crash

    sent = begin(stand, kills)
    states = []
    for number in range(8):
        try:
            states.append(stand.deliver(sent, delivery_info={"redelivered": number > 0}).state)
        except Crash:
            states.append("crash")

    assert states == ["crash"] * 3 + ["FAILURE"] * 5
    assert len(starts) == 3
    assert told == ["DeadTaskError"]
    assert stand.effects() == ["failed"]
    assert "started 3 times" in upkeep.dead(stand.alchemy.engine)[0]["error"]


def test_starts_that_ended_do_not_count(stand: OutboxStand) -> None:
    """Only starts without an end say that a task kills its process: retries may be many."""

    @stand.task(name="again", once=True, bind=True, max_deliveries=2, max_retries=None)
    def again(self: Any, session: Session) -> int:
        if self.request.retries < 6:
            raise self.retry(countdown=0)
        return int(self.request.retries)

    sent = start(stand, again)
    while (ended := stand.deliver(sent)).state == "RETRY":
        [sent] = stand.sent()

    assert (ended.state, ended.value) == ("SUCCESS", 6)


@WAYS
def test_runs_again_in_a_living_process_do_not_count(stand: OutboxStand, begin: Start) -> None:
    """A body that is run again after a transient error has killed nothing."""
    runs: list[str] = []

    @stand.task(name="unlucky", once=True, transient_retries=6, max_deliveries=2)
    def unlucky(session: Session, name: str) -> int:
        runs.append(name)
        session.add(Effect(name=name))
        if len(runs) < 6:
            raise DBAPIError("SELECT 1", {}, Exception("the server went away"), connection_invalidated=True)
        return len(runs)

    sent = begin(stand, unlucky, "a")
    ended = stand.deliver(sent, delivery_info={"redelivered": True})

    assert (ended.state, ended.value) == ("SUCCESS", 6)
    assert stand.effects() == ["a"]


@WAYS
def test_message_that_is_requeued_again_and_again_does_not_count(stand: OutboxStand, begin: Start) -> None:
    """`Reject(requeue=True)` says "not now"; each of these starts has ended."""
    runs: list[str] = []

    @stand.task(name="busy", once=True, max_deliveries=2)
    def busy(session: Session, name: str) -> int:
        runs.append(name)
        if len(runs) < 6:
            raise Reject("not now", requeue=True)
        session.add(Effect(name=name))
        return len(runs)

    sent = begin(stand, busy, "a")
    states = [stand.deliver(sent, delivery_info={"redelivered": True}).state for _ in range(6)]

    assert states == ["REJECTED"] * 5 + ["SUCCESS"]
    assert stand.effects() == ["a"]


@WAYS
@pytest.mark.parametrize("commit_on", [("success",), ("success", "ignore")])
def test_ignored_task_is_done(stand: OutboxStand, begin: Start, commit_on: tuple[str, ...]) -> None:
    """Ignore ends it, with its writes or without; a copy is ignored as well and does nothing."""

    @stand.task(name="ignores", once=True, commit_on=commit_on)
    def ignores(session: Session) -> None:
        session.add(Effect(name="a"))
        raise Ignore

    sent = begin(stand, ignores)
    states = [stand.deliver(sent).state for _ in range(2)]

    assert states == ["IGNORED", "IGNORED"]
    assert stand.effects() == (["a"] if "ignore" in commit_on else [])
    assert owed(stand) == 0


def test_rejected_task_is_dead_and_a_requeued_one_is_owed(stand: OutboxStand) -> None:
    """Reject without requeue has failed for good; with it, the broker keeps it, and so does the outbox."""

    @stand.task(name="rejects", once=True)
    def rejects(session: Session, requeue: bool) -> None:
        session.add(Effect(name="ghost"))
        raise Reject("no", requeue=requeue)

    thrown_away, requeued = start(stand, rejects, False), start(stand, rejects, True)
    states = [stand.deliver(thrown_away).state, stand.deliver(requeued).state]

    assert states == ["REJECTED", "REJECTED"]
    assert [row["task_id"] for row in upkeep.dead(stand.alchemy.engine)] == [thrown_away.id]
    assert stand.outbox("task_id, " + OWED)[1] == (requeued.id, True)
    assert stand.effects() == []


@WAYS
def test_replaced_task_is_done_and_its_replacement_runs_once(stand: OutboxStand, begin: Start) -> None:
    """The replacement has the task's id and a record of its own."""

    @stand.task(name="replacement", once=True)
    def replacement(session: Session) -> str:
        session.add(Effect(name="replacement"))
        return "replaced"

    @stand.task(name="replaces", once=True, bind=True)
    def replaces(self: Any, session: Session) -> None:
        session.add(Effect(name="first"))
        self.replace(replacement.si())

    first = begin(stand, replaces)
    stand.deliver(first)
    [second] = stand.sent()
    stand.deliver(first)
    results = [stand.deliver(second).value for _ in range(2)]

    assert second.id == first.id
    assert results == ["replaced", "replaced"]
    assert stand.effects() == ["first", "replacement"]
    assert stand.sent() == []
    assert owed(stand) == 0


def test_owed_task_is_sent_again_when_the_broker_has_lost_it(stand: OutboxStand) -> None:
    """And it is not sent before its time; the copy that turns up after all does nothing."""

    @stand.task(name="slow", once=True)
    def slow(session: Session) -> None:
        session.add(Effect(name="a"))

    lost = start(stand, slow)
    early = stand.relay_all()
    stand.make_due()
    stand.relay_all()
    [again] = stand.sent()
    stand.deliver(again)
    stand.deliver(lost)
    stand.make_due()
    late = stand.relay_all()

    assert (early, late) == (0, 0)
    assert (again.id, again.body, again.headers) == (lost.id, lost.body, lost.headers)
    assert stand.effects() == ["a"]


def test_start_of_a_run_puts_the_next_delivery_off(stand: OutboxStand) -> None:
    """redeliver_after counts from the start: a task that waited long in the queue is not sent beside its own run."""
    waits: list[Any] = []

    @stand.task(name="looks", once=True, redeliver_after=100)
    def looks(session: Session) -> None:
        waits.append(seconds_until_due(stand))

    sent = start(stand, looks)
    after_publish = seconds_until_due(stand)
    stand.make_due()
    stand.deliver(sent)

    assert 90 < after_publish <= 100
    assert 90 < waits[0] <= 100


def test_task_with_an_eta_is_sent_again_after_its_eta(stand: OutboxStand) -> None:
    """Before it no worker would have run it."""

    @stand.task(name="later", once=True, redeliver_after=100)
    def later(session: Session) -> None:
        raise NotImplementedError

    start(stand, later, countdown=1000)

    assert 1090 < seconds_until_due(stand) <= 1100


def seconds_until_due(stand: OutboxStand) -> float:
    """Return how far ahead the only row's due_at is, by the database's clock."""
    query = {
        "sqlite": "SELECT round((julianday(due_at) - julianday('now')) * 86400, 3) FROM celery_outbox",
        "postgresql": "SELECT extract(epoch FROM due_at - clock_timestamp()) FROM celery_outbox",
        "mariadb": "SELECT timestampdiff(microsecond, utc_timestamp(6), due_at) / 1e6 FROM celery_outbox",
    }[stand.database.name]
    return float(stand.database.scalar(query))


def test_completed_records_are_pruned_after_the_window_and_nothing_else(make_stand: MakeStand) -> None:
    """Young records, owed and dead tasks stay, however old."""
    stand = make_stand(once_window=1000)

    @stand.task(name="count", once=True)
    def count(session: Session, name: str) -> None:
        if name == "dead":
            raise LookupError

    old, young, _, dead = (start(stand, count, name) for name in ("old", "young", "owed", "dead"))
    for sent in (old, young, dead):
        stand.deliver(sent)
    for column in ("created_at", "completed_at", "died_at", "due_at"):
        stand.database.execute(
            f"UPDATE celery_outbox SET {column} = '2020-01-01 00:00:00'"
            f" WHERE {column} IS NOT NULL AND NOT (task_id = :young AND '{column}' = 'completed_at')",
            young=young.id,
        )

    deleted = upkeep.prune_all(stand.alchemy.engine, stand.alchemy.once_window_seconds)

    assert deleted == 1
    assert old.id not in stand.outbox()
    assert len(stand.outbox()) == 3


def test_relay_prunes_as_fast_as_records_grow_old(make_stand: MakeStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch a minute, and the next at once while a batch was full: the table does not grow for ever."""
    monkeypatch.setattr(relay_module, "PRUNE_ROWS", 2)
    clock = [0.0]
    monkeypatch.setattr(relay_module, "monotonic", lambda: clock[0])
    stand = make_stand(once_window=1000)

    @stand.task(name="count", once=True)
    def count(session: Session) -> None: ...

    def grow_old(number: int) -> None:
        for _ in range(number):
            stand.deliver(start(stand, count))
        stand.database.execute("UPDATE celery_outbox SET completed_at = '2020-01-01 00:00:00'")

    relay = stand.relay()
    left = []
    for seconds, more in ((1, 5), (61, 0), (62, 0), (63, 0), (64, 1), (123, 0), (124, 0)):
        grow_old(more)
        clock[0] = seconds
        relay.prune_sometimes()
        left.append(len(stand.outbox()))

    assert left == [5, 3, 1, 0, 1, 0, 0]


def test_revive_takes_only_the_dead(stand: OutboxStand) -> None:
    """Ids of tasks that are owed, completed or unknown are not theirs; without ids it takes all the dead."""

    @stand.task(name="count", once=True)
    def count(session: Session, name: str) -> None:
        if name.startswith("dead"):
            raise LookupError

    completed, waiting, *dead = (start(stand, count, name) for name in ("done", "owed", "dead 1", "dead 2", "dead 3"))
    for sent in (completed, *dead):
        stand.deliver(sent)

    taken = upkeep.revive(stand.alchemy.engine, [completed.id, waiting.id, "unknown", dead[0].id])
    rest = upkeep.revive(stand.alchemy.engine)
    stand.relay_all()

    assert (taken, rest) == (1, 2)
    assert sorted(sent.id for sent in stand.sent()) == sorted(sent.id for sent in dead)


def test_same_key_enqueued_again_after_it_is_done_reports_the_result(stand: OutboxStand) -> None:
    """The message goes out as any other and finds the work done; while it is owed, a second message shares its fate."""

    @stand.task(name="keyed", once=lambda name: name)
    def keyed(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        return f"done {name}"

    first, second = start(stand, keyed, "a"), start(stand, keyed, "a")
    values = [stand.deliver(second).value, stand.deliver(first).value, stand.deliver(start(stand, keyed, "a")).value]

    assert values == ["done a"] * 3
    assert stand.effects() == ["a"]
    assert len(stand.outbox()) == 1


def test_task_that_was_sent_past_the_outbox_leaves_a_dead_row_that_can_be_revived(stand: OutboxStand) -> None:
    """Its message is made from the request: the same id, arguments and chain."""

    @stand.task(name="fails", once=True)
    def fails(session: Session, name: str) -> None:
        raise LookupError(name)

    sent = start_past_outbox(stand, fails, "a", headers={"tenant": "acme"})
    stand.deliver(sent)
    upkeep.revive(stand.alchemy.engine)
    stand.relay_all()

    [again] = stand.sent()
    assert (again.id, again.args, again.headers["retries"]) == (sent.id, ["a"], 0)
    assert again.headers["tenant"] == "acme"
