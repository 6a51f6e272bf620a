"""Captured sends: what they equal, and how they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import Retry

from celery_alchemy import Alchemy, ConfigurationError, enqueue
from celery_alchemy.testing import EndlessRunError, Sent, captured, crash_at
from celery_alchemy.testing import sending as kit
from tests.kit.store import Store

pytestmark = pytest.mark.databases("sqlite")


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("options", [{"outbox": True}, {"outbox": False}, {"broker": True}], ids=str)
def test_sends_are_captured_and_run(options: dict[str, bool], make_store: Callable[..., Store]) -> None:
    """Plain, on commit, with each kind of broker: all, in order; nothing is left when they have run."""
    store = make_store(**options)
    with captured(store.alchemy) as sent:
        store.pay.delay("a")
        with store.alchemy.begin() as session:
            enqueue(session, store.pay.s(order="b"))

        assert sent == [store.pay.s("a"), store.pay.s("b")]
        runs = sent.run()

        assert sent == []
    assert [(run.sent.task, run.state) for run in runs] == [
        ("store.pay", "SUCCESS"),
        ("store.pay", "SUCCESS"),
        ("store.receipt", "SUCCESS"),
        ("store.receipt", "SUCCESS"),
    ]
    assert runs[-1].result == "1 of b"


def test_rolled_back_sends_are_not_there(store: Store, sent: Sent) -> None:
    """A task that failed has sent nothing."""
    run = _run(store.fail, sent)

    assert run.state == "FAILURE"
    assert sent == []


def _run(task: Any, sent: Sent) -> Any:
    task.delay()
    return sent.run_next(propagate=False)


def test_sent_task_equals_its_signature_however_it_was_called(store: Store, sent: Sent) -> None:
    """Keywords, positions and defaults make no difference; another value, task or queue does."""
    store.receipt.apply_async((), {"order": "a"}, queue="slow", countdown=60)

    assert sent == [store.receipt.s("a")]
    assert sent == [store.receipt.s(order="a", copies=1)]
    assert [store.receipt.s("a").set(queue="slow", countdown=60)] == sent
    assert sent != [store.receipt.s("b")]
    assert sent != [store.receipt.s("a", 2)]
    assert sent != [store.pay.s("a")]
    assert sent != [store.receipt.s("a").set(queue="fast")]
    assert sent != [store.receipt.s("a").set(countdown=600)]
    assert sent != [store.receipt.s("a").set(expires=60)]
    assert repr(sent) == "[store.receipt(order='a')]"


def test_sent_task_equals_its_signature_after_the_serializer(store: Store, sent: Sent) -> None:
    """Values are compared as the worker gets them: a tuple is a list there, a datetime a datetime."""
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    store.receipt.delay(("a", at))

    assert sent == [store.receipt.s(("a", at))]
    assert sent == [store.receipt.s(["a", at])]


def test_what_cannot_be_compared_is_an_error(store: Store, sent: Sent) -> None:
    """An expectation that would hold for everything is refused."""
    store.receipt.delay("a")

    with pytest.raises(TypeError, match="'link' of 'store.receipt' cannot be compared"):
        assert sent == [store.receipt.s("a").set(link=[store.receipt.s()])]
    with pytest.raises(TypeError, match="chain"):
        assert sent == [chain(store.receipt.si("a"), store.receipt.si("b"))]


def test_tasks_run_one_by_one(store: Store, sent: Sent) -> None:
    """After a step what it sent is there to be looked at."""
    store.pay.delay("a")

    run = sent.run_next()

    assert run.state == "SUCCESS"
    assert repr(run) == f"store.pay('a') -> SUCCESS {run.result}"
    assert sent == [store.receipt.s("a")]
    sent.run()
    with pytest.raises(IndexError):
        sent.run_next()


def test_failure_is_raised(store: Store, sent: Sent) -> None:
    """A test does not pass over a task that failed; the next run goes on behind it."""
    store.fail.delay()
    store.receipt.delay("a")

    with pytest.raises(LookupError, match="the reason"):
        sent.run()
    assert [run.state for run in sent.run()] == ["SUCCESS"]


def test_retries_are_run(store: Store, sent: Sent) -> None:
    """Each attempt is a delivery of its own, and only the last one's work is committed."""
    result = store.retry.delay()

    runs = sent.run()

    assert [run.state for run in runs] == ["RETRY", "RETRY", "SUCCESS"]
    assert isinstance(runs[0].result, Retry)
    assert result.get(timeout=1) == 2
    assert store.paid == ["attempt 2"]


def test_canvas_runs_to_its_end(store: Store, sent: Sent) -> None:
    """Links, callbacks and chords are sent when their time has come, and their results are stored."""
    result = chain(store.pay_once.s("a"), store.receipt.s(3)).delay()
    header = chord([store.pay_once.s("b"), store.pay_once.s("c")])(store.receipt.s())

    sent.run()

    assert result.get(timeout=1) == "3 of a"
    assert header.get(timeout=1) == "1 of ['b', 'c']"


def test_endless_sends_are_noticed(store: Store, sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that sends itself for ever ends the test instead of the test run."""
    monkeypatch.setattr(kit, "MOST_RUNS", 5)
    task: Any = store.app.task

    @task(shared=False, name="store.again")
    def again() -> None:
        again.delay()

    again.delay()

    with pytest.raises(EndlessRunError, match=r"5 tasks were run .* store.again\(\)"):
        sent.run()


@pytest.mark.parametrize("outbox", [True, False])
def test_always_eager_app_is_captured(outbox: bool, make_store: Callable[..., Store]) -> None:
    """An app that tests set to task_always_eager sends while its sends are captured, and is eager again behind that."""
    store = make_store(outbox=outbox, task_always_eager=True)
    with captured(store.alchemy) as sent:
        store.pay.delay("a")

        assert sent == [store.pay.s("a")]

    assert store.receipt.delay("b").get() == "1 of b"


def test_captured_tasks_can_be_handed_to_the_broker(store: Store, sent: Sent) -> None:
    """For a real worker."""
    queue = f"kit-{os.getpid()}"
    store.receipt.apply_async(("a",), queue=queue)

    sent.publish()

    assert sent == []
    with store.app.connection_for_read() as connection, connection.SimpleQueue(queue) as received:
        message = received.get(timeout=5)
        message.ack()
        assert message.payload[0] == ["a"]


def test_alchemy_without_an_app_is_refused() -> None:
    """There is nothing yet whose sends could be captured, or whose tasks could crash."""
    alchemy = Alchemy(bind="sqlite://")

    with pytest.raises(ConfigurationError, match="init_app"), captured(alchemy):
        pass
    with pytest.raises(ConfigurationError, match="init_app"), crash_at(alchemy, "body, before"):
        pass


def test_nothing_is_captured_behind_the_block(store: Store) -> None:
    """The app's own producers and the outbox's publisher are back."""
    queue = f"kit-behind-{os.getpid()}"
    with captured(store.alchemy) as sent:
        pass

    store.receipt.apply_async(("a",), queue=queue)
    with store.alchemy.begin() as session:
        enqueue(session, store.receipt.s("b"), queue=queue)

    assert sent == []
    with store.app.connection_for_read() as connection, connection.SimpleQueue(queue) as received:
        for order in ("a", "b"):
            message = received.get(timeout=5)
            message.ack()
            assert message.payload[0] == [order]
