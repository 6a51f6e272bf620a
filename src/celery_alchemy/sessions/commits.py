"""What has been committed while a request runs that ``transient_retries`` would run again.

Beneath the ledger and the transaction, which write here, and ``requests/transient_retries.py``,
which reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["Commits", "began_at", "commits_under_way", "uncounted"]

COMMITTED = "it has committed writes"
SENT = "it has committed, and what waited for the commit is sent"
UNANSWERED = "a COMMIT of it got no answer, and may have been carried out"


class Commits:
    """The commits of all sessions that a request's body uses.

    They count in its own thread, greenlet or asyncio task.

    Args:
        request: Whose they are.
        outer: Those of the request around it, which sees these as well.
        began: Since when the request runs, in ``time.monotonic()`` seconds: its first run counts.

    Attributes:
        is_ending: The request's own commit is next, or is done: nothing of it is left to be asked.
        is_writing: The COMMIT that is sent next, or was sent last, is one of writes.
        has_written_aside: A connection that belongs to no session of ours has sent a write.
        why_final: Why the body must not run again; empty while it may.
    """

    __slots__ = (
        "began",
        "has_written_aside",
        "is_ending",
        "is_writing",
        "outer",
        "request",
        "why_final",
    )

    def __init__(self, request: object, outer: Commits | None, began: float) -> None:
        self.request: object = request
        self.outer: Commits | None = outer
        self.began: float = began
        self.is_ending: bool = False
        self.is_writing: bool = False
        self.has_written_aside: bool = False
        self.why_final: str = ""

    def asks(self) -> bool:
        """Tell whether it matters if a transaction has changed anything that no statement shows."""
        return not self.is_ending or self.outer is not None

    def begin_commit(self, *, is_writing: bool) -> None:
        """Note that a COMMIT is about to be sent."""
        for one in self._with_outer():
            one.is_writing = is_writing or one.is_ending

    def note_committed(self, *, wrote: bool, sends: bool = False) -> None:
        """Note that a COMMIT was carried out.

        Args:
            wrote: It was one of writes, as is now known; ``begin_commit`` may have been told so.
            sends: Sends, or other callables, have waited for it.
        """
        for one in self._with_outer():
            if wrote or one.is_writing:
                one.why_final = COMMITTED
            elif sends:
                one.why_final = one.why_final or SENT

    def note_unanswered(self, *, wrote: bool = False) -> None:
        """Note that a COMMIT has failed without an answer of the database.

        Args:
            wrote: It was one of writes, whatever ``begin_commit`` was told.
        """
        for one in self._with_outer():
            if wrote or one.is_writing:
                one.why_final = one.why_final or UNANSWERED

    def _with_outer(self) -> Iterator[Commits]:
        one: Commits | None = self
        while one is not None:
            yield one
            one = one.outer


#: Those of the innermost request that may run again; None where none does.
commits_under_way: ContextVar[Commits | None] = ContextVar("celery_alchemy_commits", default=None)


def began_at(request: object, started: float) -> float:
    """Return since when a request runs, in ``time.monotonic()`` seconds.

    Args:
        request: The request.
        started: Since when, if it is run only once.
    """
    commits = commits_under_way.get()
    return started if commits is None or commits.request is not request else commits.began


@contextmanager
def uncounted(request: object) -> Iterator[None]:
    """Leave the commits inside of the block out of a request's own.

    They are the library's, which may be repeated.
    """
    commits = commits_under_way.get()
    if commits is None or commits.request is not request:
        yield
        return
    commits_under_way.set(commits.outer)
    try:
        yield
    finally:
        commits_under_way.set(commits)
