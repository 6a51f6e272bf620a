"""What the database is told of the running task: application_name, and comments behind the statements."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError
from celery_alchemy.loop import process_loop
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

SYNC = ("sqlite", "postgresql", "postgresql+psycopg2", "mariadb", "mariadb+mysqldb")
ASYNC = ("sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg", "mariadb+asyncmy", "mariadb+aiomysql")

#: What the server shows of the asking connection.
ACTIVITY = "SELECT application_name, query FROM pg_stat_activity WHERE pid = pg_backend_pid()"


@pytest.fixture(autouse=True)
def _end_loop() -> Iterator[None]:
    yield
    process_loop.close()


def sent(shop: Shop) -> list[str]:
    """Return a list that gets the text of every statement from here on, as the driver gets it."""
    statements: list[str] = []
    dialect: Any = shop.alchemy.engine.dialect
    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        original = getattr(dialect, name)

        def note(cursor: Any, statement: str, *rest: Any, original: Any = original) -> None:
            statements.append(statement)
            original(cursor, statement, *rest)

        setattr(dialect, name, note)
    return statements


@pytest.mark.databases("postgresql", "postgresql+psycopg2", "postgresql+psycopg")
@pytest.mark.parametrize("options", [{"application_name": True}, {"statement_comments": ("task", "id")}], ids=lambda o: next(iter(o)))
def test_server_shows_which_task_a_transaction_belongs_to(make_shop: MakeShop, options: dict[str, Any]) -> None:
    """Its name and id stand in pg_stat_activity while the task runs, and in nobody else's transaction."""
    shop = make_shop(**options)

    @shop.task(name="shop.looks")
    def looks(session: Session) -> list[str]:
        return list(session.execute(text(ACTIVITY)).one())

    name, query = shop.trace(looks, request={"id": "a-request"}).value
    with shop.alchemy.engine.connect() as connection:
        other_name, other_query = connection.execute(text(ACTIVITY)).one()

    if "application_name" in options:
        assert name == "shop.looks[a-request]"
        assert query == ACTIVITY
    else:
        assert query == f"{ACTIVITY} /*id='a-request',task='shop.looks'*/"
    assert "shop.looks" not in other_name + other_query


@pytest.mark.databases("postgresql+asyncpg", "postgresql+psycopg")
@pytest.mark.parametrize("options", [{"application_name": True}, {"statement_comments": ("task", "id")}], ids=lambda o: next(iter(o)))
def test_server_shows_which_async_task_a_transaction_belongs_to(make_shop: MakeShop, options: dict[str, Any]) -> None:
    """As for plain tasks, when many run on one loop."""
    shop = make_shop(**options)

    @shop.task(name="shop.looks")
    async def looks(session: AsyncSession) -> str:
        await asyncio.sleep(0)
        return " ".join((await session.execute(text(ACTIVITY))).one())

    for number in range(2):
        shown = shop.trace(looks, request={"id": f"request-{number}"}).value
        assert "shop.looks" in shown
        assert f"request-{number}" in shown


@pytest.mark.databases("postgresql", "postgresql+asyncpg")
def test_name_that_is_too_long_keeps_its_end(make_shop: MakeShop, database: Any) -> None:
    """PostgreSQL has room for 63 bytes; the id and the end of the task's name say more than the beginning."""
    shop = make_shop(application_name=True)
    long = "shop." + "tasks." * 20 + "è\0rename"

    if database.url.startswith("postgresql+asyncpg"):

        @shop.task(name=long)
        async def looks(session: AsyncSession) -> Any:
            return await session.scalar(text("SHOW application_name"))

    else:

        @shop.task(name=long)
        def looks(session: Session) -> Any:
            return session.scalar(text("SHOW application_name"))

    shown = shop.trace(looks, request={"id": "i" * 36}).value

    assert len(shown) == 63
    assert shown.endswith(f"tasks.??rename[{'i' * 36}]")


@pytest.mark.databases(*SYNC)
def test_every_kind_of_statement_works_with_a_comment(make_shop: MakeShop, database: Any) -> None:
    """Parameters, percent signs, many rows, text with a semicolon: the comment changes nothing but the text."""
    shop = make_shop(statement_comments=("task", "id"))

    @shop.task(name="per%cent's */ %s :x ? $1")
    def works(session: Session, percent: str) -> list[Any]:
        add_books(session, ["one"])
        session.execute(insert(Book), [{"title": f"{number}%"} for number in range(3)])
        session.execute(text("UPDATE book SET title = :new WHERE title = :old"), {"new": "1", "old": "one"})
        found = session.scalars(text("SELECT title FROM book WHERE title LIKE '%2%' ;\n")).all()
        literal = session.connection().exec_driver_sql(f"SELECT '{percent}'").scalar()
        no_parameters = session.connection().execution_options(no_parameters=True).exec_driver_sql("SELECT '%'").scalar()
        return [list(found), literal, no_parameters]

    statements = sent(shop)
    doubled = "%" if database.name == "sqlite" else "%%"
    traced = shop.trace(works, doubled, request={"id": "*/ DROP TABLE book; --%"})

    assert traced.value == [["2%"], "%", "%"], traced
    assert shop.titles() == ["1", "0%", "1%", "2%"]
    safe = "/*id='%2A%2F%20DROP%20TABLE%20book%3B%20--%25',task='per%25cent%27s%20%2A%2F%20%25s%20%3Ax%20%3F%20%241'*/"
    commented = [statement for statement in statements if safe in statement.replace("%%", "%")]
    assert len(commented) >= 5
    assert all(statement.count("*/") == 1 for statement in commented)
    assert all(statement.replace("%%", "%").endswith(safe) for statement in commented)


