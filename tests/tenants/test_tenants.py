"""Real workers of three tenant applications, with an outbox and once tasks: what is written for a tenant is the tenant's."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import make_transient_to_detached

from celery_alchemy.databases.tables import metadata
from tests.conftest import StartWorker
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.tenants import by_row_security, by_schema_map, by_search_path
from tests.waiting import eventually
from tests.workers import Pool

TENANTS = ("emma", "anne")

pytestmark = [pytest.mark.databases("postgresql"), pytest.mark.brokers("redis")]


class Tenants:
    """Two tenants, each with an order 1 of its own.

    Args:
        database: The test's.
        notes: A query for the texts of a tenant's notes, in the order in which they were written.
    """

    def __init__(self, database: Database, notes: str) -> None:
        self.database = database
        self._notes = notes

    def notes(self, tenant: str) -> list[str]:
        """Return what was written for a tenant."""
        return [row[0] for row in self.database.rows(self._notes.format(tenant=tenant))]

    def states(self) -> list[tuple[str, bool, bool]]:
        """Return the tasks in the outbox: name, completed, dead."""
        query = "SELECT task_name, completed_at IS NOT NULL, died_at IS NOT NULL FROM public.celery_outbox ORDER BY 1, 2"
        return [(str(name), bool(completed), bool(dead)) for name, completed, dead in self.database.rows(query)]


@contextmanager
def schemas(database: Database) -> Iterator[Tenants]:
    """Two tenants, each with a schema of its own; the library's table is in public."""
    with database.engine.begin() as connection:
        metadata.create_all(connection)
        for tenant in TENANTS:
            connection.execute(text(f"CREATE SCHEMA {tenant}"))
            connection.execute(text(f"CREATE TABLE {tenant}.orders (id serial PRIMARY KEY, title text)"))
            connection.execute(text(f"CREATE TABLE {tenant}.notes (id serial PRIMARY KEY, text text)"))
            connection.execute(text(f"INSERT INTO {tenant}.orders (title) VALUES ('of {tenant}')"))
    yield Tenants(database, "SELECT text FROM {tenant}.notes ORDER BY id")
    database.disconnect_others()
    for tenant in TENANTS:
        database.execute(f"DROP SCHEMA {tenant} CASCADE")


@contextmanager
def rows(database: Database) -> Iterator[Tenants]:
    """Two tenants in the same tables, behind row security; the application is no superuser, which nothing would hold back."""
    role = f"celery_alchemy_{secrets.token_hex(4)}"
    by_row_security.Base.metadata.create_all(database.engine)
    with database.engine.begin() as connection:
        metadata.create_all(connection)
        connection.execute(text(f"CREATE ROLE {role} NOLOGIN"))
        connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {role}"))
        for index, tenant in enumerate(TENANTS, 1):
            values = {"id": index, "title": f"of {tenant}", "tenant": tenant}
            connection.execute(text("INSERT INTO orders (id, title, tenant) VALUES (:id, :title, :tenant)"), values)
        for table in ("orders", "notes"):
            connection.execute(text(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY"))
            connection.execute(text(f"CREATE POLICY one ON {table} USING (tenant = current_setting('app.tenant', true))"))
        connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"))
        connection.execute(text(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}"))
    limited = database.engine.url.update_query_dict({"options": f"-c role={role}"})
    own = Database("postgresql", limited, database.engine.url)
    yield Tenants(own, "SELECT text FROM notes WHERE tenant = '{tenant}' ORDER BY id")
    database.disconnect_others()
    database.execute(f"DROP OWNED BY {role}")
    database.execute(f"DROP ROLE {role}")


@pytest.fixture
def tenants(module: ModuleType, database: Database) -> Iterator[Tenants]:
    """The tenants of the application under test."""
    with (rows if module is by_row_security else schemas)(database) as found:
        yield found


CASES = [
    pytest.param(by_schema_map, "prefork", id="schema_map"),
    pytest.param(by_search_path, "threads", id="search_path"),
    pytest.param(by_row_security, "prefork", id="row_security"),
]


@pytest.mark.parametrize(("module", "pool"), CASES)
def test_each_tenant_sees_and_writes_its_own_rows(
    tenants: Tenants, module: ModuleType, pool: Pool, broker: Broker, start_worker: StartWorker
) -> None:
    """Entities, the body's writes, a task that it sends, a second transaction and record_failure."""
    start_worker(module.__name__, pool=pool, concurrency=2, database=tenants.database)

    shipped, failed = {}, {}
    for number, tenant in enumerate(TENANTS, 1):
        order = _order(module, number if module is by_row_security else 1)
        shipped[tenant] = _send(module, broker, "ship", tenant, order)
    titles = {tenant: result.get(timeout=60) for tenant, result in shipped.items()}
    eventually(lambda: all(len(tenants.notes(tenant)) == 2 for tenant in TENANTS), what="the tasks that they sent have run")
    for number, tenant in enumerate(TENANTS, 1):
        order = _order(module, number if module is by_row_security else 1)
        failed[tenant] = _send(module, broker, "fail", tenant, order)
        with pytest.raises(LookupError):
            failed[tenant].get(timeout=60)

    assert titles == {tenant: f"of {tenant}" for tenant in TENANTS}
    for tenant in TENANTS:
        assert tenants.notes(tenant) == [f"ship of {tenant}", "count 1", "failed: LookupError"]
    expected = [("count", True, False)] * 2 + [("fail", False, True)] * 2 + [("ship", True, False)] * 2
    eventually(lambda: tenants.states() == expected, what="each once task has its record, in the one table")


@pytest.mark.parametrize(("module", "pool"), CASES)
def test_task_without_a_tenant_writes_nothing(
    tenants: Tenants, module: ModuleType, pool: Pool, broker: Broker, start_worker: StartWorker
) -> None:
    """It fails when its around is entered, before its order is loaded."""
    start_worker(module.__name__, pool=pool, concurrency=1, database=tenants.database)

    result = _send(module, broker, "ship", None, _order(module, 1))
    with pytest.raises(LookupError, match="without a tenant"):
        result.get(timeout=60)

    assert [tenants.notes(tenant) for tenant in TENANTS] == [[], []]


def _order(module: Any, number: int) -> Any:
    """Return an order as a web request of its tenant has it: only its class and its key travel."""
    order = module.Order(id=number)
    # As if it were loaded: a reference needs an identity, and no row is read here.
    make_transient_to_detached(order)
    return order


def _send(module: Any, broker: Broker, name: str, tenant: str | None, order: Any) -> Any:
    """Send a task as a web request of a tenant does."""
    headers = {} if tenant is None else {"tenant": tenant}
    signature = module.app.tasks[name].s(order)
    return broker.client.send_task(name, signature.args, headers=headers)
