"""The heartbeat of a worker, in a thread of its own, and the look after other workers.

Beside ``taking.py``, whose claims are the worker's for as long as its heart beats. On PostgreSQL
the thread also listens for what has been sent, since it has a connection that does nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic

from sqlalchemy import Connection, Engine

from ..outbox.chord_records import CHORD_ROWS, prune_chords
from ..outbox.relay import PRUNE_EVERY_SECONDS, PRUNE_ROWS
from ..outbox.relay import prune as prune_records
from ..outbox.result_records import RESULT_ROWS, prune_results
from ..sessions.fork_lock import fork_guard
from .broadcasts import prune
from .ears import Ear, ear_on
from .hold import moment
from .homes import BrokerHome
from .poison import Poison
from .tables import begun
from .waking import WAITS, channel_of, somebody_waits
from .workers import beat, enlist, release_lost

__all__ = ["Heart", "beat_seconds"]

logger: logging.Logger = logging.getLogger(__name__)

#: A heart beats so often while a worker may be silent, and at least every so many seconds.
BEATS_UNTIL_LOST = 5
BEAT_MAX_SECONDS = 5.0

#: Seconds between two removals of broadcasts that have expired.
CLEAN_EVERY_SECONDS = 30.0


def beat_seconds(worker_lost_after_seconds: float) -> float:
    """Return how often a heart beats whose worker counts as lost after so many seconds."""
    return min(worker_lost_after_seconds / BEATS_UNTIL_LOST, BEAT_MAX_SECONDS)


class Heart:
    """Beats for one worker until it is stopped, or finds that the worker counts as lost.

    Args:
        home: The broker's database.
        engine: Lends the connection that it keeps.
        worker: The id of the worker's row.
        on_lost: Called when other workers have its messages now.
        on_wake: Called when something was sent, where the database tells.
    """

    def __init__(
        self,
        home: BrokerHome,
        engine: Engine,
        worker: str,
        on_lost: Callable[[], None],
        on_wake: Callable[[], None],
    ) -> None:
        self._home = home
        self._engine = engine
        self._worker = worker
        self._on_lost = on_lost
        self._on_wake = on_wake
        self._poison = Poison(home, worker)
        self._stopping = threading.Event()
        self._connection: Connection | None = None
        self._ear: Ear | None = None
        self._beaten_at = monotonic()
        self._sweeps_from = 0.0
        self._pruned_at = self._cleaned_at = monotonic()
        self._thread = threading.Thread(target=self._run, name="celery-alchemy-heart", daemon=True)

    @property
    def hears(self) -> bool:
        """True while the database tells what was sent."""
        return self._ear is not None

    def start(self, connection: Connection, lock_file: str | None) -> None:
        """Write the worker's row, on a connection of the caller's, and start the thread."""
        at, lost_after = moment(), self._home.worker_lost_after_seconds
        with begun(self._home.place, connection) as tables:
            # It is there if the answer to an earlier COMMIT did not come.
            if not beat(tables, self._worker, lost_after):
                enlist(tables, self._worker, lost_after, lock_file)
        self._home.hold.note_beat(self._worker, at)
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """End the thread and give its connection back."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        period = beat_seconds(self._home.worker_lost_after_seconds)
        try:
            while not self._stopping.is_set():
                if not self._tries_to_beat():
                    self._on_lost()
                    return
                self._rest(period)
        finally:
            self._let_go()

    def _tries_to_beat(self) -> bool:
        """Beat once; False if the worker counts as lost. An outage is waited for."""
        lost_after, at = self._home.worker_lost_after_seconds, moment()
        try:
            with fork_guard:
                alive = self._beat()
        except Exception:
            # What takes messages reports an outage. Whoever was away itself cannot tell who is
            # lost.
            logger.debug("The heartbeat failed and is tried again", exc_info=True)
            self._sweeps_from = monotonic() + lost_after
            # A database that has crashed, or another one in its place, may not know every claim.
            self._home.hold.note_given_back()
            self._let_go()
            return True
        self._beaten_at = monotonic()
        if alive:
            self._home.hold.note_beat(self._worker, at)
        else:
            self._home.hold.note_lost(self._worker)
        return alive

    def _beat(self) -> bool:
        lost_after = self._home.worker_lost_after_seconds
        if self._connection is None:
            self._connection = self._engine.connect()
            place = self._home.place
            self._ear = ear_on(self._connection, channel_of(place), channel_of(place, WAITS))
            self._on_wake()
        if monotonic() - self._beaten_at > lost_after / 2:
            # This process stood still, as perhaps all of the machine did: others must have the time
            # to show their life.
            self._sweeps_from = monotonic() + lost_after
        with begun(self._home.place, self._connection, lost_after) as tables:
            alive = beat(tables, self._worker, lost_after)
        if alive and monotonic() >= self._sweeps_from:
            with begun(self._home.place, self._connection, lost_after) as tables:
                released = release_lost(tables, self._worker, self._home.max_deliveries)
                if released.due:
                    self._on_wake()
                if released.poisonous:
                    # Before the COMMIT, whose answer may not come: they are the worker's then.
                    self._poison.note()
                if monotonic() - self._cleaned_at > CLEAN_EVERY_SECONDS:
                    self._cleaned_at = monotonic()
                    prune(tables)
            self._prune_records()
        if alive:
            self._poison.end_behind()
        return alive

    def _prune_records(self) -> None:
        """Delete a batch of old records and results once a minute.

        While there are more, each time.
        """
        if monotonic() - self._pruned_at < PRUNE_EVERY_SECONDS:
            return
        self._pruned_at = monotonic()
        deleted = prune_records(self._engine, self._home.once_window_seconds, self._home.place)
        results = prune_results(self._home.place, self._engine)
        chords = prune_chords(self._home.place, self._engine)
        if deleted == PRUNE_ROWS or results == RESULT_ROWS or chords == CHORD_ROWS:
            self._pruned_at -= PRUNE_EVERY_SECONDS

    def _rest(self, seconds: float) -> None:
        """Wait for the next beat, and meanwhile tell of what is sent."""
        until = monotonic() + seconds
        while not self._stopping.is_set() and (left := until - monotonic()) > 0:
            if self._ear is None:
                self._stopping.wait(left)
                continue
            try:
                # In slices: to stop must not take a beat's time.
                heard = self._ear.heard_within(min(left, 0.5))
                if channel_of(self._home.place, WAITS) in heard:
                    somebody_waits.note()
                if channel_of(self._home.place) in heard:
                    self._on_wake()
            except Exception:
                logger.debug("Listening failed and is begun again", exc_info=True)
                self._let_go()
                return

    def _let_go(self) -> None:
        connection, self._connection, self._ear = self._connection, None, None
        if connection is not None:
            try:
                # It listens, and the next user of the connection must not.
                connection.invalidate()
                connection.close()
            except Exception:
                logger.debug("A connection could not be closed", exc_info=True)
