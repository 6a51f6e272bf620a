"""Whether a worker still has what it has taken: told by its parent, asked by its children.

Beneath the heart, which beats for the claims, and the routes, which tasks ask. A task whose message
the database holds for its worker needs no look into the table at its start: nobody else has it.
"""

from __future__ import annotations

import mmap
import struct
import time

__all__ = ["Hold", "moment"]

#: What is shared: the id of the worker that beats, when its heart beat last, and when it last gave
#: back a message.
_WORKER_BYTES = 32
_BEATEN, _GAVE_BACK, _SIZE = 32, 40, 48

#: A clock that goes on while the machine is suspended, where there is one: the database's does.
#: Source: https://man7.org/linux/man-pages/man2/clock_gettime.2.html
_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


class Hold:
    """What a worker's parent knows of its claims, in memory that its children share.

    Of several workers that share it, which were forked from one process, the one counts that beat
    last: of the messages of the others it is not known whether they are still held.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)

    def note_beat(self, worker: str, at: float) -> None:
        """Note that a worker has shown its life to the database.

        Args:
            worker: The id of its row.
            at: ``moment()`` before it did.
        """
        self._memory[:_WORKER_BYTES] = _shared(worker)
        self._write(_BEATEN, at)

    def note_given_back(self) -> None:
        """Note, before it is done, that a worker gives back what it has taken."""
        self._write(_GAVE_BACK, moment())

    def covers(self, worker: str, taken_at: float, seconds: float) -> bool:
        """Tell whether nobody else can have got a message that a worker has taken.

        Args:
            worker: The id of its row.
            taken_at: ``moment()`` before it took it.
            seconds: For how long a heartbeat counts here, which is less than for the database.
        """
        beaten_at = self._read(_BEATEN)
        # After the time: whoever beats writes its name first.
        is_own = self._memory[:_WORKER_BYTES] == _shared(worker)
        return is_own and moment() - beaten_at < seconds and self._read(_GAVE_BACK) < taken_at

    def _write(self, place: int, seconds: float) -> None:
        struct.pack_into("d", self._memory, place, seconds)

    def _read(self, place: int) -> float:
        return float(struct.unpack_from("d", self._memory, place)[0])


def _shared(worker: str) -> bytes:
    return worker.encode()[:_WORKER_BYTES].ljust(_WORKER_BYTES)


def moment() -> float:
    """Return seconds that are the same in all processes of a machine."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(_CLOCK)
