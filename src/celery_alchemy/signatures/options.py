"""What a task's options may be.

They are checked once, when Celery binds the task's class to its app and has applied
``task_annotations``.

Underneath ``task.py``, which declares the options and documents them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, TypeGuard, get_args

from ..databases import is_known
from ..errors import ConfigurationError
from ..messages.celery_types import AnyTask
from ..sessions.coroutine_functions import is_coroutine_function
from ..sessions.isolation import ShownEngine
from .entities import Missing
from .outcomes import ONCE_COMMITS_ON, SUCCESS, CommitOn

__all__ = [
    "MAPS",
    "MayBeOnce",
    "check_around",
    "check_engines",
    "check_once",
    "check_options",
    "may_be_once",
    "needs_transaction",
    "once_of",
    "refuse_map",
    "refuse_old_protocol",
    "written_in",
]

#: Celery's tasks that call another one for each of many items, directly: none of the calls is a
#: delivery.
MAPS = frozenset({"celery.map", "celery.starmap", "celery.chunks"})


class TaskOptions(Protocol):
    """The options of a task, as its class has them: what was written there, right or wrong."""

    commit_on: object
    isolation_level: str | None
    max_deliveries: int | None
    missing: Missing
    read_only: bool
    redeliver_after: float | None
    transient_retries: int


class MayBeOnce(Protocol):
    """A task of the library's class, which may be a ``once`` task."""

    @property
    def name(self) -> str: ...

    is_once: ClassVar[bool]

    @property
    def once_key(self) -> Callable[..., object] | None: ...


#: A task's class.
Options = type[TaskOptions]


def written_in(cls: type, name: str) -> object:
    """Return a class attribute that may be a function, without making a method of it."""
    value = inspect.getattr_static(cls, name, None)
    return value.__func__ if isinstance(value, staticmethod) else value


def once_of(cls: type) -> object:
    """Return the option ``once`` of a task class; a dict is celery-once's and says nothing here."""
    once = written_in(cls, "once")
    return False if isinstance(once, dict) else once


def check_options(cls: Options, name: str) -> None:
    """Refuse what every task refuses.

    Args:
        cls: The task class.
        name: The task's name, for messages.

    Raises:
        ConfigurationError: ``missing``, ``transient_retries``, ``isolation_level`` or
            ``record_failure`` cannot work.
    """
    if cls.missing not in get_args(Missing):
        raise ConfigurationError(
            f"missing={cls.missing!r} of task {name!r} is unknown.",
            f"Use one of {', '.join(map(repr, get_args(Missing)))}.",
        )
    retries: object = cls.transient_retries
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ConfigurationError(
            f"transient_retries={retries!r} of task {name!r} is no number of retries.",
            "Give a whole number, 0 for none.",
        )
    read_only: object = cls.read_only
    if not isinstance(read_only, bool):
        raise ConfigurationError(
            f"read_only={read_only!r} of task {name!r} is no switch.", "Give True or False."
        )
    if needs_transaction(cls) is not None and _is_autocommit(cls.isolation_level):
        raise _autocommit(cls, name, "isolation_level='AUTOCOMMIT'")
    check_around(written_in(cls, "around"), f"of task {name!r}")
    record = inspect.getattr_static(cls, "record_failure")
    record = getattr(record, "__func__", record)
    if record is not None and not callable(record):
        raise ConfigurationError(
            f"record_failure={record!r} of task {name!r} cannot be called.",
            "Give a function: def failed(session: Session, exc: Exception, *args, **kwargs).",
        )


def needs_transaction(cls: Options) -> str | None:
    """Return the option of a task that AUTOCOMMIT would break; None if it has none."""
    if once_of(cls):
        return "once"
    return "transient_retries" if cls.transient_retries else "read_only" if cls.read_only else None


def _is_autocommit(level: object) -> bool:
    return str(level).upper() == "AUTOCOMMIT"


def _autocommit(cls: Options, name: str, where: str) -> ConfigurationError:
    promise = needs_transaction(cls)
    reason = (
        "there is no transaction to be read-only"
        if promise == "read_only"
        else "nothing is rolled back: a run that is repeated would write again what the one before"
        " has written"
    )
    return ConfigurationError(
        f"Task {name!r} has {promise} and {where}, in which {reason}.", "Remove one of the two."
    )


def check_around(around: object, whose: str) -> None:
    """Refuse what can be seen to return no context manager.

    Args:
        around: The option; None for nothing.
        whose: For messages.

    Raises:
        ConfigurationError: It cannot be called, or it is a generator or a coroutine function.
    """
    if around is None:
        return
    if not callable(around):
        problem = f"around={around!r} {whose} cannot be called."
    elif inspect.isgeneratorfunction(around) or inspect.isasyncgenfunction(around):
        problem = f"The around {whose} is a generator function, which makes no context manager."
    elif is_coroutine_function(around):
        problem = f"The around {whose} is an `async def` that returns a coroutine."
    else:
        return
    raise ConfigurationError(
        problem,
        "Give a function of the task and its session with @contextmanager or @asynccontextmanager.",
    )


