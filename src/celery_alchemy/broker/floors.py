"""From when on a worker looks for due messages, where a look from the oldest one on takes long.

Beside the claims. PostgreSQL keeps the entries of messages that are gone in the index for as long
as any transaction is open that is older, such as a report or a backup of an hour: each look from
the oldest message on goes through all of them. What becomes of a queue then:
https://brandur.org/postgres-queues
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import product
from time import monotonic

from ..databases.tables import Rows, Since

__all__ = ["Floors"]

#: A look that takes longer goes through what is gone. One in a healthy table takes a millisecond.
SLOW_SECONDS = 0.005

#: The part of the time that looks from the oldest message on may take.
SHARE = 0.1

#: Seconds between two of them at most. A message that was committed long after younger ones, or
#: given back, waits so long.
MOST_SECONDS = 10.0

#: What became due so shortly before is looked through again: its senders may not have committed.
MARGIN_SECONDS = 1.0


class Floors:
    """What a worker remembers of its looks; it changes nothing while they are quick."""

    def __init__(self) -> None:
        self._since: dict[tuple[int, str], datetime] = {}
        self._whole_at = 0.0
        self._was_partial = False
        # The database's time, and this process's at that moment; None where it does not matter.
        self._clock: tuple[datetime, float] | None = None

    def forget(self) -> None:
        """Have the next look be a whole one."""
        self._since = {}

    def since(self) -> Since:
        """Return from when on to look, for priorities and queues; empty for a whole look."""
        self._was_partial = bool(self._since) and not self.is_whole_due()
        return self._since if self._was_partial else {}

    def is_whole_due(self) -> bool:
        """Tell whether it is time to look from the oldest message on: always, if that is quick."""
        return monotonic() >= self._whole_at

    def note_whole(self, seconds: float) -> None:
        """Note how long it took to look from the oldest message on."""
        is_slow = seconds >= SLOW_SECONDS and self._clock is not None
        pause = min(seconds / SHARE, MOST_SECONDS)
        self._whole_at = monotonic() + pause if is_slow else 0.0

    def note(self, rows: Rows, queues: Sequence[str], limit: int, seconds: float) -> None:
        """Note how a look has ended.

        Args:
            rows: What was taken, with the database's time.
            queues: Where it looked, in their order, for each priority.
            limit: How many it was to take: with fewer it has seen all that are due.
            seconds: How long it took.
        """
        if rows and rows[0].was_due_at is not None:
            self._clock = rows[0].taken_at, monotonic()
        if not self._was_partial:
            self._since = {}
            self.note_whole(seconds)
        if self._clock is not None and not self.is_whole_due():
            at, then = self._clock
            began_at = at + timedelta(seconds=monotonic() - then - seconds)
            self._raise(rows, queues, began_at, is_full=len(rows) >= limit)

    def _raise(
        self, rows: Rows, queues: Sequence[str], began_at: datetime, *, is_full: bool
    ) -> None:
        """Have what was seen not be looked through again."""
        margin = timedelta(seconds=MARGIN_SECONDS)
        youngest: dict[tuple[int, str], datetime] = {}
        for row in rows:
            place = (row.priority, row.queue)
            youngest[place] = max(row.was_due_at, youngest.get(place, row.was_due_at))
        for place in product(range(9, -1, -1), queues):
            seen = youngest.pop(place, None)
            if is_full and seen is not None and not youngest:
                # There was no room for more of this one, and none was looked for after it.
                self._since[place] = min(seen, began_at) - margin
                return
            self._since[place] = began_at - margin

    def seconds_left(self) -> float:
        """Return the seconds until a whole look; infinite after one, and when it is due already."""
        left = self._whole_at - monotonic()
        return left if self._was_partial and left > 0 else float("inf")
