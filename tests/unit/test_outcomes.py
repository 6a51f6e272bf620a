"""The transaction policy: which outcomes commit, said per task, per app and by task_annotations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.signals import before_task_publish
from greenlet import GreenletExit
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy, ConfigurationError, SessionTask
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite")


def succeed(self: SessionTask) -> None:
    return None


def retry(self: SessionTask) -> None:
    raise self.retry(countdown=60)


def ignore(self: SessionTask) -> None:
    raise Ignore


def reject(self: SessionTask) -> None:
    raise Reject("no", requeue=False)


def fail(self: SessionTask) -> None:
    raise LookupError


def time_out(self: SessionTask) -> None:
    raise SoftTimeLimitExceeded


WAYS: dict[str, Callable[[SessionTask], None]] = {
    "success": succeed,
    "retry": retry,
    "ignore": ignore,
    "reject": reject,
    "failure": fail,
    "time limit": time_out,
}


def ending(shop: Shop, outcome: str, **options: Any) -> Any:
    """Make a task that writes a book and ends in that way."""
    end = WAYS[outcome]

    @shop.task(name=outcome, bind=True, **options)
    def work(self: SessionTask, session: Session) -> None:
        add_books(session, ["Emma"])
        end(self)

    return work


@pytest.mark.parametrize("outcome", WAYS)
def test_only_success_commits_by_default(shop: Shop, outcome: str) -> None:
    """Every way to end but success rolls back."""
    shop.trace(ending(shop, outcome))

    assert shop.titles() == (["Emma"] if outcome == "success" else [])
    assert shop.checked_out() == 0


@pytest.mark.parametrize("place", ["task", "app", "annotations"])
@pytest.mark.parametrize("outcome", ["success", "retry", "ignore", "reject"])
def test_each_outcome_commits_where_it_is_listed(make_shop: MakeShop, outcome: str, place: str) -> None:
    """A policy of one outcome commits that one and rolls back the others, wherever it is given."""
    policy = (outcome,)
    shop = make_shop(commit_on=policy) if place == "app" else make_shop()
    if place == "annotations":
        shop.app.conf.task_annotations = {"*": {"commit_on": policy}}
    options = {"commit_on": policy} if place == "task" else {}

    for way in WAYS:
        before = len(shop.titles())
        shop.trace(ending(shop, way, **options))
        after = len(shop.titles())
        shop.database.execute("DELETE FROM book")

        assert (after - before == 1) == (way == outcome)
    assert shop.checked_out() == 0


def test_task_overrides_the_apps_policy(make_shop: MakeShop) -> None:
    """The policy of the task wins over that of the Alchemy."""
    shop = make_shop(commit_on=("success", "ignore"))

    shop.trace(ending(shop, "ignore", commit_on=("success",)))

    assert shop.titles() == []


def test_empty_policy_leaves_the_commit_to_the_body(shop: Shop) -> None:
    """With `commit_on=()` what the body committed stays and the rest is rolled back."""

    @shop.task(commit_on=())
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        session.commit()
        add_books(session, ["Persuasion"])

    shop.trace(work)

    assert shop.titles() == ["Emma"]


def test_explicit_commit_is_welcome(shop: Shop) -> None:
    """What the body committed itself stays when it fails later; what came after is rolled back."""

    @shop.task()
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        session.commit()
        add_books(session, ["Persuasion"])
        raise LookupError

    assert shop.trace(work).state == "FAILURE"
    assert shop.titles() == ["Emma"]


def test_rollback_in_the_body_leaves_a_usable_session(shop: Shop) -> None:
    """After `session.rollback()` the body goes on in a new transaction, which is committed."""

    @shop.task()
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        session.rollback()
        add_books(session, ["Persuasion"])

    shop.trace(work)

    assert shop.titles() == ["Persuasion"]


def test_unflushed_objects_are_committed(shop: Shop) -> None:
    """An object that was only added is flushed by the commit, also when the body sent no statement."""

    @shop.task()
    def work(session: Session) -> None:
        session.add(Book(title="Emma"))

    shop.trace(work)

    assert shop.titles() == ["Emma"]


def test_commit_comes_before_the_callback_is_sent(shop: Shop) -> None:
    """The next link of a chain is published when its predecessor's rows are visible."""
    visible: list[list[str]] = []

    @shop.task(name="work")
    def work(session: Session) -> None:
        add_books(session, ["Emma"])

    @shop.task(name="next")
    def next_one() -> None: ...

    def published(sender: str, **more: Any) -> None:
        visible.append(shop.titles())

    before_task_publish.connect(published, sender="next")
    try:
        shop.trace(work, request={"callbacks": [next_one.si()]})
    finally:
        before_task_publish.disconnect(published, sender="next")

    assert visible == [["Emma"]]


