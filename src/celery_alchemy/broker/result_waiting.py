"""Waiting for results in the database: until they come, or the time is over.

Between the listener, which looks for all that wait in this process, and the backend,
``results.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack
from time import monotonic, sleep

from celery import states
from celery.exceptions import TimeoutError as CeleryTimeoutError

from ..messages.celery_types import Fields
from ..outbox.result_records import key_of
from .chords import ChordBackend
from .result_listener import Listener, Wait, listener_of

__all__ = ["WaitingBackend"]

#: Seconds until whoever has begun to wait looks by itself: the first time, and how they grow.
FIRST_SECONDS = 0.02
SLOWING = 1.5

#: Seconds between two looks of one for whom the listener looks: it raises what the listener cannot.
SELDOM_SECONDS = 5.0


class WaitingBackend(ChordBackend):
    """A result backend that waits for what the database tells."""

    _cache: MutableMapping[str, Fields]
    _listener: Listener | None = None

    @abstractmethod
    def metas(self, task_ids: Iterable[str]) -> dict[str, Fields]:
        """Return what is kept of tasks, by their ids."""

    def wait_for(
        self,
        task_id: str,
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_interval: Callable[[], object] | None = None,
    ) -> Fields:
        """Wait until a task has ended, and return what is kept of it.

        Raises:
            celery.exceptions.TimeoutError: It has not ended in time.
        """
        waiting = self.get_many([task_id], timeout, interval, no_ack, on_interval=on_interval)
        meta = next(waiting)[1]
        if on_interval is not None and meta["status"] in states.PROPAGATE_STATES:
            # By this Celery looks whether a task has failed that comes before: its error is raised.
            on_interval()
        return meta

    def get_many(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        interval: float = 0.5,
        no_ack: bool = True,
        on_message: Callable[[Fields], object] | None = None,
        on_interval: Callable[[], object] | None = None,
    ) -> Iterator[tuple[str, Fields]]:
        """Yield tasks as they end, each with what is kept of it; one SELECT looks for hundreds.

        Raises:
            celery.exceptions.TimeoutError: Not all have ended in time.
        """
        self._ensure_not_eager()
        left = list(dict.fromkeys(task_ids))
        pauses = _Pauses(timeout, interval)
        with ExitStack() as stack:
            while left:
                found = self._ended(left)
                left = [task_id for task_id in left if task_id not in found]
                for task_id, meta in found.items():
                    if on_message is not None:
                        on_message(meta)
                    yield task_id, meta
                if left:
                    pauses.wait(self._wait_for_keys(stack, pauses, left), on_interval)

    def _ended(self, task_ids: Sequence[str]) -> dict[str, Fields]:
        """Return what is kept of those tasks that have ended, in their order."""
        cache = self._cache
        metas = {task_id: cache[task_id] for task_id in task_ids if task_id in cache}
        unknown = [task_id for task_id in task_ids if task_id not in metas]
        if unknown:
            metas |= self._ensure_retryable(self.metas, unknown)
        found = {id_: metas[id_] for id_ in task_ids if metas[id_]["status"] in states.READY_STATES}
        for task_id, meta in found.items():
            if meta["status"] == states.SUCCESS:
                cache[task_id] = meta
        return found

    def _wait_for_keys(
        self, stack: ExitStack, pauses: _Pauses, task_ids: Sequence[str]
    ) -> Wait | None:
        """Have the listener look for tasks from now on; None where there is none."""
        keys = frozenset(map(key_of, task_ids))
        if pauses.told is not None:
            pauses.told.keys = keys
        elif (listener := self._listening()) is not None:
            pauses.told = stack.enter_context(listener.awaiting(keys))
        return pauses.told

    def _listening(self) -> Listener | None:
        database = self.database
        # Kept, for there is one in the process for as long as anybody has it.
        self._listener = listener_of(database.engine(), database.place)
        return self._listener


class _Pauses:
    """The pauses between the looks of one that waits.

    Args:
        timeout: Seconds for which it waits at most; None for ever.
        interval: Seconds after which the caller is asked at the latest.
    """

    def __init__(self, timeout: float | None, interval: float) -> None:
        self._until = None if timeout is None else monotonic() + timeout
        self._interval = max(interval, 0.001)
        self._pause = min(FIRST_SECONDS, self._interval)
        #: What the listener wakes; None until it looks.
        self.told: Wait | None = None

    def wait(self, told: Wait | None, on_interval: Callable[[], object] | None) -> None:
        """Wait until there is a reason to look.

        Raises:
            celery.exceptions.TimeoutError: The time is over.
        """
        since = monotonic()
        while True:
            if on_interval is not None:
                on_interval()
            left = self._left()
            if left <= 0:
                raise CeleryTimeoutError("The operation timed out.")
            seconds = min(self._pause, left)
            if told is None:
                sleep(seconds)
                is_told = True
            else:
                is_told = told.wait(seconds)
            is_early = self._pause < self._interval
            self._pause = min(self._pause * SLOWING, self._interval)
            if is_told or is_early or monotonic() - since > SELDOM_SECONDS or self._left() <= 0:
                return

    def _left(self) -> float:
        return self._interval if self._until is None else self._until - monotonic()
