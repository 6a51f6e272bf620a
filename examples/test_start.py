"""Each web application starts with the one command of its README, with a real server and a real worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.services.brokers import Brokers
from tests.services.databases import Databases

EXAMPLES = Path(__file__).parent
SECONDS = 60


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables that take an example to servers: a database and a queue of the test's own; empty without servers."""
    if not getattr(request, "param", False):
        yield {}
        return
    databases, brokers = Databases(), Brokers()
    database, broker = databases.open("postgresql", tmp_path), brokers.open("redis", tmp_path)
    yield {"DATABASE_URL": database.url, "BROKER_URL": broker.settings["broker_url"], "QUEUE": broker.prefix}
    with redis.Redis.from_url(broker.settings["broker_url"]) as client:
        client.delete(broker.prefix, f"_kombu.binding.{broker.prefix}")
    databases.close()


@pytest.fixture
def start(request: pytest.FixtureRequest, port: int, tmp_path: Path, servers: dict[str, str]) -> Iterator[str]:
    """The URL of an example that was started as its README says; its data lies in a folder of the test."""
    environment = {**os.environ, **servers, "PORT": str(port), "EXAMPLE_FOLDER": str(tmp_path), "C_FORCE_ROOT": "1"}
    process = subprocess.Popen([sys.executable, "-m", request.param], cwd=EXAMPLES, env=environment, start_new_session=True)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _when_up(url: str) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            httpx.get(url)
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("start", "servers"),
    [("fastapi_app", False), ("fastapi_app", True), ("flask_app", False), ("sqlmodel_app", False), ("starlette_app", False)],
    indirect=True,
)
def test_order_is_charged_by_the_started_example(start: str, request: pytest.FixtureRequest) -> None:
    """An order that comes in by HTTP is charged by the worker beside the server; without servers, and on PostgreSQL and Redis."""
    _when_up(start)

    is_json = "sqlmodel" in request.node.name
    order = httpx.post(f"{start}/orders", **({"json": {"item": "tea"}} if is_json else {"params": {"item": "tea"}})).json()  # type: ignore[arg-type]

    deadline = time.monotonic() + SECONDS
    while httpx.get(f"{start}/orders/{order['id']}").json()["state"] != "charged":
        assert time.monotonic() < deadline
        time.sleep(0.05)
