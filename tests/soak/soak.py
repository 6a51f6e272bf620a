"""Runs a soak and prints its accounts: lost, doubled, ghosts, kills.

`make soak MINUTES=10 DATABASE=postgresql BROKER=redis`, or `python -m tests.soak --help`. It makes a database of its own on the
server and uses a key prefix or queues of its own in the broker.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery_alchemy.databases.tables import metadata
from tests.broker.lines import database_broker
from tests.services.brokers import Broker, Brokers
from tests.services.databases import Database, Databases
from tests.settings import environment
from tests.soak.chaos import Chaos
from tests.soak.fleet import Member, members
from tests.soak.ledger import Accounts, Base, accounts
from tests.waiting import eventually

#: Until the producers must have sent something, and until nothing may be under way any more.
START_SECONDS = 90.0
DRAIN_SECONDS = 300.0


@dataclass(frozen=True)
class Report:
    """How a soak ended.

    Attributes:
        accounts: Promises against effects.
        harm: How often each kind of harm was done.
        kills: Processes that were killed.
        restarts: Processes that ended without having been killed and were started again.
        rollbacks: Transactions and SAVEPOINTs that sent something and rolled back.
        drained_seconds: How long it took from the last harm until nothing was under way.
    """

    accounts: Accounts
    harm: dict[str, int]
    kills: int
    restarts: int
    rollbacks: int
    drained_seconds: float

    @property
    def passed(self) -> bool:
        """Everything adds up, and the run was worth something."""
        return self.accounts.add_up and self.accounts.promised > 0 and self.rollbacks > 0 and self.kills > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers that are printed."""
        return {
            "tasks": self.accounts.promised,
            "lost": len(self.accounts.lost),
            "doubled": len(self.accounts.doubled),
            "ghosts": len(self.accounts.ghosts),
            "kills": self.kills,
            "open": self.accounts.open,
            "dead": self.accounts.dead,
            "rollbacks": self.rollbacks,
            "ended by themselves": self.restarts,
            "drained after seconds": round(self.drained_seconds, 1),
            "harm": self.harm,
        }


def soak(
    database: Database,
    broker: Broker,
    folder: Path,
    seconds: float,
    *,
    workers: int = 2,
    relays: int = 2,
    producers: int = 2,
    rate: float = 4.0,
    strike_seconds: float = 1.0,
    seed: int = 0,
) -> Report:
    """Run everything for a while, harm it, let it drain, and compare.

    Args:
        database: Empty.
        broker: Empty.
        folder: For logs.
        seconds: How long harm is done.
        workers: Worker processes of three children each.
        relays: Relays that run alone.
        producers: Producer processes.
        rate: Transactions of each producer in a second.
        strike_seconds: Time between two harms, on average.
        seed: Of the choice of harms.
    """
    Base.metadata.create_all(database.engine)
    metadata.create_all(database.engine)
    settings = dict(broker.settings)
    if broker.name == "alchemy":
        # The app's Alchemy is it.
        del settings["broker_url"]
    variables = environment(settings, database.url)
    fleet = members(folder, variables, broker.prefix, workers=workers, relays=relays, producers=producers, rate=rate)
    chaos = Chaos(fleet, database, broker, seed)
    try:
        for member in fleet:
            member.start()
        rollbacks = folder / "rollbacks"
        # On a busy machine a producer may be killed each time before it has come to do anything.
        eventually(
            lambda: rollbacks.exists() and accounts(database).promised > 0,
            timeout=START_SECONDS,
            what="the producers send",
        )
        restarts = _harm(fleet, chaos, seconds, strike_seconds)
        chaos.end()
        drained_seconds = _drain(fleet, database, broker)
        return Report(
            accounts(database),
            dict(sorted(chaos.done.items())),
            chaos.kills,
            restarts,
            rollbacks.stat().st_size if rollbacks.exists() else 0,
            drained_seconds,
        )
    finally:
        for member in fleet:
            member.clean_up()


def _harm(fleet: Sequence[Member], chaos: Chaos, seconds: float, strike_seconds: float) -> int:
    ends = time.monotonic() + seconds
    by_themselves = 0
    while time.monotonic() < ends:
        by_themselves += sum(member.keep() for member in fleet)
        chaos.strike()
        for member in fleet:
            member.keep()
        time.sleep(random.uniform(0.5, 1.5) * strike_seconds)
    return by_themselves


