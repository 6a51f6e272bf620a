"""Celery's commands in processes that are forked from one which has everything imported.

Importing costs a command 1.5 s of processor time, and the suite runs more than a thousand. Such a process is what
`python -m celery ...` would be: its own session, environment, output and signals, a main thread, no connection.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = [
    "asyncio",
    "celery.__main__",
    "celery.app.trace",
    "celery.apps.worker",
    "celery.backends.redis",
    "celery.backends.rpc",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "celery.concurrency.thread",
    "celery.fixups.django",
    "celery.loaders.app",
    "celery.worker.consumer",
    "celery_alchemy",
    "celery_alchemy.testing",
    "kombu.transport.filesystem",
    "kombu.transport.pyamqp",
    "kombu.transport.redis",
    "psycopg",
    "pymysql",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.ext.asyncio",
    "sqlalchemy.orm",
]
"""What workers of the tests import; none of it makes an app or a thread."""
# An interpreter reads these when it starts.
_OF_INTERPRETERS = ("PYTHON", "LD_", "MALLOC_", "COVERAGE_")


class Forked:
    """A process that was forked; of `subprocess.Popen` it has what the tests use.

    Attributes:
        pid: Its id, also that of its session and process group.
        returncode: As of `Popen`; None until it has been seen to have ended.
    """

    def __init__(self, parent: _Parent, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            answer = self._parent.ask({"pid": self.pid})
            self.returncode = answer if isinstance(answer, int) else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: It is still up.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("celery", timeout or 0)
            time.sleep(0.005)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        os.kill(self.pid, signal.SIGTERM)


class _Parent:
    """The process from which the others are forked, as the test's process sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        own, other = socket.socketpair()
        with other:
            command = [sys.executable, "-m", "tests.forked", str(other.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[other.fileno()], start_new_session=True)
        self._file = own.makefile("rw")
        own.close()

    def ask(self, request: Mapping[str, object]) -> object:
        """Ask it for something, and return its answer."""
        with self._lock:
            self._file.write(f"{json.dumps(request)}\n")
            self._file.flush()
            return json.loads(self._file.readline())

    def end(self) -> None:
        """Have it end."""
        self._file.close()
        self._process.wait()


_parents: dict[int, _Parent] = {}


def can_fork(env: Mapping[str, str]) -> bool:
    """Tell whether a process with such variables may be forked: none is for its interpreter, and none differs."""
    names = {name for name in {*env, *os.environ} if name.startswith(_OF_INTERPRETERS)} - {"PYTHONPATH"}
    return all(env.get(name) == os.environ.get(name) for name in names) and "COVERAGE_PROCESS_CONFIG" not in env


def fork(arguments: Sequence[str], *, env: Mapping[str, str], output: Path, errors: Path | None = None) -> Forked:
    """Run `celery ...` in a process of its own, in the project's folder.

    Args:
        arguments: What comes after `celery`.
        env: All of its environment variables.
        output: Where its standard output goes, at the file's end.
        errors: Where its standard error goes; the same file by default.
    """
    parent = _parents.get(os.getpid())
    if parent is None:
        # A fork of the test's process has one of its own.
        _parents.clear()
        parent = _parents[os.getpid()] = _Parent()
        atexit.register(parent.end)
    request = {"arguments": [*arguments], "env": dict(env), "output": str(output), "errors": str(errors or output)}
    pid = parent.ask(request)
    assert isinstance(pid, int)
    return Forked(parent, pid)


def run(arguments: Sequence[str], *, env: Mapping[str, str], folder: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `celery ...` to its end, like `subprocess.run(..., capture_output=True, text=True)`.

    Raises:
        subprocess.TimeoutExpired: It is still up, and was killed.
    """
    if not can_fork(env):
        command = [sys.executable, "-m", "celery", *arguments]
        return subprocess.run(command, cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=timeout, check=False)
    output, errors = folder / "stdout", folder / "stderr"
    for path in (output, errors):
        path.write_text("")
    process = fork(arguments, env=env, output=output, errors=errors)
    try:
        code = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(["celery", *arguments], code, output.read_text(), errors.read_text())


# --- the process itself -------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> None:
    """Fork for each request until nobody asks any more; in a child, return when it is to run Celery's command."""
    ended: dict[int, int] = {}
    file = requests.makefile("rw")
    for line in file:
        request = json.loads(line)
        answer: int | None
        if "pid" in request:
            answer = _ended(request["pid"], ended)
        else:
            answer = os.fork()
            if not answer:
                file.close()
                requests.close()
                _become(request)
                return
        file.write(f"{json.dumps(answer)}\n")
        file.flush()
    sys.exit()


def _ended(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if not found:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _become(request: dict[str, object]) -> None:
    """Be a process that was started with what the request says."""
    os.setsid()
    arguments, env = request["arguments"], request["env"]
    assert isinstance(arguments, list)
    assert isinstance(env, dict)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if path and path not in sys.path:
            sys.path.insert(0, path)
    sys.argv = ["celery", *arguments]
    for path, stream in ((os.devnull, 0), (str(request["output"]), 1), (str(request["errors"]), 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)


def main() -> None:
    """Import, and fork when asked to."""
    for name in IMPORTED:
        # Drivers are not there everywhere.
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)


if __name__ == "__main__":
    main()
    from celery.__main__ import main as celery_main

    sys.exit(celery_main())
