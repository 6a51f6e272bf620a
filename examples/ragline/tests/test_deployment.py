"""What is deployed: compose.yaml says what ragline understands, and the parts work on servers as it has them."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from kombu import Connection
from tests.services.availability import require
from tests.services.brokers import Brokers
from tests.services.databases import Databases

from pipelines import long_text
from ragline import cli
from ragline.settings import settings_from
from ragline.workers import stop
from servers import eventually, letter_vectors, serving

FOLDER = Path(__file__).parent.parent
REPOSITORY = FOLDER.parent.parent


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml, with values for what the person must set."""
    text = (FOLDER / "compose.yaml").read_text()
    filled = re.sub(r"\$\{(\w+):\?[^}]*\}", "0123456789abcdef", text)
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", filled)
    assert "${" not in filled
    compose = yaml.safe_load(filled)
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in compose["volumes"]
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def test_the_commands_of_compose_are_ragline_commands(services: dict[str, dict[str, Any]]) -> None:
    """Each is parsed as the image would; together the workers serve both queues."""
    commands = {name: service["command"] for name, service in services.items() if "build" in service}

    for arguments in commands.values():
        command: Any = typer.main.get_command(cli.cli)
        rest = list(arguments)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context("ragline", rest)

    queues = {arguments[2] for arguments in commands.values() if arguments[:2] == ["worker", "--queue"]}
    assert queues == set(settings_from({}).queue_names)


def test_the_settings_of_compose_are_ragline_settings(services: dict[str, dict[str, Any]]) -> None:
    """Every variable is one of the README's, and their values can be used."""
    documented = set(re.findall(r"RAGLINE_\w+", (FOLDER / "README.md").read_text()))
    for service in services.values():
        environment = service["environment"]
        if "build" not in service:
            continue
        assert set(environment) <= documented
        settings = settings_from(environment)
        assert settings.database_url.startswith("postgresql+psycopg://ragline:")
        assert settings.broker_url.startswith("amqp://ragline:")
    assert settings_from(services["serve"]["environment"]).token


def test_the_page_is_published_to_this_machine_alone(services: dict[str, dict[str, Any]]) -> None:
    """What is published at all is bound to 127.0.0.1: TLS is another's to speak."""
    ports = [port for service in services.values() for port in service.get("ports", ())]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_image_is_made_of_what_is_there() -> None:
    """Every path that is copied exists, and every extra that is installed is declared."""
    text = (FOLDER / "Dockerfile").read_text()
    declared = set(re.findall(r"^(\w+) = \[", (FOLDER / "pyproject.toml").read_text(), re.M))

    copied = [path for line in re.findall(r"^COPY (.*)$", text, re.M) for path in line.split()[:-1]]
    (installed,) = re.findall(r"ragline\[([\w,]+)\]", text)

    assert copied
    assert all((REPOSITORY / path).exists() for path in copied)
    assert set(installed.split(",")) <= declared
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text()
    assert all(f"!{path}\n" in ignored for path in copied)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings of a new installation on PostgreSQL and RabbitMQ."""
    databases, brokers = Databases(), Brokers()
    prefix = f"ragline-test-{secrets.token_hex(4)}"
    broker_url = require(brokers.server("rabbitmq")).url
    try:
        yield {
            "RAGLINE_HOME": str(tmp_path),
            "RAGLINE_DATABASE_URL": databases.open("postgresql", tmp_path).url,
            "RAGLINE_BROKER_URL": broker_url,
            "RAGLINE_QUEUES": prefix,
        }
    finally:
        databases.close()
        with Connection(broker_url) as connection, connection.channel() as channel:
            for kind in ("parsing", "embedding"):
                channel.queue_delete(f"{prefix}-{kind}")
                channel.exchange_delete(f"{prefix}-{kind}")


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, for the length of a block."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", "from ragline.cli import main; main()", *arguments],
        env={**os.environ, "COLUMNS": "300", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop(process)
        assert process.stdout is not None
        process.stdout.close()


def test_workers_of_their_own_for_parsing_and_embedding_on_servers(servers: dict[str, str]) -> None:
    """As on several machines: the page takes in, one worker parses, another embeds, the page finds.

    Without the second one the document waits for its vectors, and nothing is lost.
    """
    with serving(letter_vectors) as endpoint:
        environment = servers | {
            "RAGLINE_EMBEDDER": "openai",
            "RAGLINE_EMBEDDINGS_URL": endpoint.url,
            "RAGLINE_EMBEDDINGS_MODEL": "letters",
        }
        with (
            running("serve", "--port", "0", **environment) as served,
            running("worker", "--queue", "parsing", "--processes", "1", **environment),
        ):
            assert served.stdout is not None
            url = next(found[0] for line in served.stdout if (found := re.search(r"http://\S+", line)))
            with httpx.Client(base_url=url, timeout=30) as client:
                added = client.post("/api/documents", params={"name": "a.md"}, content=long_text("whale"))
                path = f"/api/documents/{added.json()['document']['id']}"
                eventually(lambda: client.get(path).json()["state"] == "embedding", seconds=60)
                waiting = client.get("/api/status").json()
                with running("worker", "--queue", "embedding", "--processes", "1", **environment):
                    eventually(lambda: client.get(path).json()["state"] == "ready", seconds=60)
                found = client.get("/api/search", params={"q": "whale", "mode": "vector"}).json()

    assert waiting["messages"]["owed"] >= 1
    assert len(waiting["workers"]) == 1
    assert found["passages"][0]["name"] == "a.md"