def _drain(fleet: Sequence[Member], database: Database, broker: Broker) -> float:
    """Stop the producers and wait until nothing is under way: no promise unkept, no row open, no message in the broker."""
    began = time.monotonic()
    workers = [member for member in fleet if member.role == "worker"]
    for worker in workers:
        # billiard's blocking pool, which Celery uses with the file-system broker, stands still for ever when the
        # child that waits for the next job is killed: it held the queue's lock. An operator would start it anew, too.
        worker.kill_group()
    for member in fleet:
        member.keep()
        if member.role == "producer":
            member.terminate()
    survivors = [member for member in fleet if member.role != "producer"]
    while time.monotonic() < began + DRAIN_SECONDS:
        for member in survivors:
            member.keep()
        if accounts(database).settled and broker.pending() == 0:
            break
        time.sleep(0.5)
    seconds = time.monotonic() - began
    # What is being run a second time now is finished, and counted.
    for worker in workers:
        worker.terminate()
    return seconds


# --- the command ---------------------------------------------------------------------------------------------------------


_DATABASE_VARIABLES = {
    "postgresql": "TEST_POSTGRESQL_URL",
    "mysql": "TEST_MYSQL_URL",
    "mariadb": "TEST_MYSQL_URL",
}
_BROKER_VARIABLES = {"redis": "TEST_REDIS_URL", "amqp": "TEST_AMQP_URL", "rabbitmq": "TEST_AMQP_URL"}


def _database_kind(given: str) -> str:
    """Return the kind of a database that is given by its name or by a URL of its server, which is noted."""
    kind = given.split("://", maxsplit=1)[0].split("+", maxsplit=1)[0]
    if "://" in given and kind in _DATABASE_VARIABLES:
        os.environ[_DATABASE_VARIABLES[kind]] = given
    return {"mysql": "mariadb"}.get(kind, kind)


def _broker_kind(given: str) -> str:
    """Return the kind of a broker that is given by its name or by its URL, which is noted."""
    kind = given.split("://", maxsplit=1)[0]
    if "://" in given and kind in _BROKER_VARIABLES:
        os.environ[_BROKER_VARIABLES[kind]] = given
    return {"amqp": "rabbitmq"}.get(kind, kind)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long harm is done (default: 10)")
    parser.add_argument("--database", default="sqlite", help="sqlite, postgresql, mariadb, or the URL of a server")
    parser.add_argument("--broker", default="filesystem", help="filesystem, redis, rabbitmq, the URL of a server, or alchemy")
    parser.add_argument("--seed", type=int, default=None, help="of the choice of harms; printed")
    parser.add_argument("--rate", type=float, default=4.0, help="transactions of each producer in a second")
    return parser.parse_args()


def main() -> None:
    """Run a soak as the command line asks; exit with 1 unless lost, doubled and ghosts, and what is open or dead, are 0."""
    arguments = _arguments()
    # The processes must not outlive a soak that is ended from outside.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="celery-alchemy-soak-"))
    databases, brokers = Databases(), Brokers()
    database = databases.open(_database_kind(arguments.database), folder)
    kind = _broker_kind(arguments.broker)
    broker = database_broker(database, folder) if kind == "alchemy" else brokers.open(kind, folder)
    _say(f"{arguments.minutes:g} minutes on {database.name} and {broker.name}, seed {seed}, logs in {folder}")
    try:
        report = soak(database, broker, folder, arguments.minutes * 60, rate=arguments.rate, seed=seed)
        _tell(report)
        if not report.passed:
            _keep_rows(database, folder)
    finally:
        broker.close()
        databases.close()
    sys.exit(0 if report.passed else 1)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _tell(report: Report) -> None:
    for name, value in report.as_dict().items():
        _say(f"{name:<22} {value}")
    for kind in ("lost", "doubled", "ghosts"):
        for name in getattr(report.accounts, kind)[:10]:
            _say(f"{kind}: {name}")


def _keep_rows(database: Database, folder: Path) -> None:
    """Leave what tells how it came to this beside the logs; the database is dropped."""
    path = folder / "rows.json"
    queries = {"outbox": "SELECT * FROM celery_outbox", "effects": "SELECT name, task_id FROM soak_effect"}
    path.write_text(json.dumps({name: database.rows(query) for name, query in queries.items()}, default=str))
    _say(f"rows in {path}")
