"""celery-singleton and celery-once lock when a task is sent: a send that comes to nothing gives the lock back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery_once import AlreadyQueued, QueueOnce
from celery_singleton import DuplicateTaskError, Singleton
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import MessageTooLargeError, PublishError, SessionTask, enqueue
from celery_alchemy.requests.event_loop import process_loop
from tests.services.brokers import Broker
from tests.unit.conftest import MakeShop
from tests.unit.shop import Book, Shop, add_books

pytestmark = [pytest.mark.databases("sqlite", "postgresql"), pytest.mark.brokers("redis")]

DUPLICATE = (AlreadyQueued, DuplicateTaskError)


class OnceFirst(QueueOnce, SessionTask):
    """celery-once in front."""

    abstract = True
    once = {"graceful": False, "unlock_before_run": False}  # noqa: RUF012 - as celery_once.tasks has it.


class OnceBehind(SessionTask, QueueOnce):
    """celery-once behind."""

    abstract = True
    once = {"graceful": False, "unlock_before_run": False}  # noqa: RUF012 - as above.


class SingletonFirst(Singleton, SessionTask):
    """celery-singleton in front."""

    abstract = True
    raise_on_duplicate = True


class SingletonBehind(SessionTask, Singleton):
    """celery-singleton behind."""

    abstract = True
    raise_on_duplicate = True


CLASSES: list[type[SessionTask]] = [OnceFirst, OnceBehind, SingletonFirst, SingletonBehind]
KINDS = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


@pytest.fixture
def locks(broker: Broker, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings of both packages: locks in the test's own folder, and in Redis under a name of its own."""
    prefix = f"lock-{uuid4().hex}-"
    url = str(broker.settings["broker_url"])
    yield {
        "ONCE": {"backend": "celery_once.backends.File", "settings": {"location": str(tmp_path)}},
        "singleton_backend_url": url,
        "singleton_key_prefix": prefix,
    }
    client = redis.Redis.from_url(url)
    for key in client.scan_iter(f"{prefix}*"):
        client.delete(key)
    client.close()
    process_loop.close()


@pytest.fixture(params=[False, True], ids=["direct", "outbox"])
def locking(request: pytest.FixtureRequest, make_shop: MakeShop, locks: dict[str, Any]) -> Shop:
    """A shop with such tasks, once with and once without the outbox."""
    shop = make_shop(outbox=request.param)
    shop.app.conf.update(locks)
    if request.param:
        shop.alchemy.create_tables()
    return shop


def task_of(shop: Shop, kind: type[SessionTask]) -> Any:
    """Make a task that takes a lock when it is sent."""

    @shop.task(name=f"report {kind.__name__}", base=kind)
    def report(session: Session, day: int) -> None:
        add_books(session, [f"day {day}"])

    return report


def is_locked(shop: Shop, task: Any, day: int = 1) -> bool:
    """Try to send it once more, and take that back."""
    with shop.alchemy.session() as session:
        try:
            enqueue(session, task.s(day))
        except DUPLICATE:
            return True
        session.rollback()
    return False


@KINDS
def test_rolled_back_send_gives_the_lock_back(locking: Shop, kind: type[SessionTask]) -> None:
    """The next request can send it; the one that is committed keeps the lock until the task has run."""
    task = task_of(locking, kind)
    with locking.alchemy.session() as session:
        enqueue(session, task.s(1))
        within = is_locked(locking, task)
        session.rollback()
    after_rollback = is_locked(locking, task)

    with locking.alchemy.begin() as session:
        enqueue(session, task.s(1))
    after_commit = is_locked(locking, task)
    locking.trace(task, 1)

    assert (within, after_rollback, after_commit) == (True, False, True)
    assert not is_locked(locking, task)
    assert locking.titles() == ["day 1"]


