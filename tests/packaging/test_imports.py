"""What importing the package costs: the modules that it loads beyond those of Celery and SQLAlchemy."""

from __future__ import annotations

import subprocess
import sys

# What every application with Celery and SQLAlchemy's ORM has loaded before. The dialects are loaded by SQLAlchemy itself where
# the outbox's partial indexes name them. Celery's tracer runs what is sent in an eager app.
BEFORE = """
import sys
from celery import Celery
import celery.app.trace, celery.canvas, celery.result, sqlalchemy.ext.compiler, sqlalchemy.orm, sqlite3
Celery("a").Task
import sqlalchemy.dialects.mysql, sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite
before = set(sys.modules)
import celery_alchemy
print(*sorted(set(sys.modules) - before))
"""

#: What only some processes need: an event loop, a worker, the command line, tests, a framework.
OF_SOME_PROCESSES = {
    "integrations",
    "operations",
    "outbox.relay",
    "requests.async_body",
    "requests.event_loop",
    "sessions.async_engine",
    "testing",
    "worker",
}
#: Of Celery and the standard library: what a fork looks through, and what it shares with its parent.
OF_OTHERS = {"celery.utils.saferepr", "gc", "mmap"}


def _loaded() -> set[str]:
    finished = subprocess.run([sys.executable, "-c", BEFORE], check=True, capture_output=True, text=True, timeout=60)
    return set(finished.stdout.split())


def test_import_loads_only_what_every_process_needs() -> None:
    """No event loop, no greenlet, no driver, no command line, no testing kit, no integration, and nothing that is not its own."""
    loaded = _loaded()
    own = {name for name in loaded if name.split(".")[0] == "celery_alchemy"}

    assert loaded - own <= OF_OTHERS
    assert [
        name for name in sorted(own) for kept_out in OF_SOME_PROCESSES if f"{name}.".startswith(f"celery_alchemy.{kept_out}.")
    ] == []


def test_plugin_keeps_a_run_of_pytest_light() -> None:
    """Every project where the package is installed has it in its runs of pytest: without commands, a worker or a driver."""
    code = "import sys, celery_alchemy.testing.plugin; print(*sys.modules)"

    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)

    heavy = {"aiosqlite", "celery.bin", "celery_alchemy.operations.command_line", "celery_alchemy.worker.parent", "psycopg", "redis"}
    assert heavy & set(finished.stdout.split()) == set()
