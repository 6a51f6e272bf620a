"""A process that ends hands over first what it has committed, whatever kind of process it is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import StartWorker
from tests.delivery.ends import QUEUE_VARIABLE, SLOW_SECONDS_VARIABLE, WAYS
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.settings import environment
from tests.waiting import eventually
from tests.workers import ROOT

pytestmark = [pytest.mark.databases("postgresql"), pytest.mark.brokers("redis")]


@pytest.fixture
def variables(database: Database, broker: Broker) -> dict[str, str]:
    """Variables of a process that sends to a queue of the test's own."""
    from celery_alchemy.databases.tables import metadata

    metadata.create_all(database.engine)
    handed_over = environment(broker.settings, database.url)
    return {
        **os.environ,
        **handed_over,
        "PYTHONPATH": str(ROOT),
        QUEUE_VARIABLE: f"{broker.prefix}.elsewhere",
    }


def run(way: str, variables: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a process to its end."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.delivery.ends", way]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**variables, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def left(database: Database) -> int:
    """Return how many messages the outbox holds."""
    return int(database.rows("SELECT count(*) FROM celery_outbox")[0][0])


@pytest.mark.parametrize("way", WAYS)
def test_process_ends_when_its_messages_are_handed_over(
    database: Database, broker: Broker, variables: dict[str, str], way: str
) -> None:
    """No relay runs: the broker has each message once, and the outbox is empty, as it ends."""
    ended = run(way, variables)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert broker.pending(variables[QUEUE_VARIABLE]) == WAYS[way][1]
    assert left(database) == 0


def test_process_does_not_wait_for_ever_and_says_what_it_leaves(database: Database, variables: dict[str, str]) -> None:
    """A broker that hangs holds up no process: its log names how many messages the relay has to send."""
    ended = run("script", variables, **{SLOW_SECONDS_VARIABLE: "3600"})

    assert ended.returncode == 0
    assert "1 messages were committed and not handed to the broker" in ended.stderr
    assert left(database) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_worker_that_is_stopped_hands_over_what_its_tasks_have_sent(
    database: Database,
    broker: Broker,
    variables: dict[str, str],
    start_worker: StartWorker,
    pool: Any,
) -> None:
    """Children of the prefork pool end by `os._exit` and run nothing that is registered with atexit."""
    elsewhere = variables[QUEUE_VARIABLE]
    worker = start_worker("tests.delivery.ends", pool=pool, env={QUEUE_VARIABLE: elsewhere})
    broker.client.send_task("sends", ("sent",)).get(timeout=30, interval=0.02)
    worker.stop()

    assert broker.pending(elsewhere) == 1
    assert left(database) == 0


def test_web_server_that_is_stopped_has_handed_over_what_it_has_answered(
    database: Database, broker: Broker, variables: dict[str, str], tmp_path: Path
) -> None:
    """Uvicorn ends by the signal itself, so that nothing runs at its exit; it is out before that."""
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "web.py").write_text(WEB)
    command = [sys.executable, "-m", "uvicorn", "web:application", "--port", str(port)]
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    server = subprocess.Popen(
        [*command, "--log-level", "error"],
        cwd=ROOT,
        env={**variables, "PYTHONPATH": path, SLOW_SECONDS_VARIABLE: "0"},
    )
    try:
        eventually(lambda: b"204" in request(port), what="uvicorn answers")
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    finally:
        server.kill()

    assert broker.pending(variables[QUEUE_VARIABLE]) == 1
    assert left(database) == 0


def request(port: int) -> bytes:
    """Ask the server for its only page; empty while it does not answer."""
    with (
        contextlib.suppress(ConnectionRefusedError),
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        return connection.recv(1000)
    return b""


WEB = """
import asyncio

from tests.delivery.ends import send


async def application(scope, receive, answer):
    if scope["type"] == "http":
        await asyncio.to_thread(send)
        await answer({"type": "http.response.start", "status": 204, "headers": []})
        await answer({"type": "http.response.body", "body": b""})
"""
