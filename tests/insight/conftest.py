"""Fixtures of the tests of warnings, session reports and checks."""

from __future__ import annotations

from collections import deque

import pytest

from celery_alchemy.requests import attempt, insight
from celery_alchemy.requests import request_session as request
from celery_alchemy.sessions import ledger
from tests.insight.clock import Clock
from tests.unit.conftest import make_shop, shop

__all__ = ["clock", "make_shop", "shop"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which idle times are measured."""
    clock = Clock()
    for module in (request, insight, ledger, attempt):
        monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.setattr(insight, "_doubtful", deque())  # What another test left is due by another clock.
    return clock
