"""Celery tasks as SQLAlchemy transactions.

The names that users import; each is documented where it is defined.
"""

from .alchemy import Alchemy
from .broker import make_known
from .databases.transient import is_transient
from .errors import (
    CallableError,
    CeleryAlchemyError,
    ClaimsLostError,
    CommitIgnoredError,
    ConfigurationError,
    DeadTaskError,
    EntityNotFoundError,
    EntityReferenceError,
    EntityReturnedError,
    ForkedConnectionError,
    LocksHeldError,
    MessageTooLargeError,
    MissingTableError,
    NoSessionError,
    NotConfiguredError,
    OnceCommitError,
    OnceKeyError,
    OnceReplacedError,
    OnceResultError,
    PublishError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    QueueNameError,
    SessionArgumentError,
    SessionParameterError,
    SignatureError,
    StepError,
    StepValueError,
    TasksAlreadyBoundError,
    UncommittedChangesError,
    UnknownTaskError,
    UnroutableError,
    UnsafeSerializerError,
)
from .events import SessionReport
from .requests.sending import enqueue
from .requests.steps import step
from .sessions.releasing import released
from .sessions.transaction import on_commit, on_end
from .signatures.entities import ForUpdate
from .task import SessionTask

__all__ = [
    "Alchemy",
    "CallableError",
    "CeleryAlchemyError",
    "ClaimsLostError",
    "CommitIgnoredError",
    "ConfigurationError",
    "DeadTaskError",
    "EntityNotFoundError",
    "EntityReferenceError",
    "EntityReturnedError",
    "ForUpdate",
    "ForkedConnectionError",
    "LocksHeldError",
    "MessageTooLargeError",
    "MissingTableError",
    "NoSessionError",
    "NotConfiguredError",
    "OnceCommitError",
    "OnceKeyError",
    "OnceReplacedError",
    "OnceResultError",
    "PublishError",
    "PublishInTransactionError",
    "PublishInTransactionWarning",
    "QueueNameError",
    "SessionArgumentError",
    "SessionParameterError",
    "SessionReport",
    "SessionTask",
    "SignatureError",
    "StepError",
    "StepValueError",
    "TasksAlreadyBoundError",
    "UncommittedChangesError",
    "UnknownTaskError",
    "UnroutableError",
    "UnsafeSerializerError",
    "enqueue",
    "is_transient",
    "on_commit",
    "on_end",
    "released",
    "step",
]

make_known()
