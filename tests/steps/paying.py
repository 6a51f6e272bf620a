"""A worker that pays for each step of a long task is killed at random, again and again, and the bill is looked at."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from celery_alchemy.databases.tables import metadata
from tests.services.databases import Database
from tests.steps.worker_app import BATCHES, BILL_VARIABLE, Base
from tests.waiting import eventually
from tests.workers import Worker

#: So that enough of the task is left for each kill.
KILLS = BATCHES // 3

#: How long a task may make no progress: until a lost worker is noticed, and another has started.
PROGRESS_SECONDS = 60.0


def pay_and_kill(
    start: Callable[[dict[str, str]], Worker], send: Callable[[], object], database: Database, folder: Path, *, whole: bool
) -> None:
    """Run the task, kill what runs it, and see that each step was paid for once, or twice where a kill fell before its COMMIT.

    Args:
        start: Starts a worker for ``tests.steps.worker_app`` with this environment.
        send: Sends the task for the document ``report``.
        database: The worker's.
        folder: Where the bill is kept.
        whole: The whole worker is killed, and started again, in the place of the process that runs the task.
    """
    Base.metadata.create_all(database.engine)
    metadata.create_all(database.engine)
    bill = folder / "bill"
    worker = start({BILL_VARIABLE: str(bill)})
    send()

    killed = _kill_at_random(worker, bill, database, whole=whole)
    eventually(lambda: _is_completed(database), timeout=PROGRESS_SECONDS, what=f"the task completes\n{worker.log[-5000:]}")

    assert killed > 0
    _assert_paid_once(bill, database)


def _kill_at_random(worker: Worker, bill: Path, database: Database, *, whole: bool) -> int:
    """Kill, each time a few payments after the last; return how often."""
    killed = 0
    while killed < KILLS and not _is_completed(database):
        before, more = len(_bill(bill)), random.randint(1, 2)
        eventually(
            lambda b=before, m=more: _lines_after(bill, b, m) or _is_completed(database),
            timeout=PROGRESS_SECONDS,
            interval=0.001,
            what="the task gets on",
        )
        moment = time.monotonic() + random.uniform(0, 0.07)
        eventually(lambda m=moment: time.monotonic() > m, interval=0.0005)
        if whole:
            worker.kill()
            worker.start()
            killed += 1
            continue
        pid = _bill(bill)[-1][1]
        if pid in worker.child_pids():
            os.kill(pid, signal.SIGKILL)
            eventually(lambda p=pid: p not in worker.child_pids(), timeout=20, what="it is gone")
            killed += 1
    return killed


def _assert_paid_once(bill: Path, database: Database) -> None:
    batches = [f"report {number}" for number in range(BATCHES)]
    names = [row[0] for row in database.rows("SELECT name FROM batch ORDER BY id")]
    last_of = {pid: (what, number) for number, (what, pid) in enumerate(_bill(bill))}
    paid: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, (what, pid) in enumerate(_bill(bill)):
        paid[what].append((number, pid))
    assert names == ["report", *batches]
    assert list(paid) == ["parse", *batches]
    for what, payments in paid.items():
        for number, pid in payments[:-1]:
            assert last_of[pid] == (what, number)
    assert database.rows("SELECT name FROM celery_steps") == []


def _bill(path: Path) -> list[tuple[str, int]]:
    """Return what was paid for, and by which process."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in lines]


def _lines_after(path: Path, before: int, more: int) -> bool:
    return len(_bill(path)) >= min(before + more, BATCHES + 1)


def _is_completed(database: Database) -> bool:
    return bool(database.rows("SELECT id FROM celery_outbox WHERE completed_at IS NOT NULL"))
