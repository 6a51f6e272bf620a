"""Messages through kombu arrive as they were sent, in order, and end as their consumer says."""

from __future__ import annotations

import threading
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from kombu.asynchronous import Hub
from kombu.exceptions import ChannelError
from sqlalchemy import create_engine

from celery_alchemy import ClaimsLostError, MissingTableError, QueueNameError
from celery_alchemy.broker import heart
from celery_alchemy.broker.claims import has_due, take
from celery_alchemy.broker.floors import Floors
from celery_alchemy.broker.tables import begun
from celery_alchemy.databases.tables import metadata
from celery_alchemy.outbox.place import Place
from tests.broker.lines import Line, OpenLine
from tests.services.databases import Database
from tests.waiting import eventually

STRANGE_NAMES = ["q" * 300, 'it\'s "quoted" `and` %s :name', "Übung.日本"]


def rows(database: Database, columns: str = "id") -> list[tuple[Any, ...]]:
    return database.rows(f"SELECT {columns} FROM celery_outbox")


def gone(database: Database) -> None:
    eventually(lambda: rows(database) == [], what="no message is left")


def test_message_arrives_as_it_was_sent(line: Line) -> None:
    """Body, headers, content type, priority and properties come through."""
    line.send("jobs", {"answer": 42}, headers={"trace": "é"}, priority=7, reply_to="there", correlation_id="c1")

    message = line.take("jobs")

    assert message.payload == {"answer": 42}
    assert message.headers["trace"] == "é"
    assert message.content_type == "application/json"
    assert message.properties["priority"] == 7
    assert (message.properties["reply_to"], message.properties["correlation_id"]) == ("there", "c1")
    assert message.delivery_info["redelivered"] is False


def test_highest_priority_comes_first_then_the_oldest(line: Line) -> None:
    """Nine is the highest, as on RabbitMQ; a message that says nothing has the lowest."""
    for number, priority in enumerate([0, 9, 5, None, 9, 12, -3]):
        line.send("jobs", number, priority=priority)

    taken = [line.take("jobs", no_ack=True).payload for _ in range(7)]

    assert taken[:4] == [1, 4, 5, 2]
    assert sorted(taken[4:]) == [0, 3, 6]


def test_priorities_count_over_all_queues_of_a_consumer(line: Line) -> None:
    """An important message is not behind unimportant ones of another queue."""
    for queue in "ab":
        for priority in (0, 9):
            line.send(queue, f"{queue}{priority}", priority=priority)

    with line.consuming(Queue("a"), Queue("b"), prefetch=1) as heard:
        for count in range(1, 5):
            heard.wait_for(count)[-1].ack()

    assert sorted(message.payload for message in heard.messages[:2]) == ["a9", "b9"]


def test_worker_may_have_a_hundred_queues(line: Line) -> None:
    """It waits for what is sent, and the highest priority comes first from wherever it is."""
    queues = [Queue(f"q{number}") for number in range(120)]

    with line.consuming(*queues) as heard:
        heard.drain(0.5)
        line.send("q3", "first")
        heard.wait_for(1)
        heard.messages.pop().ack()
    for number, priority in ((1, 0), (119, 9), (60, 5)):
        line.send(f"q{number}", number, priority=priority)
    with line.consuming(*queues, prefetch=1) as heard:
        for count in range(1, 4):
            heard.wait_for(count)[-1].ack()

    assert [message.payload for message in heard.messages] == [119, 60, 1]


def test_many_queues_are_read_past_a_map_of_schemas(database: Database) -> None:
    """What an application's engine translates for its own tables is not for the broker's."""
    metadata.create_all(database.engine)
    engine = create_engine(database.url).execution_options(schema_translate_map={None: "nowhere", "main": "nowhere"})
    queues = [f"q{number}" for number in range(60)]

    with begun(Place(), engine) as tables:
        found = take(tables, "worker", queues, 10, Floors()), has_due(tables, queues, None, Floors())
    engine.dispose()

    assert found == ([], False)


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_queue_may_have_any_name(line: Line, name: str) -> None:
    """Long ones, quotes and characters of all languages."""
    line.send(name, "x")

    assert line.take(name, no_ack=True).payload == "x"
    assert line.take("other") is None


def test_name_that_cannot_be_kept_is_refused(line: Line) -> None:
    """The sender is told the limit, and nothing is cut."""
    with pytest.raises(QueueNameError, match="501 characters of at most 500"):
        line.send("q" * 501, "x")


