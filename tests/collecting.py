"""Python's garbage collector, kept out of what it would disturb."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Have nothing collected in the middle.

    No leak is found in time, no work is timed that is another's, and nothing ends at the edge of the recursion limit, where its own
    end would fail.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
