"""Stand-ins for what sends messages: they keep each message instead.

Beneath ``sending.py``, which puts them in the place of the app's pool and of the outbox's
publisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..messages.message import Message
from ..messages.recording import Recorder

__all__ = ["CapturingPool", "CapturingProducer", "CapturingPublisher"]


class CapturingProducer(Recorder):
    """What the app's pool lends: a producer is its own context manager."""

    def __enter__(self) -> CapturingProducer:  # noqa: PYI034 - Python 3.10 has no Self.
        return self

    def __exit__(self, *exc: object) -> None:
        """There is nothing to give back."""

    def release(self) -> None:
        """There is nothing to give back."""


class CapturingPool:
    """Takes the place of the app's pool of producers."""

    limit = None

    def __init__(self, make: Callable[[], CapturingProducer], connections: object) -> None:
        self._make = make
        #: Celery asks for the kind of broker before it sends with an eta.
        self.connections = connections

    def acquire(self, block: bool = False, timeout: float | None = None) -> CapturingProducer:
        """Return a producer that captures."""
        return self._make()

    def force_close_all(self) -> None:
        """There is nothing to close."""


class CapturingPublisher:
    """Takes the place of the outbox's publisher; the broker confirms everything."""

    paused = False

    def __init__(self, keep: Callable[[Message], None]) -> None:
        self._keep = keep

    def publish(self, messages: Iterable[Message], *args: object) -> list[Exception | None]:
        """Keep messages; none of them fails."""
        errors: list[Exception | None] = []
        for message in messages:
            self._keep(message)
            errors.append(None)
        return errors

    def close(self) -> None:
        """There is nothing to close."""
