"""`celery -A app alchemy ...` as people and programs run it: what it prints, what it does, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import enqueue
from celery_alchemy.databases.tables import metadata
from tests import forked
from tests.delivery.outbox_stand import OutboxStand
from tests.delivery.test_once import start
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.settings import environment
from tests.workers import ROOT

pytestmark = [
    pytest.mark.databases("sqlite", "postgresql", "mariadb"),
    pytest.mark.brokers("filesystem"),
]

Celery = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def celery(database: Database, broker: Broker, tmp_path: Path) -> Celery:
    """Run `celery -A <app> alchemy <arguments>` and return what it printed and its exit code."""

    def run(*arguments: str, app: str = "tests.delivery.command_app", url: str | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(ROOT), **environment(broker.settings, url or database.url)}
        return forked.run(["-A", app, "alchemy", *arguments], env=env, folder=tmp_path)

    return run


def test_missing_table_is_named_and_made(celery: Celery, database: Database) -> None:
    """Without tables: exit code 1 and the command to run; create-tables makes them, and a second time does no harm."""
    before = celery("status")
    made, again = celery("create-tables"), celery("create-tables")
    after = celery("status", "--json")

    assert before.returncode == 1
    assert "celery_outbox" in before.stderr
    assert "create-tables" in before.stderr
    assert "Traceback" not in before.stderr
    assert (made.returncode, again.returncode, after.returncode) == (0, 0, 0)
    assert "celery_outbox" in made.stdout
    assert json.loads(after.stdout) == {
        "waiting": 0,
        "leased": 0,
        "owed": 0,
        "completed": 0,
        "dead": 0,
        "oldest_seconds": None,
    }


#: Every command that needs the table.
NEEDING = ["check", "status", "dead", "revive --all", "prune", "relay --once"]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("command", NEEDING)
def test_every_command_says_in_a_sentence_that_the_table_is_missing(celery: Celery, command: str) -> None:
    """And which command makes it; a person is shown no traceback."""
    ended = celery(*command.split())

    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "celery_outbox" in said
    assert "create-tables" in said
    assert "Traceback" not in said


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("command", [*NEEDING, "create-tables"])
def test_every_command_says_in_a_sentence_that_the_database_is_away(celery: Celery, command: str) -> None:
    """With the reason, and without the password of its URL."""
    ended = celery(*command.split(), url="postgresql+psycopg://shop:hunter2@127.0.0.1:1/shop")

    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert "The database cannot be used" in said
    assert "Traceback" not in said
    assert "hunter2" not in said


@pytest.mark.databases("sqlite")
def test_every_command_answers_programs(celery: Celery) -> None:
    """`--json` prints one object, or one list."""
    commands = ("create-tables", "check", "status", "dead", "revive --all", "prune", "relay --once")
    answers = {command: json.loads(celery(*command.split(), "--json").stdout) for command in commands}

    assert answers.pop("status")["waiting"] == 0
    assert answers == {
        "create-tables": {"tables": sorted(metadata.tables)},
        "check": answers["check"],
        "dead": [],
        "revive --all": {"revived": 0},
        "prune": {"deleted": 0},
        "relay --once": {"handled": 0},
    }


def test_dead_tasks_are_shown_revived_and_sent(celery: Celery, database: Database, broker: Broker) -> None:
    """Status counts them, dead says why, revive and relay --once send them under their old ids."""
    stand = OutboxStand(database, broker)
    dead_id = fail_for_good(stand)
    with stand.broker_down(), stand.alchemy.begin() as session:
        enqueue(session, stand.effect.s("waits"))
    stand.make_due()

    status, dead = celery("status", "--json"), celery("dead", "--json")
    dead_text = celery("dead")
    revived = celery("revive", dead_id)
    relayed = celery("relay", "--once")
    sent = stand.sent()
    stand.close()

    counts = json.loads(status.stdout)
    assert (counts["waiting"], counts["dead"]) == (1, 1)
    assert counts["oldest_seconds"] > 0
    [row] = json.loads(dead.stdout)
    assert (row["task_id"], row["task_name"], row["error"]) == (dead_id, "fails", "LookupError: no such book")
    assert dead_id in dead_text.stdout
    assert "LookupError: no such book" in dead_text.stdout
    assert (revived.returncode, revived.stdout.split()[0]) == (0, "1")
    assert (relayed.returncode, relayed.stdout.split()[0]) == (0, "2")
    assert sorted(one.task for one in sent) == ["effect", "fails"]
    assert dead_id in {one.id for one in sent}


def fail_for_good(stand: OutboxStand) -> str:
    @stand.task(name="fails", once=True)
    def fails(session: Session) -> None:
        raise LookupError("no such book")

    sent = start(stand, fails)
    stand.deliver(sent)
    return sent.id


@pytest.mark.databases("sqlite")
def test_old_records_are_pruned(celery: Celery, database: Database, broker: Broker) -> None:
    """Prune deletes completion records that are older than the window, and says how many."""
    stand = OutboxStand(database, broker)

    @stand.task(name="done", once=True)
    def done(session: Session) -> None:
        return None

    for _ in range(2):
        stand.deliver(start(stand, done))
    first = stand.outbox("id")[0]
    stand.database.execute("UPDATE celery_outbox SET completed_at = '2020-01-01 00:00:00' WHERE id = :id", id=first)
    stand.close()

    pruned = celery("prune")

    assert (pruned.returncode, pruned.stdout.split()[0]) == (0, "1")
    assert stand.outbox("id") != [first]
    assert len(stand.outbox("id")) == 1


@pytest.mark.databases("sqlite")
def test_revive_refuses_what_it_cannot_do(celery: Celery, database: Database, broker: Broker) -> None:
    """Without ids or --all it is a misuse; of ids that are not of dead tasks it tells how many."""
    OutboxStand(database, broker).close()

    nothing, both, unknown, everything = (
        celery("revive"),
        celery("revive", "--all", "x"),
        celery("revive", "x"),
        celery("revive", "--all"),
    )

    assert (nothing.returncode, both.returncode, unknown.returncode, everything.returncode) == (2, 2, 1, 0)
    assert "--all" in nothing.stderr
    assert "1 of the ids" in unknown.stderr
    assert unknown.stdout == everything.stdout == "0 revived.\n"


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("app", "says"),
    [("tests.apps.plain", "has no Alchemy"), ("no_such_module", "no_such_module")],
    ids=["app without Alchemy", "unknown module"],
)
def test_app_that_cannot_serve_is_named(celery: Celery, app: str, says: str) -> None:
    """A person who mistyped the module reads what is wrong and no traceback."""
    ended: Any = celery("status", app=app)

    assert ended.returncode in {1, 2}
    assert says in ended.stderr + ended.stdout
    assert "Traceback" not in ended.stderr


@pytest.mark.databases("sqlite")
def test_every_command_is_listed(celery: Celery) -> None:
    """Help names each command with a line that says what it does."""
    ended = celery("--help")

    commands = {"create-tables", "status", "dead", "revive", "prune", "relay"}
    described = {line.split()[0] for line in ended.stdout.splitlines() if len(line.split()) > 2}
    assert ended.returncode == 0
    assert commands <= described
