"""A clock that stands still until a test moves it on."""

from __future__ import annotations


class Clock:
    """Stands in for ``time.monotonic``.

    Attributes:
        now: What it shows, in seconds.
    """

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def move_on(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
