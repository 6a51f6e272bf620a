"""A queue is declared before a message of the outbox is published as Celery would declare it, by whichever process publishes."""

from __future__ import annotations

from typing import Any

import pytest
from kombu import Exchange, Queue, binding

from celery_alchemy import enqueue
from celery_alchemy.messages.declarations import declared, entity_of
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import outbox as outbox_module
from tests.delivery.outbox_stand import OutboxStand
from tests.services.brokers import Broker
from tests.services.databases import Database


def queues_of(stand: OutboxStand) -> dict[str, Any]:
    """Return what a message may be sent to; each has something that its name does not say."""
    name = stand.prefix
    topic = Exchange(f"{name}-topic", type="topic", durable=False, auto_delete=True)
    direct = Exchange(f"{name}-direct")
    several = [binding(topic, routing_key="a.#"), binding(direct, routing_key="b")]
    return {
        "priorities": Queue(f"{name}-1", queue_arguments={"x-max-priority": 10}),
        "priorities by name": Queue(f"{name}-2", max_priority=5),
        "quorum": Queue(f"{name}-3", queue_arguments={"x-queue-type": "quorum"}),
        "not durable": Queue(f"{name}-4", durable=False, auto_delete=True),
        "short": Queue(f"{name}-5", message_ttl=60.0, max_length=100, expires=600.0),
        "topic": Queue(f"{name}-6", topic, routing_key="a.*"),
        "several": Queue(f"{name}-7", direct, routing_key="c", bindings=several),
        "plain": Queue(f"{name}-8"),
    }


@pytest.mark.parametrize("at_once", [True, False], ids=["handed over", "relayed"])
@pytest.mark.parametrize("number", [1, 3], ids=["alone", "together"])
@pytest.mark.databases("sqlite")
@pytest.mark.brokers("rabbitmq")
def test_queue_of_a_call_is_declared_with_all_that_it_says(
    database: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, number: int, at_once: bool
) -> None:
    """RabbitMQ refuses a second declaration that differs: Celery's own, before and after, sees none."""
    stand = OutboxStand(database, broker)
    stand.app.conf.task_create_missing_queues = True
    try:
        queues = queues_of(stand)
        if not at_once:
            monkeypatch.setattr(outbox_module.Outbox, "hand_over", lambda *args: None)
        for queue in queues.values():
            with stand.alchemy.begin() as session:
                for _ in range(number):
                    enqueue(session, stand.effect.s("sent"), queue=queue)
        monkeypatch.undo()
        stand.make_due()
        stand.relay_all()

        with stand.app.connection_for_read() as connection:
            for queue in queues.values():
                bound = queue(connection.channel())
                bound.declare()
                taken = [bound.get(no_ack=True) for _ in range(number)]
                bound.delete()
                assert None not in taken, queue
        assert stand.outbox() == []
        assert upkeep.dead(stand.alchemy.engine) == []
    finally:
        stand.close()


@pytest.mark.databases("sqlite")
def test_queue_that_the_settings_describe_is_told_by_its_name(stand: OutboxStand) -> None:
    """The process that publishes has the same settings; the row stays small."""
    known = Queue("known", Exchange("known-x", type="topic"), routing_key="k", queue_arguments={"x-max-priority": 3})
    stand.app.conf.task_queues = [known]
    stand.app.amqp.queues = stand.app.amqp.Queues([known])
    made_by_name = stand.app.amqp.queues["by name"]

    assert declared(stand.app, [known, made_by_name]) == (["known", "by name"], [])


@pytest.mark.databases("sqlite")
def test_queue_that_only_this_process_knows_is_told_in_full(stand: OutboxStand) -> None:
    """Added while it runs, or unknown where no queue may be made of a name."""
    added = stand.app.amqp.queues.add(Queue("added", queue_arguments={"x-max-priority": 3}))
    names, in_full = declared(stand.app, [added, Exchange("extra", type="fanout")])

    made = [entity_of(declaration) for declaration in in_full]
    assert names == []
    assert made == [added, Exchange("extra", type="fanout")]
    assert made[0].queue_arguments == {"x-max-priority": 3}


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "options",
    [{"queue": "q"}, {"exchange": Exchange("x", "topic"), "routing_key": "a.b"}],
    ids=["name", "exchange"],
)
def test_row_of_an_ordinary_queue_holds_no_declaration(
    stand: OutboxStand, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name, or an exchange that Celery declares nowhere."""
    monkeypatch.setattr(outbox_module.Outbox, "hand_over", lambda *args: None)
    with stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("sent"), **options)

    [envelope] = stand.outbox("envelope")
    assert '"declare"' not in envelope
