"""Fixtures of the tests about tenants."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.conftest import make_stand
from tests.tenants.orders import begin_travel, end_travel

__all__ = ["make_stand"]


@pytest.fixture(autouse=True)
def _tenants_travel() -> Iterator[None]:
    begin_travel()
    yield
    end_travel()
    process_loop.close()
