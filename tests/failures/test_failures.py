"""Each reported failure as a promise: kept by celery-alchemy, and shown to be broken by a pattern of today.

A promise is a function of a pattern. `test_ours_keeps_the_promise` puts it to celery-alchemy; that a hand-written pattern fails
the same function shows that the promise can fail.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.signals import before_task_publish
from sqlalchemy import event, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session

from tests.collecting import without_collector
from tests.failures import by_hand
from tests.failures.by_hand import ByHand, Ours
from tests.services.databases import Database
from tests.unit.shop import Book, add_books

Promise = Callable[[Ours], None]
PROMISES: list[Any] = []


def promise(*broken_by: type[ByHand], on: str = "sqlite", **options: Any) -> Callable[[Promise], Promise]:
    """Register a promise.

    Args:
        broken_by: The hand-written patterns that are shown to break it.
        on: The database that it is about.
        **options: `create_engine` options for both.
    """

    def register(check: Promise) -> Promise:
        for pattern in (Ours, *broken_by):
            name = f"{check.__name__}-{on}-{pattern.__name__}"
            PROMISES.append(pytest.param(on, pattern, check, options, id=name))
        return check

    return register


@pytest.fixture
def open_kit(database: Database) -> Iterator[Callable[..., Ours]]:
    """Make a pattern's app on the test's database."""
    kits: list[Ours] = []

    def make(pattern: type[Ours], options: dict[str, Any]) -> Ours:
        kit = pattern(database, **options) if issubclass(pattern, ByHand) else pattern(database, engine_options=options)
        kits.append(kit)
        return kit

    yield make
    by_hand.current.set(None)
    for kit in kits:
        with contextlib.suppress(Exception):  # A pattern may have left its engine in any state.
            kit.engine.dispose()


# --- held, leaked, stale ---------------------------------------------------------------------------------------------------


@promise(by_hand.Hooks, by_hand.WithBlock)
def f02_no_connection_is_held_during_slow_work(kit: Ours) -> None:
    """A transaction that only reads must not stay open during an HTTP call."""
    held: list[int] = []
    kit.database.execute("INSERT INTO book (title) VALUES ('Emma')")

    def body(task: Any, session: Session) -> str:
        book = session.scalars(select(Book)).one()
        with kit.slow(session):
            held.append(kit.checked_out())
            return book.title

    assert kit.trace(kit.make(body)).value == "Emma"
    assert held == [0]


@promise(by_hand.Hooks, pool_size=2, max_overflow=1, pool_timeout=1)
def f03_no_pool_runs_dry_after_many_odd_endings(kit: Ours) -> None:
    """Twenty ignored requests leave as many connections as there were."""

    def body(task: Any, session: Session, ignore: bool) -> int:
        value = session.scalar(select(42))
        if ignore:
            raise Ignore
        return int(value or 0)

    task = kit.make(body)
    for _ in range(20):
        kit.trace(task, True)

    assert kit.trace(task, False).value == 42
    assert kit.checked_out() == 0


@promise(by_hand.WithBlock)
def f04_an_object_can_be_read_after_its_task(kit: Ours) -> None:
    """What was loaded stays readable after the commit and the close."""
    kept: list[Book] = []

    def body(task: Any, session: Session) -> None:
        kept.append(Book(title="Emma"))
        session.add(kept[0])

    kit.trace(kit.make(body))

    assert kept[0].title == "Emma"


@promise(by_hand.Lazy)
def f05_a_failed_flush_does_not_poison_the_next_task(kit: Ours) -> None:
    """PendingRollbackError must not reach a request that did nothing wrong."""

    def body(task: Any, session: Session, title: str) -> None:
        try:
            add_books(session, [title, title] if title == "twice" else [title])
        except IntegrityError:
            raise Ignore from None

    task = kit.make(body)
    kit.trace(task, "twice")

    assert kit.trace(task, "Emma").state == "SUCCESS"
    assert kit.titles() == ["Emma"]


# By hand it cannot be shown here: where the library is imported, no pool of the process crosses a fork, whoever made it.
@promise(on="postgresql")
def f06_a_forked_child_does_not_inherit_a_connection(kit: Ours) -> None:
    """Two processes on one socket read each other's rows."""

    def body(task: Any, session: Session) -> int:
        return int(session.execute(text("SELECT pg_backend_pid()")).scalar_one())

    task = kit.make(body)
    parents = kit.trace(task).value
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, str(kit.trace(task).value).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        childs = int(pipe.read())

    assert childs != parents
    assert kit.trace(task).value == parents


