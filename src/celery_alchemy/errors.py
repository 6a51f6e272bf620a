"""The exceptions and warnings of celery-alchemy.

Everything above imports this module; it imports nothing of the package.

An exception keeps its fields in ``args`` and makes its text in ``__str__``, so that it crosses process boundaries by pickle as it
is. A text says what failed, why, and what to do. No text holds a password or the arguments of a task.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CeleryAlchemyError",
    "ConfigurationError",
    "DeadTaskError",
    "EntityNotFoundError",
    "EntityReferenceError",
    "EntityReturnedError",
    "MessageTooLargeError",
    "MissingTableError",
    "NoSessionError",
    "NotConfiguredError",
    "OnceCommitError",
    "OnceKeyError",
    "PublishError",
    "PublishInTransactionError",
    "PublishInTransactionWarning",
    "SessionArgumentError",
    "SessionParameterError",
    "TasksAlreadyBoundError",
    "UncommittedChangesError",
    "UnknownTaskError",
    "UnroutableError",
    "UnsafeSerializerError",
]


class CeleryAlchemyError(Exception):
    """Base of every exception that celery-alchemy raises by itself.

    Errors of the database and of the broker are never wrapped: they reach the caller as SQLAlchemy's and kombu's own.
    """


class ConfigurationError(CeleryAlchemyError):
    """An option, a URL or a combination of them cannot work.

    Args:
        problem: What was given and why it cannot work, one sentence.
        remedy: What to do instead, one sentence.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem} {self.remedy}"


class NotConfiguredError(ConfigurationError):
    """A task needs a session and nothing gives it one.

    Args:
        task_name: The task's registered name.
        app_name: The Celery app's main name.
    """

    def __init__(self, task_name: str, app_name: str | None) -> None:
        super().__init__(
            f"Task {task_name!r} uses a session, but no Alchemy is tied to the Celery app {app_name!r}"
            " and its class carries no session_factory.",
            "Make Alchemy(app, url) where the app is made, or call alchemy.init_app(app) in the app factory,"
            " or give the task class session_factory = sessionmaker(engine).",
        )
        self.args: tuple[Any, ...] = (task_name, app_name)


class TasksAlreadyBoundError(ConfigurationError):
    """An Alchemy was made after tasks were bound to another task class.

    Args:
        task_names: The names of the bound tasks, shortest useful list.
    """

    def __init__(self, task_names: tuple[str, ...]) -> None:
        super().__init__(
            f"The tasks {', '.join(task_names)} were bound before this Alchemy was made, with a task class that knows no sessions.",
            "Make the Alchemy right after the Celery app, before any task is used, or give these tasks base=SessionTask.",
        )
        self.args: tuple[Any, ...] = (task_names,)


class SessionParameterError(ConfigurationError):
    """The signature of a task cannot be served with sessions.

    Args:
        problem: What the signature says and why it cannot be served.
        remedy: The signature to write instead.
    """


class SessionArgumentError(CeleryAlchemyError, TypeError):
    """A caller passed a session in a message.

    Args:
        task_name: The task's registered name.
        parameter: The name of the injected parameter.
    """

    def __init__(self, task_name: str, parameter: str) -> None:
        super().__init__(task_name, parameter)
        self.task_name = task_name
        self.parameter = parameter

    def __str__(self) -> str:
        return (
            f"{self.task_name}() got a value for {self.parameter!r}, which the worker injects: a session cannot travel"
            f" in a message. Leave it out. (A test may pass its own session in a direct call,"
            f" {self.task_name.rsplit('.', 1)[-1]}({self.parameter}=session, ...).)"
        )


class NoSessionError(CeleryAlchemyError, AttributeError):
    """A session was asked for where none is at hand.

    Also an AttributeError, as it is the attribute ``self.session`` that is not there: what looks at all attributes of a task, such as
    ``mock.create_autospec()`` and ``inspect.getmembers()``, passes over it.

    Args:
        what: What asked for it: ``"self.session"``, ``"delay_on_commit"``, ...
        remedy: What to do at that place.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
        # Else Python notes the task here, and ends the traceback with a similar attribute: "Did you mean: ...?"
        self.obj: object = None

    def __str__(self) -> str:
        return f"{self.what} needs a session and none is at hand here. {self.remedy}"


OPEN_SAVEPOINT = "an open SAVEPOINT"


class UncommittedChangesError(CeleryAlchemyError):
    """``released()`` would have lost or published work that was not committed.

    Args:
        what: The kind of work: unflushed objects, uncommitted writes, pending sends or an open SAVEPOINT.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        # released(commit=True) refuses a SAVEPOINT too: it cannot be committed without the transaction around it.
        way_out = (
            "Leave the `with session.begin_nested():` block first."
            if self.what == OPEN_SAVEPOINT
            else "Commit first, or use released(session, commit=True)."
        )
        return f"released() found {self.what} in the session. Giving the connection back now would lose it. {way_out}"


class EntityReturnedError(CeleryAlchemyError):
    """A task returned an ORM object, which no result backend can carry.

    Args:
        owner: The task's name and the request's id.
        entity: The class and primary key of the object.
    """

    def __init__(self, owner: str, entity: str) -> None:
        super().__init__(owner, entity)
        self.owner = owner
        self.entity = entity

    def __str__(self) -> str:
        return (
            f"{self.owner} returned the ORM object {self.entity}. It belongs to the task's session, which ends"
            " with the task. Return its primary key, or its data as plain values, instead."
        )


