"""Any order of transactions, deliveries, crashes and relays: what is committed is sent, what is done is done once."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from celery_alchemy.outbox import relay
from tests.delivery.machine import Delivery, make_work
from tests.delivery.outbox_stand import OutboxStand
from tests.services.databases import Database

#: What the examples must have reached, on each database.
REACHED = {
    "SUCCESS",
    "FAILURE",
    "RETRY",
    "crash",
    "copy of a completed task",
    "copy of a dead task",
    "killed too often",
    "refused too often",
    "row that is another's by now",
    "run that was overtaken",
    "send in a SAVEPOINT that was rolled back",
}

#: Examples, and steps of each.
EXTENT = {"sqlite": (16, 40), "postgresql": (8, 25), "mariadb": (6, 25)}


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_no_order_of_events_breaks_a_guarantee(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sequences at each run and on each database; fewer where each step costs more."""
    monkeypatch.setattr(relay, "MAX_FAILURES", 2)
    stand = OutboxStand(database)
    make_work(stand)
    reached: set[str] = set()
    examples, steps = EXTENT[database.name]
    machine = type("DeliveryOnOneStand", (Delivery,), {"stand": stand, "reached": reached})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                # Not the phase that shortens a failing example, which takes minutes: it is printed as it was found.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        stand.close()

    assert reached >= REACHED
