"""Work that waits for servers while a transaction ends, kept off the event loop of an AsyncSession.

Beneath whatever follows a commit: handing messages over, sending them, giving locks back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextvars import copy_context

from sqlalchemy.util import await_only

__all__ = ["in_greenlet_of_loop", "off_loop"]


def in_greenlet_of_loop() -> bool:
    """Tell whether this runs for an AsyncSession, in a greenlet in which it can be awaited."""
    # Not imported: greenlet is no dependency, and where it is not loaded no AsyncSession runs.
    greenlet = sys.modules.get("greenlet")
    # SQLAlchemy 2.0.0 has no public question for it.
    return greenlet is not None and type(greenlet.getcurrent()).__name__ == "_AsyncIoGreenlet"


def off_loop(work: Callable[[], None]) -> None:
    """Run work that waits for servers.

    When an AsyncSession's commit asks for it, it runs in a thread, so that the event loop goes on.
    """
    if not in_greenlet_of_loop():
        work()
        return
    loop = asyncio.get_running_loop()
    await_only(loop.run_in_executor(None, copy_context().run, work))
