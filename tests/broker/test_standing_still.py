"""A worker that stands still in mid-transaction, as with a machine that is paused: its locks hold up no other worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from kombu import Connection, Queue
from sqlalchemy import select, text, update

from celery_alchemy.broker.homes import home_for
from celery_alchemy.broker.tables import begun
from celery_alchemy.broker.workers import Released, enlist, release_lost
from celery_alchemy.databases.tables import metadata
from tests.broker.broker_stand import BrokerStand, write
from tests.broker.lines import Line
from tests.services.databases import Database
from tests.waiting import eventually
from tests.workers import ROOT

#: A worker that stands still for good when one of the functions has changed rows for the first time, before their COMMIT.
STANDS_STILL = """
import signal, sys, threading
from celery import Celery
from kombu import Queue
from celery_alchemy import Alchemy
from celery_alchemy.broker import heart, taking
from tests.broker.lines import Line

def stand_still(module, name):
    really = getattr(module, name)

    def stop(*args):
        changed = really(*args)
        if changed:
            # To this thread: one that is sent to the process may reach another thread first, and this one commits.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return changed

    setattr(module, name, stop)

url, where = sys.argv[1:]
app = Celery("still", set_as_current=False)
Alchemy(app, url, broker=True, worker_lost_after=1)
stand_still(*{"taking": (taking, "take"), "beating": (heart, "beat")}[where])
with app.connection() as connection, Line(connection).consuming(Queue("jobs")) as heard:
    print("here", flush=True)
    heard.drain(600)
"""

pytestmark = pytest.mark.databases("postgresql", "mariadb")


def test_what_a_lost_worker_has_locked_holds_up_nobody(stand: BrokerStand, database: Database) -> None:
    """The messages of another lost worker are due at once, its own when its locks are gone."""
    task = stand.task(write, name="write")
    home = home_for("", stand.app.conf.broker_transport_options)
    engine = home.taking_engine()
    sent = {name: task.delay(name).id for name in ("paused", "gone", "working")}
    with begun(home.place, engine) as tables:
        for name, task_id in sent.items():
            enlist(tables, name, 60 if name == "working" else -1, None)
            c = tables.messages.c
            tables.run(update(tables.messages).where(c.task_id == task_id).values(claim=name, due_at=None))

    def release() -> Released:
        with begun(home.place, engine) as tables:
            return release_lost(tables, "working", 5)

    found: list[Released] = []
    with database.engine.begin() as paused:
        paused.execute(text("UPDATE celery_workers SET lock_file = 'none' WHERE id = 'paused'"))
        paused.execute(text("UPDATE celery_outbox SET failures = 7 WHERE claim = 'paused'"))
        thread = threading.Thread(target=lambda: found.append(release()))
        thread.start()
        thread.join(5)
        is_held_up = thread.is_alive()
        paused.rollback()
    thread.join(30)

    assert not is_held_up
    assert found == [Released(due=1, poisonous=0)]
    assert release() == Released(due=1, poisonous=0)
    with begun(home.place, engine) as tables:
        c = tables.messages.c
        assert tables.run(select(c.task_id).where(c.claim.is_not(None))).scalars().all() == [sent["working"]]
    engine.dispose()


@contextmanager
def standing_still(database: Database, where: str) -> Iterator[None]:
    """Run a worker that soon stands still in mid-transaction."""
    command = [sys.executable, "-c", STANDS_STILL, database.url, where]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    try:
        eventually(lambda: _is_stopped(process.pid), timeout=20, what="it stands still")
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)


def _is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


@pytest.mark.parametrize("where", ["taking", "beating"])
def test_what_it_had_goes_to_others_while_it_stands_still(database: Database, where: str) -> None:
    """Its database ends the transaction, and with that its locks, when it counts as lost."""
    metadata.create_all(database.engine)
    with Connection(f"alchemy+{database.url}") as connection:
        line = Line(connection)
        line.send("jobs", "hello")
        with standing_still(database, where), line.consuming(Queue("jobs")) as heard:
            [message] = heard.wait_for(1, timeout=20)

            assert message.payload == "hello"
            message.ack()
