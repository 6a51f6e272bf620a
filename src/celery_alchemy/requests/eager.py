"""What was enqueued in an app with ``task_always_eager``.

It runs in this process as a worker would have run it.

In the place of the broker and the worker, beneath ``sending.py``. Celery's own eager mode gives all
tasks of a chain the id of its last one, which a ``once`` task knows its work by, and ends with an
exception where a worker stores a failure and goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from celery import states
from celery.canvas import Signature
from celery.exceptions import ChordError, TimeoutError  # noqa: A004 - as results raise.
from celery.result import GroupResult, ResultBase
from celery.utils import uuid
from kombu.serialization import dumps, loads
from kombu.utils.functional import maybe_list
from vine import promise

from ..messages.callback_ids import with_fixed_ids
from ..messages.celery_types import App, Eager, Fields, signed

__all__ = ["EagerSent", "noted_errors"]

logger: logging.Logger = logging.getLogger("celery_alchemy.eager")

#: The errors of tasks that were run eagerly after a commit, for the outermost caller, whose
#: ``task_eager_propagates`` raises them.
_errors: ContextVar[list[Exception] | None] = ContextVar(
    "celery_alchemy_eager_errors", default=None
)


@contextmanager
def noted_errors() -> Iterator[tuple[list[Exception], bool]]:
    """Collect the errors of eager tasks in this block.

    Say whether it is the outermost one, which has to raise them.
    """
    outer = _errors.get()
    if outer is not None:
        yield outer, False
        return
    errors: list[Exception] = []
    token = _errors.set(errors)
    try:
        yield errors, True
    finally:
        _errors.reset(token)


class _Later(Eager):
    """The result of a task that runs when the transaction has committed."""

    def __init__(self, id: str, name: str) -> None:  # noqa: A002 - Celery's name.
        self.id = id
        self._result: object = None
        self._state: object = states.PENDING
        self._traceback: object = None
        self._name = name
        self.on_ready = promise()
        self.parent: ResultBase | None = None

    def settle(self, state: str, result: object, traceback: object = None) -> None:
        """Say how the task has ended."""
        self._state, self._result, self._traceback = state, result, traceback
        self.on_ready(self)

    def ready(self) -> bool:
        return self._state in states.READY_STATES

    def get(self, *args: Any, **kwargs: Any) -> Any:
        if self._state == states.PENDING:
            raise TimeoutError(
                f"Task {self._name}[{self.id}] has not run: its transaction has not been committed."
            )
        return super().get(*args, **kwargs)

    wait = get


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a part of a canvas has ended.

    Attributes:
        value: What it returned.
        error: Why it failed; None if it did not, or was ignored.
        goes_on: What follows it runs.
    """

    value: object = None
    error: Exception | None = None
    goes_on: bool = True


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a canvas, ready to run.

    Attributes:
        result: What its caller gets.
        run: Runs it with the arguments that come before its own.
        fail: Says that it will never run, because of what came before it.
    """

    result: _Later | GroupResult
    run: Callable[[tuple[object, ...]], _Ended]
    fail: Callable[[Exception], None]


class EagerSent:
    """A signature that runs when it is called, as the callable of ``on_commit``.

    All of it is made now, as a message would be: ids of every task, and arguments as they come out
    of the serializer.

    Args:
        app: The Celery app.
        signature: What runs. It is not changed.
        options: Of ``apply_async``.

    Raises:
        kombu.exceptions.EncodeError: The arguments cannot be serialised.
    """

    #: Its error is the task's, and not one of sending.
    raises_its_own = True

    def __init__(self, app: App, signature: Fields, options: Fields) -> None:
        self._app = app
        made = _with_options(with_fixed_ids(dict(signature)), dict(options))
        self._part = self._part_of(signed(made, app=app))

    @property
    def result(self) -> object:
        """The result, which is pending until this was called."""
        return self._part.result

    def __call__(self) -> None:
        """Run it.

        Raises:
            Exception: The error of the first task that failed, with ``task_eager_propagates``.
        """
        with noted_errors() as (errors, is_outermost):
            ended = self._part.run(())
            if ended.error is not None:
                errors.append(ended.error)
            if is_outermost and errors and self._app.conf.task_eager_propagates:
                raise errors[0]

    def _part_of(self, signature: Signature) -> _Part:
        kind = signature.get("subtask_type")
        if kind == "chain":
            return self._chain(
                [
                    self._part_of(signed(member, app=self._app))
                    for member in signature["kwargs"].get("tasks")
                ]
            )
        if kind == "group":
            return self._group(signature["kwargs"].get("tasks"), signature.options.get("task_id"))
        if kind == "chord":
            header = signature["kwargs"].get("header")
            return self._chord(
                self._group(getattr(header, "tasks", header), None),
                signed(signature["kwargs"].get("body"), app=self._app),
            )
        return self._task(signature)

    def _task(self, signature: Signature) -> _Part:
        app = self._app
        task = app.tasks[signature["task"]]
        serializer = (
            signature.options.get("serializer") or task.serializer or app.conf.task_serializer
        )
        kind, encoding, written = dumps(
            (list(signature.args), signature.kwargs), serializer=serializer
        )
        signature["args"], signature["kwargs"] = loads(written, kind, encoding, accept=[kind])
        later = _Later(signature.options["task_id"], task.name)

        def run(before: tuple[object, ...]) -> _Ended:
            try:
                ended = signature.apply_async(before, throw=False)
            except Exception as exc:  # noqa: BLE001 - such as arguments that cannot be serialised.
                later.settle(states.FAILURE, exc)
                return _Ended(error=exc, goes_on=False)
            later.settle(ended.state, ended.result, ended.traceback)
            error = (
                ended.result
                if ended.state in states.PROPAGATE_STATES and isinstance(ended.result, Exception)
                else None
            )
            return _Ended(ended.result, error, goes_on=ended.state == states.SUCCESS)

        return _Part(later, run, lambda exc: later.settle(states.FAILURE, exc))

    def _chain(self, parts: Sequence[_Part]) -> _Part:
        for before, after in pairwise(parts):
            _first_of(after.result).parent = before.result

        def fail(exc: Exception) -> None:
            for part in parts:
                part.fail(exc)

        def run(before: tuple[object, ...]) -> _Ended:
            ended = _Ended()
            for number, part in enumerate(parts, 1):
                ended = part.run(before)
                if ended.error is not None:
                    # As a worker, which stores the failure for all that would have followed.
                    error = _error_of_next(part, ended.error)
                    for skipped in parts[number:]:
                        skipped.fail(error)
                if not ended.goes_on:
                    break
                before = (ended.value,)
            return ended

        return _Part(parts[-1].result, run, fail)

    def _group(self, members: Sequence[Fields], group_id: str | None) -> _Part:
        parts = [self._part_of(signed(member, app=self._app)) for member in members]

        def run(before: tuple[object, ...]) -> _Ended:
            ends = [part.run(before) for part in parts]
            error = next((ended.error for ended in ends if ended.error is not None), None)
            return _Ended(
                [ended.value for ended in ends], error, all(ended.goes_on for ended in ends)
            )

        def fail(exc: Exception) -> None:
            for part in parts:
                part.fail(exc)

        # Groups may be in groups, which the stubs leave out.
        results: list[Any] = [part.result for part in parts]
        return _Part(GroupResult(group_id or uuid(), results, app=self._app), run, fail)

    def _chord(self, header: _Part, body: Signature) -> _Part:
        after = self._part_of(body)
        _first_of(after.result).parent = header.result

        def run(before: tuple[object, ...]) -> _Ended:
            ended = header.run(before)
            if ended.goes_on:
                return after.run((ended.value,))
            if ended.error is not None:
                error = _error_of_next(header, ended.error)
                after.fail(error)
                self._tell_errbacks(body, error)
            return _Ended(None, ended.error, goes_on=False)

        return _Part(after.result, run, after.fail)

    def _tell_errbacks(self, body: object, error: Exception) -> None:
        try:
            self._app.backend.chord_error_from_stack(body, exc=error)
        except Exception:
            logger.exception("The errbacks of a chord's body failed")


def _first_of(result: ResultBase) -> ResultBase:
    """Return the first result of a chain, of which only the last is at hand."""
    while (before := getattr(result, "parent", None)) is not None:
        result = before
    return result


def _error_of_next(part: _Part, error: Exception) -> Exception:
    """Return what a task fails with that follows one that has failed.

    Of a group it is not the member's own error.
    """
    if not isinstance(part.result, GroupResult):
        return error
    return ChordError(f"Dependency raised {error!r}")


def _with_options(signature: Fields, options: Fields) -> Fields:
    """Return a signature with the options of its ``apply_async``, where a worker would find them.

    The id and the links are those of the last task, or of the group; what failed is told for each
    task.
    """
    own = dict(signature.get("options") or {})
    kind = signature.get("subtask_type")
    if kind is None:
        for name in ("link", "link_error"):
            both = [
                *(maybe_list(own.get(name)) or ()),
                *(maybe_list(options.pop(name, None)) or ()),
            ]
            if both:
                own[name] = [with_fixed_ids(one) for one in both]
        return {**signature, "options": {**own, **options}}
    inner = dict(signature["kwargs"])
    options = {**{name: own[name] for name in ("link", "link_error") if own.get(name)}, **options}
    errors = {"link_error": options["link_error"]} if options.get("link_error") else {}
    if kind == "chain":
        *others, last = inner["tasks"]
        inner["tasks"] = [
            *(_with_options(dict(one), dict(errors)) for one in others),
            _with_options(dict(last), options),
        ]
    elif kind == "chord":
        inner["body"] = _with_options(dict(inner["body"]), options)
    else:
        own.update({"task_id": options.pop("task_id")} if "task_id" in options else {})
        inner["tasks"] = [_with_options(dict(one), dict(options)) for one in inner["tasks"]]
    return {**signature, "kwargs": inner, "options": own}
