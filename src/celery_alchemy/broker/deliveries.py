"""What a channel has delivered, until it is acknowledged, given back or set aside.

Beneath the channel, which delivers; above the thread that writes the ends into the table.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, cast

from kombu.transport import virtual

from ..error_texts import error_text
from .claims import Claim
from .homes import BrokerHome
from .queues import Binding
from .routes import Routes
from .taking import Taker

if TYPE_CHECKING:
    from multiprocessing.util import Finalize

__all__ = ["Deliveries", "Owner", "Received"]


class Owner(Protocol):
    """What a channel needs of its connection.

    Attributes:
        home: The broker's database.
        routes: The way of messages through it.
        taker: Takes messages for the connection.
    """

    home: BrokerHome
    routes: Routes
    taker: Taker

    def stop_reading(self, bindings: Sequence[Binding]) -> None: ...


class _Channel(Protocol):
    """What its deliveries ask a channel."""

    @property
    def broker(self) -> Owner | None: ...

    @property
    def deliveries(self) -> Deliveries: ...


class Deliveries(virtual.QoS):
    """What a channel has delivered and what is not acknowledged yet; used from any thread."""

    if TYPE_CHECKING:
        # What kombu's stubs leave out.
        _on_collect: Finalize

        def _flush(self) -> None: ...

    def __init__(self, channel: virtual.Channel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._own_channel = cast("_Channel", channel)
        self.claims: dict[str, Claim] = {}
        #: Why nobody could read them, of those that were tried.
        self.unreadable: dict[str, str] = {}

    def ack(self, delivery_tag: str) -> None:
        """End a delivery: its message goes."""
        self._end(delivery_tag, gives_back=False)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """End a delivery: its message goes back, or goes."""
        self._end(delivery_tag, gives_back=requeue)

    def begin(self, delivery_tag: str, *, at_once: bool) -> threading.Event | None:
        """Have a delivery count as a start, for as long as it has not ended.

        Returns:
            What is set when that is committed; None for a ``once`` task, which counts by itself.
        """
        claim, connection = self.claims.get(delivery_tag), self._own_channel.broker
        if claim is None or claim.once or connection is None:
            return None
        return connection.taker.begin(claim, at_once=at_once)

    def put_off(self, delivery_tag: str, error: str) -> None:
        """Have a delivery that is about to go back be due after a while only.

        Args:
            delivery_tag: The delivery.
            error: Why it goes back.
        """
        claim = self.claims.get(delivery_tag)
        if claim is not None:
            self.claims[delivery_tag] = replace(claim, error=error)

    def note_unreadable(self, delivery_tag: str, exc: BaseException) -> None:
        """Set a delivery aside that nobody could read, with its error, unless it goes back."""
        if delivery_tag in self.claims:
            self.unreadable[delivery_tag] = error_text(exc)

    def _end(self, delivery_tag: str, *, gives_back: bool) -> None:
        claim = self.claims.pop(delivery_tag, None)
        error = self.unreadable.pop(delivery_tag, None)
        super().ack(delivery_tag)
        connection = self._own_channel.broker
        # A channel that was closed has given its claims back.
        if claim is not None and connection is not None:
            taker = connection.taker
            if error is not None and not gives_back:
                # Celery acknowledges, or rejects, what it cannot read.
                claim, gives_back = replace(claim, error=error, dies=True), True
            (taker.give_back if gives_back else taker.end)(claim)

    def in_flight(self) -> int:
        """Return how many deliveries are not acknowledged."""
        return len(self._delivered or ()) - len(self._dirty or ())

    def restore_unacked_once(self, stderr: object = None) -> None:
        """Give everything back that is not acknowledged, when the channel is closed."""
        self._on_collect.cancel()
        self._flush()
        connection = self._own_channel.broker
        while self.claims and connection is not None:
            _, claim = self.claims.popitem()
            connection.taker.give_back(claim)
        if self._delivered is not None:
            self._delivered.clear()


class Received(virtual.Message):
    """A message that is kept with its error if nobody can read it."""

    def _decode(self) -> object:
        try:
            return super()._decode()
        except Exception as exc:
            channel: _Channel | None = self.channel
            if channel is not None:
                channel.deliveries.note_unreadable(str(self.delivery_tag), exc)
            raise
