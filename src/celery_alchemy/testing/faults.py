"""Faults for a test to provoke: a process that is killed at a point, a message that is delivered twice.

Above the points. In the test's own process a crash is an exception that nobody catches; a real worker's process, started by
``WorkerProcess``, kills itself.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

from celery import Celery
from celery.signals import before_task_publish
from celery.utils import uuid
from kombu import Producer

from .. import publisher
from ..alchemy import Alchemy
from ..errors import ConfigurationError
from ..task import SessionTask
from .noticing import noticing
from .points import POINTS, Point, listeners, replaced

__all__ = ["CRASH_HEADER", "Crash", "CrashAt", "PointNotReachedError", "crash_at", "deliver_twice", "deliveries"]

#: The message header that carries a crash to a real worker: the point, and the file that the process leaves when it dies.
CRASH_HEADER = "celery_alchemy_crash"


class Crash(BaseException):
    """The death of a process, in a test that goes on. No ``except Exception`` catches it, as none catches SIGKILL."""

    def __init__(self, point: str) -> None:
        super().__init__(point)
        self.point = point

    def __str__(self) -> str:
        return f"crash_at({self.point!r})"


class PointNotReachedError(AssertionError):
    """Nothing came to the point at which a test wanted a crash, so that it would have shown nothing."""

    def __init__(self, point: str, task: str | None, reached: tuple[str, ...]) -> None:
        super().__init__(point, task, reached)
        self.point: str = point
        self.task: str | None = task
        self.reached: tuple[str, ...] = reached

    def __str__(self) -> str:
        whose = "" if self.task is None else f" of task {self.task!r}"
        return (
            f"crash_at({self.point!r}): the point{whose} was not reached inside of the block. Reached:"
            f" {'; '.join(self.reached) or 'none'}. What is called directly is not acknowledged, and what sends nothing does not"
            " publish."
        )


class CrashAt:
    """A crash that waits for its point.

    Attributes:
        point: Where.
        task: The name of the only task that it waits for; None for whatever comes first.
    """

    def __init__(self, point: Point, task: str | None, file: Path) -> None:
        self.point = point
        self.task = task
        self.file = file
        self._struck_here = False
        self._reached: dict[str, None] = {}

    @property
    def struck(self) -> bool:
        """True once the process has died: this one, or a real worker's."""
        return self._struck_here or self.file.exists()

    def reached(self, point: Point, request: Any) -> None:
        """Strike if this is the point, for the first time."""
        if self.task is not None and (request is None or getattr(request, "task", None) != self.task):
            return
        self._reached[point] = None
        if point == self.point and not self.struck:
            self._struck_here = True
            raise Crash(point)

    def travel(self, sender: Any = None, headers: Any = None, **more: Any) -> None:
        """Go with a message to a real worker (as a receiver of ``before_task_publish``)."""
        if isinstance(headers, dict) and self.task in (None, sender):
            headers[CRASH_HEADER] = [self.point, str(self.file)]

    def demand(self) -> None:
        """Fail the test if it has not struck.

        Raises:
            PointNotReachedError: It names the points that were reached.
        """
        if not self.struck:
            raise PointNotReachedError(self.point, self.task, tuple(self._reached))


@contextmanager
def crash_at(alchemy: Alchemy, point: Point, *, task: Any = None) -> Iterator[CrashAt]:
    """Kill the process that comes to a point first, inside of the block; once.

    Around ``Sent.run()`` the task's process is lost: Celery and the broker do what they do then, so that a task that is acknowledged
    late is delivered again. Around code that is called directly (``.apply()``, a request to a web application) the ``Crash`` ends
    the block, and the test goes on behind it. Tasks that are sent inside of the block to a ``WorkerProcess`` kill it there.

    Args:
        alchemy: Its app's tasks come to points.
        point: Where; see ``Point``.
        task: Only this task, or the task of this name.

    Raises:
        PointNotReachedError: Nothing came to the point.
        ConfigurationError: There is no such point.
    """
    if point not in POINTS:
        raise ConfigurationError(f"There is no point {point!r}.", f"Use one of {', '.join(map(repr, POINTS))}.")
    app = _app_of(alchemy)
    with tempfile.TemporaryDirectory() as folder:
        crash = CrashAt(point, getattr(task, "name", task), Path(folder, "struck"))
        listeners.append(crash.reached)
        before_task_publish.connect(crash.travel, weak=False)
        try:
            with noticing(app):
                yield crash
        except Crash as died:
            if died.point != point:
                raise
        finally:
            before_task_publish.disconnect(crash.travel)
            listeners.remove(crash.reached)
        crash.demand()


def _app_of(alchemy: Alchemy) -> Celery[Any]:
    if alchemy.app is None:
        raise ConfigurationError("This Alchemy has no app yet.", "Call init_app(app) first.")
    return alchemy.app


# --- delivered twice -------------------------------------------------------------------------------------------------------

_deliveries = 1


def deliveries() -> int:
    """Return how often a captured message is delivered."""
    return _deliveries


@contextmanager
def deliver_twice() -> Iterator[None]:
    """Have every task delivered twice under one id inside of the block, as brokers do at times.

    ``Sent.run()`` runs each twice, ``.apply()`` and ``task_always_eager`` too, and what is sent to a broker is sent twice. With
    ``.apply()`` the result is the first run's; when that raises there is no second one.
    """
    global _deliveries  # noqa: PLW0603 - a fact about the process, as a broker's is.
    with ExitStack() as stack:
        stack.enter_context(replaced(SessionTask, "apply", _applying_twice()))
        stack.enter_context(replaced(Producer, "publish", _publishing_twice()))
        stack.enter_context(replaced(publisher, "confirmed_together", lambda *args: set()))
        _deliveries = 2
        try:
            yield
        finally:
            _deliveries = 1


def _applying_twice() -> Any:
    original = SessionTask.apply

    @functools.wraps(original)
    def apply(task: SessionTask, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Any:
        options["task_id"] = options.get("task_id") or uuid()
        first = original(task, args, kwargs, *more, **options)
        original(task, args, kwargs, *more, **options)
        return first

    return apply


def _publishing_twice() -> Any:
    original = cast("Any", Producer.publish)

    @functools.wraps(original)
    def publish(producer: Any, *args: Any, **kwargs: Any) -> Any:
        if "task" in (kwargs.get("headers") or {}):
            original(producer, *args, **kwargs)
        return original(producer, *args, **kwargs)

    return publish
