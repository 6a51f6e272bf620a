"""Deliveries of one `once` task at the same time: one commits, the others report what it did, on every isolation level."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery.exceptions import Ignore
from sqlalchemy.orm import Session

from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start

LEVELS = [
    ("sqlite", None),
    ("postgresql", "READ COMMITTED"),
    ("postgresql", "REPEATABLE READ"),
    ("postgresql", "SERIALIZABLE"),
    ("mariadb", "READ COMMITTED"),
    ("mariadb", "REPEATABLE READ"),
    ("mariadb", "SERIALIZABLE"),
]


class Meeting:
    """A place in a body where the first runs wait for each other, so that they are certainly in it at the same time."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties)
        self._left = parties
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Wait for the others; runs after the first ones go on at once."""
        with self._lock:
            self._left -= 1
            if self._left < 0:
                return
        self._barrier.wait(20)


@WAYS
@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
def test_deliveries_at_the_same_time_are_one_effect(stand: OutboxStand, level: str | None, begin: Start) -> None:
    """Both bodies run, both have read that nothing is done yet; one commits and both report its result."""
    meeting = Meeting(2)

    @stand.task(name="meets", once=True, isolation_level=level)
    def meets(session: Session) -> int:
        meeting.wait()
        effect = Effect(name="a")
        session.add(effect)
        session.flush()
        stand.effect.delay_on_commit("child")
        return effect.id

    sent = begin(stand, meets)
    with ThreadPoolExecutor(2) as pool:
        ended = [future.result(60) for future in [pool.submit(stand.deliver, sent) for _ in range(2)]]

    assert [(one.state, one.value) for one in ended] == [("SUCCESS", ended[0].value)] * 2
    assert stand.effects() == ["a"]
    assert [child.args for child in stand.sent()] == [["child"]]
    assert stand.outbox("completed_at IS NOT NULL") == [True]


@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
def test_many_tasks_with_one_key_at_the_same_time_are_one_effect(stand: OutboxStand, level: str | None) -> None:
    """A key, four messages, four threads: MariaDB's gap locks make some of them victims of a deadlock, and still."""
    meeting = Meeting(4)

    @stand.task(name="meets", once=lambda key: key, isolation_level=level)
    def meets(session: Session, key: str) -> int:
        meeting.wait()
        effect = Effect(name=key)
        session.add(effect)
        session.flush()
        return effect.id

    with stand.alchemy.begin():
        for _ in range(4):
            meets.delay_on_commit("a")
    messages = stand.sent()
    with ThreadPoolExecutor(4) as pool:
        ended = [future.result(60) for future in [pool.submit(stand.deliver, sent) for sent in messages]]

    assert len({sent.id for sent in messages}) == 4
    assert [(one.state, one.value) for one in ended] == [("SUCCESS", ended[0].value)] * 4
    assert stand.effects() == ["a"]


@pytest.mark.parametrize(("database", "level"), LEVELS, indirect=["database"])
def test_loser_of_a_winner_that_rolls_back_does_the_work(stand: OutboxStand, level: str | None) -> None:
    """The one that came first fails after the other has waited for it: the other one's effect is the effect."""
    meeting = Meeting(2)
    first = threading.local()
    failing = threading.Lock()

    @stand.task(name="meets", once=True, isolation_level=level, autoretry_for=(LookupError,), default_retry_delay=0)
    def meets(session: Session) -> str:
        meeting.wait()
        session.add(Effect(name="a"))
        session.flush()
        if failing.acquire(blocking=False):
            first.failed = True
            raise LookupError
        return "done"

    with stand.alchemy.begin():
        meets.delay_on_commit()
    [sent] = stand.sent()
    with ThreadPoolExecutor(2) as pool:
        ended = [future.result(60) for future in [pool.submit(stand.deliver, sent) for _ in range(2)]]
    retries: list[Any] = [stand.deliver(retry) for retry in stand.sent()]

    assert sorted({one.state for one in ended} | {one.state for one in retries} - {"RETRY"}) in (["RETRY", "SUCCESS"], ["SUCCESS"])
    assert stand.effects() == ["a"]
    assert {one.value for one in [*ended, *retries] if one.state == "SUCCESS"} == {"done"}


@WAYS
@pytest.mark.parametrize("database", ["sqlite", "postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize(("ending", "state"), [(Ignore(), "IGNORED"), (LookupError("no such book"), "FAILURE")])
def test_deliveries_that_end_without_success_at_the_same_time_leave_one_record(
    stand: OutboxStand, begin: Start, ending: Exception, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each writes the record; those that come too late neither fail by that nor complain."""
    meeting = Meeting(3)

    @stand.task(name="meets", once=True)
    def meets(session: Session) -> None:
        meeting.wait()
        raise ending

    sent = begin(stand, meets)
    with ThreadPoolExecutor(3) as pool:
        ended = [future.result(60) for future in [pool.submit(stand.deliver, sent) for _ in range(3)]]

    assert [(one.state, type(one.value)) for one in ended] == [(state, type(ending))] * 3
    assert stand.outbox("completed_at IS NOT NULL, died_at IS NOT NULL") == [(state == "IGNORED", state == "FAILURE")]
    assert [record for record in caplog.records if record.name.startswith("celery_alchemy") and record.levelname == "ERROR"] == []
