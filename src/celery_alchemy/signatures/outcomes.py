"""The ways a task request can end, and which of them commit: the one place that decides.

Used by the life of a request (``requests/attempt.py``); knows Celery's exceptions and nothing of
databases.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from celery.app.task import Context
from celery.canvas import Signature
from celery.exceptions import Ignore, Reject, Retry

from ..errors import ConfigurationError

__all__ = [
    "ONCE_COMMITS_ON",
    "SUCCESS",
    "CommitOn",
    "Outcome",
    "Replaced",
    "ReplacedHere",
    "commit_on_from",
    "outcome_of",
]

Outcome = Literal["success", "retry", "ignore", "reject", "failure"]
CommitOn = frozenset[Outcome]

SUCCESS: CommitOn = frozenset({"success"})

#: The outcomes that may commit a ``once`` task: those that end it.
ONCE_COMMITS_ON: CommitOn = frozenset({"success", "ignore"})
_ALLOWED: tuple[Outcome, ...] = tuple(o for o in get_args(Outcome) if o != "failure")


class Replaced(Ignore):
    """What ``self.replace()`` raises: an Ignore, but none that the body raised.

    A replaced task has finished its share of the work and handed the rest on: it commits as a
    success.
    """


class ReplacedHere(Replaced):
    """What ``self.replace()`` raises in eager mode, where ``apply()`` runs the replacement.

    By then the transaction has ended: the replacement sees its rows and meets none of its locks.

    Args:
        signature: The replacement.
        request: What it replaces.
        key: The row of a ``once`` task; None for any other.
    """

    def __init__(self, signature: Signature, request: Context, key: str | None) -> None:
        super().__init__("Replaced by new task")
        self.signature = signature
        self.request = request
        self.key = key


def outcome_of(exc: BaseException) -> Outcome:
    """Return the outcome that Celery's tracer gives a request that raised ``exc``.

    Source: the order of the handlers in ``celery.app.trace.build_tracer``.
    """
    if isinstance(exc, Reject):
        return "reject"
    if isinstance(exc, Replaced):
        return "success"
    if isinstance(exc, Ignore):
        return "ignore"
    if isinstance(exc, Retry):
        return "retry"
    return "failure"


def commit_on_from(value: object, where: str) -> CommitOn:
    """Check a ``commit_on`` option and return it as a set.

    Args:
        value: What the user gave: an iterable of outcome names.
        where: Where it was given, for the message.

    Raises:
        ConfigurationError: It is a bare string, no iterable, or holds a name that is no outcome.
    """
    allowed = ", ".join(repr(o) for o in _ALLOWED)
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigurationError(
            f"commit_on={value!r} of {where} is not a tuple of outcomes.",
            f'Write commit_on=("success",) with any of {allowed}, or () to commit in the body.',
        )
    outcomes = frozenset(value)
    unknown = [o for o in outcomes if o not in _ALLOWED]
    if unknown:
        extra = " An exception always rolls back." if "failure" in unknown else ""
        raise ConfigurationError(
            f"commit_on of {where} holds {', '.join(repr(o) for o in unknown)}, which is no"
            f" outcome.{extra}",
            f"The outcomes are {allowed}.",
        )
    return outcomes
