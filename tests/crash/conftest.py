"""One aftermath for each pair of database and broker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.broker.lines import database_broker
from tests.crash.aftermath import Aftermath, make_aftermath
from tests.crash.points import Extent
from tests.services.brokers import Brokers
from tests.services.databases import Databases

#: Pairs, and how many of the kills of whole workers are made there; all of them, on one pair, in `.ci/run`.
PAIRS: dict[str, tuple[str, str, Extent]] = {
    "sqlite-filesystem": ("sqlite", "filesystem", "few"),
    "postgresql-redis": ("postgresql", "redis", "every" if os.environ.get("TEST_EVERY_CRASH") else "most"),
    "postgresql-rabbitmq": ("postgresql", "rabbitmq", "few"),
    "mariadb-redis": ("mariadb", "redis", "few"),
    "postgresql-alchemy": ("postgresql", "alchemy", "most"),
    "mariadb-alchemy": ("mariadb", "alchemy", "few"),
    "sqlite-alchemy": ("sqlite", "alchemy", "few"),
}


@pytest.fixture(scope="module", params=PAIRS)
def aftermath(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """What is left of one pair when everything has died at every point."""
    database_name, broker_name, extent = PAIRS[request.param]
    folder: Path = tmp_path_factory.mktemp("crash")
    databases, brokers = Databases(), Brokers()
    database = databases.open(database_name, folder)
    database.clear()
    broker = database_broker(database, folder) if broker_name == "alchemy" else brokers.open(broker_name, folder)
    yield make_aftermath(database, broker, folder, extent)
    broker.close()
    databases.close()
