"""Captured sends: what would have gone to the broker, as a list that can be compared and run.

Above the publisher and the app's producers, whose places it takes; ``delivery.py`` runs what was
captured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, ClassVar, cast

from kombu import serialization
from kombu.serialization import dumps, loads
from sqlalchemy import select

from ..alchemy import Alchemy
from ..databases.tables import outbox
from ..errors import CeleryAlchemyError, ConfigurationError
from ..messages.celery_types import App
from ..messages.kombu_types import connected
from ..messages.message import Message
from ..messages.publisher import Publisher, send
from ..messages.recording import let_backend_ignore_recorders
from ..outbox.outbox import Row
from ..requests.registry import home_of
from .capturing import CapturingPool, CapturingProducer, CapturingPublisher
from .delivery import Delivery, RunState, deliver
from .faults import deliveries
from .points import reach, replaced
from .steps import record_steps_of, steps_run

__all__ = ["EndlessRunError", "Run", "Sent", "SentTask", "captured"]

#: Runs after which ``Sent.run()`` gives up on a task that sends itself again and again.
MOST_RUNS = 1000

#: Seconds by which a countdown may differ from the one that is expected.
COUNTDOWN_TOLERANCE_SECONDS = 5.0


class EndlessRunError(CeleryAlchemyError, AssertionError):
    """Tasks went on sending tasks."""

    def __init__(self, last: str) -> None:
        super().__init__(last)
        self.last = last

    def __str__(self) -> str:
        return (
            f"{MOST_RUNS} tasks were run and there are still more, the last one was {self.last}:"
            " does it send, or retry, itself for ever? Take one step after the other with"
            " run_next()."
        )


class SentTask:
    """A task that was sent.

    Equal to a signature of the same task with the same arguments, however they are passed.

    A signature's options are compared where it has some: ``mail.s(7).set(queue="slow",
    countdown=60)``.

    Attributes:
        message: As it would have gone to the broker.
        task: The task's name.
        id: The task's id.
        args: Positional arguments as the worker gets them: after the serializer.
        kwargs: Keyword arguments, likewise.
        redelivered: A worker had it before.
    """

    def __init__(self, app: App, message: Message, *, redelivered: bool = False) -> None:
        self._app = app
        self.message = message
        self.task: str = str(message.task_name)
        self.id: str = str(message.task_id)
        self.redelivered = redelivered
        self._sent_at = datetime.now(timezone.utc)
        args, kwargs, _ = loads(
            message.body,
            message.content_type,
            message.content_encoding,
            accept={message.content_type},
        )
        self.args: tuple[object, ...] = tuple(args)
        self.kwargs: dict[str, object] = dict(kwargs)

    def __repr__(self) -> str:
        shown = [repr(value) for value in self.args] + [
            f"{name}={value!r}" for name, value in self.kwargs.items()
        ]
        return f"{self.task}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SentTask):
            return self.id == other.id
        if not isinstance(other, Mapping) or "task" not in other:
            return NotImplemented
        if other.get("subtask_type") is not None:
            raise TypeError(
                f"A {other['subtask_type']} is several messages, now or later: compare with the"
                " signatures of its first tasks."
            )
        if other["task"] != self.task or self._bound(
            other.get("args"), other.get("kwargs")
        ) != self._bound(self.args, self.kwargs):
            return False
        return all(self._has(name, value) for name, value in (other.get("options") or {}).items())

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def record_steps(self, **values: object) -> None:
        """Record steps, as if an earlier run of this task had done them and been killed.

        Args:
            **values: What each step has returned, by its name, in order; ``**{"embed 0": 7}`` for
                names that are no identifiers.

        Raises:
            ConfigurationError: The task is no ``once`` task.
        """
        record_steps_of(self._app, self.message, values)

    def _bound(self, args: Iterable[object] | None, kwargs: Mapping[str, object] | None) -> object:
        """Return arguments as the body would get them, after the serializer."""
        given = (list(args or ()), dict(kwargs or {}))
        content_type, encoding, body = dumps(
            given,
            serializer=vars(serialization)["registry"].type_to_name[self.message.content_type],
        )
        positional, named = loads(body, content_type, encoding, accept={content_type})
        task = self._app.tasks.get(self.task)
        if task is None:
            return positional, named
        try:
            bound = inspect.signature(task.run).bind(*positional, **named)
        except TypeError:
            return positional, named
        bound.apply_defaults()
        return dict(bound.arguments)

    def _has(self, option: str, expected: object) -> bool:
        message = self.message
        if option in ("queue", "routing_key"):
            return getattr(expected, "name", expected) in (
                message.routing_key,
                *message.queue_names,
            )
        if option in ("countdown", "eta", "expires"):
            return self._is_timed(
                message.headers.get("expires" if option == "expires" else "eta"), expected
            )
        values = {
            "task_id": self.id,
            "exchange": message.exchange,
            **message.properties,
            **message.headers,
        }
        if option not in values:
            raise TypeError(
                f"The option {option!r} of {self.task!r} cannot be compared: look at"
                " sent[n].message."
            )
        return bool(values[option] == expected)

    def _is_timed(self, header: str | None, expected: object) -> bool:
        """Tell whether a time in the headers is the expected one.

        That is a datetime, or seconds from the send.
        """
        if header is None:
            return False
        at = datetime.fromisoformat(header.replace("Z", "+00:00"))
        at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
        if isinstance(expected, (int, float)):
            return (
                abs((at - self._sent_at).total_seconds() - expected) <= COUNTDOWN_TOLERANCE_SECONDS
            )
        return bool(at == expected)


@dataclass(frozen=True, slots=True)
class Run:
    """One delivery of a captured task.

    Attributes:
        sent: The task.
        state: How it ended: Celery's state, or ``"LOST"`` if the process was killed by
            ``crash_at``.
        result: What it returned or raised.
        steps: The steps that ran in it and were committed, by name; not those that were recorded
            before.
    """

    sent: SentTask
    state: RunState
    result: Any
    steps: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.sent!r} -> {self.state} {self.result!r}"


_NOT_HANDED_OVER = (
    select(outbox)
    .where(outbox.c.claim.is_not(None), outbox.c.body.is_not(None))
    .order_by(outbox.c.created_at)
)


class Sent(list[SentTask]):
    """What was sent and has not been run, in the order of the sends."""

    def __init__(self, app: App) -> None:
        super().__init__()
        self._app = app

    # As a list's, but for type checkers: that of a list lets a list of sent tasks be compared with
    # nothing else.
    def __eq__(self, other: object) -> bool:
        return list.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return list.__ne__(self, other)

    __hash__: ClassVar[None] = None

    def run(self, *, propagate: bool = True) -> list[Run]:
        """Run what was sent, and what that sends, until nothing is left.

        Each task is delivered as by a worker, in this thread: with its own session,
        acknowledgement, result, callbacks and retries. ``countdown`` and ``eta`` are not waited
        for. What a process that was killed meanwhile has committed and not handed over is sent as
        by ``relay()``.

        Args:
            propagate: Raise what a task raised, other than a retry. False returns it as the run's
                result.

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
        app = self._app
        with app.connection_for_write() as connection, connection.Producer() as producer:
            while self:
                send(app, connected(producer), self.pop(0).message)

    def relay(self) -> None:
        """Send what is in the outbox, committed but not handed over.

        A relay does so when the lease of its writer is over.
        """
        home = home_of(self._app)
        if home is None or home.outbox is None:
            return
        with home.place.begin(home.outbox.engine()) as table:
            left = table.execute(_NOT_HANDED_OVER).all()
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
            with steps_run() as ran:
                ended = deliver(self._app, sent.message, redelivered=redelivered)
            runs.append(Run(sent, ended.state, ended.result, tuple(ran)))
            if ended.requeued:
                self.insert(0, SentTask(self._app, sent.message, redelivered=True))
            if propagate and ended.state == "FAILURE":
                _raise(ended)
        return runs


