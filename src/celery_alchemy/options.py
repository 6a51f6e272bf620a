"""What a task's options may be: checked once, when Celery binds the task's class to its app and has applied ``task_annotations``.

Underneath ``task.py``, which declares the options and documents them.
"""

from __future__ import annotations

import inspect
from typing import Any, get_args

from .entities import Missing
from .errors import ConfigurationError
from .outcome import ONCE_COMMITS_ON, SUCCESS, CommitOn

__all__ = ["check_once", "check_options", "once_of", "written_in"]


def written_in(cls: type, name: str) -> Any:
    """Return a class attribute that may be a function, without making a method of it."""
    value = inspect.getattr_static(cls, name, None)
    return value.__func__ if isinstance(value, staticmethod) else value


def once_of(cls: type) -> Any:
    """Return the option ``once`` of a task class; a dict is celery-once's and says nothing here."""
    once = written_in(cls, "once")
    return False if isinstance(once, dict) else once


def check_options(cls: Any, name: str) -> None:
    """Refuse what every task refuses.

    Args:
        cls: The task class.
        name: The task's name, for messages.

    Raises:
        ConfigurationError: ``missing``, ``transient_retries``, ``isolation_level`` or ``record_failure`` cannot work.
    """
    if cls.missing not in get_args(Missing):
        raise ConfigurationError(
            f"missing={cls.missing!r} of task {name!r} is unknown.",
            f"Use one of {', '.join(map(repr, get_args(Missing)))}.",
        )
    retries: object = cls.transient_retries
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(
            f"transient_retries={retries!r} of task {name!r} is no number of retries.", "Give a whole number, 0 for none."
        )
    promise = "once" if once_of(cls) else "transient_retries" if retries else None
    if promise is not None and str(cls.isolation_level).upper() == "AUTOCOMMIT":
        raise ConfigurationError(
            f"Task {name!r} has {promise} and isolation_level='AUTOCOMMIT', in which nothing is rolled back: a run that is repeated"
            " would write again what the one before has written.",
            "Remove one of the two.",
        )
    record = inspect.getattr_static(cls, "record_failure")
    record = getattr(record, "__func__", record)
    if record is not None and not callable(record):
        raise ConfigurationError(
            f"record_failure={record!r} of task {name!r} cannot be called.",
            "Give a function: def failed(session: Session, exc: Exception, *args, **kwargs).",
        )
    if inspect.iscoroutinefunction(record):
        raise ConfigurationError(
            f"record_failure of task {name!r} is an `async def`.",
            "Make it a plain `def` with a Session: it also runs where there is no event loop, for a child that was killed.",
        )


def check_once(cls: Any, name: str, policy: CommitOn | None) -> None:
    """Refuse what a ``once`` task refuses beside that.

    Args:
        cls: The task class.
        name: The task's name, for messages.
        policy: The task's own ``commit_on``; None for the Alchemy's.

    Raises:
        ConfigurationError: ``once`` itself is wrong, or another option contradicts it.
    """
    once = once_of(cls)
    if once is not True and not callable(once):
        raise ConfigurationError(
            f"once={once!r} of task {name!r} is neither True nor a callable.",
            "Use once=True, or once=lambda order_id: f'charge:{order_id}'.",
        )
    if written_in(cls, "session_factory") is not None:
        raise ConfigurationError(
            f"Task {name!r} is once, but its class has a session_factory, which has no outbox to record that in.",
            "Give the app an Alchemy instead of the session_factory.",
        )
    if cls.read_only:
        raise ConfigurationError(
            f"Task {name!r} is both once and read_only, but once writes its completion.", "Remove one of the two."
        )
    if policy is not None and not ONCE_COMMITS_ON >= policy >= SUCCESS:
        raise ConfigurationError(
            f"Task {name!r} is once, and its commit_on={cls.commit_on!r} does not fit: a once task commits its writes when it is"
            " done, since what an attempt commits before that would be committed again with the next delivery of its message.",
            'Use commit_on=("success",) or ("success", "ignore"), or remove once.',
        )
    for option in ("redeliver_after", "max_deliveries"):
        value = getattr(cls, option)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):
            raise ConfigurationError(
                f"{option}={value!r} of task {name!r} is not a positive number.", "Give a number greater than 0."
            )
