"""Celery tasks as SQLAlchemy transactions.

The names that users import; each is documented where it is defined.
"""

from .alchemy import Alchemy
from .entities import ForUpdate
from .errors import (
    CeleryAlchemyError,
    ConfigurationError,
    DeadTaskError,
    EntityNotFoundError,
    EntityReferenceError,
    EntityReturnedError,
    MessageTooLargeError,
    MissingTableError,
    NoSessionError,
    NotConfiguredError,
    OnceCommitError,
    OnceKeyError,
    PublishError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    SessionArgumentError,
    SessionParameterError,
    TasksAlreadyBoundError,
    UncommittedChangesError,
    UnknownTaskError,
    UnroutableError,
    UnsafeSerializerError,
)
from .events import SessionReport
from .sending import enqueue
from .task import SessionTask
from .transaction import on_commit, released
from .transient import is_transient

__all__ = [
    "Alchemy",
    "CeleryAlchemyError",
    "ConfigurationError",
    "DeadTaskError",
    "EntityNotFoundError",
    "EntityReferenceError",
    "EntityReturnedError",
    "ForUpdate",
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
    "SessionReport",
    "SessionTask",
    "TasksAlreadyBoundError",
    "UncommittedChangesError",
    "UnknownTaskError",
    "UnroutableError",
    "UnsafeSerializerError",
    "enqueue",
    "is_transient",
    "on_commit",
    "released",
]
