"""What importing the package costs: the modules that it loads beyond those of Celery and SQLAlchemy."""

from __future__ import annotations

import subprocess
import sys

# What every application with Celery and SQLAlchemy's ORM has loaded before. The dialects are loaded by SQLAlchemy itself where
# the outbox's partial indexes name them.
BEFORE = """
import sys
from celery import Celery
import celery.canvas, celery.result, sqlalchemy.ext.compiler, sqlalchemy.orm, sqlite3
Celery("a").Task
import sqlalchemy.dialects.mysql, sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite
before = set(sys.modules)
import celery_alchemy
print(*sorted(set(sys.modules) - before))
"""

#: What a web application, a worker and a script all need.
LOADED = {
    "alchemy",
    "arguments",
    "body",
    "completion",
    "databases",
    "databases.generic",
    "databases.mysql",
    "databases.postgresql",
    "databases.sqlite",
    "engine",
    "entities",
    "errors",
    "events",
    "failure",
    "injection",
    "insight",
    "labels",
    "ledger",
    "message",
    "named_database",
    "once",
    "options",
    "outbox",
    "outcome",
    "owed",
    "pipeline",
    "publisher",
    "registry",
    "request",
    "reruns",
    "sending",
    "sessions",
    "tables",
    "task",
    "transaction",
    "transient",
}


def _loaded() -> set[str]:
    finished = subprocess.run([sys.executable, "-c", BEFORE], check=True, capture_output=True, text=True, timeout=60)
    return set(finished.stdout.split())


def test_import_loads_only_what_every_process_needs() -> None:
    """No event loop, no greenlet, no driver, no command line, no testing kit, no integration, and nothing that is not its own."""
    loaded = _loaded()

    assert loaded == {"celery_alchemy", *(f"celery_alchemy.{name}" for name in LOADED)}


def test_plugin_keeps_a_run_of_pytest_light() -> None:
    """Every project where the package is installed has it in its runs of pytest: without commands, a worker or a driver."""
    code = "import sys, celery_alchemy.testing.plugin; print(*sys.modules)"

    finished = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)

    heavy = {"aiosqlite", "celery.bin", "celery_alchemy.cli", "celery_alchemy.worker", "psycopg", "redis"}
    assert heavy & set(finished.stdout.split()) == set()
