"""What listeners are told when a task's session is closed."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, SessionReport, events
from tests.insight.clock import Clock
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")


@pytest.fixture
def reports(shop: Shop) -> list[SessionReport]:
    """The reports of the shop's sessions."""
    reports: list[SessionReport] = []
    shop.alchemy.on_session_closed(reports.append)
    return reports


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_report_says_who_used_the_database_how_much(shop: Shop, reports: list[SessionReport], clock: Clock) -> None:
    """Name, id, outcome, statements, and the seconds that passed: idle ones, and all from the start of the body."""

    @shop.task(name="works")
    def works(session: Session) -> None:
        clock.move_on(1.0)
        session.execute(text("SELECT 1"))
        clock.move_on(2.0)
        session.execute(text("SELECT 2"))
        clock.move_on(4.0)

    shop.trace(works, request={"id": "a-request"})

    assert reports == [
        SessionReport(
            task_name="works",
            task_id="a-request",
            outcome="success",
            statements=2,
            database_seconds=0.0,
            idle_seconds=6.0,
            seconds=7.0,
        )
    ]


def test_time_of_statements_is_measured(shop: Shop, reports: list[SessionReport], clock: Clock) -> None:
    """Seconds that a statement takes are the database's, not idle ones."""

    @shop.task()
    def works(session: Session) -> None:
        driver: Any = session.connection().connection.dbapi_connection
        driver.create_function("takes", 1, clock.move_on)
        session.execute(text("SELECT takes(3.0)")).all()

    assert shop.trace(works).state == "SUCCESS"

    [report] = reports
    assert (report.database_seconds, report.idle_seconds, report.seconds) == (3.0, 0.0, 3.0)


