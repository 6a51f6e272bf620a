"""Whatever stands in a row of the outbox: it is set aside with its error, and its neighbours are sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from celery_alchemy import enqueue
from celery_alchemy.messages.message import Message
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import outbox as outbox_module
from celery_alchemy.outbox import relay as relay_module
from tests.collecting import without_collector
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import OutboxStand
from tests.services.brokers import Broker
from tests.services.databases import Database

_PLAIN = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "exchange": "",
    "routing_key": "",
    "queues": [],
    "headers": {},
    "properties": {},
}


def keep(stand: OutboxStand, *names: str) -> dict[str, str]:
    """Commit messages that nobody has handed over; return the ids of their rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outbox_module.Outbox, "hand_over", lambda *args: None)
        with stand.alchemy.begin() as session:
            for name in names:
                enqueue(session, stand.effect.s(name))
    stand.make_due()
    return {json.loads(bytes(body))[0][0]: row_id for row_id, body in stand.outbox("id, body") if b"strange" not in bytes(body)}


def broken(stand: OutboxStand, **changes: Any) -> None:
    """Put a row between two good ones, with other columns or parts of its envelope."""
    rows = keep(stand, "first", "broken", "last")
    columns = {name: changes.pop(name) for name in list(changes) if name not in {*_PLAIN, "declare", "envelope_text"}}
    envelope = changes.pop("envelope_text", None)
    if envelope is None:
        [kept] = [row[1] for row in stand.outbox("id, envelope") if row[0] == rows["broken"]]
        envelope = json.dumps({**json.loads(kept), **changes})
    columns["envelope"] = envelope
    assignments = ", ".join(f"{name} = :{name}" for name in columns)
    stand.database.execute(f"UPDATE celery_outbox SET {assignments} WHERE id = :row", row=rows["broken"], **columns)


def relay_for_long(stand: OutboxStand) -> None:
    """Let a relay handle everything until nothing is left that could be tried again."""
    for _ in range(relay_module.MAX_FAILURES + 1):
        stand.relay_all()
        stand.make_due()


def names_sent(stand: OutboxStand) -> set[str]:
    return {sent.args[0] for sent in stand.sent()}


def _strange_queue(name: str) -> dict[str, Any]:
    """Return a queue whose binding has a part of that name, which the error names."""
    return {"entity": "queue", "name": "q", "bindings": [{name: 1}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"queues": None},
        {"queues": "celery"},
        {"queues": 5},
        {"declare": None},
        {"declare": [{"entity": "queue"}]},
        {"declare": [_strange_queue("a\0b")]},
        {"declare": [_strange_queue("a\ud800b")]},
        {"envelope_text": "[" * 100_000},
        {"once": True, "redeliver_seconds": 2_000_000_000, "sends": 2_000_000_000},
        {"once": True, "redeliver_seconds": -5},
    ],
    ids=lambda changes: "-".join(f"{name}={str(value)[:20]!r}" for name, value in changes.items()),
)
def test_row_that_cannot_be_read_is_set_aside_alone(stand: OutboxStand, changes: dict[str, Any]) -> None:
    """Its error is kept in a form that the database takes, and no relay stops for it."""
    readable = changes.get("sends") is not None
    broken(stand, **changes)

    with without_collector():
        stand.relay_all()

    assert names_sent(stand) - {"broken"} == {"first", "last"}
    assert len(upkeep.dead(stand.alchemy.engine)) == (0 if readable else 1)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "\0" * 20_000], ids=["nul", "half a surrogate", "long"])
def test_error_text_that_no_database_takes_stops_no_relay(stand: OutboxStand, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the broker's client says of a message may hold anything."""
    keep(stand, "first", "poison", "last")
    publish_one = stand.relay()._publisher._publish_one

    def refuse(producer: Any, message: Message) -> Exception | None:
        return ValueError(text) if b"poison" in message.body else publish_one(producer, message)

    monkeypatch.setattr("celery_alchemy.messages.publisher.confirmed_together", lambda *args: set())
    monkeypatch.setattr("celery_alchemy.messages.publisher.Publisher._publish_one", lambda self, *args: refuse(*args))
    relay_for_long(stand)

    [dead] = upkeep.dead(stand.alchemy.engine)
    assert names_sent(stand) == {"first", "last"}
    assert "ValueError" in dead["error"]


def test_id_that_no_database_takes_fails_no_commit(stand: OutboxStand) -> None:
    """The column is for people; the message carries the id as it is."""
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"), task_id="a\0b")

    [sent] = stand.sent()
    assert sent.id == "a\0b"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
_HEADERS = st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "task", "eta", "expires", "timelimit", "strange"), _JSON))
_PROPERTIES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("priority", "expiration", "delivery_mode", "reply_to", "correlation_id", "declare"), _JSON)
)
_CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": _JSON,
        "content_encoding": _JSON,
        "exchange": _JSON,
        "routing_key": _JSON,
        "queues": _JSON,
        "declare": _JSON,
        "headers": _HEADERS | _JSON,
        "properties": _PROPERTIES | _JSON,
        "sends": st.integers(-(2**31), 2**31 - 1),
        "failures": st.integers(-(2**31), 2**31 - 1),
        "redeliver_seconds": st.integers(-(2**31), 2**31 - 1) | st.none(),
        "once": st.booleans(),
        "body": st.binary(max_size=20) | st.none(),
        "envelope_text": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    },
)


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.brokers("redis", "rabbitmq")
def test_no_row_stops_its_neighbours(database: Database, broker: Broker) -> None:
    """Random rows among good ones, on a real broker: the good ones are sent, the relay never raises."""
    stand = OutboxStand(database, broker)
    good: list[str] = []

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changes=_CHANGES)
    @example(changes={"routing_key": "x" * 300})
    @example(changes={"properties": {"priority": 999}})
    @example(changes={"properties": {"delivery_mode": 77}})
    @example(changes={"properties": {"expiration": -1}})
    @example(changes={"headers": {"strange": 2**70}})
    @example(changes={"exchange": "no-such-exchange"})
    @example(changes={"content_type": "x" * 300})
    def check(changes: dict[str, Any]) -> None:
        stand.database.execute("DELETE FROM celery_outbox")
        broken(stand, **changes)
        stand.relay_all()
        good.extend(name for sent in stand.sent() if sent.body.startswith(b'[["') for name in [sent.args[0]])
        assert {"first", "last"} <= set(good), changes
        good.clear()

    try:
        check()
    finally:
        stand.close()


def test_relay_goes_on_to_the_others_when_one_message_ends_the_connection(
    make_stand: MakeStand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that hangs up on one message is there for the next: the one is set aside in the end, none waits for it."""
    stand = make_stand()
    keep(stand, "first", "poison", "last")
    send = relay_module.Publisher._publish_one

    def hang_up(self: Any, producer: Any, message: Message) -> Exception | None:
        if b"poison" in message.body:
            raise ConnectionResetError("the broker has hung up")
        return send(self, producer, message)

    monkeypatch.setattr("celery_alchemy.messages.publisher.confirmed_together", lambda *args: set())
    monkeypatch.setattr(relay_module.Publisher, "_publish_one", hang_up)
    stand.relay_all()
    at_once = names_sent(stand)
    while not upkeep.dead(stand.alchemy.engine):
        keep(stand, "another")
        stand.relay_all()

    assert at_once == {"first", "last"}
    assert ["hung up" in row["error"] for row in upkeep.dead(stand.alchemy.engine)] == [True]
