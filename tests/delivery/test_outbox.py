"""The outbox and the relay: a committed message is published at least once whatever happens, and a bad one is in nobody's way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from celery_alchemy import enqueue
from celery_alchemy.messages import publisher as publisher_module
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import delivery
from celery_alchemy.outbox import outbox as outbox_module
from celery_alchemy.outbox import relay as relay_module
from celery_alchemy.outbox.relay import Relay, RelayThread
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once_endings import seconds_until_due
from tests.waiting import eventually


def leave_behind(stand: OutboxStand, *names: str) -> None:
    """Commit messages that this process does not hand over, and let their leases pass."""
    with stand.broker_down(), stand.alchemy.begin() as session:
        for name in names:
            enqueue(session, stand.effect.s(name))
    stand.make_due()


def names_sent(stand: OutboxStand) -> list[str]:
    return [sent.args[0] for sent in stand.sent()]


# --- the broker is away -----------------------------------------------------------------------------------------------


def test_message_is_kept_while_the_broker_is_down_and_sent_by_the_relay(stand: OutboxStand) -> None:
    """The commit succeeds, the caller gets the id, and the relay sends the message under it, once."""
    with stand.broker_down(), stand.alchemy.begin() as session:
        session.add(Effect(name="written"))
        result = enqueue(session, stand.effect.s("sent"))
    kept = stand.outbox("task_id")
    stand.make_due()
    handled = [stand.relay_all(), stand.relay_all()]

    [sent] = stand.sent()
    assert stand.effects() == ["written"]
    assert kept == [result.id] == [sent.id]
    assert handled == [1, 0]
    assert stand.outbox() == []


def test_id_of_any_length_is_sent_as_it_is(stand: OutboxStand) -> None:
    """The table keeps what fits of it, for people; the sender's commit does not fail for it."""
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"), task_id="x" * 300)

    [sent] = stand.sent()
    assert sent.id == "x" * 300


