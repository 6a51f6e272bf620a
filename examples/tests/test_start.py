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

EXAMPLES = Path(__file__).parent.parent
SECONDS = 60


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start(request: pytest.FixtureRequest, port: int, tmp_path: Path) -> Iterator[str]:
    """The URL of an example that was started as its README says; its data lies in a folder of the test."""
    environment = {**os.environ, "PORT": str(port), "EXAMPLE_FOLDER": str(tmp_path), "C_FORCE_ROOT": "1"}
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


@pytest.mark.parametrize("start", ["fastapi_app", "flask_app", "sqlmodel_app", "starlette_app"], indirect=True)
def test_order_is_charged_by_the_started_example(start: str, request: pytest.FixtureRequest) -> None:
    """An order that comes in by HTTP is charged by the worker beside the server."""
    _when_up(start)

    is_json = "sqlmodel" in request.node.name
    order = httpx.post(f"{start}/orders", **({"json": {"item": "tea"}} if is_json else {"params": {"item": "tea"}})).json()  # type: ignore[arg-type]

    deadline = time.monotonic() + SECONDS
    while httpx.get(f"{start}/orders/{order['id']}").json()["state"] != "charged":
        assert time.monotonic() < deadline
        time.sleep(0.05)
