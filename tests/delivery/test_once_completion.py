"""The record of a task that was not owed meets a row that came in the meantime: it takes one that only counts this task's starts."""

from __future__ import annotations

import pytest

from celery_alchemy.requests.once_records import complete
from tests.delivery.outbox_stand import OutboxStand

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mariadb")

ROW = {"task_id": "'one'", "body": "NULL", "died_at": "NULL", "completed_at": "NULL"}


@pytest.mark.parametrize(
    ("changed", "takes"),
    [
        ({}, True),
        ({"task_id": "'another'"}, False),
        ({"body": "'[]'"}, False),
        ({"died_at": "CURRENT_TIMESTAMP"}, False),
        ({"completed_at": "CURRENT_TIMESTAMP"}, False),
    ],
    ids=["counts", "another task", "message", "dead", "completed"],
)
def test_row_that_only_counts_is_completed_and_no_other(stand: OutboxStand, changed: dict[str, str], takes: bool) -> None:
    """A message, a dead task and another task's work are left as they are, and the run is overtaken."""
    row = {**ROW, **changed}
    stand.database.execute(
        "INSERT INTO celery_outbox (id, task_id, once, created_at, sends, failures, deliveries, body, died_at, completed_at)"
        f" VALUES ('key', {row['task_id']}, TRUE, CURRENT_TIMESTAMP, 0, 0, 1, {row['body']}, {row['died_at']}, {row['completed_at']})"
    )

    with stand.alchemy.place.begin(stand.alchemy.engine) as table:
        assert complete(table, "key", "one", "adds", '"done"', owed=False) is takes

    assert stand.outbox("result") == (['"done"'] if takes else [None])
