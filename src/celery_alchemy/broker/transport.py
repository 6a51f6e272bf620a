"""The transport that kombu knows as ``alchemy://``.

At the top of the broker: a connection's channels, the thread that takes messages for them, and its
way into the worker's loop, which is told by a pair of sockets that something has arrived.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

from kombu import Connection
from kombu.transport import virtual
from kombu.transport.base import Implements
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError

from ..databases.versions import too_old
from ..errors import ClaimsLostError, ConfigurationError
from .channel import Channel as BrokerChannel
from .homes import BrokerHome, home_for
from .inboxes import Inbox, Surroundings
from .queues import Binding, exists, unbind
from .routes import Routes
from .tables import begun, seen
from .taking import Taker
from .telling import drain_told

if TYPE_CHECKING:
    from kombu.asynchronous import Hub

__all__ = ["Transport"]

logger: logging.Logger = logging.getLogger(__name__)

DRIVER_TYPE = "alchemy"

#: Deliveries of one turn of the worker's loop, which has timers and other connections too.
DELIVERIES_AT_ONCE = 100


class Transport(virtual.Transport):
    """One connection to the broker.

    Args:
        client: The connection of kombu that it belongs to.
    """

    Channel: type[virtual.Channel] = BrokerChannel
    can_parse_url = True
    driver_type = DRIVER_TYPE
    driver_name = "sqlalchemy"
    connection_errors: tuple[type[BaseException], ...] = (
        ConnectionError,
        OperationalError,
        InterfaceError,
    )
    implements: Implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct", "topic", "fanout"])
    )

    def __init__(self, client: Connection, **kwargs: object) -> None:
        super().__init__(client, **kwargs)
        self._meant = client.hostname or "", client.transport_options or {}
        self._arrival = threading.Event()
        self._is_lost = False
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._loop: Hub | None = None
        _let_workers_talk()

    @cached_property
    def home(self) -> BrokerHome:
        """The database that it connects to.

        It is looked for when it is needed: Celery makes a Connection of a URL alone to show it.

        Raises:
            ConfigurationError: The URL names no database, and no Alchemy of the process is meant.
        """
        return home_for(*self._meant)

    @cached_property
    def routes(self) -> Routes:
        """Where the messages of its exchanges go."""
        return Routes(self.home)

    @cached_property
    def taker(self) -> Taker:
        """What takes messages for its channels; another one when it was closed and opened again."""
        return Taker(
            self.home,
            Surroundings(self._inboxes, self._readers, self._on_arrival, self._on_lost),
        )

    def _open_channels(self) -> list[BrokerChannel]:
        # A copy: the main thread opens and closes them.
        channels = list(self.channels or ())
        return [channel for channel in channels if isinstance(channel, BrokerChannel)]

    def _inboxes(self) -> Sequence[Inbox]:
        return [channel for channel in self._open_channels() if channel.callbacks]

    def _readers(self) -> Mapping[Binding, Inbox]:
        found: dict[Binding, Inbox] = {}
        for channel in self._open_channels():
            for binding in list(channel.readers):
                if binding.queue in channel.callbacks:
                    found[binding] = channel
        return found

    def _on_arrival(self) -> None:
        self._arrival.set()
        sockets = self._sockets
        if sockets is not None:
            # A full buffer says it already; a closed socket belongs to a connection that ends.
            with suppress(OSError):
                sockets[1].send(b".")

    def _on_lost(self) -> None:
        self._is_lost = True
        self._on_arrival()

    def _refuse_lost(self) -> None:
        if self._is_lost:
            raise ClaimsLostError(self.home.worker_lost_after_seconds)

    # --- what kombu asks for ----------------------------------------------------------------------

    def establish_connection(self) -> Transport:
        """Connect, and see that the tables are there.

        Raises:
            MissingTableError: One of them has not been made.
            ConfigurationError: The database is too old to be a broker.
            sqlalchemy.exc.OperationalError: The database cannot be reached.
        """
        with seen(self.home.place, self.home.engine()) as tables:
            problem = too_old(tables.connection)
            if problem is not None:
                raise ConfigurationError(problem, "Upgrade it, or use another broker.")
            exists(tables, "")
        self._is_lost = False
        return super().establish_connection()

    def close_connection(self, connection: Connection) -> None:
        """Give back what is not acknowledged, and end the thread."""
        super().close_connection(connection)
        drain_told()
        self.taker.stop()
        del self.taker
        sockets, self._sockets = self._sockets, None
        if sockets is not None:
            if self._loop is not None:
                self._loop.remove_reader(sockets[0])
            for end in sockets:
                end.close()

    def stop_reading(self, bindings: Sequence[Binding]) -> None:
        """Take back the rows of readers that end; those that cannot be taken back now expire."""
        try:
            with begun(self.home.place, self.home.engine()) as tables:
                unbind(tables, [*bindings, *(Binding(binding.queue) for binding in bindings)])
        except Exception as exc:  # noqa: BLE001 - whatever it is, the rows expire.
            logger.debug("The readers of a closed channel expire: %r", exc)

    def drain_events(
        self, connection: object, timeout: float | None = None, **kwargs: object
    ) -> None:
        """Deliver one message, waiting for it.

        Raises:
            TimeoutError: None has arrived in time.
            ClaimsLostError: Other workers have this one's messages.
        """
        until = None if timeout is None else monotonic() + timeout
        while True:
            self._refuse_lost()
            self._arrival.clear()
            if any(channel.deliver() for channel in self._open_channels()):
                return
            left = 1.0 if until is None else until - monotonic()
            if left <= 0:
                raise TimeoutError
            self._arrival.wait(left)

    def register_with_event_loop(self, connection: object, loop: Hub) -> None:
        """Have the worker's loop deliver what arrives."""
        if self._sockets is None:
            self._sockets = socket.socketpair()
            for end in self._sockets:
                end.settimeout(0)
        self._loop = loop
        loop.add_reader(self._sockets[0], self._on_readable)
        self._on_arrival()

    def _on_readable(self) -> None:
        if self._sockets is None:
            return
        with suppress(BlockingIOError):
            self._sockets[0].recv(4096)
        for _ in range(DELIVERIES_AT_ONCE):
            self._refuse_lost()
            if not any(channel.deliver() for channel in self._open_channels()):
                return
        self._on_arrival()

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """Return a URL as it may be shown."""
        client = self.client
        prefix = f"{client.uri_prefix}+" if client is not None and client.uri_prefix else ""
        try:
            shown = make_url(uri).render_as_string(hide_password=not include_password)
        except ArgumentError:
            return uri
        return prefix + shown.replace("***", mask)

    def get_manager(self, *args: object, **kwargs: object) -> NoReturn:
        """Nothing beside the channels can be managed.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the broker is managed by `celery -A app alchemy status`")


def _let_workers_talk() -> None:
    """Have the steps by which workers know of each other take this transport for one that can.

    They know two types of brokers by name. Where no worker runs in this process they are not
    imported.
    """
    for module, name in (("mingle", "Mingle"), ("gossip", "Gossip")):
        step = getattr(sys.modules.get(f"celery.worker.consumer.{module}"), name, None)
        if step is not None and DRIVER_TYPE not in step.compatible_transports:
            step.compatible_transports = step.compatible_transports | {DRIVER_TYPE}
