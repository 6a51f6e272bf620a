"""on_commit runs a callable after the outermost commit, once, in order, and never after a rollback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from celery_alchemy import CallableError, ConfigurationError, PublishError, on_commit, on_end
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")

Ran = list[str]


@pytest.fixture
def ran() -> Ran:
    """What has run, in order."""
    return []


@pytest.fixture
def engine(shop: Shop) -> Engine:
    return shop.alchemy.engine


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def test_callables_run_in_order_after_the_commit(session: Session, shop: Shop, ran: Ran) -> None:
    """Each sees the committed rows, and runs once."""
    add_books(session, ["Emma"])
    on_commit(session, lambda: ran.append(f"first {shop.titles()}"))
    on_commit(session, lambda: ran.append("second"))
    session.flush()

    before = list(ran)
    session.commit()
    session.commit()

    assert before == []
    assert ran == ["first ['Emma']", "second"]


def test_nothing_runs_after_a_rollback(session: Session, ran: Ran) -> None:
    """Neither at once nor at the next commit."""
    on_commit(session, lambda: ran.append("x"))
    session.rollback()
    add_books(session, ["Emma"])
    session.commit()

    assert ran == []


def test_nothing_runs_after_a_close(engine: Engine, ran: Ran) -> None:
    """Closing a session rolls back."""
    with Session(engine) as session:
        add_books(session, ["Emma"])
        on_commit(session, lambda: ran.append("x"))

    assert ran == []


def test_nothing_runs_when_the_commit_fails(session: Session, ran: Ran) -> None:
    """A flush inside of commit() that fails is no commit."""
    on_commit(session, lambda: ran.append("x"))
    session.add_all([Book(title="Emma"), Book(title="Emma")])

    with pytest.raises(IntegrityError):
        session.commit()
    session.rollback()
    session.commit()

    assert ran == []


def test_nothing_runs_when_the_database_refuses_the_commit(session: Session, ran: Ran, engine: Engine) -> None:
    """An error of COMMIT itself is no commit either."""
    add_books(session, ["Emma"])
    on_commit(session, lambda: ran.append("x"))

    def refuse(connection: object) -> None:
        raise OperationalError("COMMIT", {}, Exception("refused"))

    event.listen(engine, "commit", refuse)
    with pytest.raises(OperationalError):
        session.commit()
    event.remove(engine, "commit", refuse)
    session.rollback()

    assert ran == []


def test_released_savepoint_waits_for_the_outer_commit(session: Session, ran: Ran) -> None:
    """SQLAlchemy tells of a released SAVEPOINT as of a commit; it is none."""
    add_books(session, ["Emma"])
    with session.begin_nested():
        add_books(session, ["Persuasion"])
        on_commit(session, lambda: ran.append("inner"))
    after_savepoint = list(ran)
    on_commit(session, lambda: ran.append("outer"))
    session.commit()

    assert after_savepoint == []
    assert ran == ["inner", "outer"]


def test_rolled_back_savepoint_takes_its_callables_with_it(session: Session, ran: Ran) -> None:
    """What was given inside is gone, what was given before and after it stays."""
    on_commit(session, lambda: ran.append("before"))
    savepoint = session.begin_nested()
    on_commit(session, lambda: ran.append("inside"))
    savepoint.rollback()
    on_commit(session, lambda: ran.append("after"))
    session.commit()

    assert ran == ["before", "after"]


def test_nested_savepoints_each_decide(session: Session, ran: Ran) -> None:
    """A released inner SAVEPOINT is lost with the outer one that is rolled back."""
    with session.begin_nested():
        with session.begin_nested():
            on_commit(session, lambda: ran.append("kept"))
        doomed = session.begin_nested()
        with session.begin_nested():
            on_commit(session, lambda: ran.append("lost inside"))
        on_commit(session, lambda: ran.append("lost"))
        doomed.rollback()
    session.commit()

    assert ran == ["kept"]


def test_failing_block_in_a_savepoint_drops_its_callables(session: Session, ran: Ran) -> None:
    """The usual `with session.begin_nested()` around what may fail: the outer work goes on."""
    with pytest.raises(IntegrityError), session.begin_nested():
        on_commit(session, lambda: ran.append("lost"))
        session.add_all([Book(title="Emma"), Book(title="Emma")])
        session.flush()
    on_commit(session, lambda: ran.append("kept"))
    session.commit()

    assert ran == ["kept"]


def test_callable_may_use_the_session(session: Session, shop: Shop) -> None:
    """It begins a new transaction then, which is the callable's to commit."""

    def more() -> None:
        add_books(session, ["Persuasion"])
        session.commit()

    add_books(session, ["Emma"])
    on_commit(session, more)
    session.commit()

    assert shop.titles() == ["Emma", "Persuasion"]