class PublishError(CeleryAlchemyError):
    """The transaction was committed, but something that had to run after it did not.

    The work in the database is safe and must not be repeated. What failed was a message to the broker (without an outbox it
    is lost) or a callable given to ``on_commit``. ``__cause__`` is the first error.

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
            + ". With Alchemy(..., outbox=True) messages are kept in the database and sent when the broker is back."
        )


def _in_transaction_text(task_name: str) -> str:
    return (
        f"{task_name} sent a task while its transaction has uncommitted writes: a worker may start it before"
        " they are visible, and a rollback does not take it back. Use delay_on_commit(), or"
        ' Alchemy(..., publish_in_transaction="defer") to have every send wait for the commit, or "allow".'
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

    def __init__(self, task_name: Any) -> None:
        super().__init__(task_name)

    def __str__(self) -> str:
        return _in_transaction_text(str(self.args[0]))


class UnknownTaskError(CeleryAlchemyError):
    """A signature names a task that the app does not know, and that was not declared as another service's.

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
            f"The app {self.app_name!r} has no task {self.task_name!r}: a worker would throw the message away."
            " Check the name and that its module is imported; for a task of another service pass"
            f" Alchemy(..., remote_tasks=({self.task_name!r},))."
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
            f"The message for {self.task_name} has {self.size_bytes} bytes, over the limit of {self.limit_bytes}. Store the data"
            " and pass its key; or raise Alchemy(..., max_message_bytes=...) if the broker takes more."
        )


class UnroutableError(CeleryAlchemyError):
    """RabbitMQ has no queue for a message.

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
            f"RabbitMQ has no queue for the message for {self.task_name} with the routing key {self.routing_key!r}. Make the queue,"
            " or name it with queue=..., so that Celery declares it, and leave the routing key to Celery."
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
            f"The message for {self.task_name} is {self.content_type}: whoever can write to the table could execute code in a"
            " worker. Use the json, yaml or msgpack serializer for this task."
        )


class MissingTableError(CeleryAlchemyError):
    """A table of the library is not in the database.

    Args:
        table: Its name.
    """

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table

    def __str__(self) -> str:
        return (
            f"The table {self.table!r} does not exist. Make it with `celery -A your_app alchemy create-tables`, with"
            " alchemy.create_tables(), or with Alembic from alchemy.metadata."
        )


class OnceKeyError(CeleryAlchemyError):
    """The key of a ``once`` task cannot be used.

    Args:
        task_name: The name of the task.
        problem: What is wrong with it.
    """

    def __init__(self, task_name: str, problem: str) -> None:
        super().__init__(task_name, problem)
        self.task_name = task_name
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"The once key of {self.task_name} {self.problem}. It must be a str that fits the table's id of 255 characters"
            " together with the task's name, without white space at its ends; the id of a task without a key must fit it too."
        )


class OnceCommitError(CeleryAlchemyError):
    """The body of a ``once`` task committed writes by itself.

    Args:
        owner: The task's name and the request's id.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner

    def __str__(self) -> str:
        return (
            f"{self.owner} is a once task and committed writes in its body. They would be committed again when the task is"
            " delivered again, because its completion is recorded in the same transaction as its writes, at the end. Remove the"
            " commit; released(session) around slow work is fine as long as nothing was written."
        )


class DeadTaskError(CeleryAlchemyError):
    """A ``once`` task that is dead was delivered again; it does not run until it is revived.

    Args:
        task_name: The name of the task.
        key: Its row in the outbox.
        error: Why it died.
    """

    def __init__(self, task_name: str, key: str, error: str) -> None:
        super().__init__(task_name, key, error)
        self.task_name = task_name
        self.key = key
        self.error = error

    def __str__(self) -> str:
        return (
            f"{self.task_name} ({self.key}) is dead: {self.error}. Look with `celery -A your_app alchemy dead`, send it"
            " again with `... alchemy revive`."
        )


class EntityReferenceError(CeleryAlchemyError):
    """An entity cannot travel as an argument, or a reference cannot be one to an entity of the task's.

    Args:
        entity: The name of its class.
        problem: Why.
        remedy: What to do.
    """

    def __init__(self, entity: str, problem: str, remedy: str) -> None:
        super().__init__(entity, problem, remedy)
        self.entity = entity
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"A {self.entity} cannot be an argument of a task: {self.problem}. {self.remedy}"


class EntityNotFoundError(CeleryAlchemyError):
    """The row that an argument refers to does not exist, or is not visible yet.

    Args:
        entity: The name of its class.
        key: Its primary key.
    """

    def __init__(self, entity: str, key: tuple[Any, ...]) -> None:
        super().__init__(entity, key)
        self.entity = entity
        self.key = key

    def __str__(self) -> str:
        shown = self.key[0] if len(self.key) == 1 else self.key
        return (
            f"There is no {self.entity} with the key {shown!r}. It was deleted, or the task was sent before the transaction that"
            ' made it committed: use delay_on_commit(). missing="ignore" or "retry" on the task treats it otherwise.'
        )
