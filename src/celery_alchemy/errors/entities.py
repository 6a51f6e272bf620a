"""An entity cannot travel, or is not there."""

from __future__ import annotations

from .root import CeleryAlchemyError

__all__ = ["EntityNotFoundError", "EntityReferenceError", "EntityReturnedError"]


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
            f"{self.owner} returned the ORM object {self.entity}. It belongs to the task's session,"
            " which ends with the task. Return its primary key, or its data as plain values,"
            " instead."
        )


class EntityReferenceError(CeleryAlchemyError):
    """An entity cannot travel as an argument, or a reference is none to the task's entity.

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

    def __init__(self, entity: str, key: tuple[object, ...]) -> None:
        super().__init__(entity, key)
        self.entity = entity
        self.key = key

    def __str__(self) -> str:
        shown = self.key[0] if len(self.key) == 1 else self.key
        return (
            f"There is no {self.entity} with the key {shown!r}. It was deleted, or the task was"
            " sent before the transaction that made it committed: use delay_on_commit()."
            ' missing="ignore" or "retry" on the task treats it otherwise.'
        )
