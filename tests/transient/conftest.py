"""Fixtures of the tests of transient errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_alchemy.loop import process_loop
from tests.delivery.conftest import make_stand, stand
from tests.unit.conftest import make_shop, shop

__all__ = ["make_shop", "make_stand", "shop", "stand"]


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()
