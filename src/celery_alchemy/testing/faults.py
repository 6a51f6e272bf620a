"""Faults for a test to provoke.

A process is killed at a point, a message is delivered twice.

Above the points. In the test's own process a crash is an exception that nobody catches; a real
worker's process, started by ``WorkerProcess``, kills itself.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

from celery.signals import before_task_publish
from celery.utils import uuid
from kombu import Producer

from ..alchemy import Alchemy
from ..errors import CeleryAlchemyError, ConfigurationError
from ..messages import publisher
from ..messages.celery_types import AnyTask, App
from ..task import SessionTask
from .noticing import noticing
from .points import POINTS, Point, is_point, listeners, processes, replaced

__all__ = [
    "CRASH_HEADER",
    "Crash",
    "CrashAt",
    "PointNotReachedError",
    "crash_at",
    "deliver_twice",
    "deliveries",
]

#: The message header that carries a crash to a real worker: the point, and the file that the
#: process leaves when it dies.
CRASH_HEADER = "celery_alchemy_crash"

#: Seconds that a worker's process has at the end of the block to come to its point: a result can be
#: had before the message is acknowledged.
STRIKE_SECONDS = 2.0


class Crash(BaseException):
    """The death of a process, in a test that goes on.

    No ``except Exception`` catches it, as none catches SIGKILL.
    """

    def __init__(self, point: str) -> None:
        super().__init__(point)
        self.point = point

    def __str__(self) -> str:
        return f"crash_at({self.point!r})"


class PointNotReachedError(CeleryAlchemyError, AssertionError):
    """Nothing came to the point at which a test wanted a crash.

    The test would have shown nothing.
    """

    def __init__(self, point: str, task: str | None, reached: tuple[str, ...]) -> None:
        super().__init__(point, task, reached)
        self.point: str = point
        self.task: str | None = task
        self.reached: tuple[str, ...] = reached

    def __str__(self) -> str:
        whose = "" if self.task is None else f" of task {self.task!r}"
        return (
            f"crash_at({self.point!r}): the point{whose} was not reached inside of the block."
            f" Reached: {'; '.join(self.reached) or 'none'}. What is called directly is not"
            " acknowledged, and what sends nothing does not publish."
        )


class CrashAt:
    """A crash that waits for its point.

    Attributes:
        point: Where.
        task: The name of the only task that it waits for; None for whatever comes first.
    """

    def __init__(self, point: str, task: str | None, file: Path) -> None:
        self.point = point
        self.task = task
        self.file = file
        self._struck_here = False
        self._has_travelled = False
        self._reached: dict[str, None] = {}

    @property
    def struck(self) -> bool:
        """True once the process has died: this one, or a real worker's."""
        return self._struck_here or self.file.exists()

    def reached(self, point: str, request: object) -> None:
        """Strike if this is the point, for the first time."""
        if self.task is not None and (
            request is None or getattr(request, "task", None) != self.task
        ):
            return
        self._reached[point] = None
        if point == self.point and not self.struck:
            self._struck_here = True
            raise Crash(point)

    def travel(self, sender: object = None, headers: object = None, **more: object) -> None:
        """Go with a message to a real worker (as a receiver of ``before_task_publish``)."""
        if isinstance(headers, dict) and self.task in (None, sender):
            self._has_travelled = True
            headers[CRASH_HEADER] = [self.point, str(self.file)]

    def demand(self) -> None:
        """Fail the test if it has not struck, and does not in the process that it has travelled to.

        Raises:
            PointNotReachedError: It names the points that were reached.
        """
        waits = self._has_travelled and bool(processes)
        deadline = monotonic() + (STRIKE_SECONDS if waits else 0)
        while not self.struck and monotonic() < deadline:
            sleep(0.01)
        # The file goes with the block.
        self._struck_here = self.struck
        if not self._struck_here:
            raise PointNotReachedError(self.point, self.task, tuple(self._reached))


@contextmanager
def crash_at(
    alchemy: Alchemy, point: Point | str, *, task: AnyTask | str | None = None
) -> Iterator[CrashAt]:
    """Kill the process that comes to a point first, inside of the block; once.

    Around ``Sent.run()`` the task's process is lost: Celery and the broker do what they do then, so
    that a task that is acknowledged late is delivered again. Around code that is called directly
    (``.apply()``, a request to a web application) the ``Crash`` ends the block, and the test goes
    on behind it. Tasks that are sent inside of the block to a ``WorkerProcess`` kill it there.

    Args:
        alchemy: Its app's tasks come to points.
        point: Where; see ``Point``, or ``"step parse"`` for the moment before the COMMIT of that
            step, also with ``", before"`` for that before its function and ``", after"`` for that
            after its COMMIT.
        task: Only this task, or the task of this name.

    Raises:
        PointNotReachedError: Nothing came to the point.
        ConfigurationError: There is no such point.
    """
    if not is_point(point):
        points = ", ".join(map(repr, POINTS))
        raise ConfigurationError(
            f"There is no point {point!r}.", f"Use one of {points}; or 'step NAME' of a step."
        )
    app = _app_of(alchemy)
    with tempfile.TemporaryDirectory() as folder:
        crash = CrashAt(
            point,
            task if isinstance(task, str) else getattr(task, "name", None),
            Path(folder, "struck"),
        )
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


def _app_of(alchemy: Alchemy) -> App:
    if alchemy.app is None:
        raise ConfigurationError("This Alchemy has no app yet.", "Call init_app(app) first.")
    return alchemy.app


# --- delivered twice ------------------------------------------------------------------------------

_deliveries = 1


def deliveries() -> int:
    """Return how often a captured message is delivered."""
    return _deliveries


@contextmanager
def deliver_twice() -> Iterator[None]:
    """Have every task delivered twice under one id inside of the block, as brokers do at times.

    ``Sent.run()`` runs each twice, ``.apply()`` and ``task_always_eager`` too, and what is sent to
    a broker is sent twice. With ``.apply()`` the result is the first run's; when that raises there
    is no second one.
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


def _applying_twice() -> object:
    original = SessionTask.apply

    @functools.wraps(original)
    def apply(
        task: SessionTask,
        args: object = None,
        kwargs: object = None,
        *more: object,
        **options: object,
    ) -> object:
        options["task_id"] = options.get("task_id") or uuid()
        first = original(task, args, kwargs, *more, **options)
        original(task, args, kwargs, *more, **options)
        return first

    return apply


def _publishing_twice() -> object:
    original: Callable[..., object] = vars(Producer)["publish"]

    @functools.wraps(original)
    def publish(producer: Producer, *args: object, **kwargs: object) -> object:
        headers = kwargs.get("headers")
        if isinstance(headers, Mapping) and "task" in headers:
            original(producer, *args, **kwargs)
        return original(producer, *args, **kwargs)

    return publish
