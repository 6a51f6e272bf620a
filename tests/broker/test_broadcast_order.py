"""Broadcasts whose numbers do not come in the order of their commits."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from celery_alchemy.broker.broadcasts import Log, say
from celery_alchemy.broker.claims import has_due
from celery_alchemy.broker.floors import Floors
from celery_alchemy.broker.homes import home_for
from celery_alchemy.broker.queues import Binding, declare
from celery_alchemy.broker.routes import Routes
from celery_alchemy.broker.tables import begun
from celery_alchemy.messages.message import Message
from tests.broker.broker_stand import BrokerStand

READER = Binding("mine", "said", "fanout", "")


def said(exchange: str, **properties: object) -> Message:
    """A broadcast."""
    return Message(
        body=b"{}",
        content_type="application/json",
        content_encoding="utf-8",
        exchange=exchange,
        routing_key="",
        headers={},
        properties=properties,
    )


def test_what_is_said_to_the_first_reader_reaches_it(stand: BrokerStand) -> None:
    """Also right after something that nobody could hear."""
    home = home_for("", stand.app.conf.broker_transport_options)
    routes, log = Routes(home), Log()
    with begun(home.place, home.engine()) as tables:
        log.begin(tables)
        before = routes.of(tables, said("said"))
        declare(tables, Binding("mine", "said", "fanout", "", is_reader=True), 60)
        after = routes.of(tables, said("said"))

    assert (before, after) == (([], False), ([], True))


def test_broadcast_of_priority_9_is_read_first(stand: BrokerStand) -> None:
    """Then the oldest; one whose priority is no number is like one that has none."""
    home, log = home_for("", stand.app.conf.broker_transport_options), Log()
    priorities: list[object] = [3, None, 9, "high", 3]
    with begun(home.place, home.engine()) as tables:
        log.begin(tables)
        say(tables, [said("said", priority=priority, number=number) for number, priority in enumerate(priorities)])
        found = log.read(tables, [READER])

    assert [delivery.payload["properties"]["number"] for delivery, _ in found] == [2, 0, 4, 1, 3]


def test_broadcast_whose_time_is_over_is_not_read(stand: BrokerStand) -> None:
    """Nor does it wake an idle worker."""
    home, log = home_for("", stand.app.conf.broker_transport_options), Log()
    with begun(home.place, home.engine()) as tables:
        log.begin(tables)
        say(tables, [said("said", expiration=0.0)])

        assert has_due(tables, [], log.is_unread(tables, [READER]), Floors()) is False
        assert log.read(tables, [READER]) == []


@pytest.mark.databases("sqlite", "postgresql")
def test_broadcast_that_commits_later_than_a_higher_number_is_seen(stand: BrokerStand) -> None:
    """By the look of an idle worker, which reads only if there is something to read; and it is read once."""
    home, log = home_for("", stand.app.conf.broker_transport_options), Log()
    with begun(home.place, home.engine()) as tables:
        log.begin(tables)
        say(tables, [said("hidden")])
        say(tables, [said("said")])

        seen = log.read(tables, [READER])
        is_new_before = has_due(tables, [], log.is_unread(tables, [READER]), Floors())
        tables.run(update(tables.broadcasts).values(exchange="said"))
        is_new = has_due(tables, [], log.is_unread(tables, [READER]), Floors())
        later = log.read(tables, [READER])

    assert (len(seen), is_new_before, is_new, len(later)) == (1, False, True, 1)
