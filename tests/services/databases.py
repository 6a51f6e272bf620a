"""A database for each test: SQLite, PostgreSQL or MariaDB, and what a test asks it from outside."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.services.availability import Found, Missing, locate, require
from tests.services.wheels import start_postgresql
from tests.waiting import eventually

NAMES = ("sqlite", "postgresql", "mariadb")
# The synchronous driver of each: the default of a test, and what the test's own questions go through.
DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg", "mariadb": "mysql+pymysql"}
# Drivers that `make` installs where it can, and their modules.
OPTIONAL_DRIVERS = {"mysqldb": "MySQLdb", "asyncmy": "asyncmy"}
PREFIX = "celery_alchemy_test"


class Database:
    """An empty database that belongs to the running test.

    Attributes:
        name: "sqlite", "postgresql" or "mariadb".
        url: What the code under test connects to, password included, with the driver the test asked for.
        engine: A synchronous engine without a pool for the test's own statements; it holds no connection
            between two statements, so it is never in the way of what is counted.
    """

    def __init__(self, name: str, url: URL, own_url: URL) -> None:
        self.name = name
        self.url = url.render_as_string(hide_password=False)
        connect_args = {"timeout": 30} if name == "sqlite" else {}
        self.engine: Engine = create_engine(own_url, poolclass=NullPool, connect_args=connect_args)

    def __repr__(self) -> str:
        return f"<Database {self.name} {self.engine.url!r}>"

    def execute(self, statement: str, **parameters: Any) -> None:
        """Run one statement in a transaction of its own."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def rows(self, query: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Return what is committed, as plain tuples."""
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(query), parameters)]

    def scalar(self, query: str, **parameters: Any) -> Any:
        """Return the first column of the first row, or None."""
        rows = self.rows(query, **parameters)
        return rows[0][0] if rows else None

    def connections(self) -> list[int]:
        """Return the server's ids of everyone else's connections to this database (none for SQLite)."""
        query = _CONNECTIONS.get(self.name)
        return [int(row[0]) for row in self.rows(query)] if query else []

    def transactions(self) -> int:
        """Return how many others hold a transaction open (SQLite: 1 while the write lock is held)."""
        if self.name == "sqlite":
            return int(self._write_locked())
        if self.name == "mariadb":
            return sum(state.active for state in self._innodb())
        return len(self.rows(_TRANSACTIONS))

    def waiting_for_a_lock(self) -> int:
        """Return how many statements of others wait for a lock that somebody holds (not for SQLite)."""
        if self.name == "mariadb":
            return sum(state.waits for state in self._innodb())
        return len(self.rows(_WAITING_FOR_A_LOCK))

    def disconnect_others(self) -> int:
        """Cut all other connections to this database, as a restarting server does; return how many when they are gone."""
        ids = self.connections()
        for connection_id in ids:
            if self.name == "postgresql":
                self.rows("SELECT pg_terminate_backend(:id)", id=connection_id)
            else:
                self._kill(connection_id)
        eventually(lambda: not set(ids) & set(self.connections()), what="the connections are cut")
        return len(ids)

    def clear(self) -> None:
        """Cut everyone else off and drop all tables."""
        self.disconnect_others()
        if self.name == "postgresql":
            with self.engine.begin() as connection:
                connection.execute(text("DROP SCHEMA public CASCADE"))
                connection.execute(text("CREATE SCHEMA public"))
        elif self.name == "mariadb":
            tables = self.rows(_MARIADB_TABLES)
            with self.engine.begin() as connection:
                connection.execute(text("SET FOREIGN_KEY_CHECKS = 0"))
                for (table,) in tables:
                    connection.execute(text(f"DROP TABLE `{table}`"))

    def _innodb(self) -> list[_Transaction]:
        ((_kind, _name, status),) = self.rows("SHOW ENGINE INNODB STATUS")
        others = set(self.connections())
        found = (_Transaction.read(block) for block in status.split("\n---TRANSACTION ")[1:])
        return [transaction for transaction in found if transaction.connection in others]

    def _write_locked(self) -> bool:
        impatient = create_engine(self.engine.url, poolclass=NullPool, connect_args={"timeout": 0})
        try:
            with impatient.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("BEGIN IMMEDIATE"))
                connection.execute(text("ROLLBACK"))
        except OperationalError:
            return True
        return False

    def _kill(self, connection_id: int) -> None:
        try:
            self.execute(f"KILL {connection_id}")
        except OperationalError as error:
            if error.orig is None or error.orig.args[0] != _UNKNOWN_THREAD:
                raise