def test_process_that_dies_after_the_commit_leaves_the_message_to_the_relay(
    stand: OutboxStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between COMMIT and publish nobody is left to hand it over."""

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outbox_module.Outbox, "hand_over", die)
        with pytest.raises(KeyboardInterrupt), stand.alchemy.begin() as session:
            enqueue(session, stand.effect.s("sent"))
    before = stand.relay_all()
    stand.make_due()
    stand.relay_all()

    assert before == 0
    assert names_sent(stand) == ["sent"]


def test_process_that_dies_between_publish_and_settlement_causes_a_copy_with_the_same_id(
    stand: OutboxStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At least once: the copy carries the id by which a once task knows it."""

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(delivery, "settle", die)
        with pytest.raises(KeyboardInterrupt), stand.in_caller(), stand.alchemy.begin() as session:
            enqueue(session, stand.effect.s("sent"))
    stand.make_due()
    stand.relay_all()

    first, copy = stand.sent()
    assert first.id == copy.id
    assert stand.outbox() == []


def test_relay_publishes_in_the_order_in_which_rows_were_written(stand: OutboxStand) -> None:
    """A batch goes out oldest first, whatever order the database returns it in."""
    leave_behind(stand, "0", "1", "2", "3", "4")
    for row_id, body in stand.outbox("id, body"):
        number = json.loads(bytes(body))[0][0]
        stand.database.execute(f"UPDATE celery_outbox SET created_at = '2019-01-0{9 - int(number)} 00:00:00' WHERE id = '{row_id}'")
    stand.relay_all()

    assert names_sent(stand) == ["4", "3", "2", "1", "0"]


def test_broker_that_is_down_does_not_count_against_a_message(stand: OutboxStand) -> None:
    """An outage of a week sets nothing aside: the message is tried again every few seconds."""
    leave_behind(stand, "sent")
    with stand.broker_down():
        for _ in range(relay_module.MAX_FAILURES + 2):
            stand.relay().step()
            stand.make_due()
    dead = upkeep.dead(stand.alchemy.engine)
    stand.relay_all()

    assert dead == []
    assert names_sent(stand) == ["sent"]


def test_relay_goes_on_after_an_outage_of_the_database(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loop waits the outage out and takes up by itself."""
    leave_behind(stand, "sent")
    relay = stand.relay()
    working_engine = relay._engine
    failures: list[int] = []

    def engine() -> Any:
        if len(failures) < 3:
            failures.append(1)
            raise ConnectionError("the database is away")
        return working_engine()

    monkeypatch.setattr(relay, "_engine", engine)
    thread = RelayThread(relay, 0.01)
    thread.start()
    try:
        eventually(lambda: stand.outbox() == [], what="the relay has sent the message")
    finally:
        thread.stop()

    assert len(failures) == 3
    assert names_sent(stand) == ["sent"]


# --- leases and fencing -----------------------------------------------------------------------------------------------


def test_leased_message_is_not_taken_by_another_relay(stand: OutboxStand) -> None:
    """Not while its process is handing it over, not while another relay publishes it."""
    taken: list[int] = []
    leave_behind(stand, "sent")
    working = stand.relay()
    publish = working._publisher.publish

    class Slow:
        paused = False

        def publish(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            taken.append(stand.relay_all())
            return publish(messages)

    working._publisher = Slow()  # type: ignore[assignment]
    working.step()

    assert taken == [0]
    assert names_sent(stand) == ["sent"]


@pytest.mark.parametrize("ends", ["sent", "failed"])
def test_relay_that_was_paused_past_its_lease_settles_nothing(make_stand: MakeStand, ends: str) -> None:
    """The row is another relay's by then: the late one's word, sent or failed, must not touch it."""
    stand = make_stand()
    leave_behind(stand, "sent")
    paused, second_claim = stand.relay(), stand.relay()
    rows: list[Any] = []

    class PausedPast:
        paused = False

        def publish(self, messages: Any, *args: Any, **kwargs: Any) -> list[Exception | None]:
            # While this one sleeps its lease passes and another relay takes the row.
            stand.make_due()
            with stand.alchemy.place.begin(stand.alchemy.engine) as table:
                relay_module.claim_due(table, "second")
            rows.append(stand.outbox("id, claim, failures, sends, error"))
            return [None if ends == "sent" else ValueError("late")] * len(list(messages))

    paused._publisher = PausedPast()  # type: ignore[assignment]
    paused.step()
    after = stand.outbox("id, claim, failures, sends, error")
    stand.make_due()
    second_claim.step()

    assert rows[0] == after
    assert after[0][1] == "second"
    assert names_sent(stand) == ["sent"]
    assert stand.outbox() == []


@pytest.mark.parametrize("once", [False, True])
def test_process_that_was_paused_in_its_hand_over_settles_nothing(
    stand: OutboxStand, monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """The same holds for the process that committed the message, of a plain task and of one that is owed."""

    @stand.task(name="hands over", once=once)
    def hands_over() -> None: ...

    rows: list[Any] = []
    outbox = stand.alchemy.outbox
    assert outbox is not None
    publish = outbox.publisher.publish

    def publish_late(*messages: Any) -> Any:
        answers = publish(*messages)
        stand.make_due()
        with stand.alchemy.place.begin(stand.alchemy.engine) as table:
            relay_module.claim_due(table, "relay")
        rows.append(stand.outbox("claim, due_at, sends"))
        return answers

    monkeypatch.setattr(outbox.publisher, "publish", publish_late)
    with stand.in_caller(), stand.alchemy.begin() as session:
        enqueue(session, hands_over.s())

    assert rows[0][0][0] == "relay"
    assert stand.outbox("claim, due_at, sends") == rows[0]


def test_many_relays_share_the_work(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them at once: each message is published once, nothing is left, nobody fails."""
    monkeypatch.setattr(relay_module, "BATCH_ROWS", 10)
    names = [f"{number}" for number in range(200)]
    leave_behind(stand, *names)

    def work(relay: Relay) -> int:
        handled = 0
        while claimed := relay.step():
            handled += claimed
        return handled

    with ThreadPoolExecutor(4) as pool:
        handled = [future.result(60) for future in [pool.submit(work, stand.relay()) for _ in range(4)]]

    assert sum(handled) == len(names)
    assert sorted(names_sent(stand)) == sorted(names)
    assert stand.outbox() == []


# SQLite has one writer at a time.
@pytest.mark.databases("postgresql", "mariadb")
def test_relay_does_not_wait_for_a_transaction_that_is_under_way(stand: OutboxStand) -> None:
    """A producer's open transaction holds neither the relay nor its messages up."""
    leave_behind(stand, "committed")
    with stand.alchemy.session() as session:
        enqueue(session, stand.effect.s("open"))
        session.flush()
        session.execute(text("INSERT INTO effect (name) VALUES ('open')"))
        handled = stand.relay_all()
        session.rollback()

    assert handled == 1
    assert names_sent(stand) == ["committed"]


def test_relay_tries_no_message_when_its_lease_is_nearly_over(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that takes its time for each message: another relay would publish the rest at the same time."""
    clock = [0.0]
    monkeypatch.setattr(publisher_module, "monotonic", lambda: clock[0])
    leave_behind(stand, "first", "second", "third")
    relay = stand.relay()
    publish_one = relay._publisher._publish_one

    def publish_slowly(*message: Any) -> Any:
        clock[0] += relay_module.LEASE_SECONDS * 0.6
        return publish_one(*message)

    monkeypatch.setattr(relay._publisher, "_publish_one", publish_slowly)
    relay.step()

    assert len(names_sent(stand)) == 1
    assert len(stand.outbox()) == 2


@pytest.mark.databases("postgresql", "mariadb")
def test_relay_passes_by_a_row_that_somebody_has_locked(stand: OutboxStand) -> None:
    """A process that was paused in the middle of a row's change, or another relay, holds no other row up."""
    leave_behind(stand, "locked")
    [locked] = stand.outbox("id")
    leave_behind(stand, "free")
    with stand.database.engine.begin() as connection, ThreadPoolExecutor(1) as pool:
        connection.execute(text("SELECT id FROM celery_outbox WHERE id = :id FOR UPDATE"), {"id": locked})
        handled = pool.submit(stand.relay_all)
        try:
            done = handled.result(20)
        finally:
            connection.rollback()

    assert done == 1
    assert names_sent(stand) == ["free"]


# --- bad messages -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the broker refuse every message with some word in it, the others not."""

    def refuse(word: str) -> None:
        send = publisher_module.send

        def send_unless(app: Any, producer: Any, message: Any, **how: Any) -> None:
            if word.encode() in message.body:
                raise ValueError("the broker refuses it")
            send(app, producer, message, **how)

        monkeypatch.setattr(publisher_module, "send", send_unless)

    return refuse


def test_poison_message_is_set_aside_and_the_others_go_on(stand: OutboxStand, refuse: Callable[[str], None]) -> None:
    """After bounded attempts, with its error; neighbours in its batch are published at once."""
    leave_behind(stand, "first", "poison", "last")
    refuse("poison")

    stand.relay_all()
    at_once = sorted(names_sent(stand))
    attempts = 1
    while not upkeep.dead(stand.alchemy.engine):
        stand.make_due()
        attempts += stand.relay_all()

    [dead] = upkeep.dead(stand.alchemy.engine)
    assert at_once == ["first", "last"]
    assert attempts == relay_module.MAX_FAILURES
    assert "the broker refuses it" in dead["error"]
    assert names_sent(stand) == []


def test_attempts_are_put_off_longer_each_time(stand: OutboxStand, refuse: Callable[[str], None]) -> None:
    """Back-off by the database's clock, bounded."""
    leave_behind(stand, "poison")
    refuse("poison")
    waits: list[int] = []
    for _ in range(relay_module.MAX_FAILURES - 1):
        stand.relay_all()
        waits.append(round(seconds_until_due(stand)))
        stand.make_due()

    assert waits == sorted(waits)
    assert waits[1] > 1.5 * waits[0] > 0
    assert max(waits) <= relay_module.BACKOFF_MAX_SECONDS


def test_revived_poison_message_is_sent_when_the_broker_takes_it(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reviving gives it all its attempts again."""
    leave_behind(stand, "poison")
    stand.database.execute("UPDATE celery_outbox SET died_at = due_at, due_at = NULL, failures = 10, error = 'x'")

    assert stand.relay_all() == 0
    assert upkeep.revive(stand.alchemy.engine) == 1
    assert stand.relay_all() == 1
    assert names_sent(stand) == ["poison"]


CORRUPT = {
    "not JSON": "{",
    "empty": "",
    "a list": "[]",
    "a text": '"x"',
    "nothing in it": "{}",
    "only what has its own column": '{"body": "x"}',
    "wrong types": json.dumps(
        {
            "content_type": 1,
            "content_encoding": None,
            "exchange": {},
            "routing_key": [],
            "queues": [1],
            "headers": "h",
            "properties": "p",
        }
    ),
    "headers are a list": json.dumps(
        {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "exchange": "",
            "routing_key": "q",
            "queues": [],
            "headers": [],
            "properties": {},
        }
    ),
}


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("envelope", CORRUPT.values(), ids=CORRUPT.keys())
def test_corrupt_row_is_set_aside_and_the_others_go_on(stand: OutboxStand, envelope: str) -> None:
    """It is reported, and it can be looked at."""
    leave_behind(stand, "first", "corrupt", "last")
    [corrupt_id] = [row[0] for row in stand.outbox("id, body") if b"corrupt" in bytes(row[1])]
    stand.database.execute("UPDATE celery_outbox SET envelope = :e WHERE id = :id", e=envelope, id=corrupt_id)

    stand.relay_all()

    assert sorted(names_sent(stand)) == ["first", "last"]
    assert [(row["id"], "cannot be read" in row["error"]) for row in upkeep.dead(stand.alchemy.engine)] == [(corrupt_id, True)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("body = NULL", "no body"),
        ("once = true, redeliver_seconds = NULL", "no redeliver_seconds"),
    ],
)
def test_row_with_a_hole_is_set_aside_and_the_others_go_on(stand: OutboxStand, change: str, says: str) -> None:
    """A column that is empty where it must not be: found before anything is published, on every database."""
    leave_behind(stand, "first", "corrupt", "last")
    [corrupt_id] = [row[0] for row in stand.outbox("id, body") if b"corrupt" in bytes(row[1])]
    stand.database.execute(f"UPDATE celery_outbox SET {change} WHERE id = :id", id=corrupt_id)

    stand.relay_all()

    assert sorted(names_sent(stand)) == ["first", "last"]
    assert [(row["id"], says in row["error"]) for row in upkeep.dead(stand.alchemy.engine)] == [(corrupt_id, True)]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("change", "is_dead"),
    [("created_at = 'yesterday'", False), ("sends = 'many'", True), ("once = true, redeliver_seconds = 'soon'", True)],
)
def test_row_with_nonsense_in_a_column_holds_no_other_up(stand: OutboxStand, change: str, is_dead: bool) -> None:
    """SQLite keeps whatever is written into a column: what the relay needs is checked row by row, and the others go out."""
    leave_behind(stand, "first", "corrupt", "last")
    [corrupt_id] = [row[0] for row in stand.outbox("id, body") if b"corrupt" in bytes(row[1])]
    stand.database.execute(f"UPDATE celery_outbox SET {change} WHERE id = :id", id=corrupt_id)

    stand.relay_all()

    assert sorted(names_sent(stand)) == (["first", "last"] if is_dead else ["corrupt", "first", "last"])
    assert [row["id"] for row in upkeep.dead(stand.alchemy.engine)] == ([corrupt_id] if is_dead else [])


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "change",
    [
        {"queues": ["no-such-queue"]},
        {"properties": {"producer": "x", "declare": ["x"], "serializer": "pickle"}},
        {"properties": {"priority": "high"}},
        {"exchange": "no-such-exchange"},
    ],
    ids=str,
)
def test_row_that_the_broker_cannot_take_harms_nobody_else(stand: OutboxStand, change: dict[str, Any]) -> None:
    """Whatever is wrong with its routing or properties: the neighbours go out, the relay lives."""
    leave_behind(stand, "first", "strange", "last")
    [(strange_id, envelope)] = [row[:2] for row in stand.outbox("id, envelope, body") if b"strange" in bytes(row[2])]
    changed = {**json.loads(envelope), **change}
    stand.database.execute("UPDATE celery_outbox SET envelope = :e WHERE id = :id", e=json.dumps(changed), id=strange_id)

    for _ in range(relay_module.MAX_FAILURES + 1):
        stand.relay_all()
        stand.make_due()

    assert {"first", "last"} <= set(names_sent(stand))
    assert [row[0] for row in stand.outbox("id, died_at")] in ([], [strange_id])


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "uuid", "__value__": {"hex": "zz"}},
        {"__type__": "os.system", "__value__": "touch /tmp/celery-alchemy-was-here"},
        {"py/object": "os.system"},
        {"__reduce__": ["os.system", ["id"]]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_untrusted_row_makes_the_relay_import_and_run_nothing(
    stand: OutboxStand, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are data: the body is not looked at, the envelope is plain JSON."""
    leave_behind(stand, "first")
    [envelope] = stand.outbox("envelope")
    changed = json.loads(envelope)
    changed["headers"]["strange"] = value
    body = b"cos\nsystem\n(S'exit 1'\ntR."
    with stand.database.engine.begin() as connection:
        connection.execute(text("UPDATE celery_outbox SET envelope = :e, body = :b"), {"e": json.dumps(changed), "b": body})
    imported: list[str] = []
    importing = __import__

    def watch(name: str, *args: Any, **kwargs: Any) -> Any:
        imported.append(name)
        return importing(name, *args, **kwargs)

    monkeypatch.setattr("os.system", lambda command: imported.append(f"os.system({command})"))
    with monkeypatch.context() as patched:
        patched.setattr("builtins.__import__", watch)
        stand.relay_all()

    assert not [name for name in imported if "system" in name or name.startswith(stand.prefix)]
    assert len(stand.outbox("died_at")) + len(stand.sent()) == 1


@pytest.mark.databases("sqlite")
def test_relay_needs_none_of_the_users_tasks(stand: OutboxStand) -> None:
    """A relay of an app that knows no task at all sends the rows as they are."""
    leave_behind(stand, "sent")
    stand.app.tasks.pop("effect")

    stand.relay_all()

    assert names_sent(stand) == ["sent"]


# --- the clock --------------------------------------------------------------------------------------------------------


def test_leases_are_told_by_the_database_and_not_by_this_machine(stand: OutboxStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a year ahead takes nothing early and leases nothing for a year."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 365 * 86400)
    monkeypatch.setattr(outbox_module.Outbox, "hand_over", lambda *args: None)
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"))
    early = stand.relay_all()

    assert early == 0
    assert 0 < seconds_until_due(stand) <= outbox_module.LEASE_SECONDS
