"""Waiting for a condition with a deadline, the only way in which the tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], *, timeout: float = 15.0, interval: float = 0.02, what: str = "") -> T:
    """Call `condition` until it returns something true, and return that.

    Args:
        condition: Called again and again. An `AssertionError` it raises counts as "not yet", so that a
            condition can be a plain list of asserts (then return True at its end).
        timeout: Seconds until the wait is given up.
        interval: Seconds between two calls.
        what: The promise that is waited for, for the failure's text.

    Raises:
        AssertionError: The deadline passed. Says the last value or the last failed assertion.
    """
    deadline = time.monotonic() + timeout
    while True:
        last: object
        try:
            value = condition()
        except AssertionError as error:
            last = error
        else:
            if value:
                return value
            last = value
        if time.monotonic() >= deadline:
            subject = what or getattr(condition, "__name__", repr(condition))
            raise AssertionError(f"not within {timeout:g} s: {subject}; last seen: {last!r}")
        time.sleep(interval)
