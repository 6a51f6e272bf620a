"""celery_alchemy.integrations.opentelemetry, with the real SDK."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from sqlalchemy import text
from sqlalchemy.orm import Session

from celery_alchemy.integrations.opentelemetry import instrument
from tests.unit.shop import Shop

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def points_of(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """Return the data points by the name of their metric."""
    data: Any = reader.get_metrics_data()
    metrics = [metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics]
    return {metric.name: list(metric.data.data_points) for metric in metrics}


def a_task(shop: Shop) -> Any:
    @shop.task(name="ask")
    def ask(session: Session, fail: bool) -> None:
        session.execute(text("SELECT 1"))
        session.execute(text("SELECT 2"))
        if fail:
            raise ValueError("wrong")

    return ask


def test_closed_sessions_are_counted_and_measured(shop: Shop) -> None:
    """By task and outcome, in seconds."""
    reader = InMemoryMetricReader()
    instrument(shop.alchemy, meter_provider=MeterProvider(metric_readers=[reader]))
    ask = a_task(shop)

    shop.trace(ask, False)
    shop.trace(ask, False)
    shop.trace(ask, True)

    points = points_of(reader)
    counted = {point.attributes["celery_alchemy.outcome"]: point.value for point in points["celery_alchemy.sessions"]}
    assert counted == {"success": 2, "failure": 1}
    [statements] = points["celery_alchemy.statements"]
    assert (dict(statements.attributes), statements.value) == ({"celery.task_name": "ask"}, 6)
    for name in ("database", "idle", "session"):
        [histogram] = points[f"celery_alchemy.{name}.duration"]
        assert histogram.count == 3
        assert 0 <= histogram.sum < 10


def test_closed_session_is_noted_in_the_span_of_its_task(shop: Shop) -> None:
    """Whoever opened the span around the body; the event has what the report has."""
    instrument(shop.alchemy, meter_provider=MeterProvider())
    tracer = TracerProvider().get_tracer("tests")
    ask = a_task(shop)

    with tracer.start_as_current_span("run/ask") as span:
        shop.trace(ask, True)

    recorded: Any = span
    [event] = recorded.events
    assert event.name == "celery_alchemy.session_closed"
    assert event.attributes["celery.task_name"] == "ask"
    assert event.attributes["celery_alchemy.outcome"] == "failure"
    assert event.attributes["celery_alchemy.statements"] == 2


def test_without_a_provider_or_a_span_nothing_happens(shop: Shop) -> None:
    """The global provider is a no-op until the application sets one."""
    instrument(shop.alchemy)

    assert shop.trace(a_task(shop), False).state == "SUCCESS"
