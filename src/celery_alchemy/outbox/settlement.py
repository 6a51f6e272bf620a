"""Settles rows that were handed to the broker, and gives back those that were not.

Beneath the hand-over behind a commit and the relay, which both end their leases here. Only rows
that still carry the claim are touched: when a lease is over they may be another process's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from sqlalchemy import bindparam, delete, update
from sqlalchemy.exc import DBAPIError

from ..databases.tables import from_now, outbox
from ..databases.trying_again import again, at_once
from ..messages.message import Message, seconds_until
from .place import OutboxTable

__all__ = ["MAX_WAIT_SECONDS", "Leased", "give_back", "in_transaction", "settle"]

_T = TypeVar("_T")

#: How often work is tried in a transaction that the database takes back.
ATTEMPTS = 5

#: No row waits for longer: not every database can tell a date after the year 9999, and one row's
#: must not fail the others'.
MAX_WAIT_SECONDS = 10 * 365 * 86400.0

#: Ids of one statement. With as many claims SQLite before 3.32 has just enough parameters, 999.
#: https://www.sqlite.org/limits.html
BATCH_ROWS = 450


class Leased(Protocol):
    """A row that this process holds the lease of."""

    @property
    def id(self) -> str: ...

    @property
    def once(self) -> bool: ...

    @property
    def redeliver_seconds(self) -> int | None: ...

    @property
    def message(self) -> Message: ...


def in_transaction(
    begin: Callable[[], AbstractContextManager[OutboxTable]],
    work: Callable[[OutboxTable], _T],
    passes: Callable[[BaseException], bool],
) -> _T:
    """Do work in a transaction, again when the database has chosen it as the victim of a deadlock.

    InnoDB does so where several processes update rows that are neighbours in an index; the others
    have got on by then.

    Args:
        begin: Gives the table in a transaction.
        work: What is done.
        passes: Tells of an error of the database whether the work may be tried again.
    """

    def act() -> _T:
        with begin() as table:
            return work(table)

    return again(act, at_once(ATTEMPTS, lambda exc: isinstance(exc, DBAPIError) and passes(exc)))


def settle(table: OutboxTable, rows: Sequence[Leased], claims: Sequence[str]) -> None:
    """Take published rows out of the relay's way: delete a message, leave a ``once`` task owed.

    Args:
        table: In a transaction.
        rows: The rows; no id twice.
        claims: The fencing tokens that they were claimed with.
    """
    plain = sorted(row.id for row in rows if not row.once)
    owed: dict[float, list[str]] = {}
    # In the order of the ids, as everybody does it: two that lock rows in two orders may deadlock.
    for row in sorted(rows, key=lambda row: row.id):
        if row.once:
            owed.setdefault(_redeliver_in(row), []).append(row.id)
    for ids, tokens in _in_batches(plain, claims):
        table.execute(_DELETE_SENT, {"row_ids": ids, "tokens": tokens})
    for wait, waiting in owed.items():
        for ids, tokens in _in_batches(waiting, claims):
            table.execute(_KEEP_OWED, {"row_ids": ids, "tokens": tokens, "wait": wait})


def give_back(table: OutboxTable, rows: Sequence[Leased], claims: Sequence[str]) -> None:
    """Make rows that were not published due at once: whoever held their lease has let them go.

    Args:
        table: In a transaction.
        rows: The rows; no id twice.
        claims: The fencing tokens that they were claimed with.
    """
    for ids, tokens in _in_batches(sorted(row.id for row in rows), claims):
        table.execute(_GIVE_BACK, {"row_ids": ids, "tokens": tokens})


def _in_batches(ids: list[str], claims: Sequence[str]) -> Iterator[tuple[list[str], Sequence[str]]]:
    for start in range(0, len(ids), BATCH_ROWS):
        for first in range(0, len(claims), BATCH_ROWS):
            yield ids[start : start + BATCH_ROWS], claims[first : first + BATCH_ROWS]


def _redeliver_in(row: Leased) -> float:
    """Return the seconds until an owed task is sent again: from its eta if it has one.

    Longer after each time.
    """
    wait: float = float(row.redeliver_seconds or 0) * 2 ** min(getattr(row, "sends", 0), 2)
    wait += max(0.0, seconds_until(row.message.headers.get("eta")) or 0.0)
    return min(wait, MAX_WAIT_SECONDS)


_HELD = (
    outbox.c.id.in_(bindparam("row_ids", expanding=True)),
    outbox.c.claim.in_(bindparam("tokens", expanding=True)),
)

_GIVE_BACK = update(outbox).where(*_HELD).values(claim=None, due_at=from_now(0))

_DELETE_SENT = delete(outbox).where(*_HELD)

_KEEP_OWED = (
    update(outbox)
    .where(*_HELD, outbox.c.completed_at.is_(None), outbox.c.died_at.is_(None))
    .values(
        claim=None,
        due_at=from_now(bindparam("wait")),
        sends=outbox.c.sends + 1,
        failures=0,
        error=None,
    )
)
