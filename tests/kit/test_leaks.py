"""What is not given back is found, with the place that took it."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from celery_alchemy.testing import LeakError, no_leaks
from tests.kit.store import Store

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_open_session_is_a_leak(store: Store) -> None:
    """The error names file, line and function; the session's connection is not told a second time."""
    session = Session(store.alchemy.engine)

    with pytest.raises(LeakError) as raised, no_leaks():
        session.execute(text("SELECT 1"))

    session.close()
    assert len(raised.value.leaks) == 1
    assert "a session with an open transaction, begun at " in str(raised.value)
    assert f"{__file__}:" in str(raised.value)
    assert "in test_open_session_is_a_leak" in str(raised.value)


def test_open_connection_is_a_leak(store: Store) -> None:
    """A connection without a session counts as well."""
    with pytest.raises(LeakError, match=r"a connection, taken at .*test_leaks.py:\d+ in test_open_connection_is_a_leak"), no_leaks():
        connection = store.alchemy.engine.connect()

    connection.close()


def test_open_connection_of_an_async_task_is_a_leak(store: Store) -> None:
    """Its body runs in a thread of the library, and is the application's all the same."""
    taken: list[Connection] = []

    async def keep() -> None:
        taken.append(store.alchemy.engine.connect())

    task = store.task(keep, name="keep")
    with pytest.raises(LeakError, match=r"a connection, taken at .*test_leaks.py:\d+ in keep"), no_leaks():
        task.apply()

    taken.pop().close()


def test_what_is_closed_is_no_leak(store: Store) -> None:
    """Tasks that succeed, fail and retry, sync and async, and sessions in blocks leave nothing open."""

    async def request() -> None:
        async with store.alchemy.async_session() as session:
            await session.execute(text("SELECT 1"))

    with no_leaks():
        store.pay_once.apply(("a",))
        store.fail.apply()
        store.pay_async.apply(("b",))
        asyncio.run(request())
        with store.alchemy.session() as session:
            session.execute(text("SELECT 1"))


def test_what_was_open_before_is_not_told(store: Store) -> None:
    """Only what the block itself opened is its leak, as when a test's own session is open around it."""
    with Session(store.alchemy.engine) as session:
        session.execute(text("SELECT 1"))
        with no_leaks():
            session.execute(text("SELECT 1"))


def test_error_of_the_block_is_not_hidden(store: Store) -> None:
    """A test that fails in the middle of a transaction fails with its own reason."""
    session = Session(store.alchemy.engine)

    with pytest.raises(LookupError), no_leaks():
        session.execute(text("SELECT 1"))
        raise LookupError

    session.close()
