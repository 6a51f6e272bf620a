"""The shop with FastAPI's TestClient, and tasks as a worker would run them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select

from celery_alchemy import Alchemy
from celery_alchemy.testing import Sent, captured, deliver_twice, joined
from sqlmodel_app import tasks
from sqlmodel_app.tasks import Order, charge
from sqlmodel_app.web import web


@pytest.fixture
def alchemy() -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    return tasks.alchemy


@pytest.fixture(scope="module", autouse=True)
def _tables() -> Iterator[None]:
    tasks.create_tables()
    yield
    tasks.engine.dispose()


@pytest.fixture
def client() -> TestClient:
    """Sends requests."""
    return TestClient(web)


# <tests>
@pytest.mark.usefixtures("joined_transaction", "no_leaks")
def test_order_is_taken_and_charged(client: TestClient, sent: Sent) -> None:
    """The sessions of the web application come from Alchemy's sessionmaker, so they join the test's transaction."""
    order = client.post("/orders", json={"item": "tea"}).json()

    assert sent == [charge.s(order["id"])]
    assert [run.result for run in sent.run()] == ["tea"]
    assert client.get(f"/orders/{order['id']}").json()["state"] == "charged"


# </tests>


def test_twice_delivered_task_leaves_nothing(client: TestClient, alchemy: Alchemy) -> None:
    """Without pytest's fixtures; behind the block there is neither the request's order nor the task's record."""
    with joined(alchemy), captured(alchemy) as sent, deliver_twice():
        client.post("/orders", json={"item": "tea"})

        assert [run.result for run in sent.run()] == ["tea", "tea"]

    with alchemy.engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(Order)) == 0
