"""Real Celery workers as processes of their own: started, waited for, looked into, killed, cleaned up."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

from tests.forked import Forked, can_fork, fork
from tests.services.brokers import Broker
from tests.services.databases import Database
from tests.settings import environment
from tests.waiting import eventually

Pool = Literal["prefork", "threads", "solo", "gevent", "eventlet"]
ROOT = Path(__file__).parent.parent

STOP_SECONDS = 60.0
"""How long a worker may take to end.

Celery's prefork pool takes 30 s more where it forgot a task that had just begun: the child waits for its main process to see the
end of one that is unknown there (`GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT` of billiard).
"""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        # It has ended since it was listed.
        return False


class Worker:
    """A `celery worker` process group, usable as a context manager; ready when entered, gone when left.

    Args:
        app: The module that `celery -A` loads, for example "tests.apps.plain".
        broker: Its settings reach the module through `tests.settings.make_app`.
        database: Its URL reaches the module through `tests.settings.database_url`.
        pool: Celery's pool; gevent and eventlet patch the worker before anything else is imported.
        concurrency: Processes, threads or greenlets.
        queues: What to consume from; the broker's default queue when empty.
        settings: Celery settings over those of the broker (JSON-serialisable).
        env: Environment variables over those of the test process.
        arguments: More arguments of `celery worker`.
        folder: Where the log goes.
        ready_seconds: How long the worker may take until it says that it is ready.
    """

    def __init__(
        self,
        app: str,
        broker: Broker,
        *,
        folder: Path,
        database: Database | None = None,
        pool: Pool = "prefork",
        concurrency: int = 1,
        queues: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        ready_seconds: float = 60.0,
    ) -> None:
        self.name = f"{pool}-{secrets.token_hex(4)}"
        self.hostname = f"{self.name}@tests"
        self.log_path = folder / f"worker-{self.name}.log"
        # gevent and eventlet patch the modules of Python before anything is imported.
        self._can_fork = pool in ("prefork", "threads", "solo")
        self._arguments = ["-A", app, "worker", "-P", pool, "-c", str(concurrency)]
        self._arguments += ["-n", self.hostname, "-l", "INFO", "-Q", ",".join(queues or (broker.prefix,))]
        # Gossip, mingle and heartbeats talk to other workers and cost each start a second.
        self._arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat", *arguments]
        handed_over = environment({**broker.settings, **(settings or {})}, database.url if database else None)
        # Celery warns when root runs a worker; the containers of CI run as root.
        own = {"C_FORCE_ROOT": "1", "PYTHONPATH": str(ROOT)}
        self._environment = {**os.environ, **own, **handed_over, **(env or {})}
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._killed: subprocess.Popen[bytes] | Forked | None = None

    def __enter__(self) -> Worker:  # noqa: PYI034 (Self is not in Python 3.10's typing)
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        pid = self._process.pid if self._process else None
        return f"<Worker {self.hostname} pid={pid} alive={self.alive()}>"

    def start(self) -> None:
        """Start the processes and return when the worker consumes; the log of an earlier run is kept.

        Raises:
            AssertionError: The worker was not ready in time; says its log.
            RuntimeError: The worker ended; says its log.
        """
        before = len(self.log)
        self._process = self._start()
        try:
            what = f"{self.hostname} is ready"
            eventually(lambda: self._is_ready(before), timeout=self._ready_seconds, what=what)
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}\n{self.log[before:]}") from None
        except BaseException:
            self.kill()
            raise

    def _start(self) -> subprocess.Popen[bytes] | Forked:
        if self._can_fork and can_fork(self._environment):
            return fork(self._arguments, env=self._environment, output=self.log_path)
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "celery", *self._arguments],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, *, timeout: float = STOP_SECONDS) -> int | None:
        """End the worker as an operator does (SIGTERM); SIGKILL for what is left after `timeout` seconds.

        Before that its main process writes into its log where each of its threads stands.

        Returns:
            The exit code: 0 after a warm shutdown, -9 when SIGKILL was needed, None when it never ran.
        """
        if self._process is None:
            return None
        if self._process is not self._killed:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            # Celery's worker answers with the stacks of its threads.
            os.kill(self._process.pid, signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
        return self.kill()

    def kill(self) -> int | None:
        """SIGKILL the worker and all its children at once; return the worker's exit code."""
        if self._process is None:
            return None
        # The group outlives its leader: children of a worker that was killed are in it still. Later its number is another's: there
        # are 32,768 of them, and every thread takes one.
        if self._process is not self._killed:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._killed = self._process
        return self._process.wait(10)

    def send_signal(self, number: int) -> None:
        """Send a signal to the worker's main process only."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 20.0) -> int:
        """Wait until the main process has ended by itself and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It is still up after `timeout` seconds.
        """
        return self._running().wait(timeout)

    def alive(self) -> bool:
        """Whether the main process is up."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the main process, which is also the id of the process group."""
        return self._running().pid

    def child_pids(self) -> list[int]:
        """Return the ids of the pool's processes (only prefork has any), without zombies."""
        return sorted(child.pid for child in psutil.Process(self.pid).children(recursive=True) if _lives(child))

    @property
    def log(self) -> str:
        """Everything the worker has written so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_for_log(self, text: str, *, timeout: float = 15.0) -> str:
        """Wait until the log contains `text`, and return the whole log."""
        eventually(lambda: text in self.log, timeout=timeout, what=f"{self.hostname} logs {text!r}")
        return self.log

    def _is_ready(self, offset: int) -> bool:
        log = self.log[offset:]
        if f"{self.hostname} ready." in log:
            return True
        if not self.alive():
            raise RuntimeError(f"{self.hostname} ended with code {self._running().returncode}:\n{log}")
        return False

    def _running(self) -> subprocess.Popen[bytes] | Forked:
        if self._process is None:
            raise RuntimeError(f"{self.hostname} was not started")
        return self._process
