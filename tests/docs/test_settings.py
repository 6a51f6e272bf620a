"""The reference of settings, columns and commands is that of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy.orm import sessionmaker

from celery_alchemy import Alchemy, ConfigurationError, SessionTask
from celery_alchemy.databases import sqlite_engine
from celery_alchemy.databases.tables import metadata
from celery_alchemy.messages import batches as pipeline
from celery_alchemy.messages import publisher
from celery_alchemy.operations.command_line import alchemy as command_line
from celery_alchemy.outbox import outbox, relay, result_records
from celery_alchemy.requests.planned_task import PlannedTask

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
SETTINGS = (REFERENCE / "settings.md").read_text(encoding="utf-8")
LONGEST = f"{relay.BACKOFF_MAX_SECONDS:g} s"
BACKOFF = f"{relay.MAX_FAILURES} times, {relay.BACKOFF_SECONDS * 2:g} s to {LONGEST} apart"
DESCRIPTORS = (property, classmethod, staticmethod)
PAUSE = f"{publisher.PAUSE_SECONDS:g} s"


def _names(page: str, heading: str | None = None) -> set[str]:
    """Return the names in the first column of the tables of a page, or of one of its sections."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    if heading is not None:
        text = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| `([\w-]+)[^`]*`", text, flags=re.MULTILINE))


def test_settings_of_an_alchemy_are_documented() -> None:
    """docs/reference/settings.md lists every keyword argument, and no other."""
    parameters = inspect.signature(Alchemy).parameters.values()

    assert _names("settings.md", "Of an Alchemy") == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_options_of_a_task_are_documented() -> None:
    """docs/reference/settings.md lists every option, and no other."""
    ours = {"abstract", "Request", "is_async", "is_once"}
    values = {name for name, value in vars(PlannedTask).items() if not callable(value) and not isinstance(value, DESCRIPTORS)}
    values |= {"around", "once"}  # A method, and what has no value on the class.

    assert _names("settings.md", "Of a task") == {name for name in values - ours if not name.startswith("_")}


def test_once_is_refused_beside_a_session_factory() -> None:
    """It would have no outbox to be owed in, and fail at its first retry."""
    app = Celery("factory", broker="memory://")
    base = type("FactoryTask", (SessionTask,), {"abstract": True, "session_factory": sessionmaker()})

    def charge() -> None: ...

    with pytest.raises(ConfigurationError, match="session_factory"):
        app.task(base=base, once=True, lazy=False, shared=False)(charge)


def test_columns_are_documented() -> None:
    """docs/reference/table.md has a line for every column of the tables of tasks, and no other."""
    outbox_table, steps_table = metadata.tables["celery_outbox"], metadata.tables["celery_steps"]

    assert _names("table.md", "The table celery_outbox") == set(outbox_table.columns.keys())
    assert _names("table.md", "The table celery_steps") == set(steps_table.columns.keys())
    results = metadata.tables["celery_results"]
    assert _names("table.md", "The table celery_results") == set(results.columns.keys())


def test_tables_are_documented() -> None:
    """docs/reference/table.md names every table of the library."""
    page = (REFERENCE / "table.md").read_text(encoding="utf-8")

    assert [name for name in metadata.tables if f"`{name}`" not in page and f"table {name}" not in page] == []


def test_commands_are_documented() -> None:
    """docs/reference/command-line.md has a line for every command, and no other."""
    assert _names("command-line.md") == set(command_line.commands)


def test_options_of_commands_are_documented() -> None:
    """Each stands in its command's line."""
    page = (REFERENCE / "command-line.md").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^\| `([\w-]+)(.*)$", page, flags=re.MULTILINE))
    options = {(name, option) for name, c in command_line.commands.items() for p in c.params for option in p.opts if option[0] == "-"}

    assert options
    assert {(name, option) for name, option in options if option not in lines[name]} == set()


@pytest.mark.parametrize(
    "line",
    [
        f"| Lease of the process that committed a message | {outbox.LEASE_SECONDS:g} s |",
        f"| Lease of a relay on a batch of {relay.BATCH_ROWS} messages | {relay.LEASE_SECONDS:g} s |",
        f"| A broker that was down is not tried again right after a commit for | {PAUSE} |",
        f"| A broker may take to confirm a message | {pipeline.CONFIRM_TIMEOUT_SECONDS:g} s |",
        f"| Publishing is tried, when the broker refuses a message | {BACKOFF} |",
        f"| Pruning | every {relay.PRUNE_EVERY_SECONDS:g} s, {relay.PRUNE_ROWS} records at a time until none is left |",
        f"| Pruning of results | every {relay.PRUNE_EVERY_SECONDS:g} s, {result_records.RESULT_ROWS} at a time until none is left |",
        f"| SQLite's busy time-out | {sqlite_engine.BUSY_TIMEOUT_SECONDS} s |",
        f"| `max_message_bytes` | {outbox.MAX_MESSAGE_BYTES // 2**20} MiB |",
    ],
)
def test_fixed_times_are_those_of_the_code(line: str) -> None:
    """Somebody who waits for a lease at night waits for as long as it lasts."""
    assert line in SETTINGS