@pytest.mark.databases(*ASYNC)
def test_statements_of_async_tasks_work_with_comments(make_shop: MakeShop) -> None:
    """With each async driver, values and rows come through."""
    shop = make_shop(statement_comments=("task", "id"))

    @shop.task(name="100%")
    async def works(session: AsyncSession) -> Any:
        session.add(Book(title="50%"))
        await session.flush()
        return await session.scalar(text("SELECT title FROM book WHERE title LIKE :like"), {"like": "%0%"})

    assert shop.trace(works).value == "50%"
    assert shop.titles() == ["50%"]


@pytest.mark.databases("mariadb", "mariadb+mysqldb")
def test_comment_does_not_split_rows_that_are_sent_together(make_shop: MakeShop) -> None:
    """Pymysql joins the rows of an INSERT only if nothing stands behind VALUES: a thousand rows stay one statement."""
    shop = make_shop(statement_comments=("task",))

    @shop.task(name="adds")
    def adds(session: Session) -> int:
        connection = session.connection()
        before = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Com_insert'").one()[1]
        connection.exec_driver_sql("INSERT INTO book (title) VALUES (%s)", [(str(number),) for number in range(1000)])
        return int(connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Com_insert'").one()[1]) - int(before)

    assert shop.trace(adds).value == 1


@pytest.mark.databases("postgresql")
@pytest.mark.parametrize(("comments", "prepared"), [((), 1), (("task",), 1), (("task", "id"), 0)])
def test_comment_without_the_id_leaves_the_drivers_cache_alone(make_shop: MakeShop, comments: tuple[str, ...], prepared: int) -> None:
    """Psycopg prepares a text at its sixth time: with the id, no request has the text of another."""
    shop = make_shop(statement_comments=comments, application_name=True, engine_options={"pool_size": 1, "max_overflow": 0})

    @shop.task(name="reads")
    def reads(session: Session) -> None:
        session.scalar(text("SELECT count(*) FROM book WHERE title = :title"), {"title": "Emma"})

    @shop.task(name="counts")
    def counts(session: Session) -> Any:
        return session.scalar(text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%WHERE title = $1%'"))

    for _ in range(7):
        shop.trace(reads)

    assert shop.trace(counts).value == prepared


@pytest.mark.databases("sqlite")
def test_code_outside_of_tasks_has_no_labels(make_shop: MakeShop) -> None:
    """A web request's session is not a task's; one that a task opens beside its own is."""
    shop = make_shop(statement_comments=("task", "id"), application_name=True)
    statements = sent(shop)

    @shop.task(name="opens")
    def opens() -> None:
        with shop.alchemy.session() as session:
            session.scalar(text("SELECT 2"))

    with shop.alchemy.session() as session:
        session.scalar(text("SELECT 1"))
    shop.trace(opens, request={"id": "a-request"})

    assert [statement for statement in statements if statement.startswith("SELECT")] == [
        "SELECT 1",
        "SELECT 2 /*id='a-request',task='opens'*/",
    ]


@pytest.mark.databases("sqlite", "postgresql")
def test_statements_are_as_they_are_where_nobody_asks(shop: Shop) -> None:
    """Without the options no statement is sent more, and none has another text."""

    @shop.task()
    def works(session: Session) -> None:
        session.scalar(text("SELECT 1"))

    shop.trace(works)  # SQLAlchemy's own questions to a server that it does not know yet.
    statements = sent(shop)
    shop.trace(works)

    assert statements == ["SELECT 1"]


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("value", ["task", ("name",), True, ("task", 1)], ids=repr)
def test_unknown_comment_key_is_refused(make_shop: MakeShop, value: Any) -> None:
    """The message says what there is."""
    with pytest.raises(ConfigurationError, match=r'statement_comments=\("task",\)'):
        make_shop(statement_comments=value)


@pytest.mark.databases("sqlite")
def test_fiftieth_statement_in_a_row_is_found_with_comments_too(make_shop: MakeShop, caplog: pytest.LogCaptureFixture) -> None:
    """The other insight works on the same statements."""
    shop = make_shop(statement_comments=("task", "id"))

    @shop.task(name="loads")
    def loads(session: Session) -> None:
        for _ in range(50):
            session.execute(text("SELECT 1"))

    shop.trace(loads)

    assert ["50 times in a row" in record.getMessage() for record in caplog.records] == [True]
