"""A lock on a file beside an SQLite database, which shows that a worker lives.

Beside the heartbeat. A transaction that writes for minutes keeps every heartbeat waiting for the
database's one lock; the lock on a file waits for nothing, and the system takes it back when the
process ends, however it ends.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows: there the heartbeat alone counts.
    fcntl = None  # type: ignore[assignment]

__all__ = ["LifeSign", "is_shown"]

# A lock of this process would not be in its own way, and to close the file would end it.
_own: set[str] = set()


class LifeSign:
    """A file that is locked until it is taken down, or its process ends.

    Args:
        database: The path of the database's file.
        worker: The id of the worker.
    """

    def __init__(self, database: str, worker: str) -> None:
        self.path: str = str(Path(f"{database}-worker-{worker}.lock").absolute())
        self._pid = os.getpid()
        self._file: IO[bytes] = Path(self.path).open("wb")  # noqa: SIM115 - kept.
        if fcntl is not None:
            # Not flock(): a child that was forked would hold that too, after its parent is killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX)
        _own.add(self.path)

    def take_down(self) -> None:
        """Give the lock back and remove the file; in a child do nothing, it is the parent's."""
        if os.getpid() != self._pid:
            return
        _own.discard(self.path)
        self._file.close()
        with suppress(FileNotFoundError):
            Path(self.path).unlink()


def is_shown(path: str) -> bool:
    """Tell whether the worker of a file lives; a file that nobody locks is removed."""
    if path in _own:
        return True
    if fcntl is None:
        return False
    try:
        with Path(path).open("rb+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            Path(path).unlink()
    except FileNotFoundError:
        return False
    return False
