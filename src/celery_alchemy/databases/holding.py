"""What an open transaction holds, as a database tells it.

The answer of each module's ``held()``.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NOTHING", "WRITES", "Held"]


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
