"""The shop with Starlette's TestClient, and tasks as a worker would run them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from celery_alchemy import Alchemy
from celery_alchemy.testing import Sent
from starlette_app import tasks
from starlette_app.tasks import charge
from starlette_app.web import web


@pytest.fixture
def alchemy() -> Alchemy:
    """What the fixtures of celery-alchemy work on."""
    return tasks.alchemy


@pytest.fixture(scope="module", autouse=True)
def _tables() -> Iterator[None]:
    tasks.create_tables()
    yield
    tasks.alchemy.engine.dispose()


@pytest.fixture
def client() -> TestClient:
    """Sends requests."""
    return TestClient(web)


# <tests>
@pytest.mark.usefixtures("joined_transaction", "no_leaks")
def test_order_is_taken_and_charged(client: TestClient, sent: Sent) -> None:
    """Web and task are async, in two event loops, and see the same rows of one transaction."""
    order_id = client.post("/orders", params={"item": "tea"}).json()["id"]

    assert sent == [charge.s(order_id)]
    assert [run.result for run in sent.run()] == ["tea"]
    assert client.get(f"/orders/{order_id}").json() == {"item": "tea", "state": "charged"}


# </tests>


@pytest.mark.usefixtures("joined_transaction")
def test_request_that_dies_before_its_commit_sends_nothing(sent: Sent, crash_at: Any) -> None:
    """Neither is there an order."""

    async def take_order() -> None:
        # In this thread's event loop: that of a TestClient dies with the crash, and the client with it.
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=web), base_url="http://shop") as client:
            await client.post("/orders", params={"item": "tea"})

    with crash_at("COMMIT, before"):
        asyncio.run(take_order())

    assert sent == []