def check_engines(cls: Options, name: str, engines: Iterable[ShownEngine]) -> None:
    """Refuse a task that no transaction on its engines could satisfy.

    It judges by what is known before they connect.

    Args:
        cls: The task class.
        name: The task's name, for messages.
        engines: What its sessions use.

    Raises:
        ConfigurationError: ``isolation_level``, ``read_only``, ``once`` or ``transient_retries``
            cannot work there.
    """
    level = cls.isolation_level
    if level is None and needs_transaction(cls) is None:
        return
    for engine in engines:
        database, levels = engine.dialect.name, engine.levels
        if level is not None and levels is not None and str(level).replace("_", " ") not in levels:
            raise ConfigurationError(
                f"isolation_level={level!r} of task {name!r} is no level of {database}.",
                f"Use one of {', '.join(map(repr, levels))}.",
            )
        if level is None and _is_autocommit(engine.level):
            raise _autocommit(cls, name, "an engine with isolation_level='AUTOCOMMIT'")
        if cls.read_only and not is_known(database):
            raise ConfigurationError(
                f"read_only=True of task {name!r} is not supported on {database}.",
                "Remove it, or use a database user that may only read.",
            )


def check_once(cls: Options, name: str, policy: CommitOn | None) -> None:
    """Refuse what a ``once`` task refuses beside that.

    Args:
        cls: The task class.
        name: The task's name, for messages.
        policy: The task's own ``commit_on``; None for the Alchemy's.

    Raises:
        ConfigurationError: ``once`` itself is wrong, or another option contradicts it.
    """
    once = once_of(cls)
    if once is not True and (not callable(once) or is_coroutine_function(once)):
        raise ConfigurationError(
            f"once={once!r} of task {name!r} is neither True nor a plain callable.",
            "Use once=True, or once=lambda order_id: f'charge:{order_id}'.",
        )
    if any(isinstance(vars(base).get("once"), dict) for base in cls.__mro__):
        raise ConfigurationError(
            f"Task {name!r} has once={once!r}, and a class in which once is a dict, as in"
            " celery-once's, which reads its settings there.",
            "Remove one of the two: once=True keeps the second copy from doing anything,"
            " celery-once from being sent.",
        )
    if written_in(cls, "session_factory") is not None:
        raise ConfigurationError(
            f"Task {name!r} is once, but its class has a session_factory, which has no outbox to"
            " record that in.",
            "Give the app an Alchemy instead of the session_factory.",
        )
    if cls.read_only:
        raise ConfigurationError(
            f"Task {name!r} is both once and read_only, but once writes its completion.",
            "Remove one of the two.",
        )
    if policy is not None and not ONCE_COMMITS_ON >= policy >= SUCCESS:
        raise ConfigurationError(
            f"Task {name!r} is once, and its commit_on={cls.commit_on!r} does not fit: a once task"
            " commits its writes when it is done, since what an attempt commits before that would"
            " be committed again with the next delivery of its message.",
            'Use commit_on=("success",) or ("success", "ignore"), or remove once.',
        )
    _check_numbers(cls, name)


def _check_numbers(cls: Options, name: str) -> None:
    for option in ("redeliver_after", "max_deliveries"):
        value = getattr(cls, option)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and value > 0):
            raise ConfigurationError(
                f"{option}={value!r} of task {name!r} is not a positive number.",
                "Give a number greater than 0.",
            )
    if cls.max_deliveries is not None and not float(cls.max_deliveries).is_integer():
        raise ConfigurationError(
            f"max_deliveries={cls.max_deliveries!r} of task {name!r} is not a whole number.",
            "Give a whole number greater than 0.",
        )


def may_be_once(task: object) -> TypeGuard[MayBeOnce]:
    """Tell whether a task is a ``once`` task."""
    return bool(getattr(task, "is_once", False))


def refuse_map(task: MayBeOnce, how: str) -> None:
    """Refuse to run a ``once=True`` task for many items inside of one message of another task.

    Its items are direct calls without a task id, so that nothing tells which of them a delivery
    before has done. A task with a key of its arguments is called once for each key.

    Args:
        task: The task.
        how: ``"map"``, ``"starmap"`` or ``"chunks"``; or the name of Celery's task for it.

    Raises:
        ConfigurationError: The task is ``once=True``.
    """
    if not task.is_once or task.once_key is not None:
        return
    raise ConfigurationError(
        f"Task {task.name!r} is once=True, and {how.removeprefix('celery.')}() would call it for"
        " many items in one message of another task: a second delivery of that message would do"
        " them all again.",
        "Send a group, in which each item is a task of its own:"
        f" group({task.name.rsplit('.', 1)[-1]}.s(item) for item in items); or give once= a"
        " callable that makes a key of the arguments.",
    )


def refuse_old_protocol(task: AnyTask) -> None:
    """Refuse a ``once`` task's message in the format of Celery 3.

    It has no headers, in which the row is named that the message stands for.

    Raises:
        ConfigurationError: The app has ``task_protocol=1``.
    """
    if task.app.conf.task_protocol == 1:
        raise ConfigurationError(
            f"Task {task.name!r} is once, and the app has task_protocol=1, whose messages have no"
            " headers to name the task's row in.",
            "Remove task_protocol from the app's configuration: Celery reads protocol 2 since"
            " version 4.0.",
        )
