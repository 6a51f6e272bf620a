"""Every way to end a task leaves the right rows, no transaction, no connection lent out, and a worker that goes on."""

from __future__ import annotations

from typing import Any

import pytest
from celery.result import AsyncResult

from tests.conformance.app import BOUND, ENDINGS, INJECTED
from tests.conformance.conftest import RunningWorker
from tests.waiting import eventually

#: Each pool on each database, and each on every broker; and on the database for the broker.
COMBINATIONS = [
    ("prefork", "postgresql", "redis"),
    ("prefork", "postgresql+psycopg2", "filesystem"),
    ("prefork", "mariadb", "rabbitmq"),
    ("prefork", "sqlite", "filesystem"),
    ("threads", "postgresql", "rabbitmq"),
    ("threads", "mariadb", "filesystem"),
    ("threads", "sqlite", "redis"),
    ("solo", "postgresql", "filesystem"),
    ("solo", "mariadb", "filesystem"),
    ("solo", "sqlite", "redis"),
    ("gevent", "postgresql", "redis"),
    ("gevent", "mariadb", "rabbitmq"),
    ("gevent", "sqlite", "filesystem"),
    ("eventlet", "postgresql", "filesystem"),
    ("eventlet", "mariadb", "redis"),
    ("eventlet", "sqlite", "rabbitmq"),
    # The database of the tasks is their broker too.
    ("prefork", "postgresql", "alchemy"),
    ("prefork", "sqlite", "alchemy"),
    ("threads", "mariadb", "alchemy"),
    ("solo", "postgresql", "alchemy"),
    ("gevent", "postgresql", "alchemy"),
    ("eventlet", "postgresql", "alchemy"),
    ("eventlet", "mariadb", "alchemy"),
]

#: Endings that only some pools have: the others have no child to lose, and nothing that enforces a limit.
ONLY_IN = {
    "soft limit": {"prefork"},
    "hard limit": {"prefork", "gevent"},
    "lost child": {"prefork"},
    "revoke": {"prefork", "gevent", "eventlet"},
    # eventlet does not make psycopg wait in its own way.
    "revoke in a statement": {"gevent"},
    # Elsewhere SystemExit is a request to the whole worker to stop.
    "system exit": {"prefork", "threads"},
}
NEEDS_SERVER = {"revoke in a statement", "database gone", "database gone before commit", "database gone after commit"}

#: The committed marks of each ending: what follows the task's key, and the note (how many retries, or why it failed).
MARKS: dict[str, dict[str, str]] = {
    "success": {"": "0"},
    "exception": {":failed": "LookupError"},
    "self.retry": {"": "1"},
    "autoretry": {"": "1"},
    "ignore": {},
    "reject": {},
    "replace": {"": "0", ":replacement": ""},
    "soft limit": {":failed": "SoftTimeLimitExceeded"},
    "hard limit": {":failed": "TimeLimitExceeded"},
    "revoke": {},
    "revoke in a statement": {},
    "system exit": {},
    "lost child": {":failed": "WorkerLostError"},
    "failing commit": {":failed": "IntegrityError"},
    "database gone": {":failed": "OperationalError"},
    "database gone before commit": {":failed": "OperationalError"},
    "database gone after commit": {"": "0"},
    "task inside task": {":inner": "", ":failed": "LookupError"},
}
STATES = {
    "success": "SUCCESS",
    "replace": "SUCCESS",
    "database gone after commit": "SUCCESS",
    "revoke": "REVOKED",
    "revoke in a statement": "REVOKED",
}
WITHOUT_RESULT = {"ignore", "reject"}
#: Celery sends the next attempt before it stores RETRY for this one: with more than one thread the RETRY may overwrite the
#: other's SUCCESS. The end of these is seen by their rows.
SEEN_BY_MARKS = {"self.retry", "autoretry"}


