"""Alembic makes the library's table from `alchemy.metadata`, and finds nothing left to do afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata, produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.operations.ops import MigrationScript
from celery import Celery
from sqlalchemy import Connection

from celery_alchemy import Alchemy
from celery_alchemy.operations.check import check
from tests.services.databases import Database
from tests.unit.shop import Base


@pytest.fixture
def alchemy(database: Database) -> Iterator[Alchemy]:
    """An Alchemy whose table has not been made."""
    alchemy = Alchemy(Celery("migrated", broker="memory://", set_as_current=False), database.url, outbox=True)
    yield alchemy
    alchemy.engine.dispose()


def _context(connection: Connection) -> MigrationContext:
    return MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})


def _migrate(connection: Connection, metadata: Any) -> None:
    """Do what `alembic revision --autogenerate` writes and `alembic upgrade` carries out."""
    context = _context(connection)
    script: MigrationScript = produce_migrations(context, metadata)
    assert script.upgrade_ops is not None
    operations = Operations(context)
    for operation in script.upgrade_ops.ops:
        # What belongs to one table may be bundled, as its indexes are.
        for part in getattr(operation, "ops", None) or [operation]:
            operations.invoke(part)


def test_table_that_create_tables_made_is_the_one_that_alembic_wants(alchemy: Alchemy) -> None:
    """Whoever began with `create-tables` and turns to Alembic gets an empty migration."""
    metadata = [Base.metadata, alchemy.metadata]
    Base.metadata.create_all(alchemy.engine)
    alchemy.create_tables()

    with alchemy.engine.connect() as connection:
        assert compare_metadata(_context(connection), metadata) == []  # type: ignore[arg-type]


def test_table_that_alembic_made_is_whole(alchemy: Alchemy) -> None:
    """Its columns and indexes are those that `alchemy check` asks for, and a second migration is empty."""
    with alchemy.engine.begin() as connection:
        _migrate(connection, alchemy.metadata)

    with alchemy.engine.connect() as connection:
        assert compare_metadata(_context(connection), alchemy.metadata) == []
    assert {finding.code for finding in check(alchemy)} & {"database", "missing-table", "missing-index"} == set()
