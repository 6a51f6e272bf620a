"""The relay: sends what the outbox still holds.

It does so again and again until the broker or the task's completion has settled it.

Last stop of a message that the process which wrote it could not hand over. Needs none of the user's
code: it publishes rows as they are. Many relays work side by side; a claim gives each row to one of
them for a while.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

from sqlalchemy import Engine, bindparam, delete, select, update

from ..databases import database_of
from ..databases.tables import Found, from_now, outbox
from ..databases.transient import is_away, is_transient
from ..error_texts import error_text, storable
from ..messages.message import Message
from ..messages.publisher import Publisher
from ..sessions.fork_lock import fork_guard
from .outbox import missing_table
from .place import DEFAULT_PLACE, OutboxTable, Place
from .result_records import RESULT_ROWS, prune_results
from .settlement import give_back, in_transaction, settle
from .step_records import forget

__all__ = ["Claimed", "Relay", "RelayThread", "prune"]

logger: logging.Logger = logging.getLogger("celery_alchemy.relay")

_T = TypeVar("_T")

#: Rows of one claim: each costs two transactions and the broker's round trip, which are a tenth of
#: the work at this size.
BATCH_ROWS = 500

#: A claim must outlive the publishing of its batch; a broker that crawls may take 10 s to confirm
#: each message, so publishing stops when half of the lease is over.
LEASE_SECONDS = 60.0

#: A message that could not be published this often, with the broker reachable, is set aside.
MAX_FAILURES = 10
BACKOFF_SECONDS = 2.0
BACKOFF_MAX_SECONDS = 300.0

PRUNE_EVERY_SECONDS = 60.0
PRUNE_ROWS = 1000


@dataclass(slots=True)
class Claimed:
    """A row that this relay holds the lease of."""

    id: str
    once: bool
    redeliver_seconds: int | None
    sends: int
    failures: int
    message: Message


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one claim leased: rows with a message, and the ids and errors of rows without one."""

    claim: str
    claimed_at: float
    rows: list[Claimed]
    corrupt: list[tuple[str, str]]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.corrupt)


