"""A task cannot be sent, or its message cannot be delivered."""

from __future__ import annotations

from .root import CeleryAlchemyError

__all__ = [
    "CallableError",
    "ClaimsLostError",
    "MessageTooLargeError",
    "PublishError",
    "PublishInTransactionError",
    "PublishInTransactionWarning",
    "QueueNameError",
    "SignatureError",
    "UnknownTaskError",
    "UnroutableError",
    "UnsafeSerializerError",
]


class SignatureError(CeleryAlchemyError, TypeError):
    """Something that is no signature was to be sent on commit.

    Args:
        given: What was given, for people.
        task_name: The name of the task if it was a task, without its arguments.
    """

    def __init__(self, given: str, task_name: str | None = None) -> None:
        super().__init__(given, task_name)
        self.given = given
        self.task_name = task_name

    def __str__(self) -> str:
        call = "task" if self.task_name is None else self.task_name.rsplit(".", 1)[-1]
        return (
            f"enqueue() needs a signature and was given {self.given}. Write"
            f" enqueue(session, {call}.s(...)), with the task's arguments in the brackets."
        )


_RUNS_AT_ONCE = "what is written with its brackets, and no lambda in front, runs at once"


class CallableError(CeleryAlchemyError, TypeError):
    """Something that cannot be called was to be called later.

    Args:
        what: What would call it, for people.
        given: What was given, for people.
        way: The call that would be right, with ``lambda`` around what is to be done.
        why: Why it is, for people.
    """

    def __init__(self, what: str, given: str, way: str, why: str = _RUNS_AT_ONCE) -> None:
        super().__init__(what, given, way, why)
        self.what = what
        self.given = given
        self.way = way
        self.why = why

    def __str__(self) -> str:
        return (
            f"{self.what} needs a callable and was given {self.given}. Write {self.way}:"
            f" {self.why}."
        )


class PublishError(CeleryAlchemyError):
    """The transaction was committed, but something that had to run after it did not.

    The work in the database is safe and must not be repeated. What failed was a message to the
    broker (without an outbox it is lost) or a callable given to ``on_commit``. ``__cause__`` is the
    first error.

    Args:
        failures: One line for each failure: what, and the error.
    """

    def __init__(self, failures: tuple[str, ...]) -> None:
        super().__init__(failures)
        self.failures = failures

    def __str__(self) -> str:
        return (
            "The transaction is committed; do not run it again. What failed after it: "
            + "; ".join(self.failures)
            + ". With Alchemy(..., outbox=True) messages are kept in the database and sent when the"
            " broker is back."
        )


def _in_transaction_text(task_name: str) -> str:
    return (
        f"{task_name} sent a task while its transaction has uncommitted writes: a worker may start"
        " it before they are visible, and a rollback does not take it back. Use delay_on_commit(),"
        ' or Alchemy(..., publish_in_transaction="defer") to have every send wait for the commit,'
        ' or "allow".'
    )


class PublishInTransactionError(CeleryAlchemyError):
    """``publish_in_transaction="raise"``: a plain send inside an open transaction with writes.

    Args:
        task_name: The name of the task that was sent.
    """

    def __init__(self, task_name: str) -> None:
        super().__init__(task_name)
        self.task_name = task_name

    def __str__(self) -> str:
        return _in_transaction_text(self.task_name)


class PublishInTransactionWarning(UserWarning):
    """``publish_in_transaction="warn"``: a plain send inside an open transaction with writes.

    Args:
        task_name: The name of the task that was sent.
    """

    def __init__(self, task_name: object) -> None:
        super().__init__(task_name)

    def __str__(self) -> str:
        return _in_transaction_text(str(self.args[0]))


class UnknownTaskError(CeleryAlchemyError):
    """A signature names a task that the app does not know.

    It was not declared as another service's either.

    Args:
        task_name: The name in the signature.
        app_name: The Celery app's main name.
    """

    def __init__(self, task_name: str, app_name: str | None) -> None:
        super().__init__(task_name, app_name)
        self.task_name = task_name
        self.app_name = app_name

    def __str__(self) -> str:
        return (
            f"The app {self.app_name!r} has no task {self.task_name!r}: a worker would throw the"
            " message away. Check the name and that its module is imported; for a task of another"
            f" service pass Alchemy(..., remote_tasks=({self.task_name!r},))."
        )


class MessageTooLargeError(CeleryAlchemyError):
    """A message is over the size that the outbox accepts.

    Args:
        task_name: The name of the task.
        size_bytes: The size of the serialised body.
        limit_bytes: What the Alchemy accepts.
    """

    def __init__(self, task_name: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(task_name, size_bytes, limit_bytes)
        self.task_name = task_name
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes

    def __str__(self) -> str:
        return (
            f"The message for {self.task_name} has {self.size_bytes} bytes, over the limit of"
            f" {self.limit_bytes}. Store the data and pass its key; or raise Alchemy(...,"
            " max_message_bytes=...) if the broker takes more."
        )


class UnroutableError(CeleryAlchemyError):
    """The broker has no queue for a message: RabbitMQ, or the database.

    Args:
        task_name: The name of the task.
        routing_key: Where the message was to go.
    """

    def __init__(self, task_name: str, routing_key: str) -> None:
        super().__init__(task_name, routing_key)
        self.task_name = task_name
        self.routing_key = routing_key

    def __str__(self) -> str:
        return (
            f"The broker has no queue for the message for {self.task_name} with the routing key"
            f" {self.routing_key!r}. Make the queue, or name it with queue=..., so that Celery"
            " declares it, and leave the routing key to Celery."
        )


class UnsafeSerializerError(CeleryAlchemyError):
    """A message for the outbox was serialised in a way that executes code when it is read.

    Args:
        task_name: The name of the task.
        content_type: The content type that was refused.
    """

    def __init__(self, task_name: str, content_type: str) -> None:
        super().__init__(task_name, content_type)
        self.task_name = task_name
        self.content_type = content_type

    def __str__(self) -> str:
        return (
            f"The message for {self.task_name} is {self.content_type}: whoever can write to the"
            " table could execute code in a worker. Use the json, yaml or msgpack serializer for"
            " this task."
        )


class QueueNameError(CeleryAlchemyError, ValueError):
    """The name of a queue, an exchange or a routing key cannot be kept in the database.

    Args:
        name: Its beginning.
        length: How many characters it has.
        limit: How many a name may have.
    """

    def __init__(self, name: str, length: int, limit: int) -> None:
        super().__init__(name, length, limit)
        self.name = name
        self.length = length
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"The name {self.name!r} of a queue, an exchange or a routing key cannot be kept in the"
            f" database: it has {self.length} characters of at most {self.limit}, or a NUL among"
            " them. Choose a shorter name, without a NUL."
        )


class ClaimsLostError(CeleryAlchemyError, ConnectionError):
    """A worker showed no life for so long that its messages were given to others.

    Also a ConnectionError: the worker connects again, and forgets what it had taken and not begun.

    Args:
        seconds: After how long without a heartbeat a worker counts as lost.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"This worker showed no life for {self.seconds:g} seconds, by the clock of the"
            " database, and its messages were given to other workers: the process was paused, or"
            " all of its threads stood still. It connects again and takes new messages. If that"
            " happens without a cause, make worker_lost_after longer."
        )
