"""A step that does not end well, and a body that catches what it raised and goes on."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from sqlalchemy import create_engine, event, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import StepError, on_commit, step
from celery_alchemy.operations import dead_tasks
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once_interrupted import ONE, locked
from tests.steps.test_steps import send, steps_of
from tests.waiting import eventually

SERVERS = ("postgresql", "mariadb")
ASYNC = ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy")


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library has warned of."""
    ours = (record for record in caplog.records if record.name.startswith("celery_alchemy"))
    return [record.getMessage() for record in ours if record.levelname == "WARNING"]


@pytest.mark.databases(*SERVERS)
def test_soft_limit_in_a_statement_of_a_step(make_stand: MakeStand, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is asked of the connection that it broke into, not even a rollback, and the next run has a whole one."""
    stand = make_stand(engine_options=ONE)

    def work(session: Session, name: str) -> str:
        session.execute(update(Effect).values(name=name))
        return name

    @stand.task(name="ingest", once=True)
    def ingest() -> str:
        return step("a", work, "new")

    with stand.alchemy.begin() as session:
        session.add(Effect(name="old"))
    sent = send(stand, ingest)
    with locked(stand.database, Effect.__tablename__):
        interrupted = stand.deliver(sent)
    said = _warnings(caplog)
    dead_tasks.revive(stand.alchemy.engine)

    assert isinstance(interrupted.value, SoftTimeLimitExceeded)
    assert said == []
    assert stand.deliver(sent).value == "new"
    assert stand.effects() == ["new"]


@pytest.mark.parametrize("error", [SoftTimeLimitExceeded, LookupError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("goes_on_with", ["another step", "its end"])
def test_body_goes_on_after_an_error_in_a_step(stand: OutboxStand, error: type[BaseException], goes_on_with: str) -> None:
    """What the step has written is rolled back, whatever the error was, and is committed with nothing else."""

    def work(session: Session, name: str) -> None:
        session.add(Effect(name=name))
        session.flush()
        if name == "half":
            raise error

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> str:
        with pytest.raises(error):
            step("long", work, "half")
        if goes_on_with == "another step":
            step("short", work, "whole")
        else:
            work(session, "whole")
        return "whole"

    assert stand.deliver(send(stand, ingest)).value == "whole"
    assert stand.effects() == ["whole"]


@pytest.mark.databases(*SERVERS)
def test_body_goes_on_after_a_step_waited_too_long_for_a_lock(make_stand: MakeStand) -> None:
    """MariaDB undoes the statement alone, and PostgreSQL refuses all that follow: a body that goes on finds neither."""
    stand = make_stand(engine_options=ONE)
    waits = {"postgresql": "SET LOCAL lock_timeout = '1s'", "mariadb": "SET innodb_lock_wait_timeout = 1"}

    def work(session: Session) -> None:
        session.add(Effect(name="half"))
        session.flush()
        session.execute(text(waits[stand.database.name]))
        session.execute(update(Effect).where(Effect.id == old.id).values(name="new"))

    def write(session: Session) -> None:
        session.add(Effect(name="whole"))

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        with pytest.raises(OperationalError):
            step("long", work)
        step("short", write)

    old = Effect(name="old")
    with stand.alchemy.begin() as session:
        session.add(old)
        session.flush()
        session.expunge(old)
    sent = send(stand, ingest)
    with Session(stand.database.engine) as holder:
        # By its key: without an index MariaDB would lock what others add as well.
        holder.execute(select(Effect.id).where(Effect.id == old.id).with_for_update())
        stand.deliver(sent)

    assert stand.effects() == ["old", "whole"]


_SLOW_COMMIT = """
CREATE FUNCTION rest() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(2); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER rest AFTER INSERT ON effect DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION rest()
"""


@pytest.mark.databases("postgresql")
def test_body_goes_on_after_a_soft_limit_in_a_step_s_commit(
    stand: OutboxStand, soft_limit: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The COMMIT is carried out or not; the next step is committed on another connection, and nothing is done twice."""
    stand.database.execute(_SLOW_COMMIT)
    connections: list[int] = []
    timer = threading.Timer(1, soft_limit)

    def work(session: Session, name: str) -> None:
        connections.append(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
        session.add(Effect(name=name))

    @stand.task(name="ingest", once=True)
    def ingest() -> str:
        timer.start()
        with pytest.raises(SoftTimeLimitExceeded):
            step("long", work, "slow")
        step("short", work, "quick")
        return "quick"

    ended = stand.deliver(send(stand, ingest))
    said = [warning for warning in _warnings(caplog) if "without asking for 1 of its recorded steps: 'long'" not in warning]

    assert ended.value == "quick"
    assert said == []
    assert connections[0] != connections[1]
    eventually(lambda: stand.database.transactions() == 0)
    assert stand.effects() in (["slow", "quick"], ["quick", "slow"], ["quick"])


@pytest.mark.databases("postgresql")
def test_server_that_only_reads_gets_no_step_again(stand: OutboxStand) -> None:
    """After a failover the connection is dropped, also by a body that catches the error and goes on."""
    connections: list[int] = []

    def work(session: Session, name: str, mode: str) -> None:
        connections.append(session.execute(text("SELECT pg_backend_pid()")).scalar_one())
        session.execute(text(f"SET SESSION CHARACTERISTICS AS TRANSACTION READ {mode}"))
        session.execute(text(f"SET TRANSACTION READ {mode}"))
        session.add(Effect(name=name))
        session.flush()

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        with pytest.raises(DBAPIError, match="read-only transaction"):
            step("long", work, "lost", "ONLY")
        step("short", work, "whole", "WRITE")

    stand.deliver(send(stand, ingest))

    assert connections[0] != connections[1]
    assert stand.effects() == ["whole"]


_SLEEP = {"postgresql": "SELECT pg_sleep(60)", "mariadb": "SELECT sleep(60)"}


@pytest.mark.databases(*ASYNC)
@pytest.mark.parametrize("broken_in", ["between statements", "in a statement"])
@pytest.mark.parametrize("goes_on_with", ["another step", "its end"])
def test_body_goes_on_after_a_step_took_too_long(stand: OutboxStand, broken_in: str, goes_on_with: str) -> None:
    """It is cancelled by `asyncio.wait_for`: what it has written is rolled back, and is committed with nothing else."""
    if broken_in == "in a statement" and stand.database.name == "sqlite":
        pytest.skip("SQLite has no statement that sleeps")

    async def take_too_long(session: AsyncSession) -> None:
        session.add(Effect(name="half"))
        await session.flush()
        if broken_in == "in a statement":
            await session.execute(text(_SLEEP[stand.database.name]))
        await asyncio.sleep(60)

    async def write(session: AsyncSession, name: str) -> None:
        session.add(Effect(name=name))

    @stand.task(name="ingest", once=True)
    async def ingest(session: AsyncSession) -> str:
        try:
            await asyncio.wait_for(step("long", take_too_long), 0.2)
        except asyncio.TimeoutError:
            if goes_on_with == "another step":
                await step("short", write, "late")
            else:
                await write(session, "late")
        return "late"

    assert stand.deliver(send(stand, ingest)).value == "late"
    assert stand.effects() == ["late"]


def _ending(self: Any, name: str) -> BaseException:
    if name == "retry":
        # It says so by raising.
        self.retry(countdown=60)
    return {"ignore": Ignore(), "reject": Reject()}[name]


@pytest.mark.parametrize("ending", ["retry", "ignore", "reject"])
def test_body_goes_on_after_an_ending_in_a_step(stand: OutboxStand, ending: str) -> None:
    """`Retry` is an Exception, so that `except Exception` catches it: the step's rows and sends are gone all the same."""

    @stand.task(name="child")
    def child() -> None: ...

    @stand.task(name="ingest", once=True, bind=True)
    def ingest(self: Any, session: Session) -> str:
        def half(session: Session) -> None:
            session.add(Effect(name="half"))
            session.flush()
            child.delay_on_commit()
            raise _ending(self, ending)

        with pytest.raises((Retry, Ignore, Reject)):
            step("long", half)
        step("short", session.add, Effect(name="whole"))
        return "whole"

    assert stand.deliver(send(stand, ingest)).value == "whole"
    assert stand.effects() == ["whole"]
    stand.relay_all()
    assert [message.headers["task"] for message in stand.sent()].count("child") == 0


def test_death_by_reject_says_in_which_step(stand: OutboxStand) -> None:
    """As that by an error does."""

    def refuse() -> None:
        raise Reject("no such document")

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        step("fetch", refuse)

    stand.deliver(send(stand, ingest))
    [dead] = dead_tasks.dead(stand.alchemy.engine)

    assert "in step 'fetch'" in dead["error"]


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize("owed", [True, False], ids=["owed", "direct"])
def test_step_whose_commit_was_carried_out_stays_done(stand: OutboxStand, soft_limit: Callable[[], None], owed: bool) -> None:
    """A soft limit broke into its COMMIT, which the server went on with: its next call gives the value, in this run and the next."""
    stand.database.execute(_SLOW_COMMIT)
    runs: list[str] = []

    def work(session: Session, name: str) -> str:
        runs.append(name)
        session.add(Effect(name=name))
        if len(runs) == 1:
            timer.start()
        return name

    @stand.task(name="ingest", once=True)
    def ingest() -> list[str]:
        try:
            first = step("long", work, "slow")
        except SoftTimeLimitExceeded:
            first = step("long", work, "slow")
        return [first, step("short", work, "quick")]

    timer = threading.Timer(0.5, soft_limit)
    sent = send(stand, ingest, owed=owed)
    assert stand.deliver(sent).value == ["slow", "quick"]
    eventually(lambda: stand.database.transactions() == 0)

    assert stand.effects() == ["slow", "quick"]
    if owed:
        assert runs == ["slow", "quick"]


@pytest.mark.parametrize("by", ["what runs on commit", "SQLAlchemy's event"])
def test_step_that_was_ended_behind_its_commit_stays_done(stand: OutboxStand, by: str) -> None:
    """What was to run on its COMMIT raised SystemExit, and the body caught that."""
    runs: list[str] = []
    ends = [SystemExit()]

    def end(*_: object) -> None:
        if ends and stand.effects():
            raise ends.pop()

    def work(session: Session, name: str) -> str:
        runs.append(name)
        session.add(Effect(name=name))
        if by == "what runs on commit":
            on_commit(session, end)
        else:
            event.listen(session, "after_commit", end)
        return name

    @stand.task(name="ingest", once=True)
    def ingest() -> list[str]:
        try:
            first = step("long", work, "long")
        except SystemExit:
            first = step("long", work, "again")
        return [first, step("short", work, "short")]

    assert stand.deliver(send(stand, ingest)).value == ["long", "short"]
    assert (runs, stand.effects(), ends) == (["long", "short"], ["long", "short"], [])


class SlowCommit(sqlite3.Connection):
    """A disk that takes its time once."""

    is_slow = False

    def commit(self) -> None:
        """Commit, and say so late."""
        super().commit()
        if SlowCommit.is_slow:
            SlowCommit.is_slow = False
            time.sleep(1)


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize("name", ["long", "instead"])
def test_step_that_took_too_long_and_was_committed_stays_done(make_stand: MakeStand, name: str) -> None:
    """`asyncio.wait_for` gave its COMMIT up, which was carried out: the same step gives its value, and others come after it."""
    stand = make_stand(engine_options={"connect_args": {"factory": SlowCommit}})
    runs: list[str] = []

    async def work(session: AsyncSession, name: str) -> str:
        runs.append(name)
        session.add(Effect(name=name))
        SlowCommit.is_slow = len(runs) == 1
        return name

    @stand.task(name="ingest", once=True)
    async def ingest() -> str:
        try:
            return await asyncio.wait_for(step("long", work, "long"), 0.3)
        except asyncio.TimeoutError:
            return await step(name, work, name)

    assert stand.deliver(send(stand, ingest)).value == name
    expected = ["long"] if name == "long" else ["long", "instead"]
    assert (runs, stand.effects()) == (expected, expected)


@pytest.mark.databases(*ASYNC)
def test_step_under_way_at_the_end_is_refused(stand: OutboxStand) -> None:
    """`asyncio.gather` leaves it running when another one fails: half of it is not committed with the task."""

    async def bad() -> None:
        raise LookupError

    async def good(session: AsyncSession) -> None:
        session.add(Effect(name="first half"))
        await session.flush()
        await asyncio.sleep(0.3)
        session.add(Effect(name="second half"))

    @stand.task(name="ingest", once=True)
    async def ingest() -> str:
        with pytest.raises(LookupError):
            await asyncio.gather(step("a", bad), step("b", good))
        await asyncio.sleep(0.1)
        return "gave up"

    ended = stand.deliver(send(stand, ingest))

    assert isinstance(ended.value, StepError)
    assert "'b'" in str(ended.value)
    assert "under way" in str(ended.value)
    assert stand.effects() == []


@pytest.mark.parametrize("goes_on_with", ["another step", "an error of its own", "its end"])
@pytest.mark.databases("postgresql")
def test_body_that_hides_that_it_was_overtaken(make_stand: MakeStand, goes_on_with: str) -> None:
    """Whatever the body makes of it, the task goes on from the record: it is no failure of the step."""
    stand = make_stand()
    second_is_in, first_is_done = threading.Event(), threading.Event()
    seen: list[str] = []

    @stand.task(name="ingest", once=True, isolation_level="REPEATABLE READ")
    def ingest() -> str:
        step("a", str)

        def work(session: Session) -> str:
            me = threading.current_thread().name
            session.add(Effect(name="worked"))
            session.flush()
            if me == "first":
                second_is_in.wait(10)
            else:
                second_is_in.set()
                first_is_done.wait(10)
            return "worked"

        try:
            return step("b", work)
        except Exception as error:
            seen.append(threading.current_thread().name)
            if goes_on_with == "an error of its own":
                raise LookupError("no work") from error
            return step("instead", str) if goes_on_with == "another step" else "instead"

    sent = send(stand, ingest)
    ended: dict[str, Any] = {}

    def deliver() -> None:
        name = threading.current_thread().name
        ended[name] = stand.deliver(sent).value
        if name == "first":
            first_is_done.set()

    threads = [threading.Thread(target=deliver, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
        # The second one counts its start while the first one works.
        thread.join(0.5)
    for thread in threads:
        thread.join(30)

    assert seen
    assert ended == {"first": "worked", "second": "worked"}
    assert stand.effects() == ["worked"]


@pytest.mark.databases("postgresql")
def test_body_goes_on_after_a_soft_limit_while_the_records_are_read(stand: OutboxStand, soft_limit: Callable[[], None]) -> None:
    """The session is whole again for the next step."""
    engine = create_engine(stand.database.url)
    blocks = [engine.connect()]

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> str:
        session.execute(text("SELECT 1"))
        if blocks:
            blocks[0].execute(text("LOCK TABLE celery_steps IN ACCESS EXCLUSIVE MODE"))
            threading.Timer(0.3, soft_limit).start()
            with pytest.raises(SoftTimeLimitExceeded):
                step("long", str)
            blocks.pop().close()
        step("short", session.add, Effect(name="cleaned"))
        return "cleaned"

    assert stand.deliver(send(stand, ingest)).value == "cleaned"
    assert stand.effects() == ["cleaned"]
    engine.dispose()


def test_records_of_an_ignored_task_go_with_it(stand: OutboxStand) -> None:
    """It is completed, as any other."""

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        step("a", str)
        raise Ignore

    stand.deliver(send(stand, ingest))

    assert steps_of(stand) == []


def test_plain_function_around_a_coroutine_is_plain(stand: OutboxStand) -> None:
    """A decorator that runs a coroutine function to its end makes a plain one; what is still a coroutine is refused."""

    async def fetch(number: int) -> int:
        return number

    @functools.wraps(fetch)
    def run(number: int) -> Any:
        return asyncio.run(fetch(number))

    @stand.task(name="ingest", once=True)
    def ingest() -> int:
        with pytest.raises(StepError, match="async def"):
            step("refused", fetch, 1)
        return step("plain", run, 1)

    assert stand.deliver(send(stand, ingest)).value == 1


def test_function_may_have_parameters_of_any_name(stand: OutboxStand) -> None:
    """Those of `step` itself are given by their place."""

    def describe(*, name: str, function: str) -> str:
        return f"{name} {function}"

    @stand.task(name="ingest", once=True)
    def ingest() -> str:
        return step("describe", describe, name="a", function="b")

    assert stand.deliver(send(stand, ingest)).value == "a b"


def test_name_with_half_a_character_is_refused(stand: OutboxStand) -> None:
    """Before the function runs: no database could keep it."""
    ran: list[str] = []

    @stand.task(name="ingest", once=True)
    def ingest() -> None:
        step("\ud800", ran.append, "ran")

    assert isinstance(stand.deliver(send(stand, ingest)).value, StepError)
    assert ran == []
