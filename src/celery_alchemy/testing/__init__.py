"""The testing kit: tasks in the test's transaction, captured sends, leaks, crashes.

Leaks are what code has not given back, crashes come with double deliveries.

Above everything else, and imported by nothing of it. ``plugin.py`` makes pytest fixtures of it; the
rest needs no pytest.
"""

from .faults import Crash, PointNotReachedError, crash_at, deliver_twice
from .joining import Joined, joined
from .leaks import LeakError, no_leaks
from .points import Point
from .process import WorkerProcess
from .sending import EndlessRunError, Run, Sent, SentTask, captured
from .steps import steps_run

__all__ = [
    "Crash",
    "EndlessRunError",
    "Joined",
    "LeakError",
    "Point",
    "PointNotReachedError",
    "Run",
    "Sent",
    "SentTask",
    "WorkerProcess",
    "captured",
    "crash_at",
    "deliver_twice",
    "joined",
    "no_leaks",
    "steps_run",
]
