"""A ``once`` task, or a step of one, breaks its promise or would."""

from __future__ import annotations

from .root import CeleryAlchemyError

__all__ = [
    "DeadTaskError",
    "OnceCommitError",
    "OnceKeyError",
    "OnceReplacedError",
    "OnceResultError",
    "StepError",
    "StepValueError",
]


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
            f"The once key of {self.task_name} {self.problem}. It must be a str that fits the"
            " table's id of 255 characters together with the task's name, without white space at"
            " its ends; the id of a task without a key must fit it too."
        )


class OnceReplacedError(CeleryAlchemyError):
    """A ``once`` task's work was handed on by another task with its key, which replaced itself.

    There is no result that this one could report. Nothing was done a second time.

    Args:
        task_name: The name of the task.
        key: Its row in the outbox.
        by: The id of the task that replaced itself, which is that of its replacement too.
        error: Why the replacement has failed; empty if no result of it is kept, or not yet.
    """

    def __init__(self, task_name: str, key: str, by: str, error: str = "") -> None:
        super().__init__(task_name, key, by, error)
        self.task_name = task_name
        self.key = key
        self.by = by
        self.error = error

    def __str__(self) -> str:
        done = f"{self.task_name} ({self.key}) was done by the task {self.by}, which was replaced"
        if self.error:
            return (
                f"{done} by one that has failed: {self.error}. This key is done and does not run"
                " again: send what has failed."
            )
        return (
            f"{done} by one of which no result is kept, or not yet. With"
            " autoretry_for=(OnceReplacedError,) the task asks for it again. A result is kept by a"
            " result backend, for result_expires, and not with ignore_result."
        )


class OnceResultError(CeleryAlchemyError, TypeError):
    """The result of a ``once`` task cannot be kept for the deliveries that come after.

    Args:
        owner: The task's name and the request's id.
        problem: What JSON cannot hold, with its type.
    """

    def __init__(self, owner: str, problem: str) -> None:
        super().__init__(owner, problem)
        self.owner = owner
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"{self.owner} is a once task, and its result cannot be kept as JSON: {self.problem}."
            " Every delivery of a once task reports the result of the run that committed, which is"
            " kept in its record whatever the app's result_serializer is. Nothing was committed."
            " Return what JSON holds: a list for a set, float(x) for a number of NumPy."
        )


class OnceCommitError(CeleryAlchemyError):
    """The body of a ``once`` task committed writes by itself.

    The commit was refused before it was sent.

    Args:
        owner: The task's name and the request's id.
        by: What would have committed, such as the first words of a statement; empty for the
            session's ``commit()``.
    """

    def __init__(self, owner: str, by: str = "") -> None:
        super().__init__(owner, by)
        self.owner = owner
        self.by = by

    def __str__(self) -> str:
        by = f", by {self.by}" if self.by else ""
        return (
            f"{self.owner} is a once task and committed writes in its body{by}. They would be"
            " committed again when the task is delivered again, because its completion is recorded"
            " in the same transaction as its writes, at the end. Remove the commit;"
            " released(session) around slow work is fine as long as nothing was written. MySQL and"
            " MariaDB commit for TRUNCATE and every statement that defines something: do that"
            " before the task is sent, or in a task without once."
        )


class StepError(CeleryAlchemyError):
    """A ``step()`` cannot be done where, or as, it was asked for. Nothing of it was done.

    Args:
        step: The step's name.
        owner: The task's name and the request's id, or what else has asked.
        problem: What is wrong, as the end of a sentence about the step.
        remedy: What to do instead, one sentence.
    """

    def __init__(self, step: str, owner: str, problem: str, remedy: str) -> None:
        super().__init__(step, owner, problem, remedy)
        self.step = step
        self.owner = owner
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"The step {self.step!r} of {self.owner} {self.problem}. {self.remedy}"


class StepValueError(CeleryAlchemyError, TypeError):
    """What a step returned cannot be kept for the runs that come after.

    Args:
        step: The step's name.
        owner: The task's name and the request's id.
        problem: What is wrong with the value, as the end of a sentence about it.
    """

    def __init__(self, step: str, owner: str, problem: str) -> None:
        super().__init__(step, owner, problem)
        self.step = step
        self.owner = owner
        self.problem = problem

    def __str__(self) -> str:
        return (
            f"The value of the step {self.step!r} of {self.owner} {self.problem}. It is kept in the"
            " table celery_steps, for a run that goes on from here. Nothing of the step was"
            " committed. Inside of the step write large or rich data to a table of your own,"
            " through the task's session, and return its key."
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
            f"{self.task_name} ({self.key}) is dead: {self.error}. Look with `celery -A your_app"
            " alchemy dead`, send it again with `... alchemy revive`."
        )
