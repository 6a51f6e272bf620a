"""Ways to call a `once` task in which it could not be done once are refused, with the way that works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chunks, group
from celery.canvas import xmap, xstarmap
from sqlalchemy import Column, Integer, MetaData, Table, text
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, OnceCommitError, enqueue
from celery_alchemy.worker.boot_steps import SessionStep
from tests.delivery.outbox_stand import Effect, OutboxStand

pytestmark = pytest.mark.databases("sqlite")


def charge(stand: OutboxStand, **options: Any) -> Any:
    """Make a once task whose effects can be counted."""

    @stand.task(**{"name": "charge", "once": True, **options})
    def charge_once(session: Session, number: int) -> int:
        session.add(Effect(name=str(number)))
        return number

    return charge_once


WAYS_TO_MAP: dict[str, Callable[[Any], Any]] = {
    "map": lambda task: task.map([1, 2, 3]),
    "starmap": lambda task: task.starmap([(1,), (2,), (3,)]),
    "chunks": lambda task: task.chunks([(1,), (2,), (3,)], 2),
}
BY_HAND: dict[str, Callable[[Any], Any]] = {
    "map": lambda task: xmap(task.s(), [1, 2, 3], app=task.app),
    "starmap": lambda task: xstarmap(task.s(), [(1,), (2,), (3,)], app=task.app),
    "chunks": lambda task: chunks(task.s(), [(1,), (2,), (3,)], 2, app=task.app),
}


@pytest.mark.parametrize("way", WAYS_TO_MAP)
def test_map_of_a_once_task_is_refused_when_the_signature_is_made(stand: OutboxStand, way: str) -> None:
    """A second delivery of its one message would do all items again; the error names group."""
    with pytest.raises(ConfigurationError, match=r"group\(charge\.s\(item\)"):
        WAYS_TO_MAP[way](charge(stand))


@pytest.mark.parametrize("way", BY_HAND)
def test_map_that_is_made_by_hand_is_refused_when_it_is_enqueued(stand: OutboxStand, way: str) -> None:
    """Also as a member of a canvas."""
    made = BY_HAND[way](charge(stand))

    with stand.alchemy.begin() as session:
        for signature in (made, group([stand.effect.s("a"), made])):
            with pytest.raises(ConfigurationError, match="is once=True"):
                enqueue(session, signature)


@pytest.mark.parametrize("way", ["map", "starmap"])
def test_map_that_is_sent_past_the_library_does_nothing(stand: OutboxStand, way: str) -> None:
    """Its message is refused where it runs: no item is done, however often it is delivered."""
    BY_HAND[way](charge(stand)).apply_async()
    [sent] = stand.sent()
    ended = [stand.deliver(sent) for _ in range(2)]

    assert [(one.state, type(one.value)) for one in ended] == [("FAILURE", ConfigurationError)] * 2
    assert stand.effects() == []


@pytest.mark.parametrize("way", WAYS_TO_MAP)
def test_map_of_a_task_with_a_key_does_each_item_once(stand: OutboxStand, way: str) -> None:
    """Each call has the key of its arguments, over all deliveries."""
    WAYS_TO_MAP[way](charge(stand, once=lambda number: f"n{number}")).apply_async()
    messages = stand.sent()
    for sent in messages:
        stand.deliver(sent)
    while more := stand.sent():
        messages += more
        for sent in more:
            stand.deliver(sent)
    for sent in messages:
        if sent.task != "celery.chunks":
            stand.deliver(sent)

    assert sorted(stand.effects()) == ["1", "2", "3"]


def test_direct_call_of_a_once_task_in_another_task_goes_on_working(stand: OutboxStand) -> None:
    """It is a plain call with a transaction of its own, as ever."""
    inner = charge(stand)

    @stand.task(name="outer")
    def outer() -> int:
        return int(inner(5))

    outer.delay()
    [sent] = stand.sent()

    assert stand.deliver(sent).value == 5
    assert stand.effects() == ["5"]


@pytest.mark.parametrize("way", ["delay", "on commit", "enqueue"])
def test_once_task_is_refused_in_the_message_format_of_celery_3(stand: OutboxStand, way: str) -> None:
    """Its messages have no headers, in which the row would be named."""
    task = charge(stand)
    stand.app.conf.task_protocol = 1

    with stand.alchemy.begin() as session, pytest.raises(ConfigurationError, match="task_protocol=1"):
        if way == "delay":
            task.delay(1)
        elif way == "on commit":
            task.delay_on_commit(1)
        else:
            enqueue(session, group([task.s(1)]))

    assert stand.sent() == []


def test_worker_with_a_once_task_and_the_message_format_of_celery_3_is_refused(stand: OutboxStand) -> None:
    """Its retries could not be sent; that is said before it has taken anything."""
    charge(stand)
    stand.app.conf.task_protocol = 1
    worker: Any = type("Worker", (), {"app": stand.app, "pool_cls": "solo", "concurrency": 1})()

    with pytest.raises(SystemExit, match="task_protocol=1"):
        SessionStep(worker)


def test_plain_task_is_sent_in_the_message_format_of_celery_3(stand: OutboxStand) -> None:
    """The outbox keeps and sends any message."""
    stand.app.conf.task_protocol = 1
    stand.app.amqp.__dict__.pop("_create_task_sender", None)
    with stand.broker_down(), stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"))

    assert stand.relay_all() == 1
    assert stand.outbox() == []


def test_second_delivery_of_a_group_does_nothing(stand: OutboxStand) -> None:
    """What the errors advise: each item is a task of its own."""
    task = charge(stand)
    with stand.alchemy.begin() as session:
        enqueue(session, group(task.s(number) for number in (1, 2)))
    messages = stand.sent()
    for sent in messages * 2:
        stand.deliver(sent)

    assert sorted(stand.effects()) == ["1", "2"]


# --- commits past the session -----------------------------------------------------------------------


def commit_connection(session: Session) -> None:
    session.connection().commit()


def commit_text(session: Session) -> None:
    session.execute(text("commit"))


def commit_driver_text(session: Session) -> None:
    session.connection().exec_driver_sql("COMMIT")


def define(session: Session) -> None:
    session.execute(text("CREATE TABLE staging (id INT)"))


def define_by_metadata(session: Session) -> None:
    Table("staging", MetaData(), Column("id", Integer)).create(session.connection())


def begin_again(session: Session) -> None:
    session.execute(text("START TRANSACTION"))


PAST_THE_SESSION = [commit_connection, commit_text, commit_driver_text]
IMPLIED = [define, define_by_metadata, begin_again]
CASES = [
    *((name, way) for way in PAST_THE_SESSION for name in ("sqlite", "postgresql", "mariadb")),
    *(("mariadb", way) for way in IMPLIED),
]


@pytest.mark.parametrize(("database", "way"), CASES, indirect=["database"])
def test_once_body_commits_nothing_past_its_session(stand: OutboxStand, way: Callable[[Session], None]) -> None:
    """The statement is refused before it is sent; a body that catches the error commits nothing."""
    for catches in (False, True):

        @stand.task(name=f"work-{catches}", once=True)
        def work(session: Session, catches: bool) -> None:
            session.add(Effect(name="once"))
            session.flush()
            try:
                way(session)
            except OnceCommitError:
                if not catches:
                    raise

        work.apply_async((catches,))
        ended = [stand.deliver(sent) for sent in stand.sent()]

        if catches and way in [*IMPLIED, commit_text, commit_driver_text]:
            # The refused statement was not sent: nothing has happened to the transaction.
            assert ended[0].state == "SUCCESS"
            assert stand.effects() == ["once"]
        else:
            assert ended[0].state == "FAILURE"
            assert catches or isinstance(ended[0].value, OnceCommitError)
            assert stand.effects() == []


@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"], indirect=True)
def test_once_body_that_has_only_read_may_say_commit(stand: OutboxStand) -> None:
    """There is nothing that could be committed twice."""

    @stand.task(name="work", once=True)
    def work(session: Session) -> None:
        session.execute(text("SELECT 1"))
        session.execute(text("commit"))
        session.add(Effect(name="once"))

    work.apply_async()
    [ended] = [stand.deliver(sent) for sent in stand.sent()]

    assert (ended.state, stand.effects()) == ("SUCCESS", ["once"])


async def _key(number: int) -> str:
    return f"n{number}"


def test_coroutine_function_as_key_is_refused(stand: OutboxStand) -> None:
    """When the task is made: its result is no key, and nobody awaits it."""

    @stand.task(name="work", once=_key)
    def work(number: int) -> None: ...

    with pytest.raises(ConfigurationError, match="of task 'work' is neither True nor a plain callable"):
        work.delay(1)