def test_acknowledged_message_is_gone(line: Line, database: Database) -> None:
    """Its row is deleted."""
    line.send("jobs")
    line.take("jobs").ack()

    gone(database)


def test_message_that_is_put_back_comes_again_and_says_so(line: Line) -> None:
    """A consumer that requeues sees it again, marked as delivered before."""
    line.send("jobs", "again")
    line.take("jobs").requeue()

    message = eventually(lambda: line.take("jobs"))

    assert message.payload == "again"
    assert message.delivery_info["redelivered"] is True


def test_rejected_message_is_gone(line: Line, database: Database) -> None:
    """There is no dead letter queue unless one is asked for."""
    line.send("jobs")
    line.take("jobs").reject()

    gone(database)


def test_closed_connection_leaves_its_messages_to_others(open_line: OpenLine) -> None:
    """Nobody waits for the worker to count as lost that says goodbye."""
    first, second = open_line(), open_line()
    first.send("jobs", 1)
    first.send("jobs", 2)
    with first.consuming(Queue("jobs"), prefetch=2) as heard:
        heard.wait_for(2)
        first.connection.release()

    taken = [second.take("jobs", no_ack=True) for _ in range(2)]

    assert sorted(message.payload for message in taken) == [1, 2]
    assert all(message.delivery_info["redelivered"] for message in taken)


def test_consumer_gets_no_more_than_its_limit(line: Line) -> None:
    """The next message comes when one is acknowledged."""
    for number in range(5):
        line.send("jobs", number)

    with line.consuming(Queue("jobs"), prefetch=2) as heard:
        heard.wait_for(2)
        heard.drain(0.3)
        assert len(heard.messages) == 2
        heard.messages[0].ack()
        heard.wait_for(3)
        heard.drain(0.3)

        assert len(heard.messages) == 3


def test_two_consumers_share_a_queue(open_line: OpenLine) -> None:
    """Each message is for one of them."""
    one, other = open_line(), open_line()
    for number in range(40):
        one.send("jobs", number)

    with one.consuming(Queue("jobs"), prefetch=5) as first, other.consuming(Queue("jobs"), prefetch=5) as second:
        seen: list[int] = []

        def all_have_come() -> bool:
            for heard in (first, second):
                heard.drain(0.01)
                while heard.messages:
                    message = heard.messages.pop()
                    seen.append(message.payload)
                    message.ack()
            return len(seen) >= 40

        eventually(all_have_come)

    assert sorted(seen) == list(range(40))


def test_queue_that_was_never_declared_is_not_found(line: Line) -> None:
    """A passive declaration asks, and makes nothing."""
    with pytest.raises(ChannelError, match="NOT_FOUND"):
        line.channel.queue_declare("nowhere", passive=True)


def test_declared_queue_tells_what_waits_in_it(open_line: OpenLine) -> None:
    """Every connection knows of it."""
    open_line().send("jobs")

    assert open_line().channel.queue_declare("jobs", passive=True).message_count == 1


def test_purge_deletes_what_waits_and_what_is_not_due(line: Line, database: Database) -> None:
    """The number says how many; what a worker has already is not among them."""
    in_an_hour = (datetime.now(timezone.utc) + timedelta(hours=1)).isoformat()
    line.send("jobs", "now")
    line.send("jobs", "taken", priority=9)
    line.send("jobs", "later", headers={"eta": in_an_hour})
    taken = line.take("jobs")

    assert line.channel.queue_purge("jobs") == 2
    assert taken.payload == "taken"
    assert len(rows(database)) == 1


def test_deleted_queue_takes_its_messages_along(line: Line, database: Database) -> None:
    """Afterwards it is as if it had never been declared."""
    line.send("jobs")

    line.channel.queue_delete("jobs")

    assert rows(database) == []
    with pytest.raises(ChannelError, match="NOT_FOUND"):
        line.channel.queue_declare("jobs", passive=True)


def test_message_is_due_at_its_eta(line: Line) -> None:
    """It waits in the table, and arrives with an eta that its task sees and a worker does not look at again."""
    soon = (datetime.now(timezone.utc) + timedelta(seconds=0.6)).isoformat()
    line.send("jobs", "later", headers={"eta": soon})

    assert line.take("jobs") is None
    message = eventually(lambda: line.take("jobs"))
    assert datetime.now(timezone.utc).isoformat() >= soon
    assert message.headers.get("eta") is None
    assert dict(message.headers)["eta"] == soon


