"""Every way to end a task leaves the right rows, no transaction, no connection lent out, and a worker that goes on."""

from __future__ import annotations

from typing import Any

import pytest
from celery.result import AsyncResult

from tests.conformance.app import BOUND, ENDINGS, INJECTED
from tests.conformance.conftest import Stand
from tests.waiting import eventually

#: Each pool on each database, and each on every broker.
STANDS = [
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


def has(stand: tuple[str, str, str], ending: str) -> bool:
    """Tell whether this ending exists there."""
    pool, database, _ = stand
    return pool in ONLY_IN.get(ending, {pool}) and not (ending in NEEDS_SERVER and database == "sqlite")


CASES = [
    pytest.param(stand, ending, way, id=f"{'-'.join(stand)}-{ending}-{way}")
    for stand in STANDS
    for ending in ENDINGS
    for way in (INJECTED, BOUND)
    if has(stand, ending)
]


@pytest.mark.parametrize(("stand", "ending", "way"), CASES, indirect=["stand"])
def test_task_ends_as_its_outcome_says(stand: Stand, ending: str, way: str) -> None:
    """The rows are those of the outcome, nothing is left open, and the next task in the worker is unharmed."""
    key = stand.key()

    result = stand.send(f"{ending}, {way}", key)
    state = ended(stand, ending, result)

    assert state == expected_state(stand, ending)
    assert_marks(stand, ending, key)
    assert_nothing_is_left(stand)


@pytest.mark.parametrize("stand", [stand for stand in STANDS if stand[0] in ("threads", "gevent", "eventlet")], indirect=True)
def test_tasks_that_end_at_once_do_not_disturb_each_other(stand: Stand) -> None:
    """More requests than the worker runs at once, of many endings: each ends as if it were alone."""
    endings = ["success", "exception", "self.retry", "autoretry", "replace", "failing commit"] * 4
    if stand.database.name != "sqlite":
        endings += ["database gone"] * 2
    keys = [stand.key() for _ in endings]

    results = [stand.send(f"{ending}, {BOUND}", key) for ending, key in zip(endings, keys, strict=True)]
    states = [ended(stand, ending, result) for ending, result in zip(endings, results, strict=True)]

    assert states == [expected_state(stand, ending) for ending in endings]
    for ending, key in zip(endings, keys, strict=True):
        assert_marks(stand, ending, key)
    assert_nothing_is_left(stand)


def expected_state(stand: Stand, ending: str) -> str | None:
    if ending in WITHOUT_RESULT | SEEN_BY_MARKS or (ending == "system exit" and stand.pool != "prefork"):
        return None
    return STATES.get(ending, "FAILURE")


def ended(stand: Stand, ending: str, result: AsyncResult[Any]) -> str | None:
    """Wait for the end of a request, helping it along where that is part of the ending; return its final state."""
    if ending.startswith("revoke"):
        stand.wait_for_sign(f"{result.id}.started")
        stand.broker.client.control.revoke(result.id, terminate=True, signal="SIGTERM")
    if ending in SEEN_BY_MARKS:
        return None
    if expected_state(stand, ending) is None:
        stand.wait_for_sign(str(result.id))
        return None
    eventually(result.ready, timeout=30, what=f"{ending} has a result")
    return str(result.state)


def assert_marks(stand: Stand, ending: str, key: str) -> None:
    expected = MARKS[ending]
    if ending == "failing commit" and stand.database.name == "mariadb":
        expected = {":failed": "OperationalError"}
    if ending == "system exit" and stand.pool == "prefork":
        expected = {":failed": "WorkerLostError"}
    # The result is stored, and a replacement runs, after what is awaited here.
    eventually(lambda: stand.marks(key) == expected, timeout=30, what=f"{expected}, not {stand.marks(key)}")


def assert_nothing_is_left(stand: Stand) -> None:
    key = stand.key()

    eventually(lambda: stand.database.transactions() == 0, what="no transaction is left open")
    # The result is stored before the pool has taken its connection back from the request only if the library is wrong.
    assert stand.run("probe") == 0
    assert stand.run("note", key) == key
    assert stand.marks(key) == {"": ""}
    assert stand.worker.alive()
