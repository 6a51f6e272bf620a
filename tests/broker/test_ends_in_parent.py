"""Ends that the worker's parent process writes while the database is away: beside its main loop, and when it is back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import WorkerLostError
from kombu.serialization import loads

from celery_alchemy.messages.recording import recording
from celery_alchemy.requests import put_back
from celery_alchemy.worker.parent import SessionRequest
from celery_alchemy.worker.record_threads import record_threads
from tests.broker.broker_stand import BrokerStand
from tests.delivery.proxy import CommitProxy
from tests.services.databases import Database

pytestmark = pytest.mark.databases("postgresql")


@pytest.fixture
def proxy(database: Database) -> Iterator[CommitProxy]:
    """What the app reaches its database by, and what can go away."""
    with CommitProxy(database.url) as proxy:
        database.url = proxy.url
        yield proxy


def held(stand: BrokerStand, task: Any) -> tuple[Any, list[str]]:
    """Return the request of a task as the parent holds it, and what it will tell the broker."""
    told: list[str] = []
    with recording(stand.app) as messages:
        task.apply_async(task_id=task.name)
    sent = messages[0]
    message: Any = SimpleNamespace(
        headers=sent.headers,
        properties={"correlation_id": task.name, **sent.properties},
        delivery_info={"exchange": "", "routing_key": "celery", "redelivered": False},
        content_type=sent.content_type,
        content_encoding=sent.content_encoding,
        body=sent.body,
        payload=loads(sent.body, sent.content_type, sent.content_encoding),
        channel=None,
    )
    request = SessionRequest(
        message,
        app=stand.app,
        task=task,
        on_ack=lambda *_: told.append("acknowledged"),
        on_reject=lambda logger, errors, requeue: told.append(f"rejected, requeue={requeue}"),
    )
    return request, told


def nothing() -> None:
    """The body of a task that never runs here."""


def lost(request: Any) -> None:
    """A child has died."""
    try:
        raise WorkerLostError("signal 9")
    except WorkerLostError:
        request.on_failure(ExceptionInfo(), return_ok=False)


def timed_out(request: Any) -> None:
    """The hard time limit is over."""
    request.on_timeout(soft=False, timeout=1)


def revoked(request: Any) -> None:
    """The worker discards a task that was revoked."""
    request._announce_revoked("revoked", False, None, False)


ENDS = pytest.mark.parametrize(("end", "state"), [(lost, "FAILURE"), (timed_out, "FAILURE"), (revoked, "REVOKED")])


@ENDS
def test_end_is_written_when_the_database_is_back(
    proxy: CommitProxy, stand: BrokerStand, monkeypatch: pytest.MonkeyPatch, end: Callable[[Any], None], state: str
) -> None:
    """Of a task that has nothing of its own to record; the main loop goes on meanwhile."""
    monkeypatch.setattr(put_back, "INSIST_EVERY_SECONDS", 0.1)
    request, told = held(stand, stand.task(nothing, name="plain", acks_late=True))
    proxy.go_away()

    began = monotonic()
    end(request)
    took = monotonic() - began
    proxy.come_back()

    assert record_threads.drain(20)
    assert took < 0.5
    assert stand.rows() == [(state,)]
    assert told == ["acknowledged"]


@pytest.mark.parametrize("end", [timed_out, revoked])
def test_delivery_goes_back_whose_end_cannot_be_written(
    proxy: CommitProxy, stand: BrokerStand, monkeypatch: pytest.MonkeyPatch, end: Callable[[Any], None]
) -> None:
    """It would be the worker's for as long as that lives."""
    monkeypatch.setattr(put_back, "INSIST_SECONDS", 0.2)
    monkeypatch.setattr(put_back, "INSIST_EVERY_SECONDS", 0.1)
    request, told = held(stand, stand.task(nothing, name="plain", acks_late=True))
    proxy.go_away()

    end(request)

    assert record_threads.drain(20)
    assert told == ["rejected, requeue=True"]
