"""The table of codes is right: each code exists under the name that the table gives it, in its driver's own list."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import psycopg.errors
import pytest
from pymysql.constants import CR, ER
from sqlalchemy.exc import IntegrityError, InvalidRequestError, OperationalError

from celery_alchemy import is_transient
from celery_alchemy.databases import transient

#: Numbers that pymysql's list, older than they are, does not have.
NEWER = {
    1792: "ER_CANT_EXECUTE_IN_READ_ONLY_TRANSACTION",
    1836: "ER_READ_ONLY_MODE",
    1927: "ER_CONNECTION_KILLED",
    3572: "ER_LOCK_NOWAIT",
    4031: "ER_CLIENT_INTERACTION_TIMEOUT",
}


class FakeError(Exception):
    """A driver's error with a SQLSTATE."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__("what the server said")
        self.sqlstate = sqlstate


@pytest.mark.parametrize("code", transient.POSTGRESQL)
def test_sqlstate_has_the_name_that_the_table_gives_it(code: str) -> None:
    """The list of psycopg is generated from PostgreSQL's source."""
    name = re.match(r"\w+", transient.POSTGRESQL[code])

    assert name is not None
    assert psycopg.errors.lookup(code).__name__.lower() == name[0].replace("_", "")


@pytest.mark.parametrize("number", transient.MYSQL)
def test_mysql_number_has_the_name_that_the_table_gives_it(number: int) -> None:
    """As pymysql's constants have it, which are MySQL's."""
    known = {value: name for name, value in vars(ER).items() if isinstance(value, int)}
    client = {value: name for name, value in vars(CR).items() if isinstance(value, int)}
    name = transient.MYSQL[number].split(":")[0].split(" of ")[0]

    listed = client.get(number) or "ER_" + known.get(number, NEWER.get(number, "")).removeprefix("ER_")

    assert listed == name


@pytest.mark.skipif(not hasattr(sqlite3, "SQLITE_BUSY"), reason="Python before 3.11 does not name SQLite's codes")
@pytest.mark.parametrize("code", transient.SQLITE)
def test_sqlite_code_has_the_name_that_the_table_gives_it(code: int) -> None:
    """As the sqlite3 module has it."""
    assert getattr(sqlite3, transient.SQLITE[code].split(":")[0]) == code


@pytest.mark.parametrize("table", ["POSTGRESQL", "MYSQL", "SQLITE"])
def test_each_table_names_its_source(table: str) -> None:
    """A reader can look every code up where it is defined."""
    text = Path(transient.__file__).read_text(encoding="utf-8")
    comment = re.search(rf"((?:^#:? .*\n)+){table} = ", text, flags=re.MULTILINE)

    assert comment is not None
    assert "https://" in comment[1]


@pytest.mark.parametrize("code", transient.POSTGRESQL)
def test_every_sqlstate_of_the_table_is_transient(code: str) -> None:
    """Whichever class of error the driver raises it as."""
    assert is_transient(OperationalError("UPDATE", {}, FakeError(code)))


@pytest.mark.parametrize("number", transient.MYSQL)
def test_every_mysql_number_of_the_table_is_transient(number: int) -> None:
    """The drivers give it as the first argument of their error."""
    assert is_transient(OperationalError("UPDATE", {}, Exception(number, "what the server said")))


@pytest.mark.parametrize("code", ["57P03", "53300"])
def test_server_that_takes_no_connection_counts_as_lost(code: str) -> None:
    """As it does where libpq passes on the text alone: asyncpg gives the code."""
    of_asyncpg = type("OfAsyncpg", (FakeError,), {"__module__": "asyncpg.exceptions"})(code)

    assert transient.is_lost_connection(OperationalError("connect", {}, FakeError(code)))
    assert transient.is_lost_connection(of_asyncpg)


@pytest.mark.parametrize("number", [1040, 2003])
def test_mysql_that_takes_no_connection_counts_as_lost(number: int) -> None:
    """Too many connections is no answer to a statement either."""
    assert transient.is_lost_connection(OperationalError("connect", {}, Exception(number, "Too many connections")))


@pytest.mark.parametrize("code", ["23505", "23503", "57014", "42P01", "25P02", "40002", "XX000"])
def test_other_sqlstates_are_not_transient(code: str) -> None:
    """A duplicate stays one; a statement that ran out of time would run out of it again; 40002 is a broken constraint."""
    assert not is_transient(IntegrityError("INSERT", {}, FakeError(code)))


@pytest.mark.parametrize("number", [1062, 1452, 1146, 1317, 3024, 1969])
def test_other_mysql_numbers_are_not_transient(number: int) -> None:
    """A duplicate, a broken reference, a missing table, and statements that were interrupted or ran out of time."""
    assert not is_transient(OperationalError("INSERT", {}, Exception(number, "what the server said")))


@pytest.mark.parametrize("exc", [ConnectionResetError(), TimeoutError(), ValueError(1213), InvalidRequestError(), KeyError()])
def test_what_is_no_database_error_is_not_transient(exc: BaseException) -> None:
    """An HTTP call's lost connection has rolled nothing back."""
    assert not is_transient(exc)
