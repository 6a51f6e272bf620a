"""What a worker's parent process records of a `once` task: a hard time limit, a child that died, a revoked or expired task."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from celery.worker.state import revoked
from sqlalchemy.orm import Session

from celery_alchemy import DeadTaskError
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.worker.parent import SessionRequest
from celery_alchemy.worker.record_threads import record_threads
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start, start
from tests.stand import Crash, Sent


class Waiting(SessionRequest):
    """The request of a worker's parent process, in which a test waits for what its threads record."""

    def on_timeout(self, soft: bool, timeout: float) -> None:
        super().on_timeout(soft, timeout)
        assert record_threads.drain(30)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        super().on_failure(exc_info, send_failed_event, return_ok)
        assert record_threads.drain(30)

    def revoked(self) -> bool:
        is_revoked = bool(super().revoked())
        assert record_threads.drain(30)
        return is_revoked


def in_parent(stand: OutboxStand, sent: Sent, kind: type[SessionRequest] = Waiting) -> tuple[Any, list[str]]:
    """Return the request of a message as a worker's parent process holds it, and what it will tell the broker."""
    told: list[str] = []
    message: Any = SimpleNamespace(
        headers=sent.headers,
        properties=sent.properties,
        delivery_info={"exchange": sent.routing[0], "routing_key": sent.routing[1], "redelivered": False},
        content_type=sent.content_type,
        content_encoding=sent.content_encoding,
        body=sent.body,
        payload=sent.content(),
    )
    request = kind(
        message,
        app=stand.app,
        task=stand.app.tasks[sent.task],
        on_ack=lambda *_: told.append("acknowledged"),
        on_reject=lambda *_: told.append("rejected"),
    )
    return request, told


@WAYS
@pytest.mark.parametrize("is_committed", [True, False])
def test_hard_time_limit_after_the_commit_is_no_failure(stand: OutboxStand, begin: Start, is_committed: bool) -> None:
    """A child may be killed while it stores the result of work that is done."""
    told: list[str] = []

    @stand.task(name="slow", once=True, record_failure=lambda session, exc, name: told.append(type(exc).__name__))
    def slow(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        return f"done {name}"

    sent = begin(stand, slow, "a")
    if is_committed:
        stand.deliver(sent)
        stand.app.AsyncResult(sent.id).forget()
    request, to_broker = in_parent(stand, sent)
    request.on_timeout(soft=False, timeout=1)
    result = stand.app.AsyncResult(sent.id)

    assert to_broker == ["acknowledged"]
    assert (result.state, told) == (("SUCCESS", []) if is_committed else ("FAILURE", ["TimeLimitExceeded"]))
    assert len(upkeep.dead(stand.alchemy.engine)) == (0 if is_committed else 1)
    assert stand.effects() == (["a"] if is_committed else [])
    assert not is_committed or result.get() == "done a"


@WAYS
def test_child_that_dies_is_counted_until_the_task_is_dead(stand: OutboxStand, begin: Start) -> None:
    """The broker gets the message back each time; past the outbox only the parent knows of the first death."""

    @stand.task(name="kills", once=True, max_deliveries=3)
    def kills(session: Session, name: str) -> None:
        session.add(Effect(name=name))
        raise Crash

    sent = begin(stand, kills, "a")
    for _ in range(3):
        with pytest.raises(Crash):
            stand.deliver(sent)
        request, to_broker = in_parent(stand, sent)
        request.on_failure(died())
        assert to_broker == ["rejected"]
    ended = stand.deliver(sent)

    assert (ended.state, type(ended.value)) == ("FAILURE", DeadTaskError)
    assert "it was started 3 times" in str(ended.value)
    assert stand.effects() == []


def died() -> Any:
    """Return what the pool tells of a child that was lost."""
    try:
        raise WorkerLostError("Worker exited prematurely: signal 9 (SIGKILL)")
    except WorkerLostError:
        return ExceptionInfo()


@pytest.mark.parametrize("reason", ["revoked", "expired"])
def test_owed_task_that_is_discarded_is_not_sent_again(stand: OutboxStand, reason: str) -> None:
    """It is dead, with the reason, and may be revived."""

    @stand.task(name="late", once=True)
    def late() -> None: ...

    sent = start(stand, late)
    if reason == "revoked":
        revoked.add(sent.id)
    else:
        sent.headers["expires"] = "2020-01-01T00:00:00+00:00"
    request, to_broker = in_parent(stand, sent)
    discarded = request.revoked()
    stand.make_due()

    assert (discarded, to_broker) == (True, ["acknowledged"])
    assert [row["error"] for row in upkeep.dead(stand.alchemy.engine)] == [f"the task was {reason}"]
    assert stand.relay_all() == 0
