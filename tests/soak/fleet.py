"""The soak's processes: producers, relays and workers, each started again whenever it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil

from tests.forked import ROOT, Forked, fork

Role = Literal["worker", "relay", "producer"]


class Member:
    """One process that is kept running, with its own process group and log.

    Args:
        role: What it is.
        name: Names its log, too.
        command: What is run; one that begins with `celery` is forked.
        environment: All of its variables.
        folder: Where the log goes.
    """

    def __init__(self, role: Role, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.role = role
        self.name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._log_path = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._groups: list[int] = []

    def start(self) -> None:
        """Start the process."""
        if self._command[0] == "celery":
            self._process = fork(self._command[1:], env=self._environment, output=self._log_path)
        else:
            self._process = self._popen()
        # The number of one that is gone is another's one day.
        self._groups = [group for group in self._groups if _is_there(group)]
        self._groups.append(self._process.pid)

    def _popen(self) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def keep(self) -> bool:
        """Start the process again if it has ended; True if it had."""
        if self._process is not None and self._process.poll() is None:
            return False
        self.start()
        return True

    @property
    def pid(self) -> int:
        """Process id of the running process.

        Raises:
            RuntimeError: It was not started.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    @property
    def log(self) -> str:
        """Everything that all of its processes have written so far."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def children(self) -> list[int]:
        """Return the process ids of a worker's children; none while it starts."""
        try:
            return [child.pid for child in psutil.Process(self.pid).children()]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL the main process; its children find out by themselves, as after the kernel's out-of-memory killer."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)

    def kill_group(self) -> None:
        """SIGKILL the main process and its children at once, as when the machine loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)

    def terminate(self) -> int:
        """Ask the process to end and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It did not within 30 s.
        """
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        self._process.terminate()
        return self._process.wait(30)

    def clean_up(self) -> None:
        """SIGKILL whatever is left of every process that was started here."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(10)


def _is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def members(
    folder: Path,
    environment: Mapping[str, str],
    queue: str,
    *,
    workers: int,
    relays: int,
    producers: int,
    rate: float,
) -> list[Member]:
    """Return the processes of a soak, not yet started.

    Args:
        folder: Where logs go.
        environment: Variables that tell them their database and broker.
        queue: What the workers consume.
        workers: How many, of three children each.
        relays: How many that run alone; every worker has one, too.
        producers: How many.
        rate: Transactions of each producer in a second.
    """
    celery = ["celery", "-A", "tests.soak.app"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "C_FORCE_ROOT": "1", "PYTHONPATH": path, **environment}

    def worker(number: int) -> Member:
        name = f"worker-{number}"
        command = [
            *celery,
            "worker",
            "-P",
            "prefork",
            "-c",
            "3",
            "-n",
            f"{name}@soak",
            "-l",
            "INFO",
            "-Q",
            queue,
        ]
        return Member("worker", name, [*command, *quiet], variables, folder)

    def relay(number: int) -> Member:
        return Member("relay", f"relay-{number}", [*celery, "alchemy", "relay"], variables, folder)

    def producer(number: int) -> Member:
        command = [sys.executable, "-m", "tests.soak.producer", str(folder), str(rate)]
        return Member("producer", f"producer-{number}", command, variables, folder)

    return [
        *(worker(number) for number in range(workers)),
        *(relay(number) for number in range(relays)),
        *(producer(number) for number in range(producers)),
    ]
