"""The connection dies while COMMIT is under way: what became of it is looked up, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.operations import dead_tasks as upkeep
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.proxy import CommitProxy
from tests.delivery.test_once import WAYS, Start
from tests.services.databases import Database

pytestmark = pytest.mark.databases("postgresql", "postgresql+psycopg2", "mariadb")


@pytest.fixture
def proxy(database: Database) -> Iterator[CommitProxy]:
    """A proxy in front of the test's database, which tests look into past it."""
    with CommitProxy(database.url) as proxy:
        yield proxy


@pytest.fixture
def stand(database: Database, proxy: CommitProxy) -> Iterator[OutboxStand]:
    """A stand whose connections go through the proxy."""
    database.url = proxy.url
    stand = OutboxStand(database)
    yield stand
    stand.close()


@WAYS
@pytest.mark.parametrize("again", [{}, {"autoretry_for": (DBAPIError,)}, {"transient_retries": 3}])
def test_commit_whose_answer_is_lost_is_a_success(
    stand: OutboxStand, proxy: CommitProxy, begin: Start, again: dict[str, Any]
) -> None:
    """The work is done: the task reports its result, what it sent is sent, and neither it nor a copy runs again."""
    runs: list[int] = []

    @stand.task(name="works", once=True, **again)
    def works(session: Session) -> str:
        runs.append(1)
        session.add(Effect(name="a"))
        session.flush()
        stand.effect.delay_on_commit("child")
        if not proxy.lost:
            proxy.lose_next("answer")
        return "done"

    sent = begin(stand, works)
    ended = stand.deliver(sent)
    copy = stand.deliver(sent)
    stand.make_due()
    stand.relay_all()

    assert (proxy.lost, len(runs)) == (1, 1)
    assert [(one.state, one.value) for one in (ended, copy)] == [("SUCCESS", "done")] * 2
    assert stand.effects() == ["a"]
    assert [child.args for child in stand.sent()] == [["child"]]


@WAYS
def test_commit_that_never_arrived_is_a_failure(stand: OutboxStand, proxy: CommitProxy, begin: Start) -> None:
    """Nothing is done: autoretry sees the error, and the next attempt does the work."""

    @stand.task(name="works", once=True, autoretry_for=(OperationalError,), default_retry_delay=0)
    def works(session: Session) -> str:
        session.add(Effect(name="a"))
        session.flush()
        stand.effect.delay_on_commit("child")
        if not proxy.lost:
            proxy.lose_next("commit")
        return "done"

    sent = begin(stand, works)
    failed = stand.deliver(sent)
    after_failure = stand.effects()
    [retry] = stand.sent()
    ended = stand.deliver(retry)

    assert proxy.lost == 1
    assert failed.state == "RETRY"
    assert after_failure == []
    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert stand.effects() == ["a"]
    assert [child.args for child in stand.sent()] == [["child"]]


def test_lost_answer_to_the_start_costs_a_count_and_nothing_else(stand: OutboxStand, proxy: CommitProxy) -> None:
    """The start is tried again; counted twice, it is still one run."""

    @stand.task(name="works", once=True)
    def works(session: Session) -> str:
        session.add(Effect(name="a"))
        return "done"

    with stand.alchemy.begin():
        works.delay_on_commit()
    [sent] = stand.sent()
    proxy.lose_next("answer")
    ended = stand.deliver(sent)

    assert proxy.lost == 1
    assert (ended.state, ended.value) == ("SUCCESS", "done")
    assert stand.effects() == ["a"]


def test_message_of_a_caller_whose_commit_lost_its_answer_is_sent(stand: OutboxStand, proxy: CommitProxy) -> None:
    """The caller cannot know that it has committed; the row can: the relay sends it."""
    with pytest.raises(OperationalError), stand.alchemy.begin() as session:
        session.add(Effect(name="a"))
        enqueue(session, stand.effect.s("sent"))
        session.flush()
        proxy.lose_next("answer")
    at_once: list[Any] = stand.sent()
    stand.make_due()
    stand.relay_all()

    assert at_once == []
    assert stand.effects() == ["a"]
    assert [sent.args for sent in stand.sent()] == [["sent"]]


def test_message_of_a_caller_whose_commit_never_arrived_is_not_sent(stand: OutboxStand, proxy: CommitProxy) -> None:
    """No row, no message."""
    with pytest.raises(OperationalError), stand.alchemy.begin() as session:
        session.add(Effect(name="a"))
        enqueue(session, stand.effect.s("ghost"))
        session.flush()
        proxy.lose_next("commit")
    stand.relay_all()

    assert stand.effects() == []
    assert stand.outbox() == []
    assert stand.sent() == []


def test_task_that_seems_to_fail_for_good_is_not_dead_if_it_committed(stand: OutboxStand, proxy: CommitProxy) -> None:
    """Without any retries the lost answer would make it dead, and a revived one would do its work again."""

    @stand.task(name="works", once=True, max_retries=0)
    def works(session: Session) -> None:
        session.add(Effect(name="a"))
        session.flush()
        proxy.lose_next("answer")

    with stand.alchemy.begin():
        works.delay_on_commit()
    [sent] = stand.sent()
    stand.deliver(sent)

    assert upkeep.dead(stand.alchemy.engine) == []
    assert stand.outbox("completed_at IS NOT NULL") == [True]
