"""Waits until a socket can be read, in the way of each pool.

gevent and eventlet put their own waits in the place of those of ``select``, so that other tasks go
on meanwhile.
"""

from __future__ import annotations

import math
import select

__all__ = ["is_readable"]


def is_readable(fileno: int, seconds: float) -> bool:
    """Wait for at most so long; return whether something, an end for example, can be read."""
    if not hasattr(select, "poll"):  # eventlet takes it away.
        return bool(select.select([fileno], [], [], seconds)[0])
    # It takes each number, where select refuses those from 1,024 on.
    poll = select.poll()
    poll.register(fileno, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))
