"""Hands finished messages to the broker, unchanged, and waits until the broker has confirmed them.

Between the outbox or the relay and the broker. Uses connections of its own, because those of the
Celery app do not ask RabbitMQ for confirms.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Mapping
from time import monotonic

from kombu.exceptions import OperationalError
from kombu.pools import ProducerPool

from ..errors import UnroutableError
from .batches import CONFIRM_TIMEOUT_SECONDS, confirmed_together, entities_of, publish_arguments
from .celery_types import App
from .kombu_types import TheProducer, borrowed, close_all, forget_declared
from .message import Message

__all__ = ["Publisher", "publish_directly"]

logger: logging.Logger = logging.getLogger("celery_alchemy.publisher")

#: Seconds for which a broker that was down is not tried again right after a commit; the relay goes
#: on trying.
PAUSE_SECONDS = 5.0

# One attempt to connect again: a connection that the broker dropped while it was idle must not send
# the message by way of the relay.
#: Seconds in which a broker must answer that has just ended a connection.
RECONNECT_SECONDS = 5

_RETRY_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}


# Redis' answers that are about one queue's key; any other (OOM, READONLY, LOADING, MASTERDOWN) is
# about the whole server.
# Source: https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
_REFUSED_BY_REDIS = ("WRONGTYPE", "NOPERM", "No permissions")


class Publisher:
    """Publishes with confirms; one for each app, usable from many threads, renewed after a fork.

    Args:
        app: The Celery app, for its broker settings and queue declarations.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._pool: ProducerPool | None = None
        self._pid = 0
        self._paused_until = 0.0

    @property
    def paused(self) -> bool:
        """True for a while after the broker could not be reached."""
        return monotonic() < self._paused_until

    def publish(
        self, messages: Iterable[Message], within_seconds: float = float("inf")
    ) -> list[Exception | None]:
        """Publish messages in order.

        Args:
            messages: The messages.
            within_seconds: When this time is over, no further message is tried.

        Returns:
            For each message that was tried in time None when the broker has confirmed it, or the
            error. When the broker cannot be reached the messages that were not tried get the error
            too.
        """
        deadline = monotonic() + within_seconds
        errors: list[Exception | None] = []
        pending = list(messages)
        confirmed: set[int] = set()
        try:
            with borrowed(self._producers()) as producer:
                if len(pending) > 1:
                    confirmed = confirmed_together(self._app, producer, pending)
                if not self._publish_alone(producer, pending, confirmed, deadline, errors):
                    return errors
        except Exception as exc:  # noqa: BLE001 - every error must be seen here.
            self._paused_until = monotonic() + PAUSE_SECONDS
            errors.extend(
                None if index in confirmed else exc for index in range(len(errors), len(pending))
            )
        else:
            self._paused_until = 0.0
        return errors

    def _publish_alone(
        self,
        producer: TheProducer,
        pending: list[Message],
        confirmed: set[int],
        deadline: float,
        errors: list[Exception | None],
    ) -> bool:
        """Publish one by one what is not confirmed yet, and note the errors.

        False when the time was over.

        A broker that hangs up on one message, and takes the next, is there: the error is that
        message's own.

        Raises:
            Exception: The broker cannot be reached.
        """
        hung_up = False
        for index, message in enumerate(pending):
            if index in confirmed:
                errors.append(None)
                continue
            if monotonic() > deadline:
                return False
            try:
                errors.append(self._publish_one(producer, message))
                hung_up = False
            except Exception as exc:
                if hung_up or index == len(pending) - 1:
                    raise
                hung_up = True
                _connect_again(producer)
                errors.append(exc)
        return True

    def _publish_one(self, producer: TheProducer, message: Message) -> Exception | None:
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
                connection = self._app.connection_for_write(
                    transport_options={"confirm_publish": True}
                )
                limit = self._app.conf.broker_pool_limit or 10
                self._pool = ProducerPool(connection.Pool(limit), limit=limit)
            return self._pool

    def close(self) -> None:
        """Close the connections of this process."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None and self._pid == os.getpid():
                close_all(pool)


def _connect_again(producer: TheProducer) -> None:
    """Give a producer a new connection.

    Raises:
        Exception: The broker cannot be reached.
    """
    connection = producer.connection
    connection.collect()
    connection.ensure_connection(max_retries=1, interval_start=0, timeout=RECONNECT_SECONDS)
    producer.revive(connection.default_channel)


def publish_directly(app: App, messages: Iterable[Message]) -> None:
    """Publish messages as ``apply_async`` would have.

    They go over the app's own connections, with its retry policy.

    Raises:
        kombu.exceptions.OperationalError: The broker cannot be reached.
    """
    with borrowed(app.producer_pool) as producer:
        for message in messages:
            send(
                app,
                producer,
                message,
                retry=app.conf.task_publish_retry,
                retry_policy=dict(app.conf.task_publish_retry_policy),
            )


def _send_with_route(app: App, producer: TheProducer, message: Message) -> None:
    """Give one message to a kombu producer.

    On RabbitMQ see that a queue has taken it, if there must be one.

    RabbitMQ confirms a message that it had no queue for. A queue that was declared on this
    connection may be gone meanwhile.

    Raises:
        UnroutableError: No queue has taken it, with its own queues declared again.
    """
    how: Mapping[str, object] = {"retry": True, "retry_policy": dict(_RETRY_ONCE)}
    if not message.has_route or producer.connection.transport.driver_type != "amqp":
        send(app, producer, message, **how)
        return
    for _ in range(2):
        returned: list[str] = []

        def keep(
            exc: Exception,
            exchange: str,
            routing_key: str,
            message: object,
            kept: list[str] = returned,
        ) -> None:
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
        forget_declared(producer.connection)
    raise UnroutableError(message.task_name or "message", message.routing_key)


def send(app: App, producer: TheProducer, message: Message, **how: object) -> None:
    """Give one message to a kombu producer as it is, with its queues declared."""
    producer.publish(
        **publish_arguments(message),
        declare=entities_of(app, producer, message),
        confirm_timeout=CONFIRM_TIMEOUT_SECONDS,
        **how,
    )
