"""One aftermath for each pair of database and broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.aftermath import Aftermath, make_aftermath
from tests.services.brokers import Brokers
from tests.services.databases import Databases

#: Pairs, and whether only a selection of the kills of whole workers is made there.
PAIRS = {
    "sqlite-filesystem": ("sqlite", "filesystem", False),
    "postgresql-redis": ("postgresql", "redis", False),
    "postgresql-rabbitmq": ("postgresql", "rabbitmq", True),
    "mariadb-redis": ("mariadb", "redis", True),
}


@pytest.fixture(scope="module", params=PAIRS)
def aftermath(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aftermath]:
    """What is left of one pair when everything has died at every point."""
    database_name, broker_name, selected = PAIRS[request.param]
    folder: Path = tmp_path_factory.mktemp("crash")
    databases, brokers = Databases(), Brokers()
    broker = brokers.open(broker_name, folder)
    database = databases.open(database_name, folder)
    yield make_aftermath(database, broker, folder, selected=selected)
    broker.close()
    databases.close()
