"""Running a body again, after an error that may pass: ``transient_retries``.

Beside ``sync_body.py``, which runs each body through it; ``failure.py`` asks it whether a failure
is the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TypeVar

from celery.app.task import Context

from ..databases.transient import is_read_only, is_transient
from ..databases.trying_again import again, backoff_seconds
from ..sessions.commits import Commits, commits_under_way
from .loop_call import pause
from .plan import Plan

__all__ = ["Runs", "runs_of", "with_transient_retries"]

logger: logging.Logger = logging.getLogger("celery_alchemy.transient_retries")

T = TypeVar("T")


@dataclass(slots=True)
class Runs:
    """A request that ``transient_retries`` runs.

    Attributes:
        plan: What is known of its task.
        request: The request.
        left: How often it may still be run again.
        commits: What it has committed by itself.
    """

    plan: Plan
    request: Context
    left: int
    commits: Commits

    def follow(self, exc: BaseException) -> bool:
        """Tell whether the body runs again after this error."""
        return self.left > 0 and not self.commits.why_final and self._may_pass(exc)

    def seconds_until_next(self, exc: Exception) -> float | None:
        """Return how long to wait until the body runs again after this error.

        None if it does not.
        """
        if not self.follow(exc):
            if self.left > 0 and self._may_pass(exc):
                self._say_why(exc)
            return None
        self.left -= 1
        self.commits.is_ending = False
        wait = backoff_seconds(self.plan.transient_retries - self.left)
        text = "Task %s failed with %s and runs again in %.2f s"
        logger.info(text, self.plan.name, type(exc).__name__, wait)
        return wait

    def end(self) -> None:
        """Have the body not run again, whatever its error: it has used a caller's transaction."""
        self.left = 0

    def _may_pass(self, exc: BaseException) -> bool:
        """Tell whether an error may pass.

        A write that the task has forbidden itself never will be done.
        """
        return is_transient(exc) and not (self.plan.options.read_only and is_read_only(exc))

    def _say_why(self, exc: Exception) -> None:
        """Say why the body does not run again, in the log and in the error's notes.

        Python has notes from 3.11 on.
        """
        why = self.commits.why_final
        note = f"Not run again by transient_retries={self.plan.transient_retries}: {why}."
        text = "Task %s[%s] failed with %s. %s"
        logger.warning(text, self.plan.name, self.request.id, type(exc).__name__, note)
        add_note: Callable[[str], None] | None = getattr(exc, "add_note", None)  # Python 3.11
        if add_note is not None:
            add_note(note)


_runs: ContextVar[Runs | None] = ContextVar("celery_alchemy_runs", default=None)


def runs_of(request: Context) -> Runs | None:
    """Return the count of a request's runs; None if it is not run by ``with_transient_retries``."""
    runs = _runs.get()
    return runs if runs is not None and runs.request is request else None


@contextmanager
def _counted(plan: Plan, request: Context) -> Iterator[Runs]:
    """Count the runs of a request, inside the block."""
    before, outer = _runs.get(), commits_under_way.get()
    commits = Commits(request, outer, monotonic())
    runs = Runs(plan, request, plan.transient_retries, commits)
    _runs.set(runs)
    commits_under_way.set(commits)
    try:
        yield runs
    finally:
        _runs.set(before)
        commits_under_way.set(outer)


@contextmanager
def _on_stack(plan: Plan, request: Context) -> Iterator[None]:
    """Put a request on the task's stack that is not there, inside the block.

    A task class whose ``__call__`` calls ``self.run()`` itself, as FlaskTask does, leaves a direct
    call without one. Each question for the request would get another one then, and none would be
    that whose runs are counted.
    """
    stack = plan.task.request_stack
    if plan.is_async or stack.top is not None:
        yield
        return
    stack.push(request)
    try:
        yield
    finally:
        stack.pop()


def with_transient_retries(
    plan: Plan,
    request: Context,
    run: Callable[..., T],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> T:
    """Run a body again, each time in a fresh session, while it fails with what may pass."""
    with _on_stack(plan, request), _counted(plan, request) as runs:
        rest = pause if plan.is_async else None
        return again(partial(run, *args, **kwargs), runs.seconds_until_next, rest)
