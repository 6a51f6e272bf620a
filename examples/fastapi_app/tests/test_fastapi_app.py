"""The shop with FastAPI's TestClient, and with a real worker."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.testing import Sent
from fastapi_app import tasks
from fastapi_app.models import Order
from fastapi_app.tasks import charge
from fastapi_app.web import web


@pytest.fixture
def alchemy() -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    return tasks.alchemy


@pytest.fixture(scope="module", autouse=True)
def _tables() -> None:
    tasks.create_tables()


@pytest.fixture
def client() -> TestClient:
    """Sends requests; without the lifespan, because the tables are there and a test's transaction may be open."""
    return TestClient(web)


# <tests>
@pytest.mark.parametrize("path", ["/orders", "/async-orders"])
def test_order_is_taken_and_charged(path: str, client: TestClient, alchemy_session: Session, sent: Sent) -> None:
    """Sync and async endpoints write and send in one transaction, which this test's rolls back."""
    order_id = client.post(path, params={"item": "tea"}).json()["id"]

    assert sent == [charge.s(order_id)]
    sent.run()
    assert client.get(f"/orders/{order_id}").json() == {"item": "tea", "state": "charged"}
    assert alchemy_session.get_one(Order, order_id).state == "charged"


# </tests>


@pytest.mark.parametrize("path", ["/orders", "/async-orders"])
@pytest.mark.usefixtures("joined_transaction")
def test_order_that_cannot_be_taken_sends_nothing(path: str, sent: Sent, crash_at: Any) -> None:
    """A process that dies before its commit has neither an order nor a task."""

    async def take_order() -> None:
        # In this thread's event loop: that of a TestClient dies with the crash, and the client with it.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=web), base_url="http://shop") as client:
            await client.post(path, params={"item": "tea"})

    with crash_at("COMMIT, before"):
        asyncio.run(take_order())

    assert sent == []


@pytest.mark.usefixtures("joined_transaction", "no_leaks")
def test_sessions_of_requests_are_closed(client: TestClient, sent: Sent) -> None:
    """Also that of a request that fails."""
    for path in ("/orders", "/async-orders"):
        client.post(path, params={"item": "tea"})

    assert client.get("/orders/0").status_code == 404


def test_real_worker_charges_orders(client: TestClient, worker_process: Any) -> None:
    """From both kinds of endpoints, over a real broker."""
    worker_process("fastapi_app.tasks")

    orders = [client.post(path, params={"item": "tea"}).json()["id"] for path in ("/orders", "/async-orders")]

    deadline = time.monotonic() + 30
    while {client.get(f"/orders/{order_id}").json()["state"] for order_id in orders} != {"charged"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
