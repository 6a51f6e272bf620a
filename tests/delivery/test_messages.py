"""What is sent on commit is, byte for byte but for ids, what Celery itself would have sent at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import chain, chord, group
from celery.signals import before_task_publish
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import OutboxStand
from tests.stand import Sent

pytestmark = pytest.mark.databases("sqlite")

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
TOMORROW = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=1)
Make = Callable[[Any], Any]


@pytest.fixture(params=[True, False], ids=["outbox", "direct"])
def stand(request: pytest.FixtureRequest, make_stand: MakeStand) -> OutboxStand:
    """A stand, once with and once without the outbox."""
    return make_stand(outbox=request.param)


SIGNATURES: dict[str, tuple[Make, dict[str, Any]]] = {
    "task": (lambda e: e.s("a"), {}),
    "kwargs": (lambda e: e.s(name="é"), {}),
    "immutable": (lambda e: e.si("a"), {}),
    "eta and expires": (lambda e: e.s("a"), {"eta": TOMORROW, "expires": TOMORROW + timedelta(hours=1)}),
    "priority": (lambda e: e.s("a"), {"priority": 7}),
    "queue": (lambda e: e.s("a"), {"queue": "other"}),
    "headers": (lambda e: e.s("a"), {"headers": {"tenant": "acme", "traceparent": "00-1-2-01"}}),
    "limits": (lambda e: e.s("a"), {"time_limit": 9, "soft_time_limit": 8}),
    "shadow, ignored result": (lambda e: e.s("a"), {"shadow": "nick", "ignore_result": True}),
    "argsrepr": (lambda e: e.s("a"), {"argsrepr": "(hidden)", "kwargsrepr": "{hidden}"}),
    "yaml": (lambda e: e.s("a"), {"serializer": "yaml"}),
    "compressed": (lambda e: e.s("a" * 500), {"compression": "zlib"}),
    "options in the signature": (lambda e: e.s("a").set(priority=3, headers={"x": "y"}), {}),
    "link": (lambda e: e.s("a"), {"link": "effect", "link_error": "effect"}),
    "chain": (lambda e: chain(e.s("a"), e.si("b"), e.si("c").set(priority=2)), {}),
    "chain with options": (lambda e: chain(e.s("a"), e.si("b")), {"priority": 4, "headers": {"x": "y"}}),
    "group": (lambda e: group(e.s("a"), e.s("b")), {}),
    "group of chains": (lambda e: group(chain(e.s("a"), e.si("b")), e.s("c")), {}),
    "chord": (lambda e: chord([e.s("a"), e.s("b")], e.si("done")), {}),
    "chain into a chord": (lambda e: chain(e.s("a"), group(e.si("b"), e.si("c")), e.si("done")), {}),
    "stamps": (lambda e: stamped(chain(e.s("a"), e.si("b"))), {}),
}


def stamped(signature: Any) -> Any:
    signature.stamp(trace="t-1")
    return signature


def options_of(stand: OutboxStand, options: dict[str, Any]) -> dict[str, Any]:
    links: dict[str, Any] = {name: stand.effect.si(name) for name in ("link", "link_error") if name in options}
    return {**options, **links}


@pytest.mark.parametrize("name", SIGNATURES)
def test_message_is_the_one_that_celery_would_send(stand: OutboxStand, name: str) -> None:
    """Every signature, every option: the same queue, body, headers and properties."""
    stand.app.conf.accept_content = ["json", "yaml"]
    make, options = SIGNATURES[name]
    queue = options.get("queue")
    make(stand.effect).apply_async(**options_of(stand, options))
    expected = [comparable(sent) for sent in stand.sent(queue)]

    with stand.alchemy.begin() as session:
        enqueue(session, make(stand.effect), **options_of(stand, options))
    found = [comparable(sent) for sent in stand.sent(queue)]

    assert expected != []
    assert found == expected


def comparable(sent: Sent) -> dict[str, Any]:
    """Return a message with its ids, which differ from message to message, taken out."""
    properties = {key: value for key, value in sent.properties.items() if key not in {"delivery_tag", "correlation_id"}}
    # The time to live is what is left of it at the publish: a few milliseconds less for the second.
    properties["expiration"] = "expiration" in properties
    return {
        "content": without_ids(sent.content()),
        "type": (sent.content_type, sent.content_encoding),
        "routing": sent.routing,
        "headers": without_ids(sent.headers),
        "properties": without_ids(properties),
    }


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        # Callbacks get their ids when the message is made, and not when they are sent; see below.
        return {key: without_ids(item) for key, item in value.items() if key != "task_id"}
    if isinstance(value, (list, tuple)):
        return [without_ids(item) for item in value]
    return UUID.sub("<id>", value) if isinstance(value, str) else value


def test_every_task_of_a_canvas_has_its_id_when_it_is_enqueued(stand: OutboxStand) -> None:
    """A parent that is delivered twice sends its callbacks, and its chain, under the same ids both times."""
    effect = stand.effect
    canvas = chain(
        effect.si("a").set(link=effect.si("linked"), link_error=effect.si("failed")),
        group(effect.si("b"), chain(effect.si("c"), effect.si("d"))),
        effect.si("done"),
    )
    with stand.alchemy.begin() as session:
        result = enqueue(session, canvas)
    [first] = stand.sent()

    embedded = first.content()[2]
    tasks = [task for name in ("callbacks", "errbacks", "chain") for task in every_task(embedded[name])]
    stand.deliver(first)
    children = {sent.id for sent in stand.sent()}
    stand.deliver(first)
    again = {sent.id for sent in stand.sent()}

    assert [task["options"].get("task_id") is not None for task in tasks] == [True] * len(tasks)
    assert len(tasks) == 6
    assert children == again
    assert result.id in {task["options"]["task_id"] for task in tasks}


def every_task(value: Any) -> list[dict[str, Any]]:
    """Return the plain tasks in a serialised canvas, at any depth."""
    if isinstance(value, (list, tuple)):
        return [task for item in value for task in every_task(item)]
    if not isinstance(value, dict):
        return []
    if "task" in value and value.get("subtask_type") is None:
        return [value]
    return every_task(list((value.get("kwargs") or {}).values()))


def test_result_of_a_group_knows_its_members(stand: OutboxStand) -> None:
    """The ids that the caller gets are those of the messages."""
    with stand.alchemy.begin() as session:
        result: Any = enqueue(session, group(stand.effect.s("a"), stand.effect.s("b")))

    assert [sent.id for sent in stand.sent()] == [member.id for member in result.results]


def test_chosen_task_id_is_kept(stand: OutboxStand) -> None:
    """task_id= is the caller's word."""
    with stand.alchemy.begin():
        result = stand.effect.apply_async_on_commit(("a",), task_id="order-7")

    assert result.id == "order-7"
    assert [sent.id for sent in stand.sent()] == ["order-7"]


