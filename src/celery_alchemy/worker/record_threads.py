"""Threads of a worker's parent process that record how requests ended.

So its main loop waits for no database.

Beneath ``parent.py``, which sees the ends.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable

from ..requests.put_back import is_recording_end
from ..sessions.background import Background

__all__ = ["RecordThreads", "record_threads"]

#: How many ends are recorded at a time: one that waits for a lock does not hold up the others.
MOST_THREADS = 4


class RecordThreads(Background):
    """Has what is done know that it records an end: it may wait for a database that is away."""

    def do(self, work: Callable[[], object]) -> None:
        """Do work, in one of the threads."""
        is_before = is_recording_end.set(True)
        try:
            work()
        finally:
            is_recording_end.reset(is_before)


record_threads: RecordThreads = RecordThreads("record", "The end of a request", MOST_THREADS)

# Ends that are seen while the pool is stopped.
atexit.register(record_threads.drain, 5.0)
