"""A channel of kombu on the broker's tables: declaring, publishing, consuming, acknowledging.

Between kombu's virtual channels, whose deliveries and prefetch limits it keeps, and the thread that
takes messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any, NoReturn, cast

from amqp.protocol import queue_declare_ok_t
from kombu.transport import virtual
from kombu.utils.uuid import uuid

from ..messages.celery_types import Fields
from ..messages.message import Message
from .broadcasts import READER_SECONDS
from .claims import BATCH_ROWS, Delivery
from .deliveries import Deliveries, Owner, Received
from .homes import BrokerHome
from .queues import Binding, declare, exists, forget, purge, size, unbind
from .revoking import revoke_waiting, revoked_by
from .routes import Routes, post
from .tables import begun, seen
from .taking import Taker
from .telling import tell

__all__ = ["Channel"]

#: Seconds for which the queue of a client is kept that did not say for how long.
CLIENT_QUEUE_SECONDS = 86400.0


class Channel(virtual.Channel):
    """One channel of a connection."""

    Message: type[virtual.Message] = Received
    QoS: type[virtual.QoS] = Deliveries
    supports_fanout = True

    def __init__(self, connection: virtual.Transport, **kwargs: object) -> None:
        super().__init__(connection, **kwargs)
        #: What was taken and is not delivered yet.
        self.arrived: deque[Delivery] = deque()
        self._transient: dict[str, float] = {}
        self._no_ack: set[str] = set()
        self._turn = 0
        self.readers: dict[Binding, Channel] = {}
        self.callbacks: dict[str, Callable[[virtual.Message], object]] = {}

    @property
    def broker(self) -> Owner | None:
        """The connection that it belongs to; None for a channel that was closed."""
        return self._owner

    @property
    def deliveries(self) -> Deliveries:
        """What it has delivered."""
        return cast("Deliveries", self.qos)

    @property
    def _owner(self) -> Owner:
        # None, once it was closed: then only ``broker`` is asked.
        return cast("Owner", self.connection)

    @property
    def _taker(self) -> Taker:
        return self._owner.taker

    @property
    def _home(self) -> BrokerHome:
        return self._owner.home

    # --- declaring --------------------------------------------------------------------------------

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, **kwargs: Any
    ) -> queue_declare_ok_t:
        """Declare a queue, or see that it was declared.

        Raises:
            kombu.exceptions.ChannelError: ``passive``, and nobody has declared it.
        """
        if passive and queue and self._has_queue(queue):
            return queue_declare_ok_t(queue, self._size(queue), 0)
        return super().queue_declare(queue, passive=passive, **kwargs)

    def _has_queue(self, queue: str, **kwargs: object) -> bool:
        home = self._home
        with seen(home.place, home.engine()) as tables:
            return exists(tables, queue)

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        seconds = None
        if kwargs.get("auto_delete") or kwargs.get("exclusive"):
            expires = (kwargs.get("arguments") or {}).get("x-expires")
            seconds = (
                max(float(expires) / 1000, READER_SECONDS) if expires else CLIENT_QUEUE_SECONDS
            )
            self._transient[queue] = seconds
        home = self._home
        with begun(home.place, home.engine()) as tables:
            declare(tables, Binding(queue), seconds)

    def _size(self, queue: str) -> int:
        home = self._home
        with seen(home.place, home.engine()) as tables:
            return size(tables, queue)

    def _purge(self, queue: str) -> int:
        home = self._home
        with begun(home.place, home.engine()) as tables:
            return purge(tables, queue)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Fields | None = None,
        **kwargs: object,
    ) -> None:
        """Bind a queue: one that goes with its client reads broadcasts, another keeps messages."""
        exchange = exchange or "amq.direct"
        exchanges = self.state.exchanges or {}
        kind = exchanges.get(exchange, {}).get("type") or "direct"
        is_reader = queue in self._transient
        binding = Binding(queue, exchange, kind, routing_key or "", is_reader)
        if is_reader:
            self._taker.begin_reading()
            self.readers[binding] = self
        home = self._home
        with begun(home.place, home.engine()) as tables:
            declare(tables, binding, READER_SECONDS if is_reader else None)

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Fields | None = None,
        **kwargs: object,
    ) -> None:
        """Take a binding back."""
        binding = Binding(queue, exchange or "amq.direct", routing_key=routing_key or "")
        self.readers = {b: c for b, c in self.readers.items() if b.id != binding.id}
        home = self._home
        with begun(home.place, home.engine()) as tables:
            unbind(tables, [binding])

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: object
    ) -> None:
        """Delete a queue with what waits in it."""
        if if_empty and self._size(queue):
            return
        self.readers = {b: c for b, c in self.readers.items() if b.queue != queue}
        home = self._home
        with begun(home.place, home.engine()) as tables:
            forget(tables, queue)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Forget an exchange; its queues stay."""
        if self.state.exchanges is not None:
            self.state.exchanges.pop(exchange, None)

    # --- publishing -------------------------------------------------------------------------------

    def basic_publish(
        self, message: Fields, exchange: str, routing_key: str, **kwargs: object
    ) -> None:
        """Write a message in a transaction of its own."""
        properties = {k: v for k, v in message["properties"].items() if k != "delivery_info"}
        expiration = properties.get("expiration")
        if expiration is not None:
            # kombu has made milliseconds of it, as AMQP has them.
            properties["expiration"] = float(expiration) / 1000
        encoding = message.get("content-encoding") or "utf-8"
        body = message["body"]
        made = Message(
            body=body.encode("utf-8") if isinstance(body, str) else bytes(body or b""),
            content_type=message.get("content-type") or "application/data",
            content_encoding=encoding,
            exchange=exchange or "",
            routing_key=routing_key or "",
            headers=dict(message.get("headers") or {}),
            properties=properties,
        )
        routes, otherwise = self._owner.routes, self.deadletter_queue
        tell(self._home, made, partial(_write, self._home, routes, made, otherwise))

    # --- consuming --------------------------------------------------------------------------------

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[..., object] | None = None,
        consumer_tag: str | None = None,
        **kwargs: object,
    ) -> str:
        """Begin to consume a queue; returns the consumer's tag."""
        tag = consumer_tag or uuid()
        self._tag_to_queue[tag] = queue
        self._active_queues.append(queue)
        self._consumers.add(tag)
        if no_ack:
            self._no_ack.add(queue)
        self.callbacks[queue] = callback or (lambda message: None)
        self._taker.start()
        return tag

    def basic_cancel(self, consumer_tag: str) -> None:
        """End a consumer, and give back what was taken for it and is not delivered."""
        queue = self._tag_to_queue.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        if queue is None or queue in self._active_queues:
            return
        self.callbacks.pop(queue, None)
        self._no_ack.discard(queue)
        for _ in range(len(self.arrived)):
            delivery = self.arrived.popleft()
            if delivery.queue != queue:
                self.arrived.append(delivery)
            elif delivery.claim is not None:
                self._taker.give_back(delivery.claim)

    def basic_get(
        self, queue: str, no_ack: bool = False, **kwargs: object
    ) -> virtual.Message | None:
        """Take one message now; None if there is none."""
        # What is acknowledged later is ended by the thread.
        self._taker.start()
        delivery = self._taker.take_now(queue)
        return None if delivery is None else self._message(delivery, no_ack=no_ack)

    def _get(self, queue: str, timeout: float | None = None) -> NoReturn:
        raise Empty

    def _message(self, delivery: Delivery, *, no_ack: bool) -> virtual.Message:
        message = self.Message(delivery.payload, channel=self)
        if delivery.claim is None:
            return message
        if no_ack:
            self._taker.end(delivery.claim)
        else:
            tag = str(message.delivery_tag)
            self.deliveries.claims[tag] = delivery.claim
            self.qos.append(message, tag)
            for _, exc, _ in message.errors or ():
                # It could not be decompressed.
                self.deliveries.note_unreadable(tag, exc)
        return message

    def deliver(self) -> bool:
        """Deliver one message that has arrived; False if there is none."""
        if not self.arrived:
            return False
        delivery = self.arrived[0]
        callback = self.callbacks.get(delivery.queue)
        if callback is None:
            self.arrived.popleft()
            if delivery.claim is not None:
                self._taker.give_back(delivery.claim)
            return True
        message = self._message(delivery, no_ack=delivery.queue in self._no_ack)
        # Only now: until here it takes part of the room.
        self.arrived.popleft()
        callback(message)
        return True

    def room(self) -> int:
        """Return how many more messages the channel takes."""
        if self.closed or not self.qos.can_consume():
            return 0
        return max(0, self._most() - self._stock())

    def is_stocked(self) -> bool:
        """Tell whether the channel has at least half of the messages that it takes."""
        return 2 * self._stock() >= self._most()

    def _most(self) -> int:
        return self.qos.prefetch_count or BATCH_ROWS

    def _stock(self) -> int:
        return self.deliveries.in_flight() + len(self.arrived)

    def wanted(self) -> list[str]:
        """Return the queues that it takes messages of, beginning with another one each time."""
        read = {binding.queue for binding in self.readers}
        queues = [queue for queue in dict.fromkeys(self._active_queues) if queue not in read]
        self._turn += 1
        start = self._turn % len(queues) if queues else 0
        return queues[start:] + queues[:start]

    def basic_qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> None:
        """Set how many messages may be unacknowledged."""
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        self._taker.wake()

    def close(self) -> None:
        """Cancel all consumers, and give back what is not acknowledged."""
        if not self.closed and self.broker is not None:
            while self.arrived:
                claim = self.arrived.popleft().claim
                if claim is not None:
                    self._taker.give_back(claim)
            if self.readers:
                self.broker.stop_reading(list(self.readers))
                self.readers = {}
        super().close()

    def _reset_cycle(self) -> None:
        """Nothing: messages come by themselves."""


def _write(home: BrokerHome, routes: Routes, message: Message, otherwise: str | None) -> None:
    revoked = revoked_by(message)
    if revoked:
        revoke_waiting(home, revoked)
    post(home, routes, message, otherwise)
