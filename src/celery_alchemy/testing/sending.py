"""Captured sends: what would have gone to the broker, as a list that can be compared and run.

Above the publisher and the app's producers, whose places it takes; ``delivery.py`` runs what was captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar, cast

from celery import Celery
from kombu import serialization
from kombu.serialization import dumps, loads
from sqlalchemy import select

from ..alchemy import Alchemy
from ..errors import ConfigurationError
from ..message import Message, Recorder, _let_backend_ignore_recorders
from ..outbox import Row
from ..publisher import send
from ..registry import homes_of
from ..tables import outbox
from .delivery import Delivery, RunState, deliver
from .faults import deliveries
from .points import reach

__all__ = ["EndlessRunError", "Run", "Sent", "SentTask", "captured"]

#: Runs after which ``Sent.run()`` gives up on a task that sends itself again and again.
MOST_RUNS = 1000

#: Seconds by which a countdown may differ from the one that is expected.
COUNTDOWN_TOLERANCE_SECONDS = 5.0


class EndlessRunError(AssertionError):
    """Tasks went on sending tasks."""

    def __init__(self, last: str) -> None:
        super().__init__(last)
        self.last = last

    def __str__(self) -> str:
        return (
            f"{MOST_RUNS} tasks were run and there are still more, the last one was {self.last}: does it send, or retry, itself for"
            " ever? Take one step after the other with run_next()."
        )


class SentTask:
    """A task that was sent. Equal to a signature of the same task with the same arguments, however they are passed.

    A signature's options are compared where it has some: ``mail.s(7).set(queue="slow", countdown=60)``.

    Attributes:
        message: As it would have gone to the broker.
        task: The task's name.
        id: The task's id.
        args: Positional arguments as the worker gets them: after the serializer.
        kwargs: Keyword arguments, likewise.
        redelivered: A worker had it before.
    """

    def __init__(self, app: Celery[Any], message: Message, *, redelivered: bool = False) -> None:
        self._app = app
        self.message = message
        self.task: str = str(message.task_name)
        self.id: str = str(message.task_id)
        self.redelivered = redelivered
        self._sent_at = datetime.now(timezone.utc)
        args, kwargs, _ = loads(message.body, message.content_type, message.content_encoding, accept={message.content_type})
        self.args: tuple[Any, ...] = tuple(args)
        self.kwargs: dict[str, Any] = dict(kwargs)

    def __repr__(self) -> str:
        shown = [repr(value) for value in self.args] + [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return f"{self.task}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SentTask):
            return self.id == other.id
        if not isinstance(other, Mapping) or "task" not in other:
            return NotImplemented
        if other.get("subtask_type") is not None:
            raise TypeError(
                f"A {other['subtask_type']} is several messages, now or later: compare with the signatures of its first tasks."
            )
        if other["task"] != self.task or self._bound(other.get("args"), other.get("kwargs")) != self._bound(self.args, self.kwargs):
            return False
        return all(self._has(name, value) for name, value in (other.get("options") or {}).items())

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def _bound(self, args: Iterable[Any] | None, kwargs: Mapping[str, Any] | None) -> Any:
        """Return arguments as the body would get them, after the serializer."""
        given = (list(args or ()), dict(kwargs or {}))
        content_type, encoding, body = dumps(
            given, serializer=cast("Any", serialization).registry.type_to_name[self.message.content_type]
        )
        positional, named = loads(body, content_type, encoding, accept={content_type})
        task = cast("Any", self._app).tasks.get(self.task)
        if task is None:
            return positional, named
        try:
            bound = inspect.signature(task.run).bind(*positional, **named)
        except TypeError:
            return positional, named
        bound.apply_defaults()
        return dict(bound.arguments)

    def _has(self, option: str, expected: Any) -> bool:
        message = self.message
        if option in ("queue", "routing_key"):
            return getattr(expected, "name", expected) in (message.routing_key, *message.queues)
        if option in ("countdown", "eta", "expires"):
            return self._is_timed(message.headers.get("expires" if option == "expires" else "eta"), expected)
        values = {"task_id": self.id, "exchange": message.exchange, **message.properties, **message.headers}
        if option not in values:
            raise TypeError(f"The option {option!r} of {self.task!r} cannot be compared: look at sent[n].message.")
        return bool(values[option] == expected)

    def _is_timed(self, header: str | None, expected: Any) -> bool:
        """Tell whether a time in the headers is the expected one: a datetime, or seconds from the send."""
        if header is None:
            return False
        at = datetime.fromisoformat(header.replace("Z", "+00:00"))
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        if isinstance(expected, (int, float)):
            return abs((at - self._sent_at).total_seconds() - expected) <= COUNTDOWN_TOLERANCE_SECONDS
        return bool(at == expected)


@dataclass(frozen=True, slots=True)
class Run:
    """One delivery of a captured task.

    Attributes:
        sent: The task.
        state: How it ended: Celery's state, or ``"LOST"`` if the process was killed by ``crash_at``.
        result: What it returned or raised.
    """

    sent: SentTask
    state: RunState
    result: Any

    def __repr__(self) -> str:
        return f"{self.sent!r} -> {self.state} {self.result!r}"


_NOT_HANDED_OVER = select(outbox).where(outbox.c.claim.is_not(None), outbox.c.body.is_not(None)).order_by(outbox.c.created_at)


class Sent(list[SentTask]):
    """What was sent and has not been run, in the order in which it would have reached the broker."""

    def __init__(self, app: Celery[Any]) -> None:
        super().__init__()
        self._app = app

    # As a list's, but for type checkers: that of a list lets a list of sent tasks be compared with nothing else.
    def __eq__(self, other: object) -> bool:
        return list.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return list.__ne__(self, other)

    __hash__: ClassVar[None] = None

    def run(self, *, propagate: bool = True) -> list[Run]:
        """Run what was sent, and what that sends, until nothing is left.

        Each task is delivered as by a worker, in this thread: with its own session, acknowledgement, result, callbacks and
        retries. ``countdown`` and ``eta`` are not waited for. What a process that was killed meanwhile has committed and not
        handed over is sent as by ``relay()``.

        Args:
            propagate: Raise what a task raised, other than a retry. False returns it as the run's result.

        Returns:
            All runs, in order.

        Raises:
            EndlessRunError: There is no end to it.
        """
        runs: list[Run] = []
        while self:
            if len(runs) >= MOST_RUNS:
                raise EndlessRunError(repr(self[0]))
            runs.extend(self._run_first(propagate=propagate))
            if not self and any(run.state == "LOST" for run in runs):
                self.relay()
        return runs

    def run_next(self, *, propagate: bool = True) -> Run:
        """Run the first task only; what it sends is left.

        Raises:
            IndexError: Nothing was sent.
        """
        if not self:
            raise IndexError("Nothing was sent, or all of it was run.")
        return self._run_first(propagate=propagate)[-1]

    def publish(self) -> None:
        """Hand all of it to the broker, for a real worker."""
        app = cast("Any", self._app)
        with app.connection_for_write() as connection, connection.Producer() as producer:
            while self:
                send(app, producer, self.pop(0).message)

    def relay(self) -> None:
        """Send what is in the outbox, committed but not handed over, as a relay does when the lease of its writer is over."""
        for home in homes_of(self._app).values():
            if home.outbox is None:
                continue
            with home.outbox.engine().begin() as connection:
                left = connection.execute(_NOT_HANDED_OVER).all()
            for claim in {row.claim for row in left}:
                rows = [
                    Row(row.id, Message.from_parts(row.body, row.envelope), row.redeliver_seconds)
                    for row in left
                    if row.claim == claim
                ]
                home.outbox.hand_over(rows, claim)

    def _run_first(self, *, propagate: bool) -> list[Run]:
        sent = self.pop(0)
        runs = []
        for redelivered in [sent.redelivered, *[True] * (deliveries() - 1)]:
            ended = deliver(self._app, sent.message, redelivered=redelivered)
            runs.append(Run(sent, ended.state, ended.result))
            if ended.requeued:
                self.insert(0, SentTask(self._app, sent.message, redelivered=True))
            if propagate and ended.state == "FAILURE":
                _raise(ended)
        return runs


def _raise(ended: Delivery) -> None:
    raise ended.result


@contextmanager
def captured(alchemy: Alchemy) -> Iterator[Sent]:
    """Capture what an Alchemy's app sends, from every thread of this process, instead of sending it.

    Plain sends are captured at once, those on commit after the commit; with the outbox their rows are written and settled as
    ever. ``task_always_eager`` is off in the block.

    Raises:
        ConfigurationError: The Alchemy has no app yet.
    """
    app = cast("Any", alchemy.app)
    if app is None:
        raise ConfigurationError("This Alchemy has no app yet.", "Call init_app(app) first.")
    sent = Sent(app)

    def keep(message: Message) -> None:
        if message.task_name is None:  # An event, a remote control command.
            return
        reach("publish, before")
        sent.append(SentTask(app, message))
        reach("publish, after")

    with ExitStack() as stack:
        _let_backend_ignore_recorders(app)
        pool = app.producer_pool
        app.amqp._producer_pool = _CapturingPool(lambda: _CapturingProducer(app, keep), pool.connections)
        stack.callback(setattr, app.amqp, "_producer_pool", pool)
        eager, app.conf.task_always_eager = app.conf.task_always_eager, False
        stack.callback(setattr, app.conf, "task_always_eager", eager)
        for home in homes_of(app).values():
            if home.outbox is not None:
                publisher, home.outbox.publisher = home.outbox.publisher, cast("Any", _CapturingPublisher(keep))
                stack.callback(setattr, home.outbox, "publisher", publisher)
        yield sent


class _CapturingProducer(Recorder):
    """What the app's pool lends: a producer is its own context manager."""

    def __enter__(self) -> _CapturingProducer:  # noqa: PYI034 - Python 3.10 has no Self.
        return self

    def __exit__(self, *exc: object) -> None:
        """There is nothing to give back."""

    def release(self) -> None:
        """There is nothing to give back."""


class _CapturingPool:
    """Takes the place of the app's pool of producers."""

    limit = None

    def __init__(self, make: Callable[[], _CapturingProducer], connections: Any) -> None:
        self._make = make
        #: Celery asks for the kind of broker before it sends with an eta.
        self.connections = connections

    def acquire(self, block: bool = False, timeout: float | None = None) -> _CapturingProducer:
        return self._make()

    def force_close_all(self) -> None:
        """There is nothing to close."""


class _CapturingPublisher:
    """Takes the place of the outbox's publisher; the broker confirms everything."""

    paused = False

    def __init__(self, keep: Callable[[Message], None]) -> None:
        self._keep = keep

    def publish(self, messages: Iterable[Message], *args: Any) -> list[Exception | None]:
        errors: list[Exception | None] = []
        for message in messages:
            self._keep(message)
            errors.append(None)
        return errors

    def close(self) -> None:
        """There is nothing to close."""
