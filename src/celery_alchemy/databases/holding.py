"""What an open transaction holds, as a database tells it.

The answer of each module's ``held()``.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTHING", "TAKEN_BACK", "WRITES", "Held"]

#: The mark of a connection whose database counts nothing, after a rollback to a SAVEPOINT.
TAKEN_BACK = -1


class Held(NamedTuple):
    """What would be lost, or let go, with a transaction.

    Attributes:
        writes: It has changed something.
        locked: The tables of which it has locked rows; None where the database cannot say.
    """

    writes: bool
    locked: tuple[str, ...] | None


NOTHING = Held(writes=False, locked=())
WRITES = Held(writes=True, locked=())
