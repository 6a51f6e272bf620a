"""Work of several callables that is done as one, in the transaction, right before its COMMIT.

Beneath ``transaction.py``, with which the callables wait for the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeGuard

from sqlalchemy.orm import Session

from .state import Entry, Waiting

__all__ = ["Joint", "is_unwritten", "write_joint"]


class Joint(Protocol):
    """A callable for ``on_commit`` that has work to do in the transaction too.

    Those of one commit are joined into one.

    Attributes:
        is_written: The work in the transaction is done.
    """

    is_written: bool

    def __call__(self) -> object: ...

    def join(self, other: Joint) -> Joint:
        """Return one that does the work of both."""
        ...

    def before_commit(self, session: Session) -> None:
        """Do the work in the transaction, right before its COMMIT."""
        ...


def is_unwritten(run: object) -> TypeGuard[Joint]:
    """Tell whether a callable has something to write before the commit, and has not done so yet."""
    return getattr(run, "is_written", True) is False


def write_joint(session: Session, waiting: Waiting) -> None:
    """Join the work that waits for a session's commit, and do it in the transaction."""
    joint: Entry | None = None
    work: Joint | None = None
    kept: list[Entry] = []
    for entry in waiting.entries:
        run = entry.run
        if not is_unwritten(run):
            kept.append(entry)
        elif joint is None or work is None:
            joint, work = entry, run
            kept.append(entry)
        else:
            work = joint.run = work.join(run)
            _join(joint, entry)
    if work is not None:
        waiting.entries = kept
        work.before_commit(session)


def _join(joint: Entry, entry: Entry) -> None:
    joint.what = f"{joint.what}; {entry.what}"
    joint.undo = _both(joint.undo, entry.undo)


def _both(
    first: Callable[[], object] | None, second: Callable[[], object] | None
) -> Callable[[], object] | None:
    if first is None or second is None:
        return first or second
    return lambda: (first(), second())
