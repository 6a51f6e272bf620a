"""The unit of work of a ``once`` task as its steps see it: a body that may be committed in parts.

Above ``once.py``, whose only commits are those of the start and of the end; ``steps.py`` decides
when these here come about.
"""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, IntegrityError

from ..databases.transient import is_away, is_transient
from ..outbox import step_records
from ..outbox.place import OutboxTable
from ..outbox.step_records import Record, StepLog
from ..sessions.closing import commit
from ..sessions.commits import uncounted
from ..sessions.releasing import uncommitted_changes
from ..signatures.outcomes import Outcome
from . import once_records as completion
from .deliveries import Overtaken
from .once import OnceUnit
from .once_records import State

__all__ = ["SteppedUnit"]


class SteppedUnit(OnceUnit):
    """One request of a ``once`` task, with steps or without."""

    def load_steps(self, log: StepLog) -> None:
        """Read what earlier runs have recorded; a task without a row has never committed a step."""
        if self._owed:
            session = self.session
            was_open = session.in_transaction()
            log.add(step_records.load(self._table(session), self.key))
            if not was_open:
                self._commit_by_ourselves()
        log.is_loaded = True

    def leave_to_record(self) -> None:
        """End the open transaction: what it has written was committed with a recorded step."""
        session = self.session
        if not session.in_transaction():
            return
        if uncommitted_changes(session):
            session.rollback()
        else:
            # As a rollback, but objects stay loaded.
            self._commit_by_ourselves()

    def commit_step(self, name: str, text: str) -> bool:
        """Commit what the session has written, with the record of a step.

        Returns:
            False if another delivery has recorded the step, has tracked the task, or has ended it;
            nothing is committed.

        Raises:
            Exception: What the database raised.
        """
        log = self.steps or StepLog()
        table = self._table(self.session)
        try:
            if not self._write_step(table, log, name, text):
                return False
        except IntegrityError:
            return False
        except DBAPIError as exc:
            # As for the completion: where READ COMMITTED goes on, the stricter levels refuse.
            if is_away(exc) or not is_transient(exc):
                raise
            return False
        log.committing = name
        self._commit_by_ourselves()
        log.committing = None
        log.has_committed = True
        log.next_position += 1
        if not self._owed:
            self._owed, self._counted_in = True, self.key
            completion.note_counted(self.request)
        return True

    def _write_step(self, table: OutboxTable, log: StepLog, name: str, text: str) -> bool:
        if not self._owed:
            # Steps are of a row that is open.
            request_id = self.request.id
            completion.track(table, self.key, request_id, self.plan.name, deliveries=1)
        elif self._counted_in is not None and not log.has_committed and self._is_later_run(log):
            step_records.note_progress(table, self._counted_in)
        return step_records.insert_step(table, self.key, name, log.next_position, text)

    def _is_later_run(self, log: StepLog) -> bool:
        return bool(log.recorded) or completion.was_delivered_before(self.request)

    def _commit_by_ourselves(self) -> None:
        self._recording = True
        try:
            with uncounted(self.request):
                commit(self.session, self.owner, expires=False)
        finally:
            self._recording = False

    def ends_well_by(self, outcome: Outcome) -> bool:
        """Tell whether what was written is committed where the body ends by an exception."""
        return outcome == "success" or (outcome == "ignore" and "ignore" in self.plan.commit_on)

    def look_for_steps(self, *, waits: bool = False) -> None:
        """Roll back, and find out what others, or a COMMIT without an answer, have recorded.

        Args:
            waits: The server may still be at that COMMIT, on a connection that was dropped.

        Raises:
            Overtaken: The task is completed or dead.
        """
        self.session.rollback()
        log = self.steps or StepLog()

        def work(table: OutboxTable) -> tuple[State, list[Record]]:
            state = completion.look(table, self.key, waits=waits)
            return state, step_records.load(table, self.key)

        state, found = self.in_own_session(work)
        if state.kind in ("completed", "dead"):
            raise Overtaken(self.owner())
        self._owed = state.kind == "owed"
        log.add(found)
