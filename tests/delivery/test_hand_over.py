"""Messages are handed over behind the commit, in groups; what could not be is the relay's at once."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from sqlalchemy import event, text

from celery_alchemy import Alchemy, enqueue
from celery_alchemy.messages import publisher as publisher_module
from celery_alchemy.outbox import hand_over
from celery_alchemy.outbox import outbox as outbox_module
from celery_alchemy.outbox import relay as relay_module
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import OutboxStand, add_effect
from tests.delivery.test_once import start
from tests.waiting import eventually


class Gate:
    """A broker that answers when it is told to.

    Attributes:
        groups: The arguments of the tasks that were published, by groups.
        threads: The names of the threads that published.
    """

    def __init__(self, stand: OutboxStand) -> None:
        assert stand.alchemy.outbox is not None
        self.groups: list[list[Any]] = []
        self.threads: list[str] = []
        self._is_open = threading.Event()
        self._publisher = stand.alchemy.outbox.publisher
        self._publish = self._publisher.publish

    def __enter__(self) -> Gate:  # noqa: PYI034 - Python 3.10 has no Self.
        self._publisher.publish = self._publish_later  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def _publish_later(self, messages: Any, *more: Any) -> Any:
        self.groups.append([json.loads(message.body)[0][0] for message in messages])
        self.threads.append(threading.current_thread().name)
        assert self._is_open.wait(20)
        return self._publish(messages, *more)

    def has_asked(self) -> bool:
        """Tell whether a message is on its way."""
        return bool(self.groups)

    def open(self) -> None:
        """Answer from now on."""
        self._is_open.set()


def commit(stand: OutboxStand, *names: str) -> None:
    """Commit a transaction that sends."""
    with stand.alchemy.begin() as session:
        for name in names:
            enqueue(session, stand.effect.s(name))


@pytest.fixture
def gate(stand: OutboxStand) -> Iterator[Gate]:
    """A broker that does not answer yet."""
    with Gate(stand) as gate:
        yield gate


def test_commit_does_not_wait_for_the_broker(stand: OutboxStand, gate: Gate) -> None:
    """The row is leased to the process, which hands it over when the broker answers."""
    commit(stand, "sent")

    assert not stand.alchemy.drain(0.05)
    assert len(stand.database.rows("SELECT id FROM celery_outbox WHERE claim IS NOT NULL")) == 1
    gate.open()
    assert stand.handed_over()
    assert [sent.args for sent in stand.sent()] == [["sent"]]
    assert stand.outbox() == []


def test_what_commits_leave_meanwhile_goes_out_together_and_in_order(stand: OutboxStand, gate: Gate) -> None:
    """While the broker answers for one message, the next ones gather: one round trip, one settlement."""
    commit(stand, "first")
    eventually(gate.has_asked)
    for number in range(5):
        commit(stand, f"{number} a", f"{number} b")
    gate.open()
    stand.handed_over()

    rest = [f"{number} {part}" for number in range(5) for part in "ab"]
    assert gate.groups == [["first"], rest]
    assert [sent.args[0] for sent in stand.sent()] == ["first", *rest]


def test_drain_tells_of_what_is_left_to_the_relay(stand: OutboxStand) -> None:
    """It says so once: what is handed over since then counts for the next call."""
    with stand.broker_down():
        commit(stand, "late")
        left = stand.alchemy.drain(20)
        since = stand.alchemy.drain(20)

    assert (left, since) == (False, True)


def test_what_does_not_fit_into_memory_is_left_to_the_relay(
    stand: OutboxStand,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broker that hangs costs the process a bounded number of messages, and no message is lost."""
    monkeypatch.setattr(hand_over, "MOST_ROWS", 2)
    commit(stand, "in hand")
    eventually(gate.has_asked)
    with caplog.at_level(logging.WARNING, "celery_alchemy.outbox"):
        for name in ("waits", "too many", "too many as well"):
            commit(stand, name)
    gate.open()
    complete = stand.handed_over()
    stand.make_due()
    stand.relay_all()

    assert not complete
    assert [text for text in caplog.messages if "does not keep up" in text][1:] == []
    assert "2 messages wait for the broker, which does not keep up" in caplog.text
    assert sorted(sent.args[0] for sent in stand.sent()) == sorted(["in hand", "waits", "too many", "too many as well"])


@pytest.mark.databases("postgresql", "mariadb")
def test_hand_over_keeps_its_connection_from_group_to_group(make_stand: MakeStand) -> None:
    """Where the pool has one connection, and a task holds it, the hand-over does not connect each time."""
    stand = make_stand(engine_options={"pool_size": 1, "max_overflow": 4})
    connects: list[object] = []
    event.listen(stand.alchemy.engine, "connect", lambda *args: connects.append(args))
    with stand.alchemy.session() as held:
        held.execute(text("SELECT 1"))
        with Gate(stand) as gate:
            commit(stand, "0")
            eventually(gate.has_asked)
            commit(stand, "1")
        engine: Any = stand.alchemy.engine
        eventually(lambda: engine.pool.checkedout() == 1, what="it gives its connection back")

    assert len(connects) <= 3
    assert len(stand.sent()) == 2


