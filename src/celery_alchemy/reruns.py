"""Running a body again, after an error that may pass: ``transient_retries``.

Beside ``body.py`` and ``coroutines.py``, which run each body through it; ``failure.py`` asks it whether a failure is the last one.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from celery.app.task import Context

from .request import UnitOfWork
from .transient import is_transient

__all__ = ["Runs", "began_at", "runs_of", "transient_runs", "with_transient_retries"]

logger: logging.Logger = logging.getLogger(__name__)

BACKOFF_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 5.0


@dataclass(slots=True)
class Runs:
    """A request that ``transient_retries`` runs, how often it may still be run again, and since when it runs."""

    task: Any
    request: Context
    left: int
    began: float

    def seconds_until_next(self, exc: Exception) -> float | None:
        """Return how long to wait until the body runs again after this error; None if it does not."""
        if self.left <= 0 or not is_transient(exc):
            return None
        self.left -= 1
        wait = backoff_seconds(self.task.transient_retries - self.left)
        logger.info("Task %s failed with %s and runs again in %.2f s", self.task.name, type(exc).__name__, wait)
        return wait


_runs: ContextVar[Runs | None] = ContextVar("celery_alchemy_runs", default=None)


def runs_of(request: Context) -> Runs | None:
    """Return the count of a request's runs; None if it is not run by ``with_transient_retries``."""
    runs = _runs.get()
    return runs if runs is not None and runs.request is request else None


def began_at(unit: UnitOfWork, request: Context) -> float:
    """Return ``time.monotonic()`` seconds at which a request began: its time limit counts from its first run."""
    runs = runs_of(request)
    return unit.started if runs is None else runs.began


@contextmanager
def transient_runs(task: Any, request: Context) -> Iterator[Runs]:
    """Count the runs of a request, inside the block."""
    before = _runs.get()
    runs = Runs(task, request, task.transient_retries, monotonic())
    _runs.set(runs)
    try:
        yield runs
    finally:
        _runs.set(before)


def with_transient_retries(task: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a body again, each time in a fresh session, while it fails with what may pass."""
    with transient_runs(task, task.request) as runs:
        while True:
            try:
                return run(*args, **kwargs)
            except Exception as exc:
                wait = runs.seconds_until_next(exc)
                if wait is None:
                    raise
            sleep(wait)


def backoff_seconds(tries: int) -> float:
    """Return how long to wait before another run: at random up to a bound that doubles, so that two rivals part."""
    return random.uniform(0, min(BACKOFF_SECONDS * 2**tries, BACKOFF_MAX_SECONDS))