def test_message_whose_time_is_over_is_dropped(line: Line, database: Database) -> None:
    """It is taken out of the queue without being delivered."""
    line.send("jobs", "old", expiration=5)
    line.send("jobs", "fresh", expiration=60)
    database.execute("UPDATE celery_outbox SET created_at = '2020-01-01 00:00:00.000000' WHERE envelope LIKE '%5.0%'")

    taken = [line.take("jobs"), line.take("jobs"), line.take("jobs")]

    assert [message.payload for message in taken if message is not None] == ["fresh"]
    assert len(rows(database)) == 1


@pytest.mark.parametrize(
    ("kind", "bound", "sent", "queues"),
    [
        ("direct", ["a", "b", "a"], "a", {"q0", "q2"}),
        ("topic", ["news.*", "news.#", "sport.#"], "news.today", {"q0", "q1"}),
        ("fanout", ["", "", ""], "", {"q0", "q1", "q2"}),
    ],
)
def test_exchange_gives_a_message_to_the_queues_that_are_bound(
    line: Line, kind: str, bound: list[str], sent: str, queues: set[str]
) -> None:
    """Each queue gets one of its own, also one that is bound by another process."""
    exchange = Exchange("the exchange", type=kind)
    for number, routing_key in enumerate(bound):
        Queue(f"q{number}", exchange, routing_key)(line.channel).declare()

    line.send(Queue("q0", exchange, bound[0]), "to all", exchange=exchange, routing_key=sent)

    assert {f"q{n}" for n in range(3) if line.take(f"q{n}", no_ack=True) is not None} == queues


def test_large_message_arrives(line: Line, database: Database) -> None:
    """Twenty megabytes, where the server allows a packet of that size."""
    if database.name == "mariadb" and int(database.scalar("SELECT @@max_allowed_packet")) < 64 * 2**20:
        pytest.skip("this server's max_allowed_packet is too small")
    body = b"\x00\xff" * 10 * 2**20

    line.send("jobs", body, content_type="application/octet-stream", content_encoding="binary")

    assert line.take("jobs").body == body


def test_row_that_cannot_be_read_is_set_aside_alone(line: Line, database: Database) -> None:
    """The others are delivered, and it is kept with its error."""
    line.send("jobs", "broken")
    database.execute("UPDATE celery_outbox SET envelope = 'nonsense'")
    line.send("jobs", "whole")

    with line.consuming(Queue("jobs")) as heard:
        assert [message.payload for message in heard.wait_for(1)] == ["whole"]

    [(error,)] = database.rows("SELECT error FROM celery_outbox WHERE died_at IS NOT NULL")
    assert "not an envelope" in error


def test_missing_table_is_named_with_its_command(database: Database) -> None:
    """Whoever connects first learns what to do."""
    with pytest.raises(MissingTableError, match=r"celery_queues.*create-tables"), Connection(f"alchemy+{database.url}") as connection:
        connection.connect()


def test_url_is_shown_without_its_password() -> None:
    """Logs and `celery report` show the broker's URL."""
    connection = Connection("alchemy+postgresql+psycopg://anne:pa55word@host/shop")

    assert "pa55word" not in connection.as_uri()
    assert "host/shop" in connection.as_uri()


def test_loop_that_runs_tasks_itself_delivers_nothing_after_its_worker_was_lost(
    line: Line, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the solo pool, where the messages behind a long task are in its worker while it runs."""
    monkeypatch.setattr(heart, "BEAT_MAX_SECONDS", 0.1)
    delivered: list[Any] = []

    def run(message: Any) -> None:
        delivered.append(message.payload)
        database.execute("DELETE FROM celery_workers")
        eventually(lambda: "celery-alchemy-heart" not in {thread.name for thread in threading.enumerate()})

    for number in range(3):
        line.send("jobs", number)
    with closing(Hub()) as hub, Consumer(line.channel, [Queue("jobs")], on_message=run):
        line.connection.transport.register_with_event_loop(line.connection.connection, hub)
        with pytest.raises(ClaimsLostError):
            for _ in range(1000):
                next(hub.loop)

    assert delivered == [0]
