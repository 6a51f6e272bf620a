"""Hands finished messages to the broker, unchanged, and waits until the broker has confirmed them.

Between the outbox or the relay and the broker. Uses connections of its own, because those of the Celery app do not ask RabbitMQ
for confirms.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import Any, cast

from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.pools import ProducerPool
from sqlalchemy.util import await_only

from .errors import UnroutableError
from .message import Message
from .pipeline import CONFIRM_TIMEOUT_SECONDS, confirmed_together, entities_of, publish_arguments

__all__ = ["Publisher", "off_loop", "publish_directly"]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds for which a broker that was down is not tried again right after a commit; the relay goes on trying.
PAUSE_SECONDS = 5.0

# One attempt to connect again: a connection that the broker dropped while it was idle must not send the message by way of the relay.
_RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


# Redis' answers that are about one queue's key; any other (OOM, READONLY, LOADING, MASTERDOWN) is about the whole server.
# Source: https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
_REFUSED_BY_REDIS = ("WRONGTYPE", "NOPERM", "No permissions")


class Publisher:
    """Publishes with confirms; one for each app, usable from many threads, renewed after a fork.

    Args:
        app: The Celery app, for its broker settings and queue declarations.
    """

    def __init__(self, app: Celery[Any]) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._pool: ProducerPool | None = None
        self._pid = 0
        self._paused_until = 0.0

    @property
    def paused(self) -> bool:
        """True for a while after the broker could not be reached."""
        return monotonic() < self._paused_until

    def publish(self, messages: Iterable[Message], within_seconds: float = float("inf")) -> list[Exception | None]:
        """Publish messages in order.

        Args:
            messages: The messages.
            within_seconds: When this time is over, no further message is tried.

        Returns:
            For each message that was tried in time None when the broker has confirmed it, or the error. When the broker cannot be
            reached the messages that were not tried get the error too.
        """
        deadline = monotonic() + within_seconds
        errors: list[Exception | None] = []
        pending = list(messages)
        confirmed: set[int] = set()
        try:
            with self._producers().acquire(block=True) as producer:
                if len(pending) > 1:
                    confirmed = confirmed_together(self._app, producer, pending)
                for index, message in enumerate(pending):
                    if index in confirmed:
                        errors.append(None)
                    elif monotonic() > deadline:
                        return errors
                    else:
                        errors.append(self._publish_one(producer, message))
        except Exception as exc:  # noqa: BLE001 - every error must be seen here.
            self._paused_until = monotonic() + PAUSE_SECONDS
            errors.extend(None if index in confirmed else exc for index in range(len(errors), len(pending)))
        else:
            self._paused_until = 0.0
        return errors

    def _publish_one(self, producer: Any, message: Message) -> Exception | None:
        connection_errors = producer.connection.connection_errors
        try:
            _send_with_route(self._app, producer, message)
        except connection_errors:
            raise
        except Exception as exc:
            # kombu wraps Redis' refusals as it wraps an outage.
            if isinstance(exc, OperationalError) and not str(exc).startswith(_REFUSED_BY_REDIS):
                raise
            return exc
        return None

    def _producers(self) -> ProducerPool:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                self._pid = os.getpid()
                connection: Connection = cast("Any", self._app).connection_for_write(transport_options={"confirm_publish": True})
                limit = self._app.conf.broker_pool_limit or 10
                self._pool = ProducerPool(connection.Pool(limit), limit=limit)
            return self._pool

    def close(self) -> None:
        """Close the connections of this process."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and self._pid == os.getpid():
                cast("Any", pool).force_close_all()
                pool.connections.force_close_all()


def off_loop(work: Callable[[], None]) -> None:
    """Run work that waits for servers; when an AsyncSession's commit asks for it, in a thread, so that its event loop goes on."""
    # Not imported: greenlet is no dependency, and where it is not loaded no AsyncSession runs.
    greenlet = sys.modules.get("greenlet")
    if greenlet is None or not getattr(greenlet.getcurrent(), "__sqlalchemy_greenlet_provider__", False):
        work()
        return
    loop = asyncio.get_running_loop()
    await_only(loop.run_in_executor(None, copy_context().run, work))


def publish_directly(app: Celery[Any], messages: Iterable[Message]) -> None:
    """Publish messages as ``apply_async`` would have, over the app's own connections and with its retry policy.

    Raises:
        kombu.exceptions.OperationalError: The broker cannot be reached.
    """
    off_loop(partial(_publish_directly, app, messages))


def _publish_directly(app: Celery[Any], messages: Iterable[Message]) -> None:
    with cast("Any", app).producer_pool.acquire(block=True) as producer:
        for message in messages:
            send(
                app,
                producer,
                message,
                retry=app.conf.task_publish_retry,
                retry_policy=dict(app.conf.task_publish_retry_policy),
            )


def _send_with_route(app: Celery[Any], producer: Any, message: Message) -> None:
    """Give one message to a kombu producer; on RabbitMQ see that a queue has taken it, if there must be one.

    RabbitMQ confirms a message that it had no queue for. A queue that was declared on this connection may be gone meanwhile.

    Raises:
        UnroutableError: No queue has taken it, with its own queues declared again.
    """
    how: dict[str, Any] = {"retry": True, "retry_policy": dict(_RETRY_ONCE)}
    if not message.has_route or producer.connection.transport.driver_type != "amqp":
        send(app, producer, message, **how)
        return
    for _ in range(2):
        returned: list[str] = []

        def keep(exc: Exception, exchange: str, routing_key: str, message: Any, kept: list[str] = returned) -> None:
            kept.append(routing_key)

        # On the producer for a channel that is made while it publishes.
        producer.on_return = keep
        producer.channel.events["basic_return"].add(keep)
        try:
            send(app, producer, message, mandatory=True, **how)
        finally:
            producer.on_return = None
            producer.channel.events["basic_return"].discard(keep)
        if not returned:
            return
        producer.connection.declared_entities.clear()
    raise UnroutableError(message.task_name or "message", message.routing_key)


def send(app: Celery[Any], producer: Any, message: Message, **how: Any) -> None:
    """Give one message to a kombu producer as it is, with its queues declared."""
    producer.publish(
        **publish_arguments(message),
        declare=entities_of(app, producer, message),
        confirm_timeout=CONFIRM_TIMEOUT_SECONDS,
        **how,
    )
