"""What lets the examples start without a server: a database, a broker and results in one folder, and one command for all.

An application of your own has URLs here, of PostgreSQL and of Redis or RabbitMQ. So have these: DATABASE_URL and BROKER_URL.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PORT = int(os.environ.get("PORT", "8000"))
FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", ".data"))


def database_url(name: str) -> str:
    """Return the URL of an example's database: DATABASE_URL, or a SQLite file in the folder."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    return os.environ.get("DATABASE_URL") or f"sqlite:///{FOLDER.resolve() / name}.db"


def celery_settings(name: str) -> dict[str, Any]:
    """Return the broker and the results of an example: BROKER_URL for both, or files in the folder."""
    url = os.environ.get("BROKER_URL")
    if url:
        return {"broker_url": url, "result_backend": url, "task_default_queue": os.environ.get("QUEUE", name)}
    folder = FOLDER.resolve() / name
    for part in ("messages", "control", "results"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return {
        "broker_url": "filesystem://",
        "broker_transport_options": {
            "data_folder_in": str(folder / "messages"),
            "data_folder_out": str(folder / "messages"),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.1,
        },
        "result_backend": f"file://{folder / 'results'}",
        # Seconds until the loss of a child is believed; 10 by default, which is long for a test that kills one.
        "worker_lost_wait": 0.2,
    }


@contextmanager
def worker(app: str) -> Iterator[None]:
    """Run ``celery -A app worker`` as a process of its own inside of the block."""
    command = [sys.executable, "-m", "celery", "-A", app, "worker", "-c", "1", "-l", "INFO", "--without-gossip", "--without-mingle"]
    process = subprocess.Popen(command, env={"C_FORCE_ROOT": "1", **os.environ})
    try:
        yield
    finally:
        process.terminate()
        process.wait()