@KINDS
def test_every_way_to_nothing_gives_the_lock_back(locking: Shop, kind: type[SessionTask]) -> None:
    """A close, a SAVEPOINT that is rolled back, a failing commit, a task that fails."""
    task = task_of(locking, kind)

    @locking.task(name="sender")
    def sender(session: Session) -> None:
        task.delay_on_commit(1)
        raise LookupError

    with locking.alchemy.session() as session:
        enqueue(session, task.s(1))
    closed = is_locked(locking, task)
    with locking.alchemy.begin() as session:
        savepoint = session.begin_nested()
        enqueue(session, task.s(1))
        savepoint.rollback()
        rolled_back = is_locked(locking, task)
    with pytest.raises(Exception, match="(?i)unique"), locking.alchemy.begin() as session:
        enqueue(session, task.s(1))
        session.add_all([Book(title="Emma"), Book(title="Emma")])
    not_committed = is_locked(locking, task)
    locking.trace(sender)

    assert (closed, rolled_back, not_committed, is_locked(locking, task)) == (False,) * 4


@KINDS
def test_send_of_another_is_not_unlocked(locking: Shop, kind: type[SessionTask]) -> None:
    """A duplicate is refused, and its rollback leaves the lock of the first."""
    task = task_of(locking, kind)
    with locking.alchemy.begin() as session:
        enqueue(session, task.s(1))
        enqueue(session, task.s(2))
    with pytest.raises(DUPLICATE), locking.alchemy.begin() as session:
        enqueue(session, task.s(1))

    assert is_locked(locking, task, 1)
    assert is_locked(locking, task, 2)


@KINDS
def test_deferred_send_of_a_failing_task_gives_the_lock_back(
    make_shop: MakeShop, locks: dict[str, Any], kind: type[SessionTask]
) -> None:
    """A plain delay() that waits by `publish_in_transaction="defer"`."""
    shop = make_shop(publish_in_transaction="defer")
    shop.app.conf.update(locks)
    task = task_of(shop, kind)

    @shop.task(name="sender")
    def sender(session: Session) -> None:
        add_books(session, ["Emma"])
        task.delay(1)
        raise LookupError

    shop.trace(sender)

    assert not is_locked(shop, task)


@KINDS
def test_refused_message_gives_the_lock_back(make_shop: MakeShop, locks: dict[str, Any], kind: type[SessionTask]) -> None:
    """One that is too large is neither kept nor sent."""
    shop = make_shop(outbox=True, max_message_bytes=100)
    shop.app.conf.update(locks)
    shop.alchemy.create_tables()
    task = task_of(shop, kind)
    for _ in range(2):
        with pytest.raises(MessageTooLargeError), shop.alchemy.session() as session:
            enqueue(session, task.s(10**100))


@KINDS
@pytest.mark.databases("sqlite")
def test_message_that_is_lost_gives_the_lock_back(make_shop: MakeShop, locks: dict[str, Any], kind: type[SessionTask]) -> None:
    """Without the outbox a broker that is down loses it, as PublishError says."""
    shop = make_shop()
    shop.app.conf.update(locks, broker_url="redis://127.0.0.1:1/0", task_publish_retry=False)
    task = task_of(shop, kind)
    for _ in range(2):
        with pytest.raises(PublishError), shop.alchemy.begin() as session:
            enqueue(session, task.s(1))
    # The fixture empties its queue.
    shop.app.conf.broker_url = "memory://"


@KINDS
@pytest.mark.databases("sqlite+aiosqlite")
def test_async_task_that_fails_gives_the_lock_back(make_shop: MakeShop, locks: dict[str, Any], kind: type[SessionTask]) -> None:
    """Out of the event loop, which must not wait for Redis."""
    shop = make_shop()
    shop.app.conf.update(locks)
    task = task_of(shop, kind)

    @shop.task(name="sender")
    async def sender(session: AsyncSession, fails: bool) -> None:
        task.delay_on_commit(1)
        if fails:
            raise LookupError

    shop.trace(sender, True)
    second = shop.trace(sender, False)

    assert second.state == "SUCCESS"
