"""A long task of steps whose worker is killed goes on elsewhere, with the database as its broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.broker.test_workers import OWN
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.steps.paying import pay_and_kill
from tests.steps.worker_app import BROKER_VARIABLE


@pytest.mark.brokers("alchemy")
@pytest.mark.parametrize("whole", [False, True], ids=["child", "worker"])
def test_killed_workers_pay_for_each_step_once(
    start_worker: StartWorker, broker: Broker, database: Database, tmp_path: Path, whole: bool
) -> None:
    """What was paid for twice was so where the kill fell between the payment and its COMMIT."""
    pay_and_kill(
        lambda env: start_worker("tests.steps.worker_app", settings=OWN, env={**env, BROKER_VARIABLE: "1"}),
        lambda: broker.client.send_task("ingest", ("report",)),
        database,
        tmp_path,
        whole=whole,
    )