class Relay:
    """Publishes due rows.

    Args:
        engine: Returns the engine of the outbox's database.
        publisher: Reaches the broker.
        once_window_seconds: How long completion records are kept.
        place: Where the table is.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        publisher: Publisher,
        once_window_seconds: float,
        place: Place = DEFAULT_PLACE,
    ) -> None:
        self._engine = engine
        self._place = place
        self._publisher = publisher
        self._once_window_seconds = once_window_seconds
        self._pruned_at = monotonic()
        self._ahead: _Batch | None = None
        self._stopping = threading.Event()

    def step(self) -> int:
        """Claim one batch, or take the one that was claimed ahead; publish it, settle it.

        Returns:
            How many rows were claimed; a full batch means that there may be more.

        Raises:
            sqlalchemy.exc.DBAPIError: The database cannot be reached; nothing is lost, rows come
                back when their lease is over.
        """
        batch = self._take()
        engine = self._engine()
        if batch.corrupt:
            with self._place.begin(engine) as table:
                _set_aside(table, batch.corrupt, batch.claim)
        if batch.rows:
            self._publish(engine, batch)
        return batch.size

    def _take(self) -> _Batch:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and monotonic() - ahead.claimed_at < LEASE_SECONDS / 4:
            return ahead
        return self._claim()

    def _claim(self) -> _Batch:
        claim, claimed_at = uuid4().hex, monotonic()
        rows, corrupt = self._transact(self._engine(), lambda table: claim_due(table, claim))
        return _Batch(claim, claimed_at, rows, corrupt)

    @contextmanager
    def _claiming_ahead(self, batch: _Batch) -> Iterator[None]:
        """Claim the next batch in a second thread, inside the block.

        The database does its share while this process serializes.
        """
        if batch.size < BATCH_ROWS or self._stopping.is_set() or self._publisher.paused:
            yield
            return
        thread = threading.Thread(
            target=self._claim_ahead, name="celery-alchemy-relay-claim", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def _claim_ahead(self) -> None:
        try:
            self._ahead = self._claim()
        except Exception:
            logger.debug(
                "The settlement or the next claim reports this, unless it has passed", exc_info=True
            )

    def _publish(self, engine: Engine, batch: _Batch) -> None:
        rows, claim = batch.rows, batch.claim
        with self._claiming_ahead(batch):
            errors = self._publisher.publish([row.message for row in rows], LEASE_SECONDS / 2)
        untried = rows[len(errors) :]
        ended = list(zip(rows, errors))  # noqa: B905 - publish() may stop early.
        sent = [row for row, error in ended if error is None]
        failed = [(row, error) for row, error in ended if error is not None]

        def end(table: OutboxTable) -> None:
            if sent:
                settle(table, sent, [claim])
            if failed:
                _put_back(table, failed, claim, counts=not self._publisher.paused)
            if untried:
                give_back(table, untried, [claim])

        self._transact(engine, end)

    def _transact(self, engine: Engine, work: Callable[[OutboxTable], _T]) -> _T:
        # Not again after a lost connection: it may have claimed what nobody knows of then.
        return in_transaction(lambda: self._place.begin(engine), work, passes=_passes_by_itself)

    def prune_sometimes(self) -> None:
        """Delete a batch of old completion records, and of expired results, once a minute.

        While there are more, one batch is deleted at each call.
        """
        if monotonic() - self._pruned_at < PRUNE_EVERY_SECONDS:
            return
        self._pruned_at = monotonic()
        deleted = prune(self._engine(), self._once_window_seconds, self._place)
        results = prune_results(self._place, self._engine())
        if deleted == PRUNE_ROWS or results == RESULT_ROWS:
            self._pruned_at -= PRUNE_EVERY_SECONDS

    def run(self, stopping: threading.Event, interval_seconds: float) -> None:
        """Work until ``stopping`` is set.

        An outage of the database or the broker is logged once and waited out.

        Args:
            stopping: Ends the loop.
            interval_seconds: How long to wait when there was nothing to do. Varied by a quarter, so
                that many relays spread.
        """
        down = False
        self._stopping = stopping
        # A batch that was claimed ahead is published before the end: no other relay would take it
        # before its lease is over.
        while not stopping.is_set() or self._ahead is not None:
            claimed = 0
            try:
                with fork_guard:
                    claimed = self.step()
                    self.prune_sometimes()
                if down:
                    logger.info("The relay works again")
                down = False
            except Exception as exc:  # noqa: BLE001 - every error must be seen here.
                if not down:
                    logger.warning(
                        "The relay cannot work now and goes on trying: %s",
                        missing_table(exc) or exc,
                    )
                down = True
            if claimed < BATCH_ROWS or self._publisher.paused:
                stopping.wait(interval_seconds * random.uniform(0.75, 1.25))


def _passes_by_itself(exc: BaseException) -> bool:
    return is_transient(exc) and not is_away(exc)


def claim_due(table: OutboxTable, claim: str) -> tuple[list[Claimed], list[tuple[str, str]]]:
    """Lease the rows that are due, those that are due longest first.

    Returns:
        The rows, those that were written first first, and the ids and errors of those that are no
        messages.
    """
    connection = table.connection
    database = database_of(connection.dialect.name)
    claimed_rows = database.claim(connection, table.table, claim, LEASE_SECONDS, BATCH_ROWS)
    rows: list[Claimed] = []
    corrupt: list[tuple[str, str]] = []
    # RETURNING gives rows in any order, and with the time of the new lease in the place of the one
    # they were due at.
    for found in sorted(claimed_rows, key=lambda row: str(row.created_at)):
        try:
            rows.append(_read(found))
        except Exception as exc:  # noqa: BLE001 - it is about this row alone.
            corrupt.append((found.id, f"the row cannot be read: {error_text(exc)}"))
    return rows, corrupt


def _read(found: Found) -> Claimed:
    """Make sense of one row by itself.

    What is wrong with it would otherwise come up among the others of its batch.

    Raises:
        ValueError: It cannot be published or settled.
    """
    if found.body is None:
        raise ValueError("it has no body")
    for count in (found.sends, found.failures, found.redeliver_seconds or 0):
        # SQLite keeps whatever is written into a column.
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{count!r} is no number of sends, failures or seconds")
    if not isinstance(found.body, (bytes, bytearray, memoryview)):
        raise ValueError(f"its body is a {type(found.body).__name__}")  # noqa: TRY004
    if found.once and not found.redeliver_seconds:
        raise ValueError("it is a once task's and has no redeliver_seconds")
    message = Message.from_parts(found.body, found.envelope or "")
    return Claimed(
        found.id, found.once, found.redeliver_seconds, found.sends, found.failures, message
    )


def _set_aside(table: OutboxTable, rows: list[tuple[str, str]], claim: str) -> None:
    for row_id, error in rows:
        reason = storable(error)
        logger.error("The outbox row %s is set aside: %s", row_id, reason)
        table.execute(_SET_ASIDE, {"row_id": row_id, "token": claim, "reason": reason})


def _put_back(
    table: OutboxTable, failed: list[tuple[Claimed, Exception]], claim: str, *, counts: bool
) -> None:
    """Make rows due again later.

    Set those aside that fail by themselves, not because the broker is down.
    """
    for row, error in failed:
        failures = row.failures + 1 if counts else row.failures
        text = error_text(error)
        if failures >= MAX_FAILURES:
            _set_aside(
                table,
                [(row.id, f"it could not be published {failures} times; last: {text}")],
                claim,
            )
            continue
        wait = (
            min(BACKOFF_SECONDS * 2**failures, BACKOFF_MAX_SECONDS) if counts else BACKOFF_SECONDS
        )
        table.execute(
            _PUT_BACK,
            {"row_id": row.id, "token": claim, "reason": text, "wait": wait, "count": failures},
        )


def prune(engine: Engine, window_seconds: float, place: Place = DEFAULT_PLACE) -> int:
    """Delete one batch of completion records older than the window; return how many."""
    with place.begin(engine) as there:
        c = there.table.c
        old = (
            select(c.id)
            # The time in a subquery, as for a claim on PostgreSQL: otherwise a prune of nothing
            # reads every completed row.
            .where(
                c.completed_at.is_not(None),
                c.completed_at < select(from_now(-window_seconds)).scalar_subquery(),
            )
            .order_by(c.completed_at)
            .limit(PRUNE_ROWS)
        )
        ids = sorted(there.run(old).scalars())
        if ids:
            there.execute(_PRUNE, [{"row_id": row_id} for row_id in ids])
            # A task whose code has no steps any more has not asked for the records of its earlier
            # runs.
            forget(there, ids)
    return len(ids)


_MINE = (outbox.c.id == bindparam("row_id"), outbox.c.claim == bindparam("token"))

_SET_ASIDE = (
    update(outbox)
    .where(*_MINE)
    .values(died_at=from_now(0), due_at=None, claim=None, error=bindparam("reason"))
)

_PUT_BACK = (
    update(outbox)
    .where(*_MINE)
    .values(
        claim=None,
        due_at=from_now(bindparam("wait")),
        failures=bindparam("count"),
        error=bindparam("reason"),
    )
)

_PRUNE = delete(outbox).where(outbox.c.id == bindparam("row_id"))


# --- the relay inside of a worker -----------------------------------------------------------------


class RelayThread:
    """Runs a relay in a thread of this process.

    Args:
        relay: What runs.
        interval_seconds: How long it waits when there was nothing to do.
    """

    def __init__(self, relay: Relay, interval_seconds: float) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=relay.run,
            args=(self._stopping, interval_seconds),
            name="celery-alchemy-relay",
            daemon=True,
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Ask the relay to end after its step and wait for it."""
        self._stopping.set()
        self._thread.join(timeout_seconds)


def relay_of(alchemy: Any) -> Relay:
    """Return a relay for an Alchemy's outbox."""
    return Relay(
        lambda: alchemy.engine, alchemy.outbox.publisher, alchemy.once_window_seconds, alchemy.place
    )
