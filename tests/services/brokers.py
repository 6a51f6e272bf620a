"""A broker that no other test shares: folders, a key prefix in Redis, or names of its own in RabbitMQ."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import amqp
import redis
from celery import Celery
from kombu import Connection
from kombu.exceptions import ChannelError

from tests.services.availability import Found, Missing, locate, require
from tests.services.wheels import start_redis

NAMES = ("filesystem", "redis", "rabbitmq")


class Broker:
    """The broker of the running test, with the result backend that goes with it.

    Attributes:
        name: "filesystem", "redis", "rabbitmq", or "alchemy" for the test's own database.
        prefix: Part of every queue, exchange or key of this test.
        settings: Celery settings, JSON-serialisable, for the workers' apps and the test's own.
        client: A Celery app without tasks for sending by name and asking for results.
    """

    def __init__(self, name: str, prefix: str, settings: dict[str, Any]) -> None:
        self.name = name
        self.prefix = prefix
        # Replies to control commands and events stay among the workers of this test.
        names: dict[str, Any] = {
            "task_default_queue": prefix,
            "control_exchange": f"{prefix}-control",
            "event_exchange": f"{prefix}-events",
            "broker_connection_retry_on_startup": True,
        }
        self.settings = names | settings
        self._queues = {prefix}
        self.client = self.app("tests-client")

    def __repr__(self) -> str:
        return f"<Broker {self.name} {self.prefix}>"

    def app(self, name: str) -> Celery:
        """Return a new Celery app on this broker; it does not become the current app."""
        app = Celery(name, set_as_current=False)
        app.conf.update(self.settings)
        return app

    def queue(self, name: str) -> str:
        """Return the name to use for another queue than the default one; it is deleted after the test."""
        full_name = f"{self.prefix}-{name}"
        self._queues.add(full_name)
        return full_name

    def pending(self, queue: str | None = None) -> int:
        """Return how many messages wait in a queue (default: the default queue); 0 when it does not exist."""
        with self.client.connection_for_read() as connection, connection.channel() as channel:
            return _message_count(channel, queue or self.prefix)

    def purge(self) -> None:
        """Throw away every waiting message of this test."""
        for queue in self._queues:
            self._on_channel("queue_purge", queue)

    def close(self) -> None:
        """Delete what the test left in the broker and close the client's connections."""
        self.client.close()
        if self.name == "redis":
            _delete_keys(self.settings["broker_url"], self.prefix)
        elif self.name == "rabbitmq":
            for queue in self._queues:
                self._on_channel("queue_delete", queue)
            for exchange in self._exchanges():
                self._on_channel("exchange_delete", exchange)

    def _exchanges(self) -> list[str]:
        control = self.settings["control_exchange"]
        events = self.settings["event_exchange"]
        return [*self._queues, f"{control}.pidbox", f"reply.{control}.pidbox", events]

    def _on_channel(self, method: str, name: str) -> None:
        # A channel of its own for each act: RabbitMQ closes it when the queue does not exist.
        options = self.settings.get("broker_transport_options", {})
        with Connection(self.settings["broker_url"], transport_options=options) as connection:
            try:
                getattr(connection.channel(), method)(name)
            except (ChannelError, amqp.NotFound):
                return


class Brokers:
    """The broker servers of one test run."""

    def __init__(self) -> None:
        self.servers: dict[str, Found | Missing] = {}

    def open(self, name: str, folder: Path) -> Broker:
        """Return an empty broker; `folder` is where files of the file-system broker and of results go."""
        prefix = f"test-{secrets.token_hex(6)}"
        return Broker(name, prefix, _SETTINGS[name](self, prefix, folder))

    def server(self, name: str) -> Found | Missing:
        """Return what became of the search for a server; it is made once in a run."""
        if name not in self.servers:
            self.servers[name] = _LOCATE[name]()
        return self.servers[name]


def _filesystem_settings(brokers: Brokers, prefix: str, folder: Path) -> dict[str, Any]:
    messages, control = folder / "broker" / "messages", folder / "broker" / "control"
    for path in (messages, control):
        path.mkdir(parents=True)
    options = {
        "data_folder_in": str(messages),
        "data_folder_out": str(messages),
        "control_folder": str(control),
        "polling_interval": 0.02,
    }
    return {"broker_url": "filesystem://", "broker_transport_options": options} | results_in(folder)


def _redis_settings(brokers: Brokers, prefix: str, folder: Path) -> dict[str, Any]:
    url = require(brokers.server("redis")).url
    options = {"global_keyprefix": f"{prefix}:"}
    return {
        "broker_url": url,
        "broker_transport_options": options,
        "result_backend": url,
        "result_backend_transport_options": options,
    }


def _rabbitmq_settings(brokers: Brokers, prefix: str, folder: Path) -> dict[str, Any]:
    return {"broker_url": require(brokers.server("rabbitmq")).url} | results_in(folder)


def results_in(folder: Path) -> dict[str, Any]:
    """Return settings that keep results as files in a folder."""
    results = folder / "results"
    results.mkdir(parents=True)
    return {"result_backend": f"tests.results:AtomicFilesystemBackend+file://{results}"}


_SETTINGS = {"filesystem": _filesystem_settings, "redis": _redis_settings, "rabbitmq": _rabbitmq_settings}


def _message_count(channel: Any, queue: str) -> int:
    if channel.connection.client.transport.driver_type == "redis":
        # kombu looks for the queue's key without its prefix, and says that there is none.
        return int(channel._size(queue))
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except (ChannelError, amqp.NotFound):
        return 0


def _delete_keys(url: str, prefix: str) -> None:
    with redis.Redis.from_url(url) as client:
        keys = list(client.scan_iter(match=f"{prefix}*", count=1000))
        if keys:
            client.delete(*keys)


def _probe_redis(url: str) -> None:
    with redis.Redis.from_url(url, socket_connect_timeout=5) as client:
        client.ping()


def _probe_rabbitmq(url: str) -> None:
    with Connection(url, connect_timeout=5) as connection:
        connection.connect()


_LOCATE: dict[str, Callable[[], Found | Missing]] = {
    "redis": lambda: locate(
        "Redis",
        variable="TEST_REDIS_URL",
        default_url="redis://127.0.0.1:6379/0",
        probe=_probe_redis,
        embedded=start_redis,
    ),
    "rabbitmq": lambda: locate(
        "RabbitMQ",
        variable="TEST_AMQP_URL",
        default_url="amqp://guest:guest@127.0.0.1:5672//",
        probe=_probe_rabbitmq,
    ),
}
