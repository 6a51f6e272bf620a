"""Fixtures of the async tests: shops and stands on async drivers, and an event loop that ends with the test."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import make_stand, stand
from tests.unit.conftest import make_shop, shop

__all__ = ["make_shop", "make_stand", "shop", "stand"]


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


@pytest.fixture
def soft_limit() -> Iterator[Callable[[], None]]:
    """A function that raises the soft time limit in the main thread, by a signal, as Celery's prefork pool does."""

    def raise_limit(number: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, raise_limit)
    main = threading.main_thread().ident
    assert main is not None
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
