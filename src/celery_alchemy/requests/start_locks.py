"""Locks that a task's class takes when the task is sent: given back when the send comes to nothing.

Beneath ``sending.py``. celery-singleton and celery-once lock in ``apply_async`` and unlock when the
task has run; of a task that waits for a commit, and is rolled back, nobody would unlock. Neither is
imported: they are known by their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from ..messages.message import Message
from ..sessions.off_loop import off_loop

__all__ = ["unlocking"]


@runtime_checkable
class _Singleton(Protocol):
    """A task of celery-singleton, whose lock holds the id of the task that is to run.

    Source: https://github.com/steinitzu/celery-singleton/blob/0.3.1/celery_singleton/singleton.py
    """

    name: str

    def generate_lock(self, task_name: str, task_args: object, task_kwargs: object) -> str: ...

    def get_existing_task_id(self, lock: str) -> str | None: ...

    def unlock(self, lock: str) -> None: ...


class _OnceBackend(Protocol):
    """Where celery-once keeps its locks."""

    def clear_lock(self, key: str) -> object: ...


@runtime_checkable
class _QueueOnce(Protocol):
    """A task of celery-once's ``QueueOnce``.

    Source: https://github.com/cameronmaske/celery-once/blob/v3.0.1/celery_once/tasks.py
    """

    once_backend: _OnceBackend

    def get_key(self, args: object, kwargs: object) -> str: ...


def unlocking(sends: Sequence[tuple[object, Message]]) -> Callable[[], None] | None:
    """Return what gives the locks back that were taken for these messages; None if there are none.

    Args:
        sends: Messages, each with its task; None for one that this app does not have.
    """
    unlocks = [unlock for task, message in sends if (unlock := _unlock(task, message)) is not None]
    return partial(off_loop, partial(_call_all, unlocks)) if unlocks else None


def _call_all(unlocks: Sequence[Callable[[], None]]) -> None:
    for unlock in unlocks:
        unlock()


def _unlock(task: object, message: Message) -> Callable[[], None] | None:
    # The class first: a protocol looks at attributes, which takes 15 us for each message on Python
    # 3.11, and celery-once's backend is made by a property.
    if hasattr(type(task), "generate_lock") and isinstance(task, _Singleton):
        return partial(_unlock_singleton, task, message)
    if hasattr(type(task), "once_backend") and isinstance(task, _QueueOnce):
        return partial(_unlock_once, task, message)
    return None


def _unlock_singleton(task: _Singleton, message: Message) -> None:
    args, kwargs = message.arguments
    lock = task.generate_lock(task.name, list(args), kwargs)
    # One that has expired may be another sender's by now.
    if task.get_existing_task_id(lock) == message.task_id:
        task.unlock(lock)


def _unlock_once(task: _QueueOnce, message: Message) -> None:
    args, kwargs = message.arguments
    task.once_backend.clear_lock(task.get_key(args, kwargs))
