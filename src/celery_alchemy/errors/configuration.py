"""What is configured cannot work, or is missing."""

from __future__ import annotations

from sqlalchemy.exc import DontWrapMixin

from .root import CeleryAlchemyError

__all__ = [
    "ConfigurationError",
    "ForkedConnectionError",
    "MissingTableError",
    "NotConfiguredError",
    "SessionParameterError",
    "TasksAlreadyBoundError",
]


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
            f"Task {task_name!r} uses a session, but no Alchemy is tied to the Celery app"
            f" {app_name!r} and its class carries no session_factory.",
            "Make Alchemy(app, url) where the app is made, or call alchemy.init_app(app) in the"
            " app factory, or give the task class session_factory = sessionmaker(engine).",
        )
        self.args: tuple[object, ...] = (task_name, app_name)


class TasksAlreadyBoundError(ConfigurationError):
    """An Alchemy was made after tasks were bound to another task class.

    Args:
        task_names: The names of the bound tasks, shortest useful list.
    """

    def __init__(self, task_names: tuple[str, ...]) -> None:
        super().__init__(
            f"The tasks {', '.join(task_names)} were bound before this Alchemy was made, with a"
            " task class that knows no sessions.",
            "Make the Alchemy right after the Celery app, before any task is used, or give these"
            " tasks base=SessionTask.",
        )
        self.args: tuple[object, ...] = (task_names,)


class SessionParameterError(ConfigurationError):
    """The signature of a task cannot be served with sessions.

    Args:
        problem: What the signature says and why it cannot be served.
        remedy: The signature to write instead.
    """


class MissingTableError(CeleryAlchemyError):
    """A table of the library is not in the database.

    Args:
        table: Its name, with its schema.
    """

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.table = table

    def __str__(self) -> str:
        return (
            f"The table {self.table!r} does not exist. Make it with `celery -A your_app alchemy"
            " create-tables`, with alchemy.create_tables(), or with Alembic from alchemy.metadata."
            " If it is in another schema, say so: Alchemy(..., schema=...)."
        )


class ForkedConnectionError(DontWrapMixin, CeleryAlchemyError):
    """A connection that was in use when its process forked was used in the child.

    It is the parent's.

    Args:
        parent_pid: The process that opened the connection.
    """

    def __init__(self, parent_pid: int) -> None:
        super().__init__(parent_pid)
        self.parent_pid = parent_pid

    def __str__(self) -> str:
        return (
            f"This Session or Connection was in use when process {self.parent_pid} forked, and its"
            " connection is that process's. Close it before the fork (or at import, where it was"
            " opened), or close it here: its next use opens a connection of this process."
        )