def test_countdown_and_expires_count_from_the_enqueue(make_stand: MakeStand) -> None:
    """A message that the relay sends late starts and expires when the caller meant it to."""
    stand = make_stand()
    before = datetime.now(timezone.utc)
    with stand.broker_down(), stand.alchemy.begin():
        stand.effect.apply_async_on_commit(("a",), countdown=600, expires=1200)
    after = datetime.now(timezone.utc)
    written = stand.outbox("envelope")
    stand.make_due()
    stand.relay_all()

    [sent] = stand.sent()
    assert 1_190_000 < int(sent.properties["expiration"]) <= 1_200_000
    for header, seconds in (("eta", 600), ("expires", 1200)):
        moment = datetime.fromisoformat(sent.headers[header])
        assert before + timedelta(seconds=seconds) <= moment <= after + timedelta(seconds=seconds)
        assert sent.headers[header] in written[0]


def test_time_to_live_in_the_broker_is_what_is_left_of_it(make_stand: MakeStand) -> None:
    """A broker counts from the publish: told the whole time, it would keep a late message for too long."""
    stand = make_stand()
    with stand.broker_down(), stand.alchemy.begin():
        stand.effect.apply_async_on_commit(("a",), expires=datetime.now(timezone.utc) + timedelta(seconds=1200))
    # As if it had been written 1000 seconds ago.
    [envelope] = stand.outbox("envelope")
    earlier = json.loads(envelope)
    earlier["headers"]["expires"] = (datetime.now(timezone.utc) + timedelta(seconds=200)).isoformat()
    stand.database.execute("UPDATE celery_outbox SET envelope = :text", text=json.dumps(earlier))
    stand.make_due()
    stand.relay_all()

    [sent] = stand.sent()
    assert 190_000 < int(sent.properties["expiration"]) <= 200_000


