"""The log celery_alchemy.requests.insight: transactions left idle, and a query for each row of another."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from celery.signals import task_postrun
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import SessionTask, released
from celery_alchemy.requests.event_loop import process_loop
from tests.insight.clock import Clock
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "celery_alchemy.insight"]


def idle_task(shop: Shop, clock: Clock, seconds: float) -> Any:
    """Return a task whose transaction is idle for so long between two statements."""

    @shop.task(name="idles")
    def idles(session: Session) -> None:
        session.execute(text("SELECT 1"))
        clock.move_on(seconds)
        session.execute(text("SELECT 2"))

    return idles


def test_idle_transaction_is_reported_with_task_id_and_place(shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the task, its request's id, the seconds, and the line of the task that went on."""
    lines: list[int] = []

    @shop.task(name="idles")
    def idles(session: Session) -> None:
        session.execute(text("SELECT 1"))
        clock.move_on(7.5)
        lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
        session.execute(text("SELECT 2"))

    shop.trace(idles, request={"id": "a-request"})

    [warning] = warnings_of(caplog)
    assert "Task idles[a-request] left its transaction idle for 7.5 s" in warning
    assert f"{__file__}:{lines[0]} in idles" in warning


def test_idle_time_before_the_commit_is_reported_as_the_end_of_the_task(
    shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Slow work after the last statement holds the transaction too; no frame of whoever called the task is named."""

    @shop.task()
    def idles(session: Session) -> None:
        session.execute(text("SELECT 1"))
        clock.move_on(6.0)

    shop.trace(idles)

    [warning] = warnings_of(caplog)
    assert "idle for 6.0 s before the end of the task" in warning


@pytest.mark.parametrize(("seconds", "expected"), [(5.0, 0), (5.5, 1)])
def test_idle_transaction_is_reported_only_over_the_limit(
    shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture, seconds: float, expected: int
) -> None:
    """The default limit is 5 seconds; exactly that long is not over it."""
    shop.trace(idle_task(shop, clock, seconds))

    assert len(warnings_of(caplog)) == expected


def test_limit_of_the_idle_report_can_be_set(make_shop: MakeShop, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """With idle_transaction_seconds=1, two idle seconds are reported."""
    shop = make_shop(idle_transaction_seconds=1)

    shop.trace(idle_task(shop, clock, 2.0))

    assert len(warnings_of(caplog)) == 1


def test_none_switches_the_idle_report_off(make_shop: MakeShop, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """With idle_transaction_seconds=None an hour is not reported."""
    shop = make_shop(idle_transaction_seconds=None)

    shop.trace(idle_task(shop, clock, 3600.0))

    assert warnings_of(caplog) == []


def test_time_in_released_is_not_idle(shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """What the warning recommends silences it: there is no transaction meanwhile."""

    @shop.task()
    def releases(session: Session) -> None:
        session.execute(text("SELECT 1"))
        with released(session):
            clock.move_on(60.0)
        session.execute(text("SELECT 2"))

    assert shop.trace(releases).state == "SUCCESS"
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(("times", "expected"), [(49, 0), (50, 1), (150, 1)])
def test_statement_is_reported_at_its_fiftieth_time_in_a_row(
    shop: Shop, caplog: pytest.LogCaptureFixture, times: int, expected: int
) -> None:
    """Not before, and once only; the warning names task, id, place and statement."""

    @shop.task(name="loads")
    def loads(session: Session) -> None:
        for number in range(times):
            session.execute(select(Book).where(Book.id == number))

    shop.trace(loads, request={"id": "a-request"})

    warnings = warnings_of(caplog)
    assert len(warnings) == expected
    for warning in warnings:
        assert "Task loads[a-request] sent the same statement 50 times in a row" in warning
        assert f"at {__file__}:" in warning
        assert " in loads: SELECT book.id, book.title FROM book" in warning


def test_other_statement_in_between_starts_the_count_again(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Forty-nine, another one, and forty-nine again are no fifty in a row."""

    @shop.task()
    def loads(session: Session) -> None:
        for statement in [*["SELECT 1"] * 49, "SELECT 2", *["SELECT 1"] * 49]:
            session.execute(text(statement))

    shop.trace(loads)

    assert warnings_of(caplog) == []


def test_many_rows_in_one_flush_are_no_repeat(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that SQLAlchemy sends together is what the warning asks for."""

    @shop.task()
    def adds(session: Session) -> None:
        add_books(session, [f"book {number}" for number in range(200)])

    shop.trace(adds)

    assert len(shop.titles()) == 200
    assert warnings_of(caplog) == []


def held_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [warning for warning in warnings_of(caplog) if "left a connection open" in warning]


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("way", ["get_bind", "engine", "session", "raises", "local"])
def test_connection_left_open_is_reported_with_task_id_and_place(
    shop: Shop, caplog: pytest.LogCaptureFixture, way: str, request: pytest.FixtureRequest
) -> None:
    """Whichever way the body came to it, and whether or not it uses the task's session or fails; once, not at every later task."""
    left: list[Any] = []
    lines: list[int] = []
    if way == "local":
        request.addfinalizer(gc.collect)
    request.addfinalizer(lambda: [each.close() for each in left])

    @shop.task(name="leaves")
    def leaves(session: Session) -> None:
        source: Any = shop.alchemy.engine if way in ("engine", "raises") else session.get_bind()
        connection = Session(source) if way == "session" else source.connect()
        lines.append(inspect.currentframe().f_lineno + 1)  # type: ignore[union-attr]
        connection.execute(text("SELECT 1"))
        if way != "local":  # There its transaction, which knows it, keeps it until the garbage collector comes.
            left.append(connection)
        if way == "raises":
            raise ValueError("wrong")

    @shop.task()
    def uses_it_too(session: Session) -> None:
        for connection in left:
            connection.execute(text("SELECT 1"))

    shop.trace(leaves, request={"id": "a-request"})
    shop.trace(uses_it_too)

    [warning] = held_by(caplog)
    assert "Task leaves[a-request] ended and left a connection open" in warning
    assert f"{__file__}:{lines[0]} in leaves" in warning


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("way", ["with", "begin", "close", "invalidate", "own session", "block", "outside"])
def test_connection_that_was_closed_is_not_reported(shop: Shop, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """Nor one that belongs to somebody else: it was open before the task, or the session of the task has it."""
    outside = shop.alchemy.engine.connect() if way == "outside" and shop.database.name != "sqlite" else None
    if outside is not None:
        outside.execute(text("SELECT 1"))

    kept: list[Any] = []

    @shop.task()
    def works(session: Session) -> None:
        engine = shop.alchemy.engine
        if way == "with":
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
                kept.append(connection)
        elif way == "begin":
            with engine.begin() as connection:
                connection.execute(text("SELECT 1"))
                kept.append(connection)
        elif way == "own session":
            with Session(engine) as own:
                own.execute(text("SELECT 1"))
        elif way == "block":
            with shop.alchemy.session() as own:
                own.execute(text("SELECT 1"))
        elif way == "outside":
            (outside or session).execute(text("SELECT 1"))
        else:
            connection = engine.connect()
            connection.execute(text("SELECT 1"))
            getattr(connection, way)()
            kept.append(connection)

    assert shop.trace(works).state == "SUCCESS"
    if outside is not None:
        outside.close()
    assert held_by(caplog) == []


class ClosesInCall(SessionTask):
    """As Flask's documented FlaskTask: the context around the call takes the session away at its end."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(*args, **kwargs)
        finally:
            self.close_those()

    def close_those(self) -> None:
        while LEFT and self.name == "closed":
            LEFT.pop().close()


class ClosesAfterReturn(ClosesInCall):
    """As the hand-written base classes with before_start."""

    abstract = True
    __call__ = SessionTask.__call__

    def after_return(self, *args: Any) -> None:
        self.close_those()


#: What bodies have left open.
LEFT: list[Any] = []


@pytest.fixture
def left() -> Iterator[list[Any]]:
    """What bodies have left open; closed with the test."""
    yield LEFT
    while LEFT:
        LEFT.pop().close()


@pytest.fixture
def _close_in_signal() -> Iterator[None]:
    """Close it in task_postrun, as a scoped_session is removed."""

    def close(task: Any, **_: Any) -> None:
        ClosesInCall.close_those(task)

    task_postrun.connect(close)
    yield
    task_postrun.disconnect(close)


@pytest.mark.databases("postgresql")  # SQLite would have the tasks wait for each other.
@pytest.mark.parametrize("base", [ClosesInCall, ClosesAfterReturn])
def test_connection_that_a_hook_closes_is_not_reported(
    shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture, left: list[Any], base: type[SessionTask]
) -> None:
    """Tasks that were there before the library keep their sessions by hand; what their hooks leave open is reported later."""

    def uses() -> None:
        left.append(Session(shop.alchemy.engine))
        left[-1].execute(text("SELECT 1"))

    closed = shop.task(name="closed", base=base)(uses)
    open_ = shop.task(name="left", base=base)(uses)

    for _ in range(2):
        shop.trace(closed)
        clock.move_on(2.0)
    shop.trace(open_, request={"id": "a-request"})
    assert held_by(caplog) == []
    clock.move_on(2.0)
    shop.trace(open_, request={"id": "another"})

    [warning] = held_by(caplog)
    assert "Task left[a-request] ended and left a connection open" in warning
    assert " in uses" in warning


@pytest.mark.usefixtures("_close_in_signal")
def test_connection_that_a_signal_closes_is_not_reported(
    shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture, left: list[Any]
) -> None:
    """A scoped_session is removed by task_postrun, after the end of the body."""

    @shop.task(name="closed")
    def closed() -> None:
        left.append(Session(shop.alchemy.engine))
        left[-1].execute(text("SELECT 1"))

    for _ in range(3):
        shop.trace(closed)
        clock.move_on(2.0)

    assert left == []
    assert held_by(caplog) == []


@pytest.mark.parametrize("options", [{"outbox": True}, {}], ids=["outbox", "plain"])
def test_librarys_own_connections_are_not_reported(
    make_shop: MakeShop, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    """What a once task and the outbox do after the commit leaves nothing open, and is nobody's fault."""
    shop = make_shop(**options)
    shop.alchemy.create_tables()

    @shop.task(name="next")
    def follows() -> None: ...

    @shop.task(once=True)
    def works(session: Session) -> None:
        add_books(session, ["Emma"])
        follows.delay_on_commit()

    assert shop.trace(works).state == "SUCCESS"
    assert shop.titles() == ["Emma"]
    assert held_by(caplog) == []


@pytest.fixture
def _end_loop() -> Iterator[None]:
    """End the event loop of async tasks with the test."""
    yield
    process_loop.close()


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.usefixtures("_end_loop")
def test_warning_of_an_async_task_names_the_line_that_awaits(shop: Shop, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """AsyncSession sends its statements from a greenlet; the place is still the user's."""

    @shop.task(name="idles")
    async def idles(session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))
        clock.move_on(8.0)
        await session.execute(text("SELECT 2"))

    assert shop.trace(idles).state == "SUCCESS"

    [warning] = warnings_of(caplog)
    assert "Task idles[" in warning
    assert f"{__file__}:" in warning
    assert " in idles" in warning


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
@pytest.mark.usefixtures("_end_loop")
def test_connection_left_open_by_an_async_task_is_reported(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """With the line that awaits."""
    left: list[Any] = []

    @shop.task(name="leaves")
    async def leaves(session: AsyncSession) -> None:
        connection = await session.bind.connect()  # type: ignore[union-attr]
        left.append(connection)
        await connection.execute(text("SELECT 1"))

    @shop.task()
    async def closes() -> None:
        await left[0].close()

    assert shop.trace(leaves).state == "SUCCESS"
    [warning] = held_by(caplog)
    shop.trace(closes)
    assert "Task leaves[" in warning
    assert f"{__file__}:" in warning
    assert " in leaves" in warning
