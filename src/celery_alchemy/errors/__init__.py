"""The exceptions and warnings of celery-alchemy.

Everything above imports this room; it imports nothing of the package. One module for each kind of
reason.

An exception keeps its fields in ``args`` and makes its text in ``__str__``, so that it crosses
process boundaries by pickle as it is. A text says what failed, why, and what to do. No text holds a
password or the arguments of a task.
"""

from __future__ import annotations

from .configuration import (
    ConfigurationError,
    ForkedConnectionError,
    MissingTableError,
    NotConfiguredError,
    SessionParameterError,
    TasksAlreadyBoundError,
)
from .entities import EntityNotFoundError, EntityReferenceError, EntityReturnedError
from .once import (
    DeadTaskError,
    OnceCommitError,
    OnceKeyError,
    OnceReplacedError,
    OnceResultError,
    StepError,
    StepValueError,
)
from .root import CeleryAlchemyError
from .sending import (
    CallableError,
    ClaimsLostError,
    MessageTooLargeError,
    PublishError,
    PublishInTransactionError,
    PublishInTransactionWarning,
    QueueNameError,
    SignatureError,
    UnknownTaskError,
    UnroutableError,
    UnsafeSerializerError,
)
from .sessions import (
    CommitIgnoredError,
    LocksHeldError,
    NoSessionError,
    SessionArgumentError,
    UncommittedChangesError,
)

__all__ = [
    "CallableError",
    "CeleryAlchemyError",
    "ClaimsLostError",
    "CommitIgnoredError",
    "ConfigurationError",
    "DeadTaskError",
    "EntityNotFoundError",
    "EntityReferenceError",
    "EntityReturnedError",
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
    "SignatureError",
    "StepError",
    "StepValueError",
    "TasksAlreadyBoundError",
    "UncommittedChangesError",
    "UnknownTaskError",
    "UnroutableError",
    "UnsafeSerializerError",
]
