"""ragline's app with a clock on its work: the CPU seconds of parsing, splitting and embedding by process.

Each worker process keeps its sum in a file of the folder that `RAGLINE_BENCHMARK_CLOCKS` names.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragline import pipeline, tasks
from ragline.app import app
from ragline.minilm.embedder import MiniLM

__all__ = ["app", "tasks"]

CLOCKS = Path(os.environ["RAGLINE_BENCHMARK_CLOCKS"])


class Clock:
    """The sum of one process, in a file that stays open: to open it each time would count as overhead."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._file = os.open(CLOCKS / str(os.getpid()), os.O_WRONLY | os.O_CREAT)

    def add(self, seconds: float) -> None:
        """Add the seconds of some work."""
        self._seconds += seconds
        os.pwrite(self._file, f"{self._seconds:20.6f}".encode("ascii"), 0)


@functools.cache
def clock_of(process: int) -> Clock:
    """The clock of this process, which a child does not share with its parent."""
    assert process == os.getpid()
    return Clock()


def timed(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose CPU time is added to its process's clock."""

    @functools.wraps(work)
    def run(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return work(*args, **options)
        finally:
            clock_of(os.getpid()).add(time.process_time() - started)

    return run


for name in ("detect_format", "split_text"):
    setattr(pipeline, name, timed(getattr(pipeline, name)))
# Without the process that parses, whose time is not that of a worker's process either.
tasks.confinement.parse = timed(tasks.confinement.parse)  # type: ignore[method-assign]
MiniLM.embed = timed(MiniLM.embed)  # type: ignore[method-assign]
