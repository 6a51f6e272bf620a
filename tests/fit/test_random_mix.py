"""Any form of session, work and ending, for any tenant: what comes of it is what the model says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from celery_alchemy.databases import sqlite_engine, trying_again
from celery_alchemy.requests.event_loop import process_loop
from celery_alchemy.sessions.at_hand import at_hand
from celery_alchemy.testing import no_leaks
from tests.fit.forms import Application, Mark, Places, current, open_places
from tests.fit.model import expected_of
from tests.fit.notable import NOTABLE
from tests.fit.plans import Plan, plans
from tests.fit.running import run
from tests.services.databases import Database

#: How many examples each database gets; more of them are drawn anew at each run.
EXAMPLES = int(os.environ.get("TEST_MIX_EXAMPLES", "0"))
FEW = {"sqlite": 40, "postgresql": 15, "mariadb": 10}


class Applications:
    """The applications of a test: made when a plan asks for one, used for all that follow."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._made: dict[tuple[str, bool], Application] = {}

    def of(self, plan: Plan) -> Application:
        """Return the application of a plan, with nothing left of the plan before."""
        key = (plan.form, plan.outbox)
        if key not in self._made:
            self._made[key] = Application(plan.form, self.places, outbox=plan.outbox)
        application = self._made[key]
        application.plan, application.runs = plan, 0
        application.heard.clear()
        application.sessions.clear()
        self.places.clear()
        return application

    def close(self) -> None:
        """Close all of them, and the loop of their async tasks."""
        process_loop.close()
        for application in self._made.values():
            application.close()


@pytest.fixture
def applications(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Applications]:
    """Applications on the test's database, whose transient errors are soon over."""
    monkeypatch.setattr(trying_again, "BACKOFF_SECONDS", 0.0001)
    # A plan that waits for itself is an error of the plan's, soon told.
    monkeypatch.setattr(sqlite_engine, "BUSY_TIMEOUT_SECONDS", 1)
    with open_places(database) as places:
        applications = Applications(places)
        yield applications
        applications.close()


def test_notable_mixes_leave_what_the_model_says(applications: Applications) -> None:
    """They hold what a few random ones may not."""
    reached = {_check(applications.of(plan), plan) for plan in NOTABLE}

    assert reached == {"SUCCESS", "FAILURE", "IGNORED", "REJECTED", "SystemExit"}


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_any_mix_leaves_what_the_model_says(database: Database, applications: Applications) -> None:
    """Rows, sends, callables in order, state, registry, pools; the same plans at each run."""
    # Not every platform has a wheel of MariaDB's.
    has_async = database.name != "mariadb" or find_spec("asyncmy") is not None
    reached: set[str] = set()

    @settings(
        max_examples=EXAMPLES or FEW[database.name],
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(plans(database.name, has_async=has_async))
    def check(plan: Plan) -> None:
        reached.add(_check(applications.of(plan), plan))

    check()

    assert reached >= {"SUCCESS", "FAILURE"}


def _check(application: Application, plan: Plan) -> str:
    """Carry a plan out, compare, and return how it has ended."""
    expected = expected_of(plan)
    with no_leaks(), _registry_unchanged(application, plan):
        found = run(application, plan)

    found.rows.sort(key=str)
    expected.rows.sort(key=str)
    assert found == expected
    for session in application.sessions:
        assert not session.in_transaction()
        assert not list(session)
    assert application.checked_out() == 0
    assert at_hand.get() is None
    assert current.get() is None
    return found.state


@contextmanager
def _registry_unchanged(application: Application, plan: Plan) -> Iterator[None]:
    """See that the application's registry holds after the block what it held before."""
    registry = None if plan.is_async else application.registry
    if registry is None:
        yield
        return
    pending = [Mark(name="pending")] if plan.held else []
    registry.add_all(pending)
    before = registry() if plan.held else registry.remove()
    yield
    assert registry.registry.has() is plan.held
    if plan.held:
        assert registry() is before
        assert list(registry.new) == pending
        registry.remove()