@promise(by_hand.WithBlock, on="postgresql")
def f07_a_close_that_fails_does_not_fail_the_work(kit: Ours) -> None:
    """The work is committed; that the connection died afterwards is nobody's failure."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        session.commit()
        session.scalars(select(Book)).all()
        kit.database.disconnect_others()

    assert kit.trace(kit.make(body, commit_on=())).state == "SUCCESS"
    assert kit.titles() == ["Emma"]


@promise(by_hand.WithBlock, on="postgresql")
def f07_a_close_that_fails_does_not_mask_the_error(kit: Ours) -> None:
    """The body's own exception is the one that is reported."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        kit.database.disconnect_others()
        raise LookupError("the reason")

    assert str(kit.trace(kit.make(body)).value) == "the reason"


@promise(by_hand.WithBlock, by_hand.Hooks, on="postgresql")
def f11_a_connection_cut_between_tasks_is_replaced(kit: Ours) -> None:
    """A restarted database costs no task."""

    def body(task: Any, session: Session) -> int:
        return int(session.scalar(select(42)) or 0)

    task = kit.make(body)
    kit.trace(task)
    kit.database.disconnect_others()

    assert kit.trace(task).value == 42


# --- shared and odd endings --------------------------------------------------------------------------------------------------


@promise(by_hand.Hooks)
def f13_requests_at_the_same_time_do_not_share_a_session(kit: Ours) -> None:
    """A session in use by one request is not another's."""
    together = threading.Barrier(4)
    kept: list[bool] = []

    def body(task: Any, session: Session) -> None:
        mine = kit.session_of(task)
        together.wait(10)
        kept.append(kit.session_of(task) is mine)
        together.wait(10)

    task = kit.make(body)
    threads = [threading.Thread(target=kit.trace, args=(task,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert kept == [True] * 4


def _f14(name: str, end: Callable[[Any], None]) -> None:
    def check(kit: Ours) -> None:
        def body(task: Any, session: Session) -> None:
            add_books(session, ["Emma"])
            end(task)

        kit.trace(kit.make(body))

        assert kit.checked_out() == 0
        assert kit.database.transactions() == 0

    check.__name__ = f"f14_{name}_leaks_nothing"
    promise(by_hand.Hooks)(check)


def _ignore(task: Any) -> None:
    raise Ignore


def _reject(task: Any) -> None:
    raise Reject("no", requeue=False)


def _retry(task: Any) -> None:
    raise task.retry(countdown=60)


_f14("ignore", _ignore)
_f14("reject", _reject)
_f14("retry", _retry)


def _refuse(session: Session) -> None:
    raise OperationalError("COMMIT", {}, Exception("refused"))


@promise(by_hand.LateCommit)
def f15_a_failing_commit_fails_the_task(kit: Ours) -> None:
    """A task whose rows are lost has not succeeded."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        event.listen(session, "before_commit", _refuse, once=True)

    assert kit.trace(kit.make(body)).state == "FAILURE"
    assert kit.checked_out() == 0


@promise(by_hand.CommitInFinally)
def f16_a_failed_task_commits_nothing(kit: Ours) -> None:
    """Half of the work is not stored."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["half done"])
        raise LookupError

    kit.trace(kit.make(body))

    assert kit.titles() == []


@promise(by_hand.AroundCall)
def f17_a_failing_commit_is_retried(kit: Ours) -> None:
    """A serialization failure comes at the commit; autoretry has to see it."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        event.listen(session, "before_commit", _refuse, once=True)

    assert kit.trace(kit.make(body, autoretry_for=(OperationalError,))).state == "RETRY"


def _interrupted(kit: Ours) -> Any:
    """Run a task that a soft time limit interrupts in the middle of a statement."""
    seconds = {"postgresql": "pg_sleep(10)", "mariadb": "sleep(10)"}[kit.database.name]

    def body(task: Any, session: Session) -> None:
        session.execute(text(f"SELECT {seconds}"))

    def interrupt(number: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        return kit.trace(kit.make(body, name="interrupted"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@promise(by_hand.WithBlock, on="postgresql", pool_size=1, max_overflow=0, pool_timeout=1)
def f18_a_soft_limit_within_a_statement_costs_no_connection(kit: Ours) -> None:
    """The slot of an interrupted connection is free again, and the task has failed by its time limit."""
    interrupted = _interrupted(kit)

    def body(task: Any, session: Session) -> int:
        return int(session.scalar(select(42)) or 0)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert kit.trace(kit.make(body)).value == 42


@promise(by_hand.WithBlock, on="mariadb", pool_size=1, max_overflow=0, pool_timeout=1)
def f19_no_task_reads_the_answer_to_an_interrupted_statement(kit: Ours) -> None:
    """`Packet sequence number wrong`, and everything after it."""
    interrupted = _interrupted(kit)

    def body(task: Any, session: Session) -> int:
        return int(session.scalar(select(42)) or 0)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert [kit.trace(kit.make(body, name=f"next {n}")).value for n in range(3)] == [42] * 3


@promise(by_hand.WithBlock, by_hand.Hooks, on="mariadb")
def f21_a_connection_that_goes_away_during_slow_work_is_not_missed(kit: Ours) -> None:
    """The server closes what has been idle too long; the task goes on with another connection."""
    kit.database.execute("INSERT INTO book (title) VALUES ('Emma')")

    def body(task: Any, session: Session) -> None:
        book = session.scalars(select(Book)).one()
        with kit.slow(session):
            kit.database.disconnect_others()
        book.title = "Persuasion"

    assert kit.trace(kit.make(body)).state == "SUCCESS"
    assert kit.titles() == ["Persuasion"]


@promise(by_hand.WithBlock, by_hand.Hooks)
def f22_the_reason_of_a_failure_is_stored(kit: Ours) -> None:
    """A document does not stay "processing" because its "failed" was rolled back with the work."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["half done"])
        raise LookupError

    kit.trace(kit.make(body, saves_failure=True))

    assert kit.titles() == ["failed"]


@promise(by_hand.WithBlock)
def f24_a_retry_finds_what_its_first_attempt_saved(kit: Ours) -> None:
    """Progress that the policy commits on a retry is there at the next attempt."""

    def body(task: Any, session: Session) -> int:
        if task.request.retries == 0:
            add_books(session, ["progress"])
            raise task.retry(countdown=0)
        return len(session.scalars(select(Book)).all())

    task = kit.make(body, commit_on=("success", "retry"))

    assert kit.trace(task).state == "RETRY"
    assert kit.trace(task, request={"retries": 1}).value == 1


@promise(by_hand.WithBlock, by_hand.Hooks)
def f25_a_retry_leaves_after_the_transaction_has_ended(kit: Ours) -> None:
    """The next attempt must not run into the locks of this one."""
    locked: list[int] = []

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        raise task.retry(countdown=0)

    def published(**message: Any) -> None:
        locked.append(kit.database.transactions())

    before_task_publish.connect(published)
    try:
        kit.trace(kit.make(body))
    finally:
        before_task_publish.disconnect(published)

    assert locked == [0]


# --- bases, engines, leftovers ------------------------------------------------------------------------------------------------


@promise(by_hand.FlaskScoped)
def f27_closing_needs_no_frameworks_context(kit: Ours) -> None:
    """The application context is gone when the task is over; the connection comes back all the same."""

    def body(task: Any, session: Session) -> None:
        add_books(session, ["Emma"])
        raise LookupError

    kit.trace(kit.make(body))

    assert kit.checked_out() == 0
    assert kit.database.transactions() == 0


@promise(by_hand.EnginePerTask)
def f28_one_engine_serves_all_tasks(kit: Ours) -> None:
    """An engine in every task is a connect in every task."""
    engines: set[int] = set()
    kept: list[Any] = []

    def body(task: Any, session: Session) -> None:
        kept.append(session.get_bind())
        engines.add(id(kept[-1]))

    task = kit.make(body)
    for _ in range(3):
        kit.trace(task)

    assert len(engines) == 1


@promise(by_hand.Lazy)
def f29_an_attempt_does_not_read_what_the_last_one_remembers(kit: Ours) -> None:
    """A new attempt has a new identity map and a new snapshot."""
    kit.database.execute("INSERT INTO book (title) VALUES ('old')")

    def body(task: Any, session: Session) -> str:
        book = session.scalars(select(Book)).one()
        # The row is referred to from elsewhere, as by a cache.
        task.app.kept = book
        if task.request.retries == 0:
            raise task.retry(countdown=0)
        return book.title

    task = kit.make(body)
    kit.trace(task)
    kit.database.execute("UPDATE book SET title = 'new'")

    assert kit.trace(task, request={"retries": 1}).value == "new"


@promise(by_hand.WithBlock)
def f31_a_result_that_cannot_be_stored_doubles_no_work(kit: Ours) -> None:
    """Whoever sends the task again gets the result of the run that committed."""
    runs: list[None] = []

    def body(task: Any, session: Session) -> str:
        runs.append(None)
        add_books(session, [f"payment {len(runs)}"])
        return "paid"

    task = kit.make_once(body)
    store = task.backend._store_result
    with pytest.MonkeyPatch.context() as patch:

        def gone_away(*args: Any, **kwargs: Any) -> None:
            patch.setattr(task.backend, "_store_result", store)
            raise ConnectionError("the result backend has gone away")

        patch.setattr(task.backend, "_store_result", gone_away)
        with pytest.warns(RuntimeWarning, match="outside body"):
            kit.trace(task, request={"id": "charge-7"})

    assert kit.trace(task, request={"id": "charge-7"}).value == "paid"
    assert kit.titles() == ["payment 1"]


@promise(by_hand.WithBlock, by_hand.Hooks)
def f32_a_task_that_fails_after_it_has_sent_leaves_nothing_half_done(kit: Ours) -> None:
    """No commit is needed to make the send safe: the rows and the message are taken back together."""

    def ship(task: Any, session: Session) -> None: ...

    shipping = kit.make(ship, name="ship")
    before = kit.waiting()

    def body(task: Any, session: Session) -> None:
        add_books(session, ["order"])
        kit.send(session, shipping)
        raise LookupError("no invoice")

    kit.trace(kit.make(body))

    assert kit.titles() == []
    assert kit.waiting() == before


class BrokenHook(Task):
    """A user's base whose own hook raises."""

    abstract = True

    def after_return(self, *args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError


@promise(by_hand.Hooks)
def f35_a_hook_that_raises_does_not_keep_the_session_open(kit: Ours) -> None:
    """Celery logs the hook's error and goes on; nothing may depend on the hook."""

    def body(task: Any, session: Session) -> None:
        session.scalars(select(Book)).all()
        raise Ignore if task.request.retries else LookupError

    options: dict[str, Any] = {}
    if isinstance(kit, ByHand):
        options["base"] = BrokenHook
    else:
        options["base"] = type("Base", (BrokenHook, kit.app.Task), {"abstract": True})
    kit.trace(kit.make(body, **options))

    assert kit.checked_out() == 0


@promise(by_hand.KeptByTaskId)
def f36_a_failed_task_is_cleaned_up_once(kit: Ours) -> None:
    """The only error in the log is the task's own."""
    records: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(str(record.exc_info[1]) if record.exc_info else record.getMessage())

    def body(task: Any, session: Session) -> None:
        session.scalars(select(Book)).all()
        raise LookupError("the reason")

    handler = Collect(level=logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        kit.trace(kit.make(body))
    finally:
        logging.getLogger().removeHandler(handler)

    assert records == ["the reason"]


@promise(by_hand.InContextVariable)
def f37_nothing_of_a_task_is_left_in_its_context(kit: Ours) -> None:
    """What runs next in the same thread does not find the session of the task before."""

    def body(task: Any, session: Session) -> None:
        session.scalars(select(Book)).all()

    task = kit.make(body)
    kit.trace(task)

    assert not kit.session_left_behind(task)


@pytest.mark.parametrize(("database", "pattern", "check", "options"), PROMISES, indirect=["database"])
def test_reported_failure_happens_by_hand_and_not_with_ours(
    open_kit: Callable[..., Ours], pattern: type[Ours], check: Promise, options: dict[str, Any]
) -> None:
    """Ours keeps each promise; each hand-written pattern that is named beside it breaks it."""
    kit = open_kit(pattern, options)

    if pattern is Ours:
        check(kit)
    else:
        with without_collector(), pytest.raises(Exception):  # noqa: B017, PT011 - each pattern breaks in its own way
            check(kit)