def _raise(ended: Delivery) -> None:
    raise ended.result


@contextmanager
def captured(alchemy: Alchemy) -> Iterator[Sent]:
    """Capture what an Alchemy's app sends, instead of sending it.

    It comes from every thread of this process.

    Plain sends are captured at once, those on commit after the commit; with the outbox their rows
    are written and settled as ever. ``task_always_eager`` is off in the block.

    Raises:
        ConfigurationError: The Alchemy has no app yet.
    """
    app = alchemy.app
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
        let_backend_ignore_recorders(app)
        pool = app.producer_pool
        capturing = CapturingPool(lambda: CapturingProducer(app, keep), pool.connections)
        stack.enter_context(replaced(app.amqp, "_producer_pool", capturing))
        eager, app.conf.task_always_eager = app.conf.task_always_eager, False
        stack.callback(setattr, app.conf, "task_always_eager", eager)
        home = home_of(app)
        if home is not None and home.outbox is not None:
            stack.enter_context(home.outbox.in_caller())
            publisher, home.outbox.publisher = (
                home.outbox.publisher,
                cast("Publisher", CapturingPublisher(keep)),
            )
            stack.callback(setattr, home.outbox, "publisher", publisher)
            # Where the database is the broker: its messages are handed over here, and wait in no
            # queue.
            queues, home.outbox.queues = home.outbox.queues, None
            stack.callback(setattr, home.outbox, "queues", queues)
        yield sent