def test_row_of_a_newer_version_is_sent(make_stand: MakeStand) -> None:
    """While workers are replaced one after another, those of before read what the new ones have written."""
    stand = make_stand()
    with stand.broker_down(), stand.alchemy.begin():
        stand.effect.delay_on_commit("a")
    [envelope] = stand.outbox("envelope")
    newer = {**json.loads(envelope), "said_since": {"some": "version"}}
    stand.database.execute("UPDATE celery_outbox SET envelope = :text", text=json.dumps(newer))
    stand.make_due()
    stand.relay_all()

    [sent] = stand.sent()
    assert sent.args == ["a"]


def test_expired_message_still_reaches_a_worker(make_stand: MakeStand) -> None:
    """A worker reports it as revoked, as Celery does; thrown away by the broker it would be pending for ever."""
    stand = make_stand()
    with stand.alchemy.begin():
        stand.effect.apply_async_on_commit(("a",), expires=datetime.now(timezone.utc) - timedelta(seconds=5))

    [sent] = stand.sent()
    assert "expiration" not in sent.properties
    assert datetime.fromisoformat(sent.headers["expires"]) < datetime.now(timezone.utc)


def test_publish_signal_runs_in_the_caller_and_changes_what_is_sent(stand: OutboxStand) -> None:
    """Tracing libraries add their headers in before_task_publish: it must run where the caller's context is."""

    def trace(headers: dict[str, Any] | None = None, **rest: object) -> None:
        assert headers is not None
        headers["traceparent"] = "00-abc"

    with stand.alchemy.begin():
        before_task_publish.connect(trace)
        stand.effect.delay_on_commit("a")
        before_task_publish.disconnect(trace)

    assert [sent.headers["traceparent"] for sent in stand.sent()] == ["00-abc"]


def test_chain_chord_and_links_run_to_their_ends(stand: OutboxStand) -> None:
    """What was sent on commit is not only alike but works: every task of the canvas runs, in its order."""
    effect = stand.effect
    with stand.alchemy.begin() as session:
        enqueue(session, chain(effect.si("a"), group(effect.si("b"), effect.si("c")), effect.si("done")))
        enqueue(session, effect.si("x"), link=effect.si("linked"))
    stand.run_all()

    effects = stand.effects()
    assert sorted(effects) == ["a", "b", "c", "done", "linked", "x"]
    assert effects.index("a") < effects.index("b") < effects.index("done")
    assert effects.index("x") < effects.index("linked")


def test_delivery_mode_and_expiration_reach_the_broker_as_they_were(stand: OutboxStand) -> None:
    """AMQP properties that a caller names are kept in the outbox too."""
    with stand.alchemy.begin():
        stand.effect.apply_async_on_commit(("a",), delivery_mode=1, reply_to="answers")

    [sent] = stand.sent()
    assert (sent.properties["delivery_mode"], sent.properties["reply_to"]) == (1, "answers")


def test_message_does_not_change_after_the_call(stand: OutboxStand) -> None:
    """Arguments are serialised at the call: what the caller does to them before the commit is too late."""
    names = ["early"]

    @stand.task(name="take")
    def take(session: Session, names: list[str]) -> None:
        raise NotImplementedError

    with stand.alchemy.begin():
        take.delay_on_commit(names)
        names.append("late")

    assert [sent.args for sent in stand.sent()] == [[["early"]]]
