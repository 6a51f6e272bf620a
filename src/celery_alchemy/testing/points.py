"""The moments at which a fault can strike, and who is told that one is reached.

Underneath the faults, which make a process notice its points, and the captured sends, which reach
two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from celery._state import get_current_task

from ..requests.attempt import UnitOfWork, at_hand

__all__ = [
    "POINTS",
    "Point",
    "is_point",
    "listeners",
    "processes",
    "reach",
    "replaced",
    "running_request",
]

#: In the order in which a task comes by them. "COMMIT" is the one that ends the task, or, where no
#: task runs, that of any session; "publish" is what a transaction or a body sends. A task that is
#: acknowledged early, Celery's default, comes by "acknowledge" first.
Point = Literal[
    "body, before",
    "body, after",
    "COMMIT, before",
    "COMMIT, after",
    "publish, before",
    "publish, after",
    "result, before",
    "result, after",
    "acknowledge, before",
    "acknowledge, after",
]
POINTS: tuple[Point, ...] = get_args(Point)

#: Called with each point that is reached and the request that is there: Celery's, None where no
#: task runs.
listeners: list[Callable[[str, object], None]] = []

#: The worker processes of this test that have been started and not killed.
processes: set[object] = set()


def is_point(point: object) -> bool:
    """Tell whether there is such a point: one of POINTS, or of a step, whose name is the user's.

    ``"step parse"`` is right before the COMMIT of the step ``parse``, when its function has
    returned; ``"step parse, before"`` is before its function, ``"step parse, after"`` after its
    COMMIT.
    """
    if not isinstance(point, str) or not point.startswith("step "):
        return point in POINTS
    name = point.removeprefix("step ").removesuffix(", before").removesuffix(", after")
    return bool(name) and name == name.strip()


def reach(point: str, request: object = None) -> None:
    """Say that this thread is at a point."""
    if listeners:
        request = request or running_request()
        for listener in tuple(listeners):
            listener(point, request)


def running_request() -> object:
    """Return Celery's request of the task that runs in this thread, greenlet or asyncio task.

    None if none does.
    """
    held = at_hand.get()
    if isinstance(held, UnitOfWork):
        return held.request
    task = get_current_task()
    return getattr(task, "request", None)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Give an object, a class or a module another attribute inside of the block."""
    had, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
