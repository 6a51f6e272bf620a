"""The one loop that does something again after an error, and the waits between its attempts.

Beside ``transient.py``, which tells the errors that may pass. What is done ends its own
transaction: a connection whose statement failed cannot go on in the old one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import sleep
from typing import TypeVar

__all__ = ["again", "at_once", "backoff_seconds"]

T = TypeVar("T")

BACKOFF_SECONDS = 0.05
BACKOFF_MAX_SECONDS = 5.0


def again(
    act: Callable[[], T],
    seconds_until_next: Callable[[Exception], float | None],
    rest: Callable[[float], object] | None = None,
) -> T:
    """Do something until it raises no error, or one that is final.

    Args:
        act: What is done.
        seconds_until_next: Tells of each error how long to wait; None for a final one.
        rest: Waits for so many seconds before each further attempt; None for a thread that may
            sleep.

    Raises:
        Exception: What ``act`` raised last.
    """
    while True:
        try:
            return act()
        except Exception as exc:
            seconds = seconds_until_next(exc)
            if seconds is None:
                raise
        (rest or sleep)(seconds)


def at_once(
    attempts: int, passes: Callable[[Exception], bool]
) -> Callable[[Exception], float | None]:
    """Return the waits of something that is tried so often, and without a pause.

    That is right where the database has refused it in favour of another, which has got on by then.

    Args:
        attempts: How often it is tried at most.
        passes: Tells of an error whether it may be tried again.
    """
    left = attempts - 1

    def seconds_until_next(exc: Exception) -> float | None:
        nonlocal left
        if not left or not passes(exc):
            return None
        left -= 1
        return 0.0

    return seconds_until_next


def backoff_seconds(tries: int) -> float:
    """Return how long to wait before another attempt.

    It is random up to a bound that doubles, so that two rivals part.
    """
    return random.uniform(0, min(BACKOFF_SECONDS * 2**tries, BACKOFF_MAX_SECONDS))
