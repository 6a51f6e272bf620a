"""record_failure writes down why a task failed, in a transaction that the failure does not take with it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, SessionParameterError, SessionTask
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")


def record(session: Session, exc: BaseException, *args: Any, **kwargs: Any) -> None:
    add_books(session, [f"{type(exc).__name__} {exc} {args} {kwargs}"])


def test_reason_survives_the_rollback(shop: Shop) -> None:
    """The work is rolled back; the reason, with the task's arguments, is committed."""

    @shop.task(record_failure=record)
    def work(session: Session, document: int, name: str = "x") -> None:
        add_books(session, ["half done"])
        raise LookupError("no such page")

    assert shop.trace(work, 7, name="a.pdf").state == "FAILURE"
    assert shop.titles() == ["LookupError no such page (7,) {'name': 'a.pdf'}"]
    assert shop.checked_out() == 0


def test_reason_is_recorded_in_direct_and_eager_calls(shop: Shop) -> None:
    """It is the same in `.apply()` and in a direct call, which raises the task's own exception."""

    @shop.task(record_failure=record)
    def work(session: Session, document: int) -> None:
        raise LookupError("no such page")

    work.apply(args=[1])
    with pytest.raises(LookupError):
        work(2)

    assert [title.split(" (")[1] for title in shop.titles()] == ["1,) {}", "2,) {}"]


def test_failure_of_a_task_without_a_session_is_recorded(shop: Shop) -> None:
    """The task itself need not have touched its session."""

    @shop.task(record_failure=record)
    def work() -> None:
        raise LookupError("no such page")

    shop.trace(work)

    assert len(shop.titles()) == 1


@pytest.mark.parametrize("exc", [Ignore(), Reject()])
def test_ignored_and_rejected_tasks_have_not_failed(shop: Shop, exc: Exception) -> None:
    """Ignore and Reject are ends of their own."""

    @shop.task(record_failure=record)
    def work(session: Session) -> None:
        raise exc

    shop.trace(work)

    assert shop.titles() == []


@pytest.mark.parametrize("how", ["self.retry", "self.retry with exc", "autoretry"])
def test_failure_is_recorded_once_after_the_last_retry(shop: Shop, how: str) -> None:
    """Attempts that will be repeated record nothing; the last one does, once."""
    options = {"autoretry_for": (LookupError,), "retry_kwargs": {"max_retries": 2}} if how == "autoretry" else {}
    attempts: list[int] = []

    @shop.task(bind=True, record_failure=record, max_retries=2, default_retry_delay=0, **options)
    def work(self: SessionTask, session: Session) -> None:
        attempts.append(len(shop.titles()))
        add_books(session, ["half done"])
        if how == "autoretry":
            raise LookupError("no such page")
        raise self.retry(exc=LookupError("no such page") if how == "self.retry with exc" else None)

    for retries in range(3):
        shop.trace(work, request={"retries": retries})

    assert attempts == [0, 0, 0]
    assert len(shop.titles()) == 1
    assert shop.titles()[0].startswith("MaxRetries" if how == "self.retry" else "LookupError no such page")


def test_failing_commit_is_recorded(shop: Shop) -> None:
    """A commit that fails is a failure like any other."""

    def refuse(session: Session) -> None:
        raise OperationalError("COMMIT", {}, Exception("refused"))

    @shop.task(record_failure=record)
    def work(session: Session) -> None:
        add_books(session, ["half done"])
        event.listen(session, "before_commit", refuse, once=True)

    shop.trace(work)

    assert len(shop.titles()) == 1
    assert shop.titles()[0].startswith("OperationalError")


