"""kombu's own transport tests on the broker that the environment names; copied beside them to be run, see `__main__.py`."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import kombu
import pytest
from t.integration.common import (
    BaseEventLoop,
    BaseExchangeTypes,
    BaseFailover,
    BaseMessage,
    BasePriority,
    BaseTimeToLive,
    BasicFunctionality,
)

URL = os.environ["TEST_BROKER"]
NOBODY_THERE = os.environ["TEST_BROKER_AWAY"]


class DrainingConnection(kombu.Connection):
    """Delivers all that has arrived at each call, as AMQP does; virtual transports may deliver one message."""

    def drain_events(self, **kwargs: Any) -> None:
        """Wait for the first one only."""
        super().drain_events(**kwargs)
        with suppress(TimeoutError):
            while True:
                super().drain_events(timeout=0.2)


@pytest.fixture
def connection() -> kombu.Connection:
    return kombu.Connection(URL)


@pytest.fixture
def invalid_connection() -> kombu.Connection:
    return kombu.Connection(NOBODY_THERE)


@pytest.fixture
def failover_connection() -> kombu.Connection:
    return kombu.Connection(f"{NOBODY_THERE};{URL}")


class TestBasicFunctionality(BasicFunctionality):
    """Connections, channels, and simple queues."""


class TestExchangeTypes(BaseExchangeTypes):
    """Direct, fanout and topic."""


class TestTimeToLive(BaseTimeToLive):
    """Messages with an expiration."""


class TestPriority(BasePriority):
    """The highest first: on Redis that is the lowest number."""

    PRIORITY_ORDER = "desc" if URL.startswith("redis") else "asc"

    @pytest.fixture
    def connection(self) -> kombu.Connection:
        return DrainingConnection(URL)


@pytest.mark.skipif(
    "+" in URL.partition("://")[0], reason="kombu splits an alternate URL as amqp://host:port/vhost, without a prefix"
)
class TestFailover(BaseFailover):
    """A second URL, where the first one does not answer."""


class TestMessage(BaseMessage):
    """Acknowledging, rejecting and putting back."""


class TestEventLoop(BaseEventLoop):
    """An acknowledgement of another thread."""