def test_thread_ends_when_there_is_nothing_to_do_and_begins_again(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sends now and then keeps no thread and no connection for it."""
    monkeypatch.setattr(hand_over, "REST_SECONDS", 0.01)
    monkeypatch.setattr(hand_over, "IDLE_SECONDS", 0.01)
    commit(stand, "first")
    assert stand.alchemy.outbox is not None
    thread = stand.alchemy.outbox._thread
    eventually(lambda: not thread._is_running)
    commit(stand, "second")

    assert [sent.args[0] for sent in stand.sent()] == ["first", "second"]


@pytest.mark.databases("sqlite")
def test_database_in_memory_is_settled_by_whoever_commits(stand: OutboxStand) -> None:
    """Another thread would find another database, or take the one connection from the caller."""
    app = Celery("memory", broker="memory://", set_as_current=False)
    alchemy = Alchemy(app, "sqlite://", outbox=True)
    alchemy.create_tables()
    with alchemy.begin() as session:
        enqueue(session, app.task(shared=False, name="effect")(add_effect).s("sent"))

    with alchemy.session() as session:
        assert session.execute(text("SELECT count(*) FROM celery_outbox")).scalar() == 0
    app.close()


def test_message_is_due_at_once_when_its_hand_over_fails(stand: OutboxStand) -> None:
    """The broker is back a second later: nothing waits for the end of a lease that nobody works on."""
    with stand.broker_down(), stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"))

    assert stand.relay_all() == 1
    assert [sent.args for sent in stand.sent()] == [["sent"]]


@pytest.mark.parametrize("once", [False, True])
def test_message_is_due_at_once_while_the_hand_over_pauses(stand: OutboxStand, once: bool) -> None:
    """After one failed publish no caller waits for the broker, and no message for the pause."""

    @stand.task(name="paused", once=once)
    def paused(name: str) -> None: ...

    assert stand.alchemy.outbox is not None
    stand.alchemy.outbox.publisher._paused_until = float("inf")
    with stand.alchemy.begin() as session:
        enqueue(session, paused.s("a"))
        enqueue(session, paused.s("b"))
    stand.relay_all()

    assert sorted(sent.args[0] for sent in stand.sent()) == ["a", "b"]


def test_retry_of_an_owed_task_is_due_at_once_when_its_hand_over_fails(stand: OutboxStand) -> None:
    """Its message stands in the row of the task, which is owed for its own time only after a publish."""

    @stand.task(name="again", once=True, bind=True)
    def again(self: Any) -> None:
        raise self.retry(countdown=0)

    sent = start(stand, again)
    with stand.broker_down():
        stand.deliver(sent)

    assert stand.relay_all() == 1
    assert [retry.headers["retries"] for retry in stand.sent()] == [1]


def test_copy_that_is_given_back_late_takes_no_lease_of_another(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was paused past its lease gives back what is no longer its own: nothing happens."""
    outbox = stand.alchemy.outbox
    assert outbox is not None

    def fail_late(messages: Any, *more: Any) -> list[Exception | None]:
        stand.make_due()
        with stand.alchemy.place.begin(stand.alchemy.engine) as table:
            relay_module.claim_due(table, "relay")
        return [ConnectionError("away") for _ in messages]

    monkeypatch.setattr(outbox.publisher, "publish", fail_late)
    with stand.in_caller(), stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"))

    assert stand.outbox("claim") == ["relay"]


def test_relay_gives_back_what_it_had_no_time_for(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that crawls: what was not tried in the first half of the lease does not wait for the second."""
    clock = [0.0]
    monkeypatch.setattr(publisher_module, "monotonic", lambda: clock[0])
    with monkeypatch.context() as patched:
        patched.setattr(outbox_module.Outbox, "hand_over", lambda *args: None)
        with stand.alchemy.begin() as session:
            for name in ("first", "second"):
                enqueue(session, stand.effect.s(name))
    stand.make_due()
    relay = stand.relay()
    publish_one = relay._publisher._publish_one

    def publish_slowly(*message: Any) -> Any:
        clock[0] += relay_module.LEASE_SECONDS * 0.6
        return publish_one(*message)

    monkeypatch.setattr(relay._publisher, "_publish_one", publish_slowly)
    monkeypatch.setattr(publisher_module, "confirmed_together", lambda *args: set())
    handled = [relay.step(), relay.step()]

    assert handled == [2, 1]
    assert sorted(sent.args[0] for sent in stand.sent()) == ["first", "second"]
