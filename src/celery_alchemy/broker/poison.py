"""Messages that were begun by too many workers which were lost with them: they fail for good.

Beside the queues; the heart of the worker that has found them out has them ended here, in a thread
of its own, since their results, errbacks and chords may be slow, or away.
"""

from __future__ import annotations

import logging
import threading

from billiard.exceptions import WorkerLostError
from sqlalchemy import select, update

from ..databases.tables import Found, Rows, from_now
from ..messages.celery_types import App
from ..sessions.fork_lock import fork_guard
from .homes import BrokerHome
from .outside_results import app_of, request_of
from .tables import begun
from .workers import poison_reason

__all__ = ["Poison"]

logger: logging.Logger = logging.getLogger(__name__)

#: How often the results of messages are tried that are to be set aside, once in each beat.
ATTEMPTS = 10


class Poison:
    """Sets messages aside that a worker has found out, after their results are written.

    A process that dies in between leaves them to be found out again, by another worker: the part of
    a chord is noted once all the same, and errbacks may run twice.

    Args:
        home: The broker's database.
        worker: The id of the worker's row, which has the messages.
    """

    def __init__(self, home: BrokerHome, worker: str) -> None:
        self._home = home
        self._worker = worker
        self._reason = poison_reason(home.max_deliveries)
        self._is_there = False
        self._attempts = 0
        self._thread: threading.Thread | None = None

    def note(self) -> None:
        """Note that there are messages to be set aside."""
        self._is_there, self._attempts = True, 0

    def end_behind(self) -> None:
        """Have them set aside, unless that is under way; called with each beat."""
        if self._is_there and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(
                target=self._run, name="celery-alchemy-poison", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        self._is_there = False
        try:
            self.end()
        except Exception as exc:  # noqa: BLE001 - every error must be seen here.
            self._is_there = True
            log = logger.debug if self._attempts > 1 else logger.warning
            log("Messages cannot be set aside yet: %s", exc, exc_info=True)

    def end(self) -> None:
        """Write that their tasks have failed, and set them aside.

        Raises:
            Exception: The database, or the result backend, is away.
        """
        self._attempts += 1
        rows = self._rows()
        app = app_of(self._home) if rows else None
        for row in rows:
            if app is not None:
                self._keep_result(app, row)
        if rows:
            self._set_aside(rows)
            logger.error("%d messages are set aside: %s", len(rows), self._reason)

    def _rows(self) -> Rows:
        with fork_guard, begun(self._home.place, self._home.engine()) as tables:
            c = tables.messages.c
            found = select(c.id, c.task_id, c.task_name, c.body, c.envelope)
            mine = (c.queue.is_not(None), c.claim == self._worker, c.error == self._reason)
            return tables.run(found.where(*mine)).all()

    def _keep_result(self, app: App, row: Found) -> None:
        """Write that a task has failed, as a worker does whose child was lost."""
        request = request_of(app, row)
        task_id: str | None = request.get("id")
        if task_id is None:
            return
        keeps = not request.ignore_result or app.conf.task_store_errors_even_if_ignored
        error = WorkerLostError(self._reason)
        try:
            with fork_guard:
                app.backend.mark_as_failure(
                    task_id, error, request=request, store_result=bool(keeps)
                )
        except Exception:
            if self._attempts < ATTEMPTS:
                raise
            logger.exception("The failure of the task %s could not be written", task_id)

    def _set_aside(self, rows: Rows) -> None:
        with fork_guard, begun(self._home.place, self._home.engine()) as tables:
            c = tables.messages.c
            mine = (c.id.in_([row.id for row in rows]), c.claim == self._worker)
            ended = update(tables.messages).where(*mine)
            tables.run(ended.values(died_at=from_now(0), due_at=None, claim=None))
