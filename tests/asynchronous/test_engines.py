"""F65: event loops that ask for an engine at once have one each."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from celery_alchemy.sessions.async_engine import ForeignAsyncEngines, OwnAsyncEngines, async_url_of

URL = async_url_of(make_url("sqlite:///loops.db"))


class Foreign(ForeignAsyncEngines):
    """Engines beside a user's own, each made in the moment in which another loop asks, if it can."""

    def __init__(self) -> None:
        super().__init__(create_async_engine(URL))
        self._other_asks = Barrier(2)

    def _make(self) -> AsyncEngine:
        engine = super()._make()
        with suppress(BrokenBarrierError):
            self._other_asks.wait(0.3)
        return engine


class Own(OwnAsyncEngines):
    """As that, made of a URL."""

    def __init__(self) -> None:
        super().__init__(URL, {})
        self._other_asks = Barrier(2)

    def _make(self) -> AsyncEngine:
        with suppress(BrokenBarrierError):
            self._other_asks.wait(0.3)
        return super()._make()


@pytest.mark.parametrize("make", [Own, Foreign])
def test_event_loops_that_ask_at_once_have_an_engine_each(make: type[Own | Foreign]) -> None:
    """Two loops with one engine would share connections, each of which belongs to one loop."""
    engines, all_have_asked = make(), Barrier(2)

    async def ask() -> tuple[AsyncEngine, bool]:
        engine = engines.get()
        # No loop ends, and gives its engine free, before the other has one.
        all_have_asked.wait(30)
        return engine, engines.get() is engine

    with ThreadPoolExecutor(2) as threads:
        asked = [future.result() for future in [threads.submit(asyncio.run, ask()) for _ in range(2)]]

    assert [same for _, same in asked] == [True, True]
    assert asked[0][0] is not asked[1][0]
