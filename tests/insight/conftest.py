"""Fixtures of the tests of warnings, session reports, checks and named databases."""

from __future__ import annotations

from collections import deque

import pytest

from celery_alchemy import body, insight, ledger, request
from tests.insight.clock import Clock
from tests.unit.conftest import make_shop, shop

__all__ = ["clock", "make_shop", "shop"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which idle times are measured."""
    clock = Clock()
    for module in (body, insight, ledger, request):
        monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.setattr(insight, "_doubtful", deque())  # What another test left is due by another clock.
    return clock
