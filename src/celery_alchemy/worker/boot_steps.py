"""The steps that Celery's worker runs in its parent process: checks, the relay, and a last wait.

At the edge: Celery finds them through the names that ``alchemy.py`` and
``requests/planned_task.py`` register.
"""

# Celery's stub has ``requires`` as a property of its own.
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from celery import bootsteps
from celery.signals import worker_process_shutdown

from ..alchemy import Alchemy
from ..messages.celery_types import App
from ..outbox.hand_over import drain_at_exit
from ..outbox.relay import RelayThread, relay_of
from ..sessions.engine import WorkerPool, dispose_own_engines, set_worker_pool, worker_pool
from .record_threads import record_threads
from .start import alchemy_of, look, report_engine

__all__ = ["GrowthStep", "RecordStep", "RelayStep", "SessionStep"]

#: Seconds that a worker which is stopped gives the ends that are being recorded.
DRAIN_SECONDS = 10.0

#: How often a worker whose broker is the database looks for what the outbox has kept for another
#: one.
OTHER_BROKERS_SECONDS = 10.0


class _TaskPool(Protocol):
    """What runs the tasks of a worker."""

    limit: int
    grow: Callable[[int], object]


class _Worker(Protocol):
    """What is asked of Celery's worker."""

    app: App
    concurrency: int | None
    pool: _TaskPool
    pool_cls: object


@worker_process_shutdown.connect
def _close_in_child(**_: object) -> None:
    # Celery's child processes end without running what is registered with atexit.
    drain_at_exit()
    dispose_own_engines()


class SessionStep(bootsteps.Step):
    """Runs once in the worker's parent, before any child is forked."""

    #: That step reads ``--autoscale``.
    # The stubs of Celery give Step and its metaclass two types for it: no one type suits both.
    requires: tuple[type[bootsteps.Step] | str, ...] = ("celery.worker.components:Pool",)

    def __init__(self, worker: _Worker, **kwargs: object) -> None:
        super().__init__(worker, **kwargs)
        pool = WorkerPool(
            _pool_name(worker.pool_cls), _most_tasks(worker), getattr(worker, "time_limit", None)
        )
        set_worker_pool(pool)
        look(worker.app, pool)


def _most_tasks(worker: _Worker) -> int:
    """Return how many tasks may run at once in the whole worker.

    With ``--autoscale=20,3`` that is 20.
    """
    autoscale: tuple[int, int] | None = getattr(worker, "autoscale", None)
    return int((autoscale[0] if autoscale else worker.concurrency) or 1)


def _pool_name(pool_class: object) -> str:
    module = pool_class if isinstance(pool_class, str) else pool_class.__module__
    name = module.split(":")[0].rsplit(".", 1)[-1]
    return {"thread": "threads"}.get(name, name)


class GrowthStep(bootsteps.StartStopStep):
    """Has connection pools follow a worker's pool that is made larger while it runs.

    It is made larger by ``control pool_grow``, or by autoscale.

    In prefork each task has a process, and a connection pool, of its own.
    """

    requires: tuple[type[bootsteps.Step] | str, ...] = ("celery.worker.components:Pool",)

    def start(self, parent: _Worker) -> None:
        """Follow the pool, where its tasks share one process."""
        tasks = parent.pool
        if not getattr(tasks, "is_green", False):
            return
        grow: Callable[[int], object] = tasks.grow

        def grow_with_connections(n: int = 1) -> object:
            # First: a task may begin as soon as there is room for it.
            _enlarge(parent.app, tasks.limit + n)
            return grow(n)

        tasks.grow = grow_with_connections


def _enlarge(app: App, concurrency: int) -> None:
    pool = worker_pool()
    if pool is None or concurrency <= pool.concurrency:
        return
    pool = replace(pool, concurrency=concurrency)
    set_worker_pool(pool)
    alchemy = alchemy_of(app)
    if alchemy is not None:
        report_engine(alchemy, pool)


class RelayStep(bootsteps.StartStopStep):
    """Runs a relay in the worker's parent for the app's outbox."""

    def __init__(self, worker: object, **kwargs: object) -> None:
        super().__init__(worker, **kwargs)
        self._thread: RelayThread | None = None

    def start(self, parent: _Worker) -> None:
        """Start the relay, once the worker has forked its children."""
        alchemy = alchemy_of(parent.app)
        if alchemy is not None and alchemy.runs_relay and _needs_relay(parent.app, alchemy):
            seconds = alchemy.relay_interval_seconds
            if alchemy.is_broker:
                seconds = max(seconds, OTHER_BROKERS_SECONDS)
            self._thread = RelayThread(relay_of(alchemy), seconds)
            self._thread.start()

    def stop(self, parent: object) -> None:
        """Let the relay finish its step."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def terminate(self, parent: object) -> None:
        """Stop as for a warm shutdown: a step is short."""
        self.stop(parent)


def _needs_relay(app: App, alchemy: Alchemy) -> bool:
    return bool(
        alchemy.keeps_messages
        or any(getattr(task, "is_once", False) for task in app.tasks.values())
    )


class RecordStep(bootsteps.StartStopStep):
    """Lets a worker that stops record the ends that it has seen.

    Until then it can still acknowledge their messages.
    """

    def close(self, parent: object) -> None:
        """Wait for the records, before the connection to the broker is closed."""
        record_threads.drain(DRAIN_SECONDS)

    def stop(self, parent: object) -> None:
        """Wait for what has come since."""
        record_threads.drain(DRAIN_SECONDS)

    def terminate(self, parent: object) -> None:
        """Wait as for a warm shutdown."""
        record_threads.drain(DRAIN_SECONDS)
