"""Crashes at named points and double deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, enqueue
from celery_alchemy.testing import Point, PointNotReachedError, Sent
from celery_alchemy.testing.points import POINTS
from tests.kit.store import Payment, Store

pytestmark = [pytest.mark.databases("sqlite"), pytest.mark.usefixtures("joined_transaction")]

UNTIL_COMMIT: tuple[Point, ...] = ("body, before", "body, after", "COMMIT, before")


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("point", POINTS)
def test_once_task_survives_a_crash_at_every_point(point: Point, store: Store, sent: Sent, crash_at: Any) -> None:
    """Wherever its process dies, a once task is delivered again and has paid once when nothing is left."""
    result = store.pay_once.delay("a")

    with crash_at(point, task=store.pay_once) as crash:
        runs = sent.run()

    assert crash.struck
    assert store.paid == ["a"]
    assert result.get(timeout=1) == "a"
    # What was published and not settled in the outbox is published again.
    assert [run.result for run in runs if run.sent.task == "store.receipt"] == ["1 of a"] * (2 if point == "publish, after" else 1)
    lost = [run for run in runs if run.state == "LOST"]
    assert [run.sent.task for run in lost] == ["store.pay_once"] or point == "acknowledge, after"


@pytest.mark.parametrize("point", POINTS)
def test_plain_task_is_lost_where_celery_loses_it(point: Point, store: Store, sent: Sent, crash_at: Any) -> None:
    """A task that is acknowledged early is gone with its process: before the commit without its work, after it without its send."""
    store.pay.delay("a")

    with crash_at(point, task="store.pay"):
        sent.run()

    # Before it was acknowledged nothing has happened, and it is delivered again.
    assert store.paid == ([] if point in (*UNTIL_COMMIT, "acknowledge, after") else ["a"])


@pytest.mark.parametrize("point", ["body, before", "body, after", "COMMIT, before", "COMMIT, after"])
def test_crash_of_a_direct_call_ends_the_block(point: Point, store: Store, sent: Sent, crash_at: Any) -> None:
    """apply() does not return; nothing is sent, and the work is there if it was committed."""
    with crash_at(point):
        store.pay.apply(("a",))
        pytest.fail("the process went on")

    assert store.paid == ([] if point in UNTIL_COMMIT else ["a"])
    assert sent == []


def test_crash_of_a_web_request(store: Store, sent: Sent, crash_at: Any) -> None:
    """A session outside of tasks comes to its commit too; what it sends is in the outbox then."""
    with crash_at("publish, before"), store.alchemy.begin() as session:
        session.add(Payment(order="a"))
        enqueue(session, store.receipt.s("a"))

    assert store.paid == ["a"]
    assert sent == []
    sent.relay()
    assert sent == [store.receipt.s("a")]
    sent.clear()
    sent.relay()
    assert sent == []


def test_crash_of_an_async_task(store: Store, crash_at: Any) -> None:
    """A coroutine comes to the same points."""
    for point in ("body, after", "COMMIT, after"):
        with crash_at(point):
            store.pay_async.apply((point,))
            pytest.fail("the process went on")

    assert store.paid == ["COMMIT, after"]


def test_commit_in_the_body_is_not_the_tasks_end(store: Store, crash_at: Any) -> None:
    """The point COMMIT is the commit that ends the task, not one before it."""
    task: Any = store.app.task

    @task(shared=False)
    def in_two_steps(session: Session) -> None:
        session.add(Payment(order="first"))
        session.commit()
        session.add(Payment(order="second"))

    with crash_at("COMMIT, before"):
        in_two_steps()

    assert store.paid == ["first"]


def test_autoretried_task_comes_to_its_points(store: Store, crash_at: Any) -> None:
    """Celery's autoretry wraps the body; a crash is no exception that it retries."""
    task: Any = store.app.task

    @task(shared=False, autoretry_for=(Exception,))
    def stubborn(session: Session) -> None:
        session.add(Payment(order="a"))

    with crash_at("body, after", task=stubborn):
        stubborn.apply()

    assert store.paid == []


def test_point_that_nothing_comes_to_fails_the_test(store: Store, crash_at: Any) -> None:
    """A crash that did not happen would show nothing; the error says what was reached."""
    reached = "not reached inside of the block. Reached: body, before; body, after; COMMIT, before; COMMIT, after"
    with pytest.raises(PointNotReachedError, match=f"'acknowledge, after'.*{reached}"), crash_at("acknowledge, after"):
        store.pay_once.apply(("a",))

    other = pytest.raises(PointNotReachedError, match="of task 'store.pay_once' .*Reached: none")
    with other, crash_at("body, after", task=store.pay_once):
        store.receipt("a")


def test_point_that_does_not_exist_is_refused(crash_at: Any) -> None:
    """A misspelt point is named, with those that exist."""
    with pytest.raises(ConfigurationError, match="'before body'.*'body, before'"), crash_at("before body"):
        pass


@pytest.mark.parametrize("point", [None, 1, "step", "step  ", "step , before", "step parse ", ["body, before"]], ids=str)
def test_point_that_cannot_be_one_is_refused(crash_at: Any, point: Any) -> None:
    """Also the name of a step that no step can have."""
    with pytest.raises(ConfigurationError, match="There is no point"), crash_at(point):
        pass


def test_nothing_is_wrapped_behind_the_block(store: Store, crash_at: Any) -> None:
    """The task's body, and what else was wrapped, is as before."""
    run = store.pay.run
    with crash_at("body, before"):
        store.pay.apply(("a",))

    assert store.pay.run is run
    store.pay.apply(("b",), throw=True)
    assert store.paid == ["b"]


def test_twice_delivered_task(store: Store, sent: Sent, deliver_twice: Callable[..., Any]) -> None:
    """A plain task pays twice, a once task once; both deliveries report."""
    store.pay.delay("plain")
    result = store.pay_once.delay("once")

    with deliver_twice():
        runs = sent.run()

    assert store.paid == ["plain", "plain", "once"]
    assert [run.result for run in runs if run.sent.id == result.id] == ["once", "once"]


def test_twice_applied_task(store: Store, deliver_twice: Callable[..., Any]) -> None:
    """An eager call runs twice under one id."""
    with deliver_twice():
        store.pay.apply(("plain",), throw=True)
        assert store.pay_once.apply(("once",)).get() == "once"

    assert store.paid == ["plain", "plain", "once"]


def test_twice_sent_task(store: Store, deliver_twice: Callable[..., Any]) -> None:
    """A broker gets every message twice: sent plainly, on commit, alone and together."""
    queue = f"twice-{id(store)}"
    with deliver_twice():
        store.receipt.apply_async(("a",), queue=queue)
        with store.alchemy.begin() as session:
            enqueue(session, store.receipt.s("b"), queue=queue)
            enqueue(session, store.receipt.s("c"), queue=queue)

    with store.app.connection_for_read() as connection, connection.SimpleQueue(queue) as received:
        orders = []
        for _ in range(6):
            message = received.get(timeout=5)
            message.ack()
            orders.append(message.payload[0][0])
    assert orders == ["a", "a", "b", "b", "c", "c"]


def test_async_session_outside_of_tasks_comes_to_its_commit(store: Store, crash_at: Any) -> None:
    """An async web request dies as a sync one does."""

    async def request() -> None:
        async with store.alchemy.async_session() as session:
            session.add(Payment(order="a"))
            await session.commit()

    with crash_at("COMMIT, before"):
        asyncio.run(request())

    assert store.paid == []