_MARIADB_TABLES = "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"
# MariaDB's answer to KILL for a connection that ended by itself a moment ago.
_UNKNOWN_THREAD = 1094

_CONNECTIONS = {
    "postgresql": (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    ),
    "mariadb": ("SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"),
}
_TRANSACTIONS = _CONNECTIONS["postgresql"] + " AND xact_start IS NOT NULL"
_WAITING_FOR_A_LOCK = _CONNECTIONS["postgresql"] + " AND wait_event_type = 'Lock'"


@dataclass(frozen=True)
class _Transaction:
    """What InnoDB's monitor says of one transaction.

    ``information_schema.innodb_trx`` is a copy that is made anew only where nobody has read it for a tenth of a
    second: who asks more often sees the first answer for ever.
    Source: https://dev.mysql.com/doc/refman/8.0/en/innodb-information-schema-internal-data.html
    """

    connection: int | None
    active: bool
    waits: bool

    @classmethod
    def read(cls, block: str) -> _Transaction:
        thread = re.search(r"^MariaDB thread id (\d+)", block, re.MULTILINE)
        return cls(
            int(thread[1]) if thread else None,
            active="not started" not in block.partition("\n")[0],
            waits=re.search(r"^LOCK WAIT", block, re.MULTILINE) is not None,
        )


# Where to stand while another database is dropped.
_MAINTENANCE = {"postgresql": "postgres", "mariadb": "information_schema"}


class Databases:
    """The databases of one test run: on each server one with a random name, made when first asked for."""

    def __init__(self) -> None:
        self.servers: dict[str, Found | Missing] = {}
        self._created: dict[str, URL] = {}

    def open(self, spec: str, folder: Path) -> Database:
        """Return an empty database.

        Args:
            spec: "sqlite", "postgresql" or "mariadb", with another driver than the default after a plus sign
                ("postgresql+psycopg2", "sqlite+aiosqlite").
            folder: Where an SQLite file goes.
        """
        name, _, driver = spec.partition("+")
        if driver in OPTIONAL_DRIVERS and find_spec(OPTIONAL_DRIVERS[driver]) is None:
            # In CI too: not every platform has a wheel of it, or what it takes to build it.
            pytest.skip(f"the driver {driver} is not installed here")
        own_url = URL.create(DRIVERS[name], database=str(folder / "test.db")) if name == "sqlite" else self._own_url(name)
        dialect = own_url.get_backend_name()
        url = own_url.set(drivername=f"{dialect}+{driver}") if driver else own_url
        return Database(name, url, own_url)

    def server(self, name: str) -> Found | Missing:
        """Return what became of the search for a server; it is made once in a run."""
        if name not in self.servers:
            self.servers[name] = _LOCATE[name]()
        return self.servers[name]

    def close(self) -> None:
        """Drop every database that this run made."""
        for name, url in self._created.items():
            with_force = " WITH (FORCE)" if name == "postgresql" else ""
            _administer(url.set(database=_MAINTENANCE[name]), f"DROP DATABASE {url.database}{with_force}")
        self._created.clear()

    def _own_url(self, name: str) -> URL:
        if name not in self._created:
            server = make_url(require(self.server(name)).url).set(drivername=DRIVERS[name])
            database = f"{PREFIX}_{os.getpid()}_{secrets.token_hex(4)}"
            charset = " CHARACTER SET utf8mb4" if name == "mariadb" else ""
            _administer(server, f"CREATE DATABASE {database}{charset}")
            self._created[name] = server.set(database=database)
        return self._created[name]


def _administer(server: URL, statement: str) -> None:
    engine = create_engine(server, poolclass=NullPool)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))


def _probe(name: str, url: str) -> None:
    own_url = make_url(url).set(drivername=DRIVERS[name])
    engine = create_engine(own_url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))


def _locate_postgresql() -> Found | Missing:
    return locate(
        "PostgreSQL",
        variable="TEST_POSTGRESQL_URL",
        default_url="postgresql://postgres@127.0.0.1:5432/postgres",
        probe=lambda url: _probe("postgresql", url),
        embedded=start_postgresql,
    )


def _locate_mariadb() -> Found | Missing:
    return locate(
        "MariaDB",
        variable="TEST_MYSQL_URL",
        default_url="mysql://root@127.0.0.1:3306/information_schema",
        probe=lambda url: _probe("mariadb", url),
    )


_LOCATE = {"postgresql": _locate_postgresql, "mariadb": _locate_mariadb}
