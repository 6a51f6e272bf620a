"""Work in a forked child of the test's process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> Any:
    """Run a function in a forked child and return its result, or the error that it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        result: Any = None
        try:
            result = work()
        except BaseException as exc:  # noqa: BLE001 - the fork must end here, whatever it was.
            result = exc
        finally:
            os.write(writing, pickle.dumps(result))
            # As Celery's children end: without the parent's exit handlers.
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return result