def has(combination: tuple[str, str, str], ending: str) -> bool:
    """Tell whether this ending exists there."""
    pool, database, broker = combination
    if ending == "revoke" and database == "sqlite" and broker == "alchemy":
        # The word that ends it could only be written when its own transaction has let go of the database's one lock.
        return False
    return pool in ONLY_IN.get(ending, {pool}) and not (ending in NEEDS_SERVER and database == "sqlite")


CASES = [
    pytest.param(combination, ending, way, id=f"{'-'.join(combination)}-{ending}-{way}")
    for combination in COMBINATIONS
    for ending in ENDINGS
    for way in (INJECTED, BOUND)
    if has(combination, ending)
]


@pytest.mark.parametrize(("running", "ending", "way"), CASES, indirect=["running"])
def test_task_ends_as_its_outcome_says(running: RunningWorker, ending: str, way: str) -> None:
    """The rows are those of the outcome, nothing is left open, and the next task in the worker is unharmed."""
    key = running.key()

    result = running.send(f"{ending}, {way}", key)
    state = ended(running, ending, result)

    assert state == expected_state(running, ending), result.traceback
    assert_marks(running, ending, key)
    assert_nothing_is_left(running)


@pytest.mark.parametrize("running", [one for one in COMBINATIONS if one[0] in ("threads", "gevent", "eventlet")], indirect=True)
def test_tasks_that_end_at_once_do_not_disturb_each_other(running: RunningWorker) -> None:
    """More requests than the worker runs at once, of many endings: each ends as if it were alone."""
    endings = ["success", "exception", "self.retry", "autoretry", "replace", "failing commit"] * 4
    if running.database.name != "sqlite":
        endings += ["database gone"] * 2
    keys = [running.key() for _ in endings]

    results = [running.send(f"{ending}, {BOUND}", key) for ending, key in zip(endings, keys, strict=True)]
    states = [ended(running, ending, result) for ending, result in zip(endings, results, strict=True)]

    assert states == [expected_state(running, ending) for ending in endings]
    for ending, key in zip(endings, keys, strict=True):
        assert_marks(running, ending, key)
    assert_nothing_is_left(running)


def expected_state(running: RunningWorker, ending: str) -> str | None:
    if ending in WITHOUT_RESULT | SEEN_BY_MARKS or (ending == "system exit" and running.pool != "prefork"):
        return None
    return STATES.get(ending, "FAILURE")


def ended(running: RunningWorker, ending: str, result: AsyncResult[Any]) -> str | None:
    """Wait for the end of a request, helping it along where that is part of the ending; return its final state."""
    if ending.startswith("revoke"):
        running.wait_for_sign(f"{result.id}.started")
        running.broker.client.control.revoke(result.id, terminate=True, signal="SIGTERM")
    if ending in SEEN_BY_MARKS:
        return None
    if expected_state(running, ending) is None:
        running.wait_for_sign(str(result.id))
        return None
    eventually(result.ready, timeout=30, what=f"{ending} has a result")
    return str(result.state)


def assert_marks(running: RunningWorker, ending: str, key: str) -> None:
    expected = MARKS[ending]
    if ending == "failing commit" and running.database.name == "mariadb":
        expected = {":failed": "OperationalError"}
    if ending == "system exit" and running.pool == "prefork":
        expected = {":failed": "WorkerLostError"}
    # The result is stored, and a replacement runs, after what is awaited here.
    eventually(lambda: running.marks(key) == expected, timeout=30, what=f"{expected}, not {running.marks(key)}")


def assert_nothing_is_left(running: RunningWorker) -> None:
    key = running.key()

    eventually(lambda: running.database.transactions() == 0, what="no transaction is left open")
    if running.broker.name == "alchemy":
        # The result is a row of the transaction: it can be seen a moment before the session is closed.
        eventually(lambda: running.run("probe") == 0, what="no connection is lent out")
    else:
        assert running.run("probe") == 0, "a result was stored before its request had given its connection back"
    assert running.run("note", key) == key
    assert running.marks(key) == {"": ""}
    assert running.worker.alive()
