"""Starting Celery workers as processes of their own, finding out whether any answers, and stopping them."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError as BrokerError

from ragline.errors import RaglineError

logger = logging.getLogger(__name__)

ENDS_WITH_STARTER = "RAGLINE_ENDS_WITH_STARTER"
"""In the environment of a worker whose standard input is a pipe from the process that started it."""
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
        logger.info("The workers cannot be asked, the broker does not answer: %s", error)
        return None
    return sorted(name for answer in answers for name in answer)


def served_queues(app: Celery) -> set[str] | None:
    """The queues that workers who answer take from, or None where the broker does not answer."""
    try:
        answers = app.control.broadcast("active_queues", reply=True, timeout=ANSWER_SECONDS) or []
    except (BrokerError, OSError) as error:
        logger.info("The workers cannot be asked, the broker does not answer: %s", error)
        return None
    lists = (queues for answer in answers for queues in answer.values() if isinstance(queues, list))
    return {queue["name"] for queues in lists for queue in queues}


@contextmanager
def temporary_worker(*, home: Path, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A worker for the length of a block, in a process group of its own; it logs to `home/worker.log`.

    Guarantees:
        It is stopped with the block, also when this process is asked to end or its terminal is closed.
        Where this process is killed, it ends by itself when it has finished the steps that it is at.
    """
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "celery", "-A", "ragline.app", *worker_arguments(processes=processes)]
    with (
        (home / "worker.log").open("ab") as log,
        _signals_end_blocks(),
        # Nothing is written to its standard input. The system closes the pipe when this process is gone,
        # and no other process has the end for writing.
        subprocess.Popen(
            command,
            env={**os.environ, ENDS_WITH_STARTER: "1"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as worker,
    ):
        try:
            yield worker
        finally:
            stop(worker)


def end_with_starter(**_: object) -> None:
    """Let a worker that ragline started end when its starter is gone; called before it begins anything.

    One that a person starts has nothing of this in its environment, and goes on.
    """
    # Taken out: what this process starts later has another standard input.
    if os.environ.pop(ENDS_WITH_STARTER, None) is not None:
        threading.Thread(target=_await_end_of_starter, name="starter", daemon=True).start()


def _await_end_of_starter() -> None:
    while os.read(0, 4096):
        pass
    logger.warning("The process that started this worker is gone: it ends after the steps that it is at.")
    # A warm shutdown once Celery listens; before that the worker has nothing to finish, and ends at once.
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signals_end_blocks() -> Iterator[None]:
    """Let signals that would end this process at once raise `SystemExit`, where nobody else takes them."""
    taken: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        wanted = (signal.SIGTERM, signal.SIGHUP)
        taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def check_runs(worker: subprocess.Popen[bytes], home: Path) -> None:
    """See that a temporary worker is still there.

    Raises:
        RaglineError: it ended by itself, so nothing would happen any more.
    """
    if worker.poll() is not None:
        raise RaglineError(f"The worker ended; {home / 'worker.log'} tells why.")


def wake_at_signals(sender: Any, **_: object) -> None:
    """Let a worker act on a signal at once; called when it is ready.

    Celery's handlers only leave a note for the event loop, which sleeps until something comes or the next
    timer is due, four seconds later: Python goes on waiting after a signal (PEP 475).
    """
    if sender.hub is None or threading.current_thread() is not threading.main_thread():
        return
    reading, writing = _wakeup_sockets()
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    sender.hub.add_reader(reading, reading.recv, 4096)


@cache
def _wakeup_sockets() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for one in pair:
        one.setblocking(False)
    return pair


def stop(worker: subprocess.Popen[bytes], *, is_idle: bool = False) -> None:
    """Let a worker finish what it is doing; end it and its children when it takes too long, or at Ctrl-C.

    Args:
        worker: it leads a process group of its own.
        is_idle: its processes have nothing to finish and are ended too: Celery takes a second or two for
            that. They hold nothing, and a step that begins in this moment is done again.
    """
    if worker.poll() is None:
        if is_idle:
            os.killpg(worker.pid, signal.SIGTERM)
        else:
            worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(timeout=STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        # A step that is cut off is done again: it was not committed.
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def child_processes(parent: int) -> list[int]:
    """The ids of a process's children, ascending."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = (line.split() for line in listing.splitlines())
    return sorted(int(pid) for pid, ppid in pairs if int(ppid) == parent)
