"""Tasks that are called without a worker end as they do in one: eagerly and directly, on every database."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy.exc import IntegrityError, OperationalError

from celery_alchemy import Alchemy
from tests.conformance.app import BOUND, INJECTED, create_tables, make
from tests.conformance.test_endings import MARKS, NEEDS_SERVER
from tests.services.databases import Database

#: What a direct call raises, where it does not return. Eagerly they are in the result.
RAISES: dict[str, type[BaseException]] = {
    "exception": LookupError,
    "self.retry": Retry,
    "autoretry": ZeroDivisionError,
    "ignore": Ignore,
    "reject": Reject,
    "system exit": SystemExit,
    "failing commit": IntegrityError,
    "database gone": OperationalError,
    "database gone before commit": OperationalError,
    "task inside task": LookupError,
}
ENDINGS = ["success", "replace", "database gone after commit", *RAISES]
#: A direct call has no further attempt: Celery raises out of `retry()`. A replacement is sent, and runs where a worker is.
DIRECT_RAISES: dict[str, type[BaseException]] = {**RAISES, "replace": Ignore}
DIRECT_MARKS: dict[str, dict[str, str]] = {
    **MARKS,
    "self.retry": {},
    "autoretry": {":failed": "ZeroDivisionError"},
    "replace": {"": "0"},
}


#: Each ending on each database, in one call with an injected session and in the other with `self.session`, taken in turn.
CELLS = [
    (database, ending)
    for database in ("sqlite", "postgresql", "mariadb")
    for ending in ENDINGS
    if not (ending in NEEDS_SERVER and database == "sqlite")
]
DIRECT = [(*cell, (INJECTED, BOUND)[number % 2]) for number, cell in enumerate(CELLS)]
EAGER = [(*cell, (BOUND, INJECTED)[number % 2]) for number, cell in enumerate(CELLS)]


@pytest.fixture
def alchemy(database: Database) -> Iterator[Alchemy]:
    """The suite's tasks, in this process."""
    create_tables(database.engine)
    app = Celery("calls", broker="memory://", backend="cache+memory://", set_as_current=False)
    alchemy = make(app, str(database.url))
    yield alchemy
    alchemy.engine.dispose()


def expected_error(errors: dict[str, type[BaseException]], ending: str, database: Database) -> type[BaseException] | None:
    if ending == "failing commit" and database.name == "mariadb":
        return OperationalError
    return errors.get(ending)


def assert_marks(ending: str, database: Database, expected: dict[str, str]) -> None:
    if ending == "failing commit" and database.name == "mariadb":
        expected = {":failed": "OperationalError"}
    assert {name.removeprefix("key"): note for name, note in database.rows("SELECT name, note FROM mark")} == expected


def assert_nothing_is_left(alchemy: Alchemy, database: Database) -> None:
    assert database.transactions() == 0
    assert alchemy.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    task_of(alchemy, "note")("next")
    assert ("next",) in database.rows("SELECT name FROM mark")


def task_of(alchemy: Alchemy, name: str) -> Any:
    assert alchemy.app is not None
    return alchemy.app.tasks[name]


@pytest.mark.parametrize(("database", "ending", "way"), DIRECT, indirect=["database"])
def test_direct_call_ends_as_its_outcome_says(alchemy: Alchemy, database: Database, ending: str, way: str) -> None:
    """What the body raises comes through; rows and connections are as after a worker's request."""
    task = task_of(alchemy, f"{ending}, {way}")
    error = expected_error(DIRECT_RAISES, ending, database)

    if error is None:
        task("key")
    else:
        with pytest.raises(error):
            task("key")

    assert_marks(ending, database, DIRECT_MARKS[ending])
    assert_nothing_is_left(alchemy, database)


@pytest.mark.parametrize(("database", "ending", "way"), EAGER, indirect=["database"])
def test_eager_call_ends_as_its_outcome_says(alchemy: Alchemy, database: Database, ending: str, way: str) -> None:
    """As in a worker, retries included; SystemExit alone reaches the caller."""
    task = task_of(alchemy, f"{ending}, {way}")
    error = expected_error(RAISES, ending, database)

    if error is SystemExit:
        with pytest.raises(SystemExit):
            task.apply(("key",))
    else:
        state = task.apply(("key",)).state
        retried = ending in ("self.retry", "autoretry")
        assert state == {Ignore: "IGNORED", Reject: "REJECTED", None: "SUCCESS"}.get(error, "SUCCESS" if retried else "FAILURE")

    assert_marks(ending, database, MARKS[ending])
    assert_nothing_is_left(alchemy, database)