def test_failing_commit_fails_the_task_with_the_databases_own_error(shop: Shop) -> None:
    """The commit's error is the task's error, nothing is stored and the connection is back."""

    @shop.task()
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        event.listen(session, "before_commit", _no_commit, once=True)

    traced = shop.trace(work)

    assert traced.state == "FAILURE"
    assert isinstance(traced.value, OperationalError)
    assert shop.titles() == []
    assert shop.checked_out() == 0


def test_failing_commit_is_autoretried(shop: Shop) -> None:
    """`autoretry_for` sees the error of the commit and runs the whole body again in a fresh session."""
    sessions: list[Session] = []

    @shop.task(autoretry_for=(OperationalError,), retry_kwargs={"countdown": 0})
    def work(session: Session) -> None:
        sessions.append(session)
        add_books(session, ["Emma"])
        if len(sessions) == 1:
            event.listen(session, "before_commit", _no_commit, once=True)

    work.apply().get()

    assert len(sessions) == 2
    assert sessions[0] is not sessions[1]
    assert shop.titles() == ["Emma"]


def test_failing_commit_of_another_outcome_fails_the_task(shop: Shop) -> None:
    """When the commit that Ignore asked for fails, the task is not silently ignored."""

    @shop.task(commit_on=("ignore",))
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        event.listen(session, "before_commit", _no_commit, once=True)
        raise Ignore

    assert shop.trace(work).state == "FAILURE"
    assert shop.checked_out() == 0


@pytest.mark.parametrize("how", ["self.retry", "autoretry"])
def test_retry_is_published_after_the_rollback(shop: Shop, how: str) -> None:
    """When the message of the next attempt leaves, the connection of this one is back in its pool."""
    held: list[int] = []
    options = {"autoretry_for": (LookupError,)} if how == "autoretry" else {}

    @shop.task(name="work", bind=True, **options)
    def work(self: SessionTask, session: Session) -> None:
        add_books(session, ["Emma"])
        if how == "autoretry":
            raise LookupError
        raise self.retry(countdown=60)

    def published(sender: str, **more: Any) -> None:
        held.append(shop.checked_out())

    before_task_publish.connect(published, sender="work")
    try:
        traced = shop.trace(work)
    finally:
        before_task_publish.disconnect(published, sender="work")

    assert traced.state == "RETRY"
    assert held == [0]
    assert shop.waiting() == 1


def test_retry_whose_commit_fails_is_not_sent(shop: Shop) -> None:
    """With `commit_on=("retry",)` a retry is only owed when the work it builds on is committed."""

    @shop.task(bind=True, commit_on=("retry",))
    def work(self: SessionTask, session: Session) -> None:
        add_books(session, ["Emma"])
        event.listen(session, "before_commit", _no_commit, once=True)
        raise self.retry(countdown=60)

    assert shop.trace(work).state == "FAILURE"
    assert shop.waiting() == 0


def test_caught_retry_is_still_sent(shop: Shop) -> None:
    """`self.retry(throw=False)` goes on; the message leaves when the body has ended, and its work is committed."""

    @shop.task(bind=True)
    def work(self: SessionTask, session: Session) -> None:
        self.retry(throw=False, countdown=60)
        add_books(session, ["Emma"])

    assert shop.trace(work).state == "SUCCESS"
    assert shop.titles() == ["Emma"]
    assert shop.waiting() == 1


