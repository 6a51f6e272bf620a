"""The finished message: what Celery would have handed to the broker.

``recording.py`` makes it of what Celery publishes, ``outbox/outbox.py`` keeps it, ``publisher.py``
sends it unchanged.
"""

from __future__ import annotations

import json as plain_json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone

from kombu.utils import json

from .celery_types import Fields
from .declarations import Declaration, entity_of, name_of

__all__ = ["Message", "seconds_until"]

# Where RabbitMQ holds messages for quorum queues, and how a routing key says for how long: 28 bits,
# the highest first.
_DELAYED_EXCHANGE = "celery_delayed_27"
_DELAY_BITS = 28
_DELAY = re.compile(rf"(?:[01]\.){{{_DELAY_BITS}}}")


@dataclass(slots=True)
class Message:
    """A message as the broker gets it.

    Attributes:
        body: The serialised, perhaps compressed, body.
        content_type: Of the body, such as ``application/json``.
        content_encoding: Of the body, such as ``utf-8``.
        exchange: Name of the exchange; empty for the default exchange.
        routing_key: Routing key; the queue's name on the default exchange.
        queues: Names of the queues to declare before publishing.
        declare: What else to declare before, in full: queues and exchanges that a name alone does
            not describe.
        headers: Celery's message headers (protocol 2) and the user's own.
        properties: AMQP properties: correlation_id, reply_to, priority, expiration, delivery_mode
            and the like.
        is_sole: Its task's id was made for it, and it goes to one queue: there is another message
            of its task only if somebody sends that id again.
        arguments: The task's args and kwargs before they were serialised; not part of the message.
    """

    body: bytes
    content_type: str
    content_encoding: str
    exchange: str
    routing_key: str
    queues: list[str] = field(default_factory=list)
    declare: list[Declaration] = field(default_factory=list)
    headers: Fields = field(default_factory=dict)
    properties: Fields = field(default_factory=dict)
    is_sole: bool = False
    arguments: tuple[tuple[object, ...], dict[str, object]] = field(
        default=((), {}), repr=False, compare=False
    )

    @property
    def task_id(self) -> str | None:
        """The id of the task; None for a message that is no task, such as a task-sent event."""
        id_: str | None = self.headers.get("id")
        return id_

    @property
    def task_name(self) -> str | None:
        """The name of the task; None for a message that is no task."""
        name: str | None = self.headers.get("task")
        return name

    @property
    def priority(self) -> int:
        """From 0 to 9, of which 9 is delivered first; 0 for a message that does not say."""
        given = self.properties.get("priority")
        return min(max(given, 0), 9) if isinstance(given, int) else 0

    @property
    def has_route(self) -> bool:
        """True if there must be a queue that takes it.

        One is declared for it, or the default exchange names one.
        """
        return self.exchange == "" or bool(self.queue_names)

    @property
    def queue_names(self) -> list[str]:
        """The names of all queues that are declared for it."""
        if not self.declare:
            return self.queues
        names = (name_of(declaration) for declaration in self.declare)
        return [*self.queues, *(name for name in names if name is not None)]

    def properties_at_publish(self) -> Fields:
        """Return the properties with what is left of the time to live.

        A broker counts it from the publish.

        A message that has expired goes out without one: a worker reports it as revoked, a broker
        would drop it in silence.
        """
        left = seconds_until(self.headers.get("expires"))
        if "expiration" not in self.properties or left is None:
            return self.properties
        others = {name: value for name, value in self.properties.items() if name != "expiration"}
        return {**others, "expiration": left} if left > 0 else others

    def routing_key_at_publish(self) -> str:
        """Return the routing key with what is left of the delay.

        RabbitMQ counts the delay from the publish.

        For quorum queues Celery has the broker hold a message until its eta; the delay in seconds
        is the beginning of the routing key then, bit by bit. With no bit set the message goes
        straight through. Source:
        https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html,
        ``kombu.transport.native_delayed_delivery``.
        """
        if not self.exchange.endswith(_DELAYED_EXCHANGE):
            return self.routing_key
        delay = _DELAY.match(self.routing_key)
        left = seconds_until(self.headers.get("eta"))
        if delay is None or left is None:
            return self.routing_key
        return (
            ".".join(f"{max(0, int(left)):0{_DELAY_BITS}b}") + self.routing_key[delay.end() - 1 :]
        )

    def envelope(self) -> str:
        """Return everything but the body, as JSON."""
        parts: Fields = {
            "content_type": self.content_type,
            "content_encoding": self.content_encoding,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "queues": self.queues,
            "headers": self.headers,
            "properties": self.properties,
        }
        if self.declare:
            parts["declare"] = self.declare
        if self.is_sole:
            parts["is_sole"] = True
        try:
            # Most hold nothing that only kombu's encoder knows, which takes twice as long.
            return plain_json.dumps(parts)
        except TypeError:
            return str(json.dumps(parts))

    @classmethod
    def from_parts(cls, body: bytes | bytearray | memoryview, envelope: str) -> Message:
        """Make a message from what ``body`` and ``envelope()`` were.

        Raises:
            ValueError: The envelope is not one. Nothing in it is executed or imported.
        """
        try:
            # The hook that knows marked types is called for each mapping, which takes longer than
            # the parsing.
            parts = json.loads(envelope) if '"__type__"' in envelope else plain_json.loads(envelope)
            # A newer version of the library, beside which this one still runs, may say more.
            known = {name: part for name, part in parts.items() if name in cls.__slots__}
            message = cls(body=bytes(body), **known)
        except Exception as exc:
            raise ValueError(f"not an envelope: {exc}") from exc
        texts: tuple[object, ...] = (
            message.content_type,
            message.content_encoding,
            message.exchange,
            message.routing_key,
        )
        mappings: tuple[object, ...] = (message.headers, message.properties)
        queues: object = message.queues
        if not isinstance(queues, list) or not all(
            isinstance(text, str) for text in (*texts, *queues)
        ):
            raise ValueError("not an envelope: a text field is not a text")
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise ValueError("not an envelope: headers or properties are not a mapping")
        declare: object = message.declare
        if not isinstance(declare, list):
            raise ValueError("not an envelope: its declarations are no list")  # noqa: TRY004
        for declaration in declare:
            entity_of(declaration)
        return message


def seconds_until(time: object) -> float | None:
    """Return the seconds until a time of a message's headers, negative when it is over.

    None if it is not one.
    """
    if not isinstance(time, str):
        return None
    try:
        at = datetime.fromisoformat(time.replace("Z", "+00:00"))
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
    return (at - datetime.now(timezone.utc)).total_seconds()
