"""The thread that takes messages for one connection, ends them, and reads broadcasts.

Between the table and the transport, which delivers what lies in the inboxes. One round is one
transaction: what is done goes, and as much as there is room for comes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from time import monotonic
from uuid import uuid4
from weakref import WeakSet

from ..databases.transient import is_away, is_read_only, is_transient
from ..outbox.outbox import missing_table
from ..sessions.fork_lock import fork_guard
from .acknowledging import acknowledge, give_back, note_begun
from .broadcasts import READER_SECONDS, Log, keep_reading
from .claims import BATCH_ROWS, Claim, Delivery, has_due, take
from .heart import Heart
from .homes import BrokerHome
from .inboxes import Begun, Inbox, Surroundings
from .life_sign import LifeSign
from .queues import Binding
from .tables import BrokerTables, begun, seen
from .taking_connection import TakingConnection
from .workers import dismiss

__all__ = ["Taker"]

logger: logging.Logger = logging.getLogger(__name__)

#: Seconds between two looks of a worker that has nothing to do: where the database tells what is
#: sent, looking only finds what has become due.
IDLE_SECONDS = 1.0

#: The same, where the database does not tell: remote control waits for a second by default.
POLL_SECONDS = 0.6

#: The shortest time between two looks where the database does not tell.
EAGER_SECONDS = 0.02

#: Seconds between two looks at the number that SQLite changes with each commit.
CHANGES_SECONDS = 0.01

#: Seconds for which a task must have run until its start is counted: most end before, and cost
#: nothing. With a statement for each, empty tasks of the threads pool took 1.6 times as long.
COUNTED_AFTER_SECONDS = 0.2

#: Seconds between two looks at broadcasts of a worker that takes one message after another.
READ_SECONDS = 0.1

#: Seconds in which more ends gather when a round was so shortly before and there is work left.
BUSY_SECONDS = 0.02
GATHER_SECONDS = 0.003

#: Seconds between two attempts during an outage.
OUTAGE_SECONDS = 1.0

#: All of this process.
_takers: WeakSet[Taker] = WeakSet()


class Taker:
    """Takes messages for one connection.

    Args:
        home: The broker's database.
        surroundings: What it serves.
    """

    def __init__(self, home: BrokerHome, surroundings: Surroundings) -> None:
        self._home = home
        self._around = surroundings
        self.worker: str = uuid4().hex
        self._done: deque[Claim] = deque()
        self._returned: deque[Claim] = deque()
        # Taken in a transaction of which it is not known that it was committed.
        self._unsure: list[Claim] = []
        self._begun: dict[tuple[str, int], Begun] = {}
        # Deliveries whose start is counted in the table.
        self._counted: set[tuple[str, int]] = set()
        self._wake = threading.Event()
        self._stopping = False
        self._log = Log()
        self._line = TakingConnection(home)
        self._heart: Heart | None = None
        self._sign: LifeSign | None = None
        self._pause = EAGER_SECONDS
        self._look_seconds = CHANGES_SECONDS
        self._kept_at = self._read_at = self._round_at = 0.0
        self._has_skipped = self._down = False
        self._working = threading.RLock()
        self._thread: threading.Thread | None = None
        _takers.add(self)

    # --- what the channels say --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to take; does nothing the second time."""
        if self._thread is None:
            name = "celery-alchemy-taker"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            # It may raise, at the end of the interpreter or of the machine's room.
            thread.start()
            self._thread = thread
        self.wake()

    def wake(self) -> None:
        """Look at once: there is more room, or something was sent."""
        self._wake.set()

    def end(self, claim: Claim) -> None:
        """Note that a delivery is done."""
        self._begun.pop(claim.delivery, None)
        self._done.append(claim)
        self.wake()

    def give_back(self, claim: Claim) -> None:
        """Note that a delivery was not done."""
        self._begun.pop(claim.delivery, None)
        self._home.hold.note_given_back()
        self._returned.append(claim)
        self.wake()

    def begin(self, claim: Claim, *, at_once: bool) -> threading.Event:
        """Note that the task of a delivery begins; what is returned is set when its row says so.

        Args:
            claim: The delivery.
            at_once: Its row says so as soon as it can, and not only if the task runs on.
        """
        one = Begun(claim, monotonic() + (0.0 if at_once else COUNTED_AFTER_SECONDS))
        self._begun[claim.delivery] = one
        if at_once:
            self.wake()
        return one.is_counted

    def begin_reading(self) -> None:
        """Have broadcasts read from now on."""
        with seen(self._home.place, self._home.engine()) as tables:
            self._log.begin(tables)

    def take_now(self, queue: str) -> Delivery | None:
        """Take one message in the caller's thread."""
        with self._working:
            self._enlist()
            self._line.floors.forget()
            with self._in_transaction() as tables:
                self._settle(tables)
                taken = self._take(tables, [queue], 1)
            self._settled()
        return taken[0] if taken else None

    def stop(self) -> None:
        """End the thread; give back what was not delivered, and say goodbye."""
        self._stopping = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(10.0)
        with self._working:
            if self._heart is not None:
                self._heart.stop()
            try:
                if self._line.is_open or self._has_notes:
                    self._leave()
            except Exception as exc:  # noqa: BLE001 - the worker's row expires.
                logger.warning("A worker could not give back what it had taken: %s", exc)
            self._line.dispose()
            if self._sign is not None:
                self._sign.take_down()

    def _leave(self) -> None:
        with fork_guard, self._in_transaction() as tables:
            self._settle(tables)
            if self._heart is not None:
                dismiss(tables, self.worker)

    def _in_transaction(self) -> AbstractContextManager[BrokerTables]:
        """Begin a transaction."""
        return begun(self._home.place, self._line.open(), self._home.worker_lost_after_seconds)

    def _wake_all(self) -> None:
        """Wake what takes from this database in this process: remote control may be apart."""
        for taker in list(_takers):
            if taker._home is self._home:
                taker.wake()

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            try:
                with fork_guard, self._working:
                    self._round()
                if self._down:
                    logger.info("The broker's database is back")
                self._down = False
                self._rest()
            except Exception as exc:  # noqa: BLE001 - every error must be seen here.
                self._note_failure(exc)
                # Without a connection, which is closed: this asks the database nothing.
                self._rest()

    def _note_failure(self, exc: Exception) -> None:
        if is_transient(exc) and not is_away(exc):
            # SQLite's one lock is another's for long, or InnoDB chose this transaction to end a
            # deadlock.
            logger.debug("Taking messages is tried again: %r", exc)
        elif not self._down:
            reason = missing_table(exc) or exc
            logger.warning("Messages cannot be taken now, it is tried again: %s", reason)
            self._down = True
        if is_read_only(exc):
            self._line.drop()
        self._line.close()

    def _enlist(self) -> None:
        """Write the worker's row and let its heart beat, before it takes anything."""
        if self._heart is not None:
            return
        connection, engine = self._line.open(), self._line.engine
        url = engine.url
        if self._sign is None and engine.dialect.name == "sqlite" and url.database:
            self._sign = LifeSign(url.database, self.worker)
        heart = Heart(self._home, engine, self.worker, self._around.on_lost, self._wake_all)
        heart.start(connection, self._sign.path if self._sign else None)
        self._heart = heart

    def _round(self) -> None:
        """End what is done and take what there is room for."""
        was_woken = self._wake.is_set()
        self._wake.clear()
        self._has_skipped = False
        asked = [(inbox, inbox.room(), inbox.wanted()) for inbox in self._around.inboxes()]
        asked = [(inbox, room, wanted) for inbox, room, wanted in asked if room > 0 and wanted]
        readers = self._around.readers()
        # Whoever has no room is woken when there is some.
        self._look_seconds = CHANGES_SECONDS if asked else READ_SECONDS
        if not (asked or readers or self._has_notes):
            self._pause = IDLE_SECONDS
            return
        if asked:
            self._enlist()
        longer = min(self._pause * 1.5, POLL_SECONDS)
        if not was_woken and self._pause > EAGER_SECONDS and not self._has_news(asked, readers):
            self._pause = longer
            return
        arrived: list[tuple[Inbox, Delivery]] = []
        with self._in_transaction() as tables:
            self._settle(tables)
            for inbox, room, wanted in asked:
                taken = self._take(tables, wanted, min(room, BATCH_ROWS))
                arrived += [(inbox, delivery) for delivery in taken]
            has_heard = self._hear(tables, readers)
        self._settled()
        self._round_at = monotonic()
        for inbox, delivery in arrived:
            inbox.arrived.append(delivery)
        if arrived:
            self._around.on_arrival()
        self._pause = EAGER_SECONDS if arrived or has_heard else longer

    def _take(self, tables: BrokerTables, queues: Sequence[str], limit: int) -> list[Delivery]:
        taken = take(tables, self.worker, queues, limit, self._line.floors)
        self._unsure += [delivery.claim for delivery in taken if delivery.claim is not None]
        return taken

    def _hear(self, tables: BrokerTables, readers: Mapping[Binding, Inbox]) -> bool:
        """Read broadcasts, unless that was done just now, in one of many rounds.

        What was read need not be committed, and is not read again.
        """
        now = monotonic()
        if not readers:
            return False
        if now < self._read_at + READ_SECONDS:
            self._has_skipped = True
            return False
        self._read_at = now
        self._keep_reading(tables, readers)
        said = self._log.read(tables, readers)
        for delivery, binding in said:
            readers[binding].arrived.append(delivery)
        if said:
            self._around.on_arrival()
        return bool(said)

    @property
    def _has_notes(self) -> bool:
        """True while something is to be written that the channels have said."""
        return bool(self._done or self._returned or self._unsure or self._running())

    def _running(self) -> list[Begun]:
        """Return what runs, is not counted and is to be."""
        return [one for one in list(self._begun.values()) if one.counted_from <= monotonic()]

    def _has_news(
        self, asked: Sequence[tuple[Inbox, int, Sequence[str]]], readers: Mapping[Binding, Inbox]
    ) -> bool:
        """Look in one statement whether there is anything to take or to read."""
        is_due_to_show = readers and monotonic() - self._kept_at > READER_SECONDS / 3
        if self._has_notes or is_due_to_show:
            return True
        queues = [queue for _, _, wanted in asked for queue in wanted]
        with begun(self._home.place, self._line.open()) as tables:
            unread = self._log.is_unread(tables, readers) if readers else None
            return has_due(tables, queues, unread, self._line.floors)

    def _keep_reading(self, tables: BrokerTables, readers: Mapping[Binding, Inbox]) -> None:
        if monotonic() - self._kept_at > READER_SECONDS / 3:
            keep_reading(tables, readers)
            self._kept_at = monotonic()

    def _settle(self, tables: BrokerTables) -> None:
        """End deliveries in a transaction; they are forgotten when it has committed.

        What an earlier one has taken goes back, if the answer to its COMMIT did not come: it is the
        worker's then, and nobody would ever run it.
        """
        self._ending = len(self._done), len(self._returned), self._running()
        done, returned, running = self._ending
        ended = [self._done[n] for n in range(done)]
        back = [self._returned[n] for n in range(returned)]
        if running:
            note_begun(tables, self.worker, [one.claim for one in running])
        if ended:
            acknowledge(tables, self.worker, ended)
        if self._unsure:
            give_back(tables, self.worker, self._unsure)
        if back:
            counted = [replace(claim, has_begun=claim.delivery in self._counted) for claim in back]
            give_back(tables, self.worker, counted)

    def _settled(self) -> None:
        done, returned, running = self._ending
        self._unsure.clear()
        for one in running:
            self._counted.add(one.claim.delivery)
            self._begun.pop(one.claim.delivery, None)
            one.is_counted.set()
        for ended, count in ((self._done, done), (self._returned, returned)):
            for _ in range(count):
                self._counted.discard(ended.popleft().delivery)

    def _rest(self) -> None:
        """Wait until there is something to do, or may be."""
        if self._down:
            # What is done wakes it, and must not make it try without end.
            threading.Event().wait(OUTAGE_SECONDS)
            return
        hears = self._heart is not None and self._heart.hears
        before = self._changes()
        seconds = self._pause if before is None and not hears else IDLE_SECONDS
        seconds = min(seconds, self._line.floors.seconds_left())
        if self._begun:
            seconds = min(seconds, COUNTED_AFTER_SECONDS)
        if self._has_skipped:
            seconds = min(seconds, max(0.0, self._read_at + READ_SECONDS - monotonic()))
        if before is None:
            if self._wake.wait(seconds):
                self._gather()
            return
        until = monotonic() + seconds
        while not self._wake.wait(min(self._look_seconds, seconds)) and monotonic() < until:
            if self._changes() != before:
                return

    def _changes(self) -> int | None:
        """Return the number that SQLite changes with each commit; None elsewhere.

        In turn with ``take_now()``: nothing begins on a connection that is read at the same time.
        """
        with self._working:
            return None if self._line.changes is None else self._line.changes()

    def _gather(self) -> None:
        """Have one transaction end several deliveries, while there is work left meanwhile."""
        if monotonic() - self._round_at < BUSY_SECONDS and not self._stopping:
            inboxes = self._around.inboxes()
            if inboxes and all(inbox.is_stocked() for inbox in inboxes):
                threading.Event().wait(GATHER_SECONDS)
