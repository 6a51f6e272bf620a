"""celery_alchemy.integrations.prometheus, with the real prometheus_client."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.integrations.prometheus import instrument
from tests.conftest import StartWorker
from tests.integrations.app import PORT_VARIABLE
from tests.unit.shop import Shop


def a_task(shop: Shop) -> Any:
    @shop.task(name="ask")
    def ask(session: Session, statements: int, fail: bool = False) -> None:
        for _ in range(statements):
            session.execute(text("SELECT 1"))
        if fail:
            raise ValueError("wrong")

    return ask


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_closed_sessions_are_counted_and_measured(shop: Shop) -> None:
    """By task and outcome; each histogram has one value for each session."""
    registry = CollectorRegistry()
    instrument(shop.alchemy, registry=registry)
    ask = a_task(shop)

    shop.trace(ask, 2)
    shop.trace(ask, 3)
    shop.trace(ask, 1, fail=True)

    value = registry.get_sample_value
    assert value("celery_alchemy_sessions_total", {"task": "ask", "outcome": "success"}) == 2
    assert value("celery_alchemy_sessions_total", {"task": "ask", "outcome": "failure"}) == 1
    assert value("celery_alchemy_statements_total", {"task": "ask"}) == 6
    for name in ("database", "idle", "session"):
        assert value(f"celery_alchemy_{name}_seconds_count", {"task": "ask"}) == 3
    whole = value("celery_alchemy_session_seconds_sum", {"task": "ask"})
    database = value("celery_alchemy_database_seconds_sum", {"task": "ask"})
    assert whole is not None
    assert database is not None
    assert 0 < database < whole


@pytest.mark.databases("sqlite")
def test_several_alchemies_share_a_registry(shop: Shop, tmp_path: Path) -> None:
    """Each is instrumented by itself, and the metrics are registered once."""
    registry = CollectorRegistry()
    analytics = Alchemy(bind=f"sqlite:///{tmp_path / 'analytics.db'}")

    instrument(shop.alchemy, registry=registry)
    instrument(analytics, registry=registry)
    shop.trace(a_task(shop), 1)

    assert registry.get_sample_value("celery_alchemy_sessions_total", {"task": "ask", "outcome": "success"}) == 1


@pytest.mark.databases("sqlite")
@pytest.mark.brokers("redis")
def test_worker_serves_the_metrics_of_all_its_processes(
    start_worker: StartWorker, run: Callable[..., Any], tmp_path: Path, broker: Any
) -> None:
    """In prometheus_client's multiprocess mode the parent of a prefork pool adds up what its children have counted."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_worker(
        "tests.integrations.app",
        pool="prefork",
        concurrency=2,
        env={"PROMETHEUS_MULTIPROC_DIR": str(folder), PORT_VARIABLE: str(port)},
        # One task for each process: the counts of processes that have ended stay.
        settings={"worker_max_tasks_per_child": 1},
    )

    processes = {run("ask", False) for _ in range(3)}
    with pytest.raises(ValueError, match="wrong"):
        run("ask", True)

    served = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    samples = {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in text_string_to_metric_families(served)
        for sample in family.samples
        if sample.labels.get("task") == "ask" and "le" not in sample.labels
    }
    assert len(processes) == 3
    assert samples["celery_alchemy_sessions_total", "success"] == 3
    assert samples["celery_alchemy_sessions_total", "failure"] == 1
    assert samples["celery_alchemy_statements_total", ""] == 8
    assert samples["celery_alchemy_database_seconds_count", ""] == 4
