"""Fixtures of the tests of steps: stands as the delivery tests have them, and an event loop that ends with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_alchemy.requests.event_loop import process_loop
from tests.asynchronous.conftest import soft_limit
from tests.delivery.conftest import make_stand, stand

__all__ = ["make_stand", "soft_limit", "stand"]


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()