def test_own_error_of_record_failure_masks_nothing(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with the task's name; the task's exception stands, and its half-written reason is rolled back."""

    def broken(session: Session, exc: BaseException) -> None:
        add_books(session, ["half a reason"])
        raise ZeroDivisionError

    @shop.task(name="work", record_failure=broken)
    def work(session: Session) -> None:
        raise LookupError("no such page")

    with caplog.at_level(logging.ERROR, "celery_alchemy"), pytest.raises(LookupError):
        work()

    assert "record_failure of task work failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert shop.titles() == []
    assert shop.checked_out() == 0


def test_session_of_record_failure_is_injected_by_annotation(shop: Shop) -> None:
    """The same rules as for bodies: it need not be the first parameter, and keyword-only works."""

    def by_keyword(exc: BaseException, document: int, *, session: Session) -> None:
        add_books(session, [f"{document}: {exc}"])

    @shop.task(record_failure=by_keyword)
    def work(session: Session, document: int) -> None:
        raise LookupError("no such page")

    shop.trace(work, 7)

    assert shop.titles() == ["7: no such page"]


def test_record_failure_without_annotations_gets_the_session_first(shop: Shop) -> None:
    """`lambda session, exc, *args: ...` is served by the contract's order."""

    @shop.task(record_failure=lambda session, exc, document: session.add(Book(title=f"{document}: {exc}")))
    def work(session: Session, document: int) -> None:
        raise LookupError("no such page")

    shop.trace(work, 7)

    assert shop.titles() == ["7: no such page"]


def test_record_failure_is_committed_under_an_empty_policy(shop: Shop) -> None:
    """`commit_on=()` is about the body; the reason is committed all the same."""

    @shop.task(record_failure=record, commit_on=())
    def work(session: Session) -> None:
        raise LookupError("no such page")

    shop.trace(work)

    assert len(shop.titles()) == 1


def test_record_failure_may_write_though_the_task_is_read_only(shop: Shop) -> None:
    """A read-only task's failure can still be written down."""

    @shop.task(record_failure=record, read_only=True)
    def work(session: Session) -> None:
        raise LookupError("no such page")

    shop.trace(work)

    assert len(shop.titles()) == 1


def test_record_failure_as_method_of_a_class(shop: Shop) -> None:
    """A static method of a task class serves all its tasks."""

    class Importer(SessionTask):
        abstract = True

        @staticmethod
        def record_failure(session: Session, exc: BaseException) -> None:
            add_books(session, [str(exc)])

    @shop.task(base=Importer)
    def work(session: Session) -> None:
        raise LookupError("no such page")

    shop.trace(work)

    assert shop.titles() == ["no such page"]


def test_record_failure_as_method_has_the_task(shop: Shop) -> None:
    """In a class it may be written as Celery's own handlers are, with `self`, or as a class method."""

    class Method(SessionTask):
        abstract = True

        def record_failure(self, session: Session, exc: BaseException, document: int) -> None:
            add_books(session, [f"{self.name} {document} {exc}"])

    class OfTheClass(SessionTask):
        abstract = True

        @classmethod
        def record_failure(cls, exc: BaseException, document: int, *, db: Session) -> None:
            add_books(db, [f"{cls.name} {document} {exc}"])

    for base in (Method, OfTheClass):

        @shop.task(name=base.__name__, base=base)
        def work(session: Session, document: int) -> None:
            raise LookupError("no such page")

        shop.trace(work, 7)

    assert shop.titles() == ["Method 7 no such page", "OfTheClass 7 no such page"]


def test_record_failure_that_is_no_function_is_refused(shop: Shop) -> None:
    """When the task is made, not when its first failure cannot be recorded."""

    def work(session: Session) -> None: ...

    with pytest.raises(ConfigurationError, match="'failed' of task 'work' cannot be called"):
        shop.task(name="work", record_failure="failed")(work).delay()


def test_failure_with_an_own_session_is_recorded_apart_from_it(shop: Shop) -> None:
    """The caller's session is not used for the reason, and is not passed to record_failure as an argument."""

    def reason(session: Session, exc: BaseException, title: str) -> None:
        add_books(session, [f"{title}: {exc}"])

    @shop.task(record_failure=reason)
    def work(session: Session, title: str) -> None:
        raise LookupError("no")

    with Session(shop.alchemy.engine) as own, pytest.raises(LookupError):
        work(session=own, title="Emma")

    assert shop.titles() == ["Emma: no"]


def no_arguments(session: Session, exc: BaseException) -> None: ...


def without_the_session(exc: BaseException, order_id: int) -> None: ...


def two_sessions(one: Session, exc: BaseException, other: Session, order_id: int) -> None: ...


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("record", [no_arguments, without_the_session, two_sessions])
def test_record_failure_that_could_not_be_called_is_refused_when_the_task_is_made(shop: Shop, record: Any) -> None:
    """As a body is; else the log alone would say so, when the task has failed."""
    with pytest.raises((ConfigurationError, SessionParameterError), match="record_failure of"):

        @shop.task(record_failure=record, lazy=False, name="pay")
        def pay(session: Session, order_id: int, note: str = "") -> None: ...


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    "record",
    [
        lambda session, exc, order_id: None,
        lambda session, exc, *args, **kwargs: None,
        lambda session, exc, order_id, note="": None,
    ],
)
def test_record_failure_that_fits_is_taken(shop: Shop, record: Any) -> None:
    """Arguments that a call may leave out are the caller's business."""

    @shop.task(record_failure=record, lazy=False, name="pay")
    def pay(session: Session, order_id: int, note: str = "") -> None: ...

    assert pay.apply(args=[1]).state == "SUCCESS"