def test_callable_may_register_another(session: Session, ran: Ran) -> None:
    """It runs after those of the first commit."""
    on_commit(session, lambda: on_commit(session, lambda: ran.append("third")))
    on_commit(session, lambda: ran.append("second"))
    session.commit()

    assert ran == ["second", "third"]


def test_connection_is_back_when_callables_run(session: Session, shop: Shop) -> None:
    """A slow callable holds no connection."""
    held: list[int] = []
    add_books(session, ["Emma"])
    on_commit(session, lambda: held.append(shop.checked_out()))
    session.commit()

    assert held == [0]


def test_failing_callable_lets_the_others_run_and_is_raised(session: Session, shop: Shop, ran: Ran) -> None:
    """Outside of a task the caller learns of it, with the words that the work is committed."""

    def broken() -> None:
        raise ConnectionError("broker down")

    add_books(session, ["Emma"])
    on_commit(session, broken, what="sending the mail")
    on_commit(session, lambda: ran.append("second"))
    with pytest.raises(PublishError, match="is committed.*sending the mail: ConnectionError: broker down") as raised:
        session.commit()

    assert isinstance(raised.value.__cause__, ConnectionError)
    assert ran == ["second"]
    assert shop.titles() == ["Emma"]


def test_failing_callable_of_a_task_does_not_fail_committed_work(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """In a task it is logged with task and id: a failure would make autoretry run the committed work again."""
    runs: list[int] = []

    def broken() -> None:
        raise ConnectionError("broker down")

    @shop.task(name="work", autoretry_for=(Exception,))
    def work(session: Session) -> None:
        runs.append(1)
        add_books(session, ["Emma"])
        on_commit(session, broken, what="sending the mail")

    with caplog.at_level(logging.ERROR, "celery_alchemy"):
        traced = shop.trace(work)

    assert traced.state == "SUCCESS"
    assert runs == [1]
    assert shop.titles() == ["Emma"]
    assert "Task work[" in caplog.text
    assert "is committed, but sending the mail failed after it" in caplog.text


def test_callables_of_a_failing_task_never_run(shop: Shop, ran: Ran) -> None:
    """The task's rollback drops them."""

    @shop.task()
    def work(session: Session) -> None:
        on_commit(session, lambda: ran.append("x"))
        raise LookupError

    assert shop.trace(work).state == "FAILURE"
    assert ran == []


def test_explicit_commit_in_a_body_runs_them_at_once(shop: Shop, ran: Ran) -> None:
    """The transaction that they were given in is committed; the task's later failure takes nothing back."""

    @shop.task()
    def work(session: Session) -> None:
        on_commit(session, lambda: ran.append("x"))
        session.commit()
        raise LookupError

    shop.trace(work)

    assert ran == ["x"]


def test_session_in_an_external_transaction_waits_for_its_commit(engine: Engine, ran: Ran) -> None:
    """A session bound to a Connection whose transaction somebody else began has not committed before that one."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            add_books(session, ["Emma"])
            on_commit(session, lambda: ran.append("x"))
            session.commit()
        after_session = list(ran)
        outer.commit()

    assert after_session == []
    assert ran == ["x"]


def test_session_in_an_external_transaction_that_rolls_back_runs_nothing(engine: Engine, ran: Ran) -> None:
    """The test suite's usual outer transaction, rolled back at the end, sends nothing."""
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            add_books(session, ["Emma"])
            on_commit(session, lambda: ran.append("x"))
            session.commit()
        outer.rollback()
    with engine.begin() as connection:
        connection.exec_driver_sql("SELECT 1")

    assert ran == []


def test_external_savepoint_that_rolls_back_runs_nothing(engine: Engine, ran: Ran) -> None:
    """The outer transaction may commit; what was promised in its rolled back SAVEPOINT is gone all the same."""
    with engine.connect() as connection:
        outer = connection.begin()
        savepoint = connection.begin_nested()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            add_books(session, ["Emma"])
            on_commit(session, lambda: ran.append("x"))
            session.commit()
        savepoint.rollback()
        outer.commit()

    assert ran == []


def test_scoped_session_is_accepted(engine: Engine, ran: Ran) -> None:
    """What Flask users have."""
    scoped = scoped_session(sessionmaker(engine))
    on_commit(scoped, lambda: ran.append("x"))
    scoped.commit()
    scoped.remove()

    assert ran == ["x"]


def test_what_is_no_session_is_refused() -> None:
    """A Connection, say: the error names what was given and what is wanted."""
    with pytest.raises(ConfigurationError, match="'str' was given.*AsyncSession"):
        on_commit("session", lambda: None)


@pytest.mark.parametrize("given", [None, 1, [print]], ids=str)
@pytest.mark.parametrize("hang", [on_commit, on_end])
def test_what_cannot_be_called_is_refused_at_once(session: Session, hang: Any, given: Any) -> None:
    """As what `on_commit(session, notify(user))` gives: it ran at once, and nothing is left for the commit."""
    with pytest.raises(CallableError, match=r"lambda: ") as raised:
        hang(session, given)
    session.rollback()

    assert isinstance(raised.value, TypeError)
    assert f"{hang.__name__}()" in str(raised.value)


def test_two_sessions_do_not_mix(engine: Engine, ran: Ran) -> None:
    """Each commit runs what belongs to its own session."""
    with Session(engine) as one, Session(engine) as two:
        on_commit(one, lambda: ran.append("one"))
        on_commit(two, lambda: ran.append("two"))
        two.commit()

    assert ran == ["two"]


# --- what callables do through the session ----------------------------------------------------------


def test_rows_that_a_callable_writes_are_committed(shop: Shop, session: Session) -> None:
    """In a transaction of their own, also those of a callable that such a row's callable was given."""

    def write_again() -> None:
        add_books(session, ["Sanditon"])

    def write() -> None:
        session.add(Book(title="Persuasion"))
        on_commit(session, write_again)

    add_books(session, ["Emma"])
    on_commit(session, write)
    session.commit()

    assert shop.titles() == ["Emma", "Persuasion", "Sanditon"]
    assert not session.in_transaction()


def test_rows_that_a_callable_of_a_task_writes_are_committed(shop: Shop) -> None:
    """Through the parameter and through `self.session`, and through the driver where no statement shows it."""

    @shop.task(bind=True)
    def work(self: Any, session: Session) -> None:
        def write() -> None:
            add_books(session, ["Emma"])
            self.session.add(Book(title="Persuasion"))

        on_commit(session, write)

    assert shop.trace(work).state == "SUCCESS"
    assert shop.titles() == ["Emma", "Persuasion"]
    assert shop.checked_out() == 0


def test_rows_of_a_callable_in_a_block_are_committed(shop: Shop) -> None:
    """`alchemy.begin()` closes its session right after the commit."""
    with shop.alchemy.begin() as session:
        on_commit(session, lambda: add_books(session, ["Emma"]))

    assert shop.titles() == ["Emma"]


def test_rows_of_a_callable_that_cannot_be_committed_are_reported(
    shop: Shop, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """As an error of the callable's would be: raised to the caller, logged in a task."""

    def duplicate(session: Session) -> None:
        session.add_all([Book(title="Persuasion"), Book(title="Persuasion")])

    @shop.task()
    def work(session: Session) -> None:
        add_books(session, ["Emma"])
        on_commit(session, lambda: duplicate(session))

    on_commit(session, lambda: duplicate(session))
    with pytest.raises(PublishError, match="what its callables have sent and written: IntegrityError"):
        session.commit()
    traced = shop.trace(work)

    assert traced.state == "SUCCESS"
    assert "is committed, but what its callables have sent and written is not" in caplog.text
    assert shop.titles() == ["Emma"]


def test_callable_that_only_reads_leaves_its_transaction_to_the_caller(session: Session) -> None:
    """There is nothing to commit."""
    on_commit(session, lambda: session.execute(text("SELECT 1")))
    session.commit()

    assert session.in_transaction()
