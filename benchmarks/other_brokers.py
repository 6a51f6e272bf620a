"""Other ways to have PostgreSQL for a queue, beside ours: each to Celery on Redis, in the same round.

Part of ``targets.py``, by ``make bench PARTS=others``; it promises nothing. kombu's own SQLAlchemy transport and its PGMQ run the
same Celery tasks. pgqueuer runs a coroutine that inserts the same row, in one process of its own: this module.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import asyncpg
import brokers
from brokers import SENDS, TASKS, Shop
from figures import Figure, take_turns
from pgmq import install_pgmq_from_sql
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from sqlalchemy import make_url

ADD = "INSERT INTO line (text) VALUES ($1)"


class Pgqueuer:
    """Rows and jobs by pgqueuer.

    Args:
        dsn: The database, as asyncpg names it.
        shop: Reads what its worker has done.
    """

    def __init__(self, dsn: str, shop: Shop) -> None:
        self._dsn, self._shop = dsn, shop
        self._loop = asyncio.new_event_loop()
        self._connection: Any = self._run(asyncpg.connect(dsn))
        self._queries = Queries(AsyncpgDriver(self._connection))
        self._run(self._queries.install())

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(work)

    def send(self) -> float:
        """Return the seconds for a turn of transactions that insert a row and send a job."""

        async def add_and_send() -> None:
            async with self._connection.transaction():
                await self._connection.execute(ADD, "sent")
                await self._queries.enqueue("add_time", None)

        start = perf_counter()
        for _ in range(SENDS):
            self._run(add_and_send())
        return perf_counter() - start

    def rate(self) -> float:
        """Return how many jobs a second a worker drains, from its first to its last."""
        self._shop.empty()
        self._run(self._queries.clear_queue())
        self._run(self._queries.enqueue(["add_time"] * TASKS, [None] * TASKS, [0] * TASKS))
        with self._working():
            times = self._shop.times(TASKS)
        return (len(times) - 1) / (times[-1] - times[0])

    @contextmanager
    def _working(self) -> Iterator[None]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PGQUEUER_DSN": self._dsn}
        worker = subprocess.Popen([sys.executable, __file__], env=environment, stdout=subprocess.DEVNULL)
        try:
            yield
        finally:
            worker.kill()
            worker.wait()

    def close(self) -> None:
        """Close its connection."""
        self._run(self._connection.close())
        self._loop.close()


async def work(dsn: str) -> None:
    """Run jobs until somebody ends the process."""
    queue = PgQueuer(AsyncpgDriver(await asyncpg.connect(dsn)))
    pool = await asyncpg.create_pool(dsn, min_size=4, max_size=4)

    @queue.entrypoint("add_time")
    async def add_time(_: Job) -> None:
        await pool.execute(ADD, str(time.time()))

    await queue.run()


def plain(url: str) -> str:
    """Return the URL of a database as PostgreSQL's own library reads it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def transports(url: str) -> Iterator[dict[str, Shop]]:
    """Shops on kombu's own transports, on one database."""
    dsn = plain(url)
    install_pgmq_from_sql(dsn=dsn)
    brokers_by_name = {"kombu's SQLAlchemy transport": f"sqla+{url}", "PGMQ with NOTIFY": dsn.replace("postgresql", "pgmq", 1)}
    shops = {name: Shop(url, broker) for name, broker in brokers_by_name.items()}
    try:
        yield shops
    finally:
        for shop in shops.values():
            shop.close()


def others(rounds: int) -> list[Figure]:
    """Measure sending, draining and waking by each, to Celery on Redis."""
    with brokers.shops() as (redis, database), transports(redis.url) as more:
        pgqueuer = Pgqueuer(plain(redis.url), redis)
        shops = {"Redis": redis, "celery-alchemy": database, **more}
        try:
            sends = {name: _sender(shop) for name, shop in shops.items()} | {"pgqueuer": pgqueuer.send}
            drains = {name: _drainer(shop) for name, shop in shops.items()} | {"pgqueuer": lambda: 1 / pgqueuer.rate()}
            wakes = {name: shop.waking for name, shop in shops.items()}
            return [
                *_measure("a row and a send", sends, rounds),
                *_measure("draining", drains, max(3, rounds // 5)),
                *_measure("commit to body", wakes, 3, is_time=True),
            ]
        finally:
            pgqueuer.close()


def _sender(shop: Shop) -> Any:
    def send() -> float:
        start = perf_counter()
        for _ in range(SENDS):
            shop.add_and_send()
        return perf_counter() - start

    return send


def _drainer(shop: Shop) -> Any:
    return lambda: 1 / shop.rate(shop.by_hand if shop.broker is not None else shop.plain)


def _measure(what: str, acts: dict[str, Any], rounds: int, *, is_time: bool = False) -> list[Figure]:
    """Compare seconds: how many times as fast as Redis; or, of a time, how many times as long."""
    unit = "times as long" if is_time else "times as fast"
    figures = {name: Figure(f"{what}, {name}, {unit} as Redis") for name in acts if name != "Redis"}

    def note(seconds: dict[str, float]) -> None:
        for name, figure in figures.items():
            ratio = seconds[name] / seconds["Redis"]
            figure.measured.append(ratio if is_time else 1 / ratio)

    take_turns(acts, rounds, note)
    return list(figures.values())


if __name__ == "__main__":
    asyncio.run(work(os.environ["PGQUEUER_DSN"]))
