"""A real worker as a process of its own, in which ``crash_at`` of the test's process strikes too.

At the edge: ``python -m celery_alchemy.testing.process worker ...`` is ``celery worker ...`` that
notices its points.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from celery.signals import worker_init

from ..messages.celery_types import App
from .faults import CRASH_HEADER
from .noticing import noticing
from .points import listeners, processes

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """A ``celery worker`` process, usable as a context manager: ready when entered, gone when left.

    Args:
        app: What ``celery -A`` is given, such as ``"shop.tasks"``.
        folder: Where its log goes.
        pool: Celery's pool: ``"prefork"``, ``"threads"``, ``"solo"`` ...
        concurrency: Processes, threads or greenlets.
        env: Environment variables over those of this process.
        arguments: More arguments of ``celery worker``.
        ready_seconds: How long it may take until it says that it is ready.
    """

    def __init__(
        self,
        app: str,
        folder: Path,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        ready_seconds: float = 60.0,
    ) -> None:
        self.hostname: str = f"{secrets.token_hex(4)}@tests"
        self.log_path: Path = folder / f"worker-{self.hostname}.log"
        self._command = [
            sys.executable,
            "-m",
            __name__,
            "-A",
            app,
            "worker",
            "-P",
            pool,
            "-c",
            str(concurrency),
        ]
        # Gossip and mingle talk to other workers and cost the start a second.
        self._command += [
            "-n",
            self.hostname,
            "-l",
            "INFO",
            "--without-gossip",
            "--without-mingle",
            *arguments,
        ]
        # Of Celery, when root runs a worker: containers of CI do.
        self._environment = {"C_FORCE_ROOT": "1", **os.environ, **(env or {})}
        self._ready_seconds = ready_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WorkerProcess:  # noqa: PYI034 - Python 3.10 has no Self.
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.hostname} {'running' if self.alive() else 'not running'}>"

    def start(self) -> None:
        """Start it and return when it consumes.

        Raises:
            RuntimeError: It ended, or was not ready in time; with its log.
        """
        before = len(self.log)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the test's own command.
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.add(self)
        deadline = time.monotonic() + self._ready_seconds
        while f"{self.hostname} ready." not in self.log[before:]:
            if not self.alive() or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"The worker did not become ready:\n{self.log[before:]}")
            time.sleep(0.02)

    def alive(self) -> bool:
        """Tell whether its main process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The id of its main process.

        Raises:
            RuntimeError: It was not started.
        """
        if self._process is None:
            raise RuntimeError("The worker was not started.")
        return self._process.pid

    @property
    def log(self) -> str:
        """All that it has written."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def stop(self, timeout: float = 20.0) -> None:
        """End it as an operator does, by SIGTERM.

        What is left after ``timeout`` seconds gets SIGKILL.
        """
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """SIGKILL it and all of its children at once."""
        processes.discard(self)
        if self._process is not None:
            # The group outlives its leader.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)


def _strike(point: str, request: object) -> None:
    """Kill this process if the task at the point was sent with a crash for it.

    It does so if none has struck yet.
    """
    crash = None if request is None else getattr(request, CRASH_HEADER, None)
    if not crash or crash[0] != point:
        return
    try:
        os.close(os.open(crash[1], os.O_CREAT | os.O_EXCL))
    except OSError:  # It struck before, or the test is over and its folder gone.
        return
    os.kill(os.getpid(), signal.SIGKILL)


#: Until the process ends.
_for_good = contextlib.ExitStack()


class _OfApp(Protocol):
    """A worker, as its signals show it."""

    app: App


def _notice(sender: _OfApp, **more: object) -> None:
    listeners.append(_strike)
    _for_good.enter_context(noticing(sender.app))


if __name__ == "__main__":
    # Here: every run of pytest imports this module, and few of them need Celery's command line.
    from celery.bin.celery import main as celery_main

    worker_init.connect(_notice, weak=False)
    sys.exit(celery_main())
