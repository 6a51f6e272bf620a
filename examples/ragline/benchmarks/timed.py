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
_seconds: dict[int, float] = {}


def timed(work: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose CPU time is added to its process's clock."""

    @functools.wraps(work)
    def run(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return work(*args, **options)
        finally:
            process = os.getpid()
            _seconds[process] = _seconds.get(process, 0.0) + time.process_time() - started
            (CLOCKS / str(process)).write_text(str(_seconds[process]), encoding="ascii")

    return run


for name in ("detect_format", "split_text"):
    setattr(pipeline, name, timed(getattr(pipeline, name)))
# Without the process that parses, whose time is not that of a worker's process either.
tasks.confinement.parse = timed(tasks.confinement.parse)  # type: ignore[method-assign]
MiniLM.embed = timed(MiniLM.embed)  # type: ignore[method-assign]
