"""Waiting for results: how soon they are seen, and what the waiting holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest
from celery import uuid
from celery.exceptions import TimeoutError as CeleryTimeoutError
from sqlalchemy.pool import NullPool

from celery_alchemy.broker import result_listener, result_waiting
from celery_alchemy.broker.result_listener import listener_of
from celery_alchemy.broker.waking import somebody_waits
from celery_alchemy.testing import no_leaks
from tests.broker.broker_stand import BrokerStand
from tests.services.databases import Database
from tests.waiting import eventually

#: One that looks by itself only so often sees nothing in time.
NEVER_SECONDS = 60.0


@contextmanager
def waiting(wait: Callable[[], Any], number: int = 1) -> Iterator[list[Any]]:
    """Have threads wait, for what the block brings; the list is what they got, and when."""
    got: list[Any] = []

    def run() -> None:
        got.append((wait(), monotonic()))

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    yield got
    for thread in threads:
        thread.join(30)


@pytest.fixture
def only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks at the beginning, and then when it is told."""
    monkeypatch.setattr(result_waiting, "FIRST_SECONDS", NEVER_SECONDS)
    monkeypatch.setattr(result_waiting, "SELDOM_SECONDS", NEVER_SECONDS)


def is_listened_to(stand: BrokerStand) -> bool:
    listener = listener_of(stand.alchemy.engine, stand.alchemy.place)
    return listener is not None and listener.connection is not None


@pytest.mark.usefixtures("only_told")
def test_result_is_seen_when_it_comes(stand: BrokerStand) -> None:
    """By the one thread that looks for all who wait; `interval` plays no part."""
    result = stand.app.AsyncResult(uuid())

    with waiting(lambda: result.get(timeout=30, interval=NEVER_SECONDS)) as got:
        eventually(lambda: is_listened_to(stand))
        stand.app.backend.store_result(result.id, "come", "SUCCESS")
        stored_at = monotonic()

    [(value, seen_at)] = got
    assert value == "come"
    assert seen_at - stored_at < 5.0


@pytest.mark.databases("postgresql")
@pytest.mark.usefixtures("only_told")
def test_postgresql_tells_who_waits(stand: BrokerStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has heard of somebody who waits tells of each result."""
    monkeypatch.setattr(result_listener, "FIRST_SECONDS", NEVER_SECONDS)
    monkeypatch.setattr(result_listener, "LONGEST_SECONDS", NEVER_SECONDS)
    results = [stand.app.AsyncResult(uuid()) for _ in range(2)]
    group = stand.app.GroupResult(uuid(), results)
    listener: Any = listener_of(stand.alchemy.engine, stand.alchemy.place)

    with waiting(lambda: group.get(timeout=30, interval=NEVER_SECONDS)) as got:
        eventually(lambda: listener._ear is not None)
        somebody_waits.note()
        for number, result in enumerate(results):
            stand.app.backend.store_result(result.id, number, "SUCCESS")

    assert [value for value, _ in got] == [[0, 1]]


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.usefixtures("only_told")
def test_many_who_wait_share_one_connection(database: Database) -> None:
    """Without a transaction; it is closed soon after the last one has its result."""
    stand = BrokerStand(database, engine_options={"poolclass": NullPool})
    result = stand.app.AsyncResult(uuid())

    with waiting(lambda: result.get(timeout=60, interval=NEVER_SECONDS), number=20) as got:
        eventually(lambda: is_listened_to(stand))
        eventually(lambda: len(database.connections()) == 1 and database.transactions() == 0)
        stand.app.backend.store_result(result.id, "come", "SUCCESS")

    assert [value for value, _ in got] == ["come"] * 20
    eventually(lambda: database.connections() == [])


def test_time_out_is_kept(stand: BrokerStand) -> None:
    """Also where it is shorter than anything else."""
    began = monotonic()

    with pytest.raises(CeleryTimeoutError):
        stand.app.AsyncResult(uuid()).get(timeout=0.3, interval=NEVER_SECONDS)

    assert 0.3 <= monotonic() - began < 5.0


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.usefixtures("only_told")
def test_cut_connection_is_made_again(stand: BrokerStand, database: Database) -> None:
    """Who waits notices nothing."""
    result = stand.app.AsyncResult(uuid())

    with waiting(lambda: result.get(timeout=30, interval=NEVER_SECONDS)) as got:
        eventually(lambda: is_listened_to(stand))
        stand.alchemy.engine.dispose()
        database.disconnect_others()
        stand.app.backend.store_result(result.id, "come", "SUCCESS")

    assert [value for value, _ in got] == ["come"]


def test_waiting_for_a_result_is_no_leak(stand: BrokerStand) -> None:
    """The thread that looks for results keeps its connection for a while, for whoever waits next."""
    with no_leaks(), pytest.raises(CeleryTimeoutError):
        stand.app.AsyncResult("of nobody").get(timeout=0.3)


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_later_wait_is_served_where_no_thread_could_be_started(stand: BrokerStand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait that asked for the thread fails, and leaves nothing behind that the next one would rely on."""
    results = [stand.app.AsyncResult(uuid()) for _ in range(2)]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", refuse)
        results[0].get(timeout=30)
    with waiting(lambda: results[1].get(timeout=30)) as got:
        eventually(lambda: is_listened_to(stand))
        stand.app.backend.store_result(results[1].id, "come", "SUCCESS")

    assert [value for value, _ in got] == ["come"]
