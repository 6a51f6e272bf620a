"""A short soak; `make soak` runs it for as long as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.soak.soak import soak

SECONDS = 25.0


@pytest.mark.databases("sqlite")
@pytest.mark.brokers("filesystem")
@pytest.mark.timeout(400)
def test_whatever_is_killed_at_whatever_moment_the_accounts_add_up(database: Database, broker: Broker, tmp_path: Path) -> None:
    """Producers, relays, workers and their children die at random and the broker forgets: nothing lost, doubled or ghostly."""
    report = soak(database, broker, tmp_path, SECONDS, workers=1, relays=1, producers=1, strike_seconds=0.6)

    assert report.passed, report.as_dict()
