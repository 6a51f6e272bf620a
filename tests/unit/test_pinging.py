"""A connection is asked whether it is alive only when it was idle; what the user sees when it is not."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from celery_alchemy import is_transient
from celery_alchemy.sessions import pinging
from tests.unit.conftest import MakeShop
from tests.unit.shop import Shop
from tests.waiting import eventually

pytestmark = pytest.mark.databases("postgresql", "mariadb")

_WHO = {"postgresql": "SELECT pg_backend_pid()", "mariadb": "SELECT connection_id()"}
_CUT = {"postgresql": "SELECT pg_terminate_backend({})", "mariadb": "KILL {}"}


@pytest.fixture
def connects(shop: Shop) -> list[object]:
    """One entry for each connection that the engine opens."""
    opened: list[object] = []
    event.listen(shop.alchemy.engine, "connect", lambda *args: opened.append(args))
    return opened


def cut(shop: Shop) -> None:
    """Have the server end the connection that waits in the pool."""
    with shop.alchemy.session() as session:
        number = session.scalar(text(_WHO[shop.database.name]))
    shop.database.execute(_CUT[shop.database.name].format(number))


def shows_its_end(shop: Shop) -> bool:
    """Tell whether the connection in the pool has something to read."""
    pool: Any = shop.alchemy.engine.pool
    [entry] = pool._pool.queue
    return pinging.has_news(entry.dbapi_connection)


def look(session: Session) -> int:
    """Send one statement."""
    return int(session.execute(text("SELECT 1")).scalar_one())


def test_connection_that_is_cut_between_two_tasks_is_replaced(shop: Shop, connects: list[object]) -> None:
    """Its end shows at its socket, without a question to the server."""
    task = shop.task(name="look")(look)
    cut(shop)
    eventually(lambda: shows_its_end(shop))

    assert task() == 1
    assert len(connects) == 2


def test_connection_in_use_a_moment_ago_is_not_asked(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that follows another one sends its own statements only."""
    monkeypatch.setattr(pinging, "has_news", lambda connection: False)
    task = shop.task(name="look")(look)
    cut(shop)

    with pytest.raises(DBAPIError) as failed:
        task()

    assert is_transient(failed.value)
    assert task() == 1


@pytest.mark.parametrize("retries", [0, 1])
def test_connection_that_is_cut_in_the_body_fails_the_task_once(shop: Shop, retries: int) -> None:
    """With an error that `is_transient` knows; with `transient_retries` the body runs again."""
    runs: list[int] = []

    @shop.task(name="is cut", transient_retries=retries)
    def is_cut(session: Session) -> int:
        number = session.scalar(text(_WHO[shop.database.name]))
        runs.append(1)
        if len(runs) == 1:
            shop.database.execute(_CUT[shop.database.name].format(number))
        return look(session)

    if retries:
        assert is_cut() == 1
    else:
        with pytest.raises(DBAPIError) as failed:
            is_cut()
        assert is_transient(failed.value)
    assert len(runs) == retries + 1


def test_connection_that_was_idle_is_asked_and_replaced(shop: Shop, connects: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """No task sees that the server has ended it meanwhile, also where the socket does not show it."""
    assert pinging.IDLE_SECONDS <= 1.0
    monkeypatch.setattr(pinging, "has_news", lambda connection: False)
    task = shop.task(name="look")(look)
    cut(shop)
    # As if a second had passed.
    monkeypatch.setattr(pinging, "IDLE_SECONDS", 0.0)

    assert task() == 1
    assert len(connects) == 2


def test_ping_that_the_user_asks_for_is_made_each_time(make_shop: MakeShop) -> None:
    """Options of the engine win over what Alchemy chooses."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    shop = make_shop(engine_options=options)
    task = shop.task(name="look")(look)
    cut(shop)

    assert task() == 1
