"""A worker refuses to start with a once window that is shorter than the time in which its broker delivers again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_alchemy import Alchemy
from celery_alchemy.worker.boot_steps import SessionStep
from tests.delivery.outbox_stand import add_effect


def start_worker_of(app: Celery) -> None:
    """Run the library's step of a worker's start."""
    worker: Any = SimpleNamespace(app=app, pool_cls="celery.concurrency.solo:TaskPool", concurrency=1)
    SessionStep(worker)


def app_with(broker: str, *, once: bool, options: dict[str, Any] | None = None, **alchemy: Any) -> Celery:
    app = Celery("window", broker=broker, set_as_current=False)
    app.conf.broker_transport_options = options or {}
    Alchemy(app, "sqlite://", **alchemy)
    make: Any = app.task(shared=False, name="effect", once=once)
    make(add_effect)
    app.finalize()
    return app


@pytest.mark.parametrize(
    ("options", "window", "says"),
    [(None, 3599, "3600"), ({"visibility_timeout": 100_000}, 90_000, "100000")],
)
def test_window_shorter_than_the_visibility_timeout_is_refused(options: dict[str, Any] | None, window: float, says: str) -> None:
    """The text names both numbers: Redis's default, or the one that was set."""
    app = app_with("redis://", once=True, options=options, once_window=window)

    with pytest.raises(SystemExit, match=rf"once_window={window} s.* {says} s"):
        start_worker_of(app)


@pytest.mark.parametrize(
    ("broker", "once", "options", "window"),
    [
        ("redis://", True, None, 3600),
        ("redis://", True, {"visibility_timeout": 60}, 61),
        ("redis://", False, None, 1),
        ("amqp://", True, None, 1),
    ],
)
def test_window_that_is_long_enough_is_no_reason(broker: str, once: bool, options: dict[str, Any] | None, window: float) -> None:
    """Nor is any window without once tasks, or with a broker that keeps what is not acknowledged for its consumer."""
    start_worker_of(app_with(broker, once=once, options=options, once_window=window))