@pytest.mark.parametrize(("ending", "state"), [("success", "SUCCESS"), ("failure", "FAILURE"), ("retry", "RETRY")])
def test_report_has_the_outcome_of_the_request(shop: Shop, reports: list[SessionReport], ending: str, state: str) -> None:
    """One report for each request, also for those that roll back."""

    @shop.task(bind=True)
    def ends(self: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        if ending == "failure":
            raise ValueError("wrong")
        if ending == "retry":
            raise self.retry(countdown=60)

    assert shop.trace(ends).state == state
    assert [(report.outcome, report.statements) for report in reports] == [(ending, 1)]


def test_commit_that_fails_is_a_failure(shop: Shop, reports: list[SessionReport]) -> None:
    """The body returned, but its transaction did not commit: one report, and not of a success."""

    @shop.task()
    def adds_twice(session: Session) -> None:
        session.add_all([Book(title="twice"), Book(title="twice")])

    assert shop.trace(adds_twice).state == "FAILURE"
    assert [report.outcome for report in reports] == ["failure"]
    assert shop.titles() == []


def test_session_is_closed_when_the_listener_hears_of_it(shop: Shop) -> None:
    """The connection is back in the pool and the rows are committed."""
    seen: list[tuple[int, list[str]]] = []

    @shop.alchemy.on_session_closed
    def look(report: SessionReport) -> None:
        seen.append((shop.checked_out(), shop.titles()))

    @shop.task()
    def adds(session: Session) -> None:
        add_books(session, ["Emma"])

    shop.trace(adds)

    assert seen == [(0, ["Emma"])]


def test_listener_can_be_given_to_alchemy(make_shop: MakeShop) -> None:
    """Alchemy(on_session_closed=...) is the same as alchemy.on_session_closed(...)."""
    reports: list[SessionReport] = []
    shop = make_shop(on_session_closed=reports.append)

    @shop.task(name="adds")
    def adds(session: Session) -> None:
        add_books(session, ["Emma"])

    shop.trace(adds)

    assert [report.task_name for report in reports] == ["adds"]


def test_request_that_does_not_use_its_session_is_not_reported(shop: Shop, reports: list[SessionReport]) -> None:
    """There was no session to close."""

    @shop.task()
    def idle(session: Session) -> str:
        return "nothing to do"

    shop.trace(idle)

    assert reports == []


def test_raising_listener_is_logged_and_harms_nothing(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """The task succeeds, its rows are committed, and the next listener is still told."""
    reports: list[SessionReport] = []

    @shop.alchemy.on_session_closed
    def raises(report: SessionReport) -> None:
        raise RuntimeError("the exporter is down")

    shop.alchemy.on_session_closed(reports.append)

    @shop.task(name="adds")
    def adds(session: Session) -> str:
        add_books(session, ["Emma"])
        return "added"

    traced = shop.trace(adds)

    assert (traced.state, traced.value) == ("SUCCESS", "added")
    assert shop.titles() == ["Emma"]
    assert len(reports) == 1
    [record] = [record for record in caplog.records if record.name == "celery_alchemy.events"]
    assert "adds" in record.getMessage()
    assert record.exc_info is not None
    assert "the exporter is down" in str(record.exc_info[1])


def test_no_report_is_made_for_nobody(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without listeners a request does not pay for a report."""
    made: list[object] = []
    monkeypatch.setattr(events, "SessionReport", lambda *values: made.append(values))

    @shop.task()
    def adds(session: Session) -> None:
        add_books(session, ["Emma"])

    @shop.task()
    def fails(session: Session) -> None:
        add_books(session, ["Ulysses"])
        raise ValueError("wrong")

    shop.trace(adds)
    shop.trace(fails)

    assert shop.titles() == ["Emma"]
    assert made == []


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize(("raises", "policy"), [(Retry, "retry"), (Ignore, "ignore"), (Reject, "reject")])
def test_commit_that_the_policy_asked_for_and_that_fails_is_a_failure(
    shop: Shop, reports: list[SessionReport], raises: type[Exception], policy: str
) -> None:
    """The request fails with the database's error: the report does not say how the body meant to end."""

    @shop.task(commit_on=(policy,))
    def adds_twice(session: Session) -> None:
        session.add_all([Book(title="twice"), Book(title="twice")])
        raise raises

    traced = shop.trace(adds_twice)

    assert (traced.state, type(traced.value)) == ("FAILURE", IntegrityError)
    assert [report.outcome for report in reports] == ["failure"]
    assert shop.checked_out() == 0


#: What another delivery leaves that has asked for a retry.
OWED = (
    "INSERT INTO celery_outbox (id, task_id, task_name, once, redeliver_seconds, max_deliveries, created_at, sends, failures,"
    " deliveries, body, envelope) VALUES ('one', 'one', 'adds', TRUE, 900, 5, CURRENT_TIMESTAMP, 1, 0, 0, '[]', '{}')"
)


# --- once --------------------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize(
    ("ending", "state"),
    [("success", "SUCCESS"), ("failure", "FAILURE"), ("retry", "RETRY"), ("ignore", "IGNORED"), ("commit", "FAILURE")],
)
def test_once_task_is_reported_as_any_other(shop: Shop, reports: list[SessionReport], ending: str, state: str) -> None:
    """One report of its own session with its outcome, also where its commit fails."""
    shop.alchemy.create_tables()

    @shop.task(bind=True, once=True, name="ends")
    def ends(self: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        if ending == "failure":
            raise ValueError("wrong")
        if ending == "retry":
            raise self.retry(countdown=60)
        if ending == "ignore":
            raise Ignore
        if ending == "commit":
            session.add(Book(title="Emma"))

    assert shop.trace(ends).state == state
    assert [(report.task_name, report.outcome) for report in reports] == [("ends", {"commit": "failure"}.get(ending, ending))]
    assert reports[0].statements >= 1
    assert shop.titles() == (["Emma"] if ending == "success" else [])


@pytest.mark.databases("sqlite", "postgresql")
def test_second_delivery_of_a_once_task_is_reported(shop: Shop, reports: list[SessionReport]) -> None:
    """As the success that it reports."""
    shop.alchemy.create_tables()

    @shop.task(once=True)
    def adds(session: Session) -> None:
        add_books(session, ["Emma"])

    for _ in range(2):
        shop.trace(adds, request={"id": "one"})

    assert [report.outcome for report in reports] == ["success", "success"]
    assert reports[0].statements > reports[1].statements


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("winner", ["commits", "leaves it open"])
def test_run_of_a_once_task_that_is_overtaken_is_reported(shop: Shop, reports: list[SessionReport], winner: str) -> None:
    """Its session was closed too: with the winner's result as a success, else as a run that is followed by another."""
    shop.alchemy.create_tables()
    runs: list[int] = []

    @shop.task(once=True, name="adds")
    def adds(session: Session) -> str:
        add_books(session, [f"Emma {len(runs)}"])
        runs.append(len(runs))
        if runs == [0]:
            if winner == "commits":
                shop.trace(adds, request={"id": "one"})
            else:
                shop.database.execute(OWED)
        return "done"

    assert shop.trace(adds, request={"id": "one"}).value == "done"
    assert [report.outcome for report in reports] == ["success" if winner == "commits" else "retry", "success"]


def test_idle_time_before_the_end_of_a_once_task_is_measured(
    shop: Shop, reports: list[SessionReport], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last statement is the record of its completion: what the transaction waited before it is idle time, and reported."""
    shop.alchemy.create_tables()

    @shop.task(once=True)
    def idles(session: Session) -> None:
        add_books(session, ["Emma"])
        clock.move_on(6.0)

    shop.trace(idles)

    assert [report.idle_seconds for report in reports] == [6.0]
    assert ["idle for 6.0 s before the end of the task" in record.getMessage() for record in caplog.records] == [True]


async def _listen(report: SessionReport) -> None: ...


@pytest.mark.parametrize(("listener", "message"), [(3, "cannot be called"), (_listen, "is an `async def`")])
def test_listener_that_nobody_could_call_or_await_is_refused(shop: Shop, listener: Any, message: str) -> None:
    """When it is given, not when the first session is closed."""
    with pytest.raises(ConfigurationError, match=message):
        shop.alchemy.on_session_closed(listener)
