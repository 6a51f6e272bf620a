"""Whether a worker still has what it has taken: told by its parent, asked by its children.

Beneath the heart, which beats for the claims, and the routes, which tasks ask. A task whose message
the database holds for its worker needs no look into the table at its start: nobody else has it.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

__all__ = ["Hold", "moment"]

#: What is shared: the id of the worker whose heart beat last, when that was, and when one last gave
#: back a message.
_BEAT, _GAVE_BACK, _SHARED = struct.Struct("32sd"), struct.Struct("d"), struct.Struct("32sdd")


class Hold:
    """What a worker's parent knows of its claims, in memory that its children share.

    Of several workers that share it, which were forked from one process, the one counts that beat
    last: of the messages of the others it is not known whether they are still held. What belongs
    together is written at once, and in place: packing into shared memory would clear it first.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SHARED.size)
        self.note_lost("")

    def note_beat(self, worker: str, at: float) -> None:
        """Note that a worker has shown its life to the database.

        Args:
            worker: The id of its row.
            at: ``moment()`` before it did.
        """
        self._memory[: _BEAT.size] = _BEAT.pack(_shared(worker), at)

    def note_lost(self, worker: str) -> None:
        """Note that a worker counts as lost: what it has, and takes yet, may be another's."""
        self.note_beat(worker, float("-inf"))

    def note_given_back(self) -> None:
        """Note, before it is done, that what a worker has taken goes back, or may have gone."""
        *_, before = _SHARED.unpack(self._memory[:])
        self._memory[_BEAT.size :] = _GAVE_BACK.pack(max(before, moment()))

    def covers(self, worker: str, taken_at: float, seconds: float) -> bool:
        """Tell whether nobody else can have got a message that a worker has taken.

        Args:
            worker: The id of its row.
            taken_at: ``moment()`` before it took it.
            seconds: For how long a heartbeat counts here, which is less than for the database.
        """
        name, beaten_at, gave_back_at = _SHARED.unpack(self._memory[:])
        is_own: bool = name == _shared(worker)
        return is_own and moment() - beaten_at < seconds and gave_back_at < taken_at


def _shared(worker: str) -> bytes:
    return worker.encode()[:32].ljust(32)


def _clock() -> Callable[[], float]:
    """Return a clock that goes on while the machine is suspended, where there is one.

    The database's does. Source: https://man7.org/linux/man-pages/man2/clock_gettime.2.html
    """
    with suppress(AttributeError, OSError):
        time.clock_gettime(time.CLOCK_BOOTTIME)
        return partial(time.clock_gettime, time.CLOCK_BOOTTIME)
    return time.monotonic


#: Returns seconds that are the same in all processes of a machine.
moment: Callable[[], float] = _clock()
