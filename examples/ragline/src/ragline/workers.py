"""Starting Celery workers as processes of their own, finding out whether any answers, and stopping them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from ragline.errors import RaglineError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0
"""How long a worker may take to answer a ping before it counts as absent."""
STOP_SECONDS = 20.0


def worker_arguments(*, processes: int, log_level: str = "warning", queues: Sequence[str] = ()) -> list[str]:
    """The arguments of `celery worker` for a ragline worker, which takes from all queues or from some."""
    # Gossip and mingle let workers know of each other, which nothing here needs and a broker of files makes
    # slow.
    return [
        "worker",
        # Two workers of one name answer as one.
        f"--hostname=ragline-{os.getpid()}@%h",
        f"--concurrency={processes}",
        f"--loglevel={log_level}",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
        *([f"--queues={','.join(queues)}"] if queues else []),
    ]


def running_workers(app: Celery) -> list[str] | None:
    """The names of the workers that answer, or None where the broker does not."""
    try:
        answers: list[dict[str, Any]] = app.control.ping(timeout=ANSWER_SECONDS) or []
    except (BrokerError, OSError) as error:
        logger.warning("The workers cannot be asked, the broker does not answer: %s", error)
        return None
    return sorted(name for answer in answers for name in answer)


@contextmanager
def temporary_worker(*, home: Path, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker for the length of a block, in a process group of its own; it logs to `home/worker.log`."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "ragline.app", *worker_arguments(processes=processes)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield worker
    finally:
        stop(worker)


def check_runs(worker: subprocess.Popen[bytes], home: Path) -> None:
    """See that a temporary worker is still there.

    Raises:
        RaglineError: it ended by itself, so nothing would happen any more.
    """
    if worker.poll() is not None:
        raise RaglineError(f"The worker ended; {home / 'worker.log'} tells why.")


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Let a worker finish what it is doing; end it and its children when it takes too long."""
    if worker.poll() is None:
        worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def child_processes(parent: int) -> list[int]:
    """The ids of a process's children, ascending."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.split() for line in listing.splitlines())
    return sorted(int(pid) for pid, ppid in pairs if int(ppid) == parent)
