"""While a transaction is open that PostgreSQL keeps what is gone for, a worker does not go through all of it at each look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import Queue
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from celery_alchemy.broker import floors as floors_module
from celery_alchemy.broker.acknowledging import acknowledge
from celery_alchemy.broker.claims import has_due, take
from celery_alchemy.broker.floors import MARGIN_SECONDS, MOST_SECONDS, SLOW_SECONDS, Floors
from celery_alchemy.broker.tables import begun
from tests.broker.broker_stand import BrokerStand, write
from tests.broker.lines import OpenLine
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.waiting import eventually

QUEUE = "celery"
GONE = 200_000
SLOW = SLOW_SECONDS * 2


# --- the rule ------------------------------------------------------------------------------------------------------------------


def at(seconds: float) -> datetime:
    """A moment of the test."""
    return datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)


def row(priority: int, queue: str, due_at: float, now: float) -> Any:
    """A row as a look returns it."""
    return SimpleNamespace(priority=priority, queue=queue, was_due_at=at(due_at), taken_at=at(now))


def looked(waiting: list[tuple[int, str, float]], queues: list[str], limit: int, since: Any, now: float) -> list[Any]:
    """What the database takes out of what waits: of priority 9 first, then by queue, then the oldest."""
    due = [one for one in waiting if one[2] <= now and at(one[2]) >= since.get(one[:2], at(0))]
    due.sort(key=lambda one: (-one[0], queues.index(one[1]), one[2]))
    for one in due[:limit]:
        waiting.remove(one)
    return [row(*one, now) for one in due[:limit]]


sent = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b"]), st.floats(0, 5)), max_size=6)


@settings(max_examples=400, deadline=None)
@given(looks=st.lists(st.tuples(sent, st.integers(1, 4)), min_size=2, max_size=12))
def test_partial_looks_take_what_whole_ones_would(looks: list[tuple[list[tuple[int, str, float]], int]]) -> None:
    """Whatever is sent between two looks and due from then on, in any queue and of any priority."""
    floors, now = Floors(), 0.0
    here: list[tuple[int, str, float]] = []
    there: list[tuple[int, str, float]] = []
    for arrived, limit in looks:
        # Some were written a moment before, and are committed now.
        new = [(priority, queue, max(0.0, now + later - 1.0)) for priority, queue, later in arrived]
        here, there = here + new, there + new
        now += 1.0
        found = looked(here, ["a", "b"], limit, floors.since(), now)
        floors.note(found, ["a", "b"], limit, SLOW)

        assert found == looked(there, ["a", "b"], limit, {}, now)


def test_quick_looks_are_whole() -> None:
    """A worker on a healthy table remembers nothing."""
    floors = Floors()
    floors.note([row(3, QUEUE, 1.0, 2.0)], [QUEUE], 1, SLOW_SECONDS / 2)

    assert floors.since() == {}
    assert floors.seconds_left() == float("inf")


def test_look_after_a_slow_one_is_partial_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ten times as long as it took, and no longer than ten seconds; the one after it is whole."""
    now = 0.0
    monkeypatch.setattr(floors_module, "monotonic", lambda: now)
    for seconds, pause in ((SLOW, SLOW * 10), (3.0, MOST_SECONDS)):
        floors = Floors()
        floors.since()
        floors.note([row(3, QUEUE, 1.0, 9.0)], [QUEUE], 1, seconds)

        higher = dict.fromkeys([(place, QUEUE) for place in range(9, 3, -1)], at(9.0 - seconds - MARGIN_SECONDS))
        assert floors.since() == higher | {(3, QUEUE): at(1.0 - MARGIN_SECONDS)}
        assert floors.seconds_left() == pytest.approx(pause)
        now += pause
        assert floors.since() == {}
        now = 0.0


def test_slow_look_that_finds_nothing_is_not_repeated_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's time is known from what was taken before; where none was, or it does not matter, each look is whole."""
    now = 0.0
    monkeypatch.setattr(floors_module, "monotonic", lambda: now)
    floors = Floors()
    floors.note([], [QUEUE], 1, SLOW)
    assert floors.since() == {}
    floors.note([row(3, QUEUE, 1.0, 2.0)], [QUEUE], 1, SLOW / 4)
    now = 5.0
    floors.note([], [QUEUE], 1, SLOW)

    assert set(floors.since().values()) == {at(7.0 - SLOW - MARGIN_SECONDS)}
    assert not floors.is_whole_due()


