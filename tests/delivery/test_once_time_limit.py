"""A `once` task whose process is killed at its hard time limit: before its commit it has failed, after it it has not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import upkeep
from celery_alchemy.worker import SessionRequest
from tests.delivery.stand import Effect, Sent, Stand
from tests.delivery.test_once import WAYS, Start


def in_parent(stand: Stand, sent: Sent) -> tuple[Any, list[str]]:
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
    request = SessionRequest(
        message,
        app=stand.app,
        task=stand.app.tasks[sent.task],
        on_ack=lambda *_: told.append("acknowledged"),
        on_reject=lambda *_: told.append("rejected"),
    )
    return request, told


@WAYS
@pytest.mark.parametrize("is_committed", [True, False])
def test_hard_time_limit_after_the_commit_is_no_failure(stand: Stand, begin: Start, is_committed: bool) -> None:
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