def test_replace_commits_and_then_sends_the_replacement(shop: Shop) -> None:
    """A replaced task has succeeded with its share: its rows are committed before the replacement leaves."""

    @shop.task(name="next")
    def next_one(session: Session, title: str) -> None: ...

    @shop.task(bind=True)
    def work(self: SessionTask, session: Session) -> Any:
        add_books(session, ["Emma"])
        return self.replace(next_one.s("Persuasion"))

    assert shop.trace(work).state == "IGNORED"
    assert shop.titles() == ["Emma"]
    assert shop.waiting() == 1


def test_eager_replacement_sees_the_committed_rows_and_can_write(shop: Shop) -> None:
    """Celery runs it inside of the replaced task, whose share is done: its transaction holds no lock any more."""

    @shop.task(name="next")
    def next_one(session: Session, title: str) -> int:
        add_books(session, [title])
        return session.query(Book).count()

    @shop.task(bind=True, commit_on=("success", "ignore"))
    def work(self: SessionTask, session: Session) -> Any:
        add_books(session, ["Emma"])
        return self.replace(next_one.s("Persuasion"))

    @shop.task(bind=True, commit_on=())
    def drop(self: SessionTask, session: Session) -> Any:
        add_books(session, ["Sanditon"])
        return self.replace(next_one.si("Lady Susan"))

    assert work.apply().get() == 2
    assert drop.apply().get() == 3

    assert shop.titles() == ["Emma", "Persuasion", "Lady Susan"]
    assert shop.checked_out() == 0


@pytest.mark.databases("postgresql")
def test_commit_of_an_aborted_transaction_fails_the_task(shop: Shop) -> None:
    """PostgreSQL answers it with ROLLBACK and no error: a body that caught its statement's error would lose its rows as a success."""
    insert = text("INSERT INTO book (title) VALUES (:title)")

    @shop.task()
    def work(session: Session) -> None:
        for title in ("Emma", "Emma"):
            with suppress(IntegrityError):
                session.execute(insert, {"title": title})

    @shop.task()
    def recover(session: Session) -> None:
        for title in ("Emma", "Emma"):
            with suppress(IntegrityError), session.begin_nested():
                session.execute(insert, {"title": title})

    outcome = shop.trace(work)
    assert outcome.state == "FAILURE"
    assert "aborted" in str(outcome.value)
    assert shop.titles() == []

    assert shop.trace(recover).state == "SUCCESS"
    assert shop.titles() == ["Emma"]


def test_base_exceptions_roll_back_and_come_through(shop: Shop) -> None:
    """SystemExit, KeyboardInterrupt and a greenlet's end take the transaction back and reach whoever sent them."""
    for kind in (SystemExit, KeyboardInterrupt, GreenletExit):

        @shop.task(name=kind.__name__)
        def work(session: Session, kind: type[BaseException] = kind) -> None:
            add_books(session, ["Emma"])
            raise kind

        with pytest.raises(kind):
            work()
        assert shop.titles() == []
        assert shop.checked_out() == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("sucess",), r"'sucess', which is no outcome.*'success', 'retry', 'ignore', 'reject'"),
        (("success", "failure"), "An exception always rolls back"),
        ("success", r'not a tuple of outcomes.*commit_on=\("success",\)'),
        (3, "not a tuple of outcomes"),
    ],
)
def test_wrong_policy_is_refused_where_it_is_given(shop: Shop, value: Any, message: str) -> None:
    """An Alchemy refuses it when made, a task when it is bound, each naming itself."""
    with pytest.raises(ConfigurationError, match=message):
        Alchemy(bind="sqlite://", commit_on=value)
    with pytest.raises(ConfigurationError, match=message) as raised:
        bool(shop.task(name="rename", commit_on=value)(succeed))
    assert "task 'rename'" in str(raised.value)


def test_retry_exception_raised_by_hand_follows_the_policy(shop: Shop) -> None:
    """A bare `raise Retry()` is a retry for the policy as it is for Celery."""

    @shop.task(commit_on=("retry",))
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        raise Retry

    assert shop.trace(work).state == "RETRY"
    assert shop.titles() == ["Emma"]


def _no_commit(session: Session) -> None:
    raise OperationalError("COMMIT", {}, Exception("the database refused"))
