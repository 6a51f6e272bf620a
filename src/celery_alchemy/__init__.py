"""Celery tasks as SQLAlchemy transactions.

The names that users import; each is documented where it is defined.
"""

from .alchemy import Alchemy
from .errors import (
    CeleryAlchemyError,
    ConfigurationError,
    EntityReturnedError,
    NoSessionError,
    NotConfiguredError,
    PublishError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    SessionArgumentError,
    SessionParameterError,
    TasksAlreadyBoundError,
    UncommittedChangesError,
)
from .task import SessionTask
from .transaction import on_commit, released

__all__ = [
    "Alchemy",
    "CeleryAlchemyError",
    "ConfigurationError",
    "EntityReturnedError",
    "NoSessionError",
    "NotConfiguredError",
    "PublishError",
    "PublishInTransactionError",
    "PublishInTransactionWarning",
    "SessionArgumentError",
    "SessionParameterError",
    "SessionTask",
    "TasksAlreadyBoundError",
    "UncommittedChangesError",
    "on_commit",
    "released",
]
