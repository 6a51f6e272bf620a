"""What the thread that takes messages is told of the channels that it takes them for.

Between ``taking.py`` and the transport and its channels.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .claims import Claim, Delivery
from .queues import Binding

__all__ = ["Begun", "Inbox", "Surroundings"]


class Inbox(Protocol):
    """What a channel shows of itself to the thread."""

    arrived: deque[Delivery]

    def room(self) -> int:
        """How many messages it takes now."""
        ...

    def is_stocked(self) -> bool:
        """Tell whether it has at least half of the messages that it takes."""
        ...

    def wanted(self) -> Sequence[str]:
        """The queues that it consumes, beginning with another one each time."""
        ...


@dataclass(frozen=True, slots=True)
class Begun:
    """A delivery whose task runs.

    Attributes:
        claim: The delivery.
        counted_from: From then on its start is to be counted, in ``time.monotonic()`` seconds.
        is_counted: Is set when its row says so.
    """

    claim: Claim
    counted_from: float
    is_counted: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a thread is told by its transport.

    Attributes:
        inboxes: Returns the channels that take messages.
        readers: Returns what is read as broadcasts, and the channel of each.
        on_arrival: Called when there is something to deliver.
        on_lost: Called when the messages belong to other workers now.
    """

    inboxes: Callable[[], Sequence[Inbox]]
    readers: Callable[[], Mapping[Binding, Inbox]]
    on_arrival: Callable[[], None]
    on_lost: Callable[[], None]
