"""Lets everything die that has a name, once for each pair of database and broker, and keeps what is left for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from celery_alchemy.databases.tables import metadata
from tests.crash.injection import STRUCK_VARIABLE
from tests.crash.points import (
    ASYNC_STEP_POINTS,
    CHILD_POINTS,
    CONFIRM_POINTS,
    DEATH_POINTS,
    PARENT_POINTS,
    PRODUCER_POINTS,
    RELAY_POINTS,
    SENT_BY_COMMIT_POINTS,
    STEP_POINTS,
    TAKEN_CHILD_POINTS,
    TAKER_POINTS,
    Extent,
    Fault,
    faults,
)
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.settings import environment
from tests.soak.fleet import Member
from tests.soak.ledger import Base, accounts
from tests.waiting import eventually
from tests.workers import ROOT

SETTLE_SECONDS = 120.0
ROUNDS = 8
#: How many faults that end whole workers are sent together: each has the others' tasks delivered again, a little later each time.
WHOLE_AT_ONCE = 10
AFTER_SECONDS = 1.0


@dataclass(frozen=True)
class Aftermath:
    """What is left when everything has died and the survivors had their time.

    Attributes:
        database: With promises, effects and the outbox.
        broker: With the results.
        folder: With a file for each fault that struck.
        faults: Everything that was to die.
        task_ids: Of the tasks that carried a fault into a worker, by the fault's name.
    """

    database: Database
    broker: Broker
    folder: Path
    faults: Sequence[Fault]
    task_ids: dict[str, str]

    def unstruck(self) -> list[Fault]:
        """Return the faults whose point nothing has reached."""
        return [fault for fault in self.faults if not (self.folder / fault.slug).exists()]

    def doomed(self) -> dict[str, str]:
        """Return the ids of the tasks that were sent to die for good, by the fault's name."""
        slugs = tuple(fault.slug for fault in self.faults if fault.point in DEATH_POINTS)
        return {name: task_id for name, task_id in self.task_ids.items() if name.startswith(slugs)}


@dataclass(frozen=True)
class _Plan:
    producers: list[Fault]
    relays: list[Fault]
    workers: list[Fault]


def _plan(database: Database, broker: Broker, extent: Extent) -> _Plan:
    """Choose the faults."""
    has_server = database.name != "sqlite"
    # aiomysql 0.3.2, which serves without asyncmy, cannot send bytes with PyMySQL 1.2.
    has_driver = database.name != "mariadb" or find_spec("asyncmy") is not None
    of_coroutines = ASYNC_STEP_POINTS if has_driver else ()
    of_bodies = [*DEATH_POINTS, *STEP_POINTS, *of_coroutines, *PARENT_POINTS]
    if broker.name == "alchemy":
        of_worker = faults([*TAKEN_CHILD_POINTS, *of_bodies, *TAKER_POINTS], has_server=has_server, extent=extent)
        # What would be wiped is the database.
        of_worker = [fault for fault in of_worker if fault.action != "wipe"]
        return _Plan(faults(SENT_BY_COMMIT_POINTS, has_server=has_server), [], of_worker)
    confirms = CONFIRM_POINTS if broker.name == "rabbitmq" else ()
    return _Plan(
        faults([*PRODUCER_POINTS, *confirms[:1]], has_server=has_server),
        faults([*RELAY_POINTS, *confirms[1:]], has_server=has_server),
        faults([*CHILD_POINTS, *of_bodies], has_server=has_server, extent=extent),
    )


def make_aftermath(database: Database, broker: Broker, folder: Path, extent: Extent) -> Aftermath:
    """Let everything die, and wait until what survives has settled all accounts.

    Raises:
        AssertionError: A fork did not end as its fault lets expect, or the accounts did not settle in time.
    """
    Base.metadata.create_all(database.engine)
    metadata.create_all(database.engine)
    plan = _plan(database, broker, extent)
    struck = folder / "struck"
    struck.mkdir()
    # The app's own database: it is told by its Alchemy which one.
    url = {"broker_url": "alchemy://"} if broker.name == "alchemy" else {}
    handed_over = environment(broker.settings | url, database.url)
    variables = {
        **os.environ,
        **handed_over,
        "C_FORCE_ROOT": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        STRUCK_VARIABLE: str(struck),
    }
    _fork("producers", plan.producers, variables)
    _fork("relays", plan.relays, variables)
    _fork("poison", [], variables)
    everything = [*plan.producers, *plan.relays, *plan.workers]
    aftermath = Aftermath(database, broker, struck, everything, {})
    _work(aftermath, variables, folder)
    return aftermath


def _ends_worker(fault: Fault) -> bool:
    return fault.action in ("kill worker", "wipe")


def _fork(what: str, chosen: Sequence[Fault], variables: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.forks", what],
        input=json.dumps([[fault.point, fault.action] for fault in chosen]),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-10_000:]
    return done.stdout


def _give_time_to(aftermath: Aftermath, left: Sequence[Fault]) -> None:
    """Wait a little for what dies after its account is settled: when it stores its result, or acknowledges."""
    deadline = time.monotonic() + AFTER_SECONDS
    while time.monotonic() < deadline and not set(aftermath.unstruck()).isdisjoint(left):
        time.sleep(0.02)


def _work(aftermath: Aftermath, variables: dict[str, str], folder: Path) -> None:
    """Keep a worker running until everything that is to die in it has died and nothing is under way."""
    command = [sys.executable, "-m", "tests.crash.forks", "worker", "-P", "prefork", "-c", "3", "-l", "INFO"]
    command += ["-Q", aftermath.broker.prefix, "--without-gossip", "--without-mingle", "--without-heartbeat"]
    worker = Member("worker", "worker", command, variables, folder)
    worker.start()

    def is_settled() -> bool:
        now = accounts(aftermath.database)
        assert now.lost == [], now.lost
        assert (now.open, now.dead) == (0, 1 + len(aftermath.doomed())), now
        assert aftermath.broker.pending() == 0
        # What a killed worker had is due again when it counts as lost, though its task may be completed.
        claimed = aftermath.database.scalar("SELECT count(*) FROM celery_outbox WHERE claim IS NOT NULL")
        assert claimed == 0, f"{claimed} messages are claimed"
        return True

    try:
        # Alone: the starts of the poison are counted, and the death of a worker takes those with it that are not in the body yet.
        eventually(is_settled, timeout=SETTLE_SECONDS, interval=0.1, what="the poison is dead")
        # What dies first may spare others their death: a task that another's worker takes over does not publish.
        # Those that kill whole workers come last.
        for whole in (False, True):
            of_kind = [fault for fault in aftermath.faults if _ends_worker(fault) == whole]
            together = WHOLE_AT_ONCE if whole else len(of_kind)
            for _ in range(ROUNDS + len(of_kind) // WHOLE_AT_ONCE):
                left = [fault for fault in aftermath.unstruck() if fault in of_kind][:together]
                if not left:
                    break
                aftermath.task_ids.update(json.loads(_fork("senders", left, variables)))
                eventually(is_settled, timeout=SETTLE_SECONDS, interval=0.1, what="all accounts are settled")
                _give_time_to(aftermath, left)
        # Copies that the worker has taken already are reported done; what runs a second time now may finish, and is counted.
        time.sleep(AFTER_SECONDS)
        worker.terminate()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{worker.log[-20_000:]}") from None
    finally:
        worker.clean_up()