def test_overdue_whole_look_does_not_make_a_worker_look_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have no room to take anything."""
    now = 0.0
    monkeypatch.setattr(floors_module, "monotonic", lambda: now)
    floors = Floors()
    floors.note([row(3, QUEUE, 1.0, 2.0)], [QUEUE], 1, SLOW)
    floors.since()
    now = MOST_SECONDS

    assert floors.seconds_left() == float("inf")


# --- on PostgreSQL -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pinned(stand: BrokerStand, database: Database) -> Iterator[Connection]:
    """A transaction that is open since before many messages came and went."""
    engine = create_engine(database.url, isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM celery_outbox"))
        columns = "once, created_at, due_at, body, envelope, queue, priority, sends, failures, deliveries"
        database.execute(
            f"INSERT INTO celery_outbox (id, task_id, task_name, {columns})"
            " SELECT 'x' || n, 'x' || n, 'x', false, now(), now() - n * interval '1 ms', '\\x5b5d', '{}', 'celery', 0, 0, 0, 0"
            f" FROM generate_series(1, {GONE}) AS n"
        )
        database.execute("DELETE FROM celery_outbox")
        yield connection
    engine.dispose()


@pytest.mark.databases("postgresql", "postgresql+psycopg2")
def test_looks_stay_quick_while_a_transaction_is_open(stand: BrokerStand, database: Database, pinned: Connection) -> None:
    """Nothing is missed, and the order is kept."""
    task = stand.task(write, name="write")
    ids = [task.delay(str(number)).id for number in range(60)]
    whole, partial, taken = [], [], []
    floors = Floors()
    while True:
        began = time.perf_counter()
        with begun(stand.home.place, stand.alchemy.engine) as tables:
            deliveries = take(tables, "w", [QUEUE], 3, floors)
            (partial if floors.since() and taken else whole).append(time.perf_counter() - began)
            acknowledge(tables, "w", [delivery.claim for delivery in deliveries if delivery.claim])
        taken += [delivery.payload["headers"]["id"] for delivery in deliveries]
        if not deliveries:
            break

    assert taken == ids
    assert len(partial) > 10
    assert median(partial) < max(whole) / 2


@pytest.mark.databases("postgresql")
def test_idle_worker_does_not_go_through_what_is_gone_each_second(
    stand: BrokerStand, database: Database, pinned: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for what has become due since then, and finds an older message when a whole look is due again."""
    monkeypatch.setattr(floors_module, "SHARE", 0.01)  # For seconds, also on a machine that is busy.
    task = stand.task(write, name="write")
    task.delay("first")
    floors = Floors()

    def look() -> tuple[bool, int]:
        with begun(stand.home.place, stand.alchemy.engine) as tables:
            is_due = has_due(tables, [QUEUE], None, floors)
            return is_due, len(take(tables, "w", [QUEUE], 3, floors)) if is_due else 0

    assert look() == (True, 1)
    assert not floors.is_whole_due()
    # Behind most of what is gone.
    older = task.delay("older").id
    database.execute(f"UPDATE celery_outbox SET due_at = due_at - interval '5 s' WHERE task_id = '{older}'")
    task.delay("younger")
    assert look() == (True, 1)
    eventually(floors.is_whole_due, timeout=MOST_SECONDS + 5, what="a whole look is due")
    assert look() == (True, 1)


@pytest.mark.databases("postgresql")
def test_messages_of_a_claim_that_was_not_committed_are_taken_at_once(
    stand: BrokerStand, database: Database, pinned: Connection, open_line: OpenLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were seen, and so they are older than the floor of the next look; a whole look would not come for ten seconds."""
    monkeypatch.setattr(floors_module, "SHARE", 0.001)
    line, lost = open_line(), []
    for _ in range(3):
        line.send(QUEUE)
    database.execute("UPDATE celery_outbox SET due_at = due_at - interval '5 s'")

    def lose(connection: Connection) -> None:
        if not lost and connection.exec_driver_sql("SELECT count(*) FROM celery_outbox WHERE claim IS NOT NULL").scalar():
            lost.append(connection)
            raise OperationalError("COMMIT", None, Exception("the connection was cut"))

    event.listen(Engine, "commit", lose)
    try:
        with line.consuming(Queue(QUEUE)) as heard:
            assert len(heard.wait_for(3, timeout=MOST_SECONDS / 2)) == 3
    finally:
        event.remove(Engine, "commit", lose)
    assert len(lost) == 1


@pytest.mark.databases("postgresql")
@pytest.mark.brokers("alchemy")
def test_message_that_is_older_than_what_was_taken_waits_for_a_moment(
    stand: BrokerStand, database: Database, broker: Broker, pinned: Connection, start_worker: StartWorker
) -> None:
    """It was committed after younger ones."""
    start_worker("tests.broker.app", pool="threads", settings={"broker_url": "alchemy://"})
    ran: dict[str, float] = {}

    def note() -> int:
        for (name,) in database.rows("SELECT name FROM effect"):
            ran.setdefault(name, time.monotonic())
        return len(ran)

    late = broker.client.send_task("write", ["late"], countdown=3600).id
    for number in range(100):
        broker.client.send_task("write", [str(number)])
        if number == 50:
            database.execute(f"UPDATE celery_outbox SET due_at = now() - interval '1 hour' WHERE task_id = '{late}'")
            began = time.monotonic()
    eventually(lambda: note() == 101, timeout=60, what="all have run")

    assert ran["late"] - began < 10
