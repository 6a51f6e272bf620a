"""The life of a ``once`` task's request: its writes are committed once, over any number of deliveries.

Beside ``request.py``: the same unit of work, with a start that looks whether the work is done, and an end that records in the
task's own transaction that it is. The record is written last, so that a long task neither holds a lock on it nor pins the outbox's
vacuum horizon; two runs at the same time are decided by the row's lock, and the loser rolls back and reports the winner's result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

from celery.canvas import maybe_signature
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from . import completion
from .completion import Ending, State
from .errors import DeadTaskError, OnceCommitError
from .ledger import ledger_of
from .message import recording
from .outbox import bind_of
from .outcome import Replaced, outcome_of
from .owed import ATTEMPTS, Overtaken, error_text, insist, record_death
from .request import AtHand, UnitOfWork, close_quietly
from .sending import hold
from .transaction import WAITING, set_owner, uncommitted_changes
from .transient import is_lost_connection, is_transient

__all__ = ["OnceUnit"]

logger: logging.Logger = logging.getLogger(__name__)


class OnceUnit(UnitOfWork):
    """One request of a ``once`` task.

    Args:
        task: The task.
        outer: What was at hand before this request began.
        key: The id of its row.
    """

    is_once = True

    def __init__(self, task: Any, outer: AtHand | None, key: str) -> None:
        super().__init__(task, outer)
        self.key = key
        self._owed = False
        self._recording = False

    def start(self) -> State:
        """Count the start, in a transaction of its own, and say what the table says.

        Returns:
            A State; the body runs if it is ``"new"`` or ``"owed"``.

        Raises:
            ConfigurationError: The session knows no database for the library's table.
        """
        session = self.session
        bind_of(session)
        attempt = 1
        while True:
            try:
                state = self._count_start(session)
                session.commit()
                break
            except Exception as exc:
                session.rollback()
                if attempt == ATTEMPTS or not is_transient(exc):
                    raise
                attempt += 1
        self._owed = state.kind == "owed"
        if self._owed:
            completion.note_counted(cast("Any", self.task).request)
        event.listen(session, "before_commit", self._refuse_commit)
        return state

    def _count_start(self, session: Session) -> State:
        task: Any = self.task
        request = task.request
        home = task.home()
        wait_seconds = task.redeliver_seconds(home, request.timelimit)
        return completion.start(session, self.key, wait_seconds, task.deliveries_allowed(home), request)

    def _refuse_commit(self, session: Session) -> None:
        if not self._recording and not session.in_nested_transaction() and uncommitted_changes(session):
            raise OnceCommitError(self.owner())

    def succeed_with(self, ending: Ending, value: Any) -> State:
        """Record the completion, commit, close and send.

        Returns:
            The state that every delivery reports: this run's, or that of the run that committed first.

        Raises:
            Overtaken: The record changed and is open; nothing of this run was committed.
            Exception: What the database raised; nothing of this run was committed.
        """
        result = self._encoded(ending, value)
        session = self.session
        self._recording = True
        try:
            if ending == "returned":
                self._hold_continuation(session, value)
            session.flush()
            recorded = self._record(session, result)
            if recorded:
                if WAITING in session.__dict__:
                    set_owner(session, self.owner())
                self.commit_is_uncertain = True
                session.commit()
        except BaseException as exc:
            self._unsent = None
            self._take_session()
            self._abandon(session, exc)
            state = self._committed_after_all(exc)
            self._tell(ledger_of(session), outcome_of(exc) if state is None else "success")
            if state is None:
                raise
            return state
        if not recorded:
            self._unsent = None
            self._take_session()
            self._abandon(session, Overtaken())
            return self._winner(session)
        self._take_session()
        close_quietly(session, self.owner)
        self._tell(ledger_of(session), "success")
        if self._unsent is not None and not self.sends_elsewhere:
            self.send_unsent()
        return State("completed", ending, value)

    def _encoded(self, ending: Ending, value: Any) -> str:
        task: Any = self.task
        return completion.encoded(ending, value, by=None if task.once_key is None else task.request.id)

    def _hold_continuation(self, session: Session, value: Any) -> None:
        """Send the callbacks and the next link of a chain from this transaction, in the place of Celery's tracer.

        The tracer sends them after the commit: a crash in between, or a broker that loses them, would end the chain.
        Source: ``_dispatch_callbacks_and_chain`` in ``celery.app.trace``.
        """
        task: Any = self.task
        request, home = task.request, task.home()
        if not (request.callbacks or request.chain) or request.is_eager or home.outbox is None:
            return
        options = {"parent_id": request.id, "root_id": request.root_id or request.id}
        if task.app.conf.task_inherit_parent_priority:
            options["priority"] = (request.delivery_info or {}).get("priority")
        with recording(task.app) as messages:
            for callback in request.callbacks or ():
                cast("Any", maybe_signature(callback, app=task.app)).apply_async((value,), **options)
            if request.chain:
                following: Any = maybe_signature(request.chain[-1], app=task.app)
                following.apply_async((value,), chain=request.chain[:-1], **options)
        hold(task.app, home, session, messages, chosen_id=True)

    def _record(self, session: Session, result: str) -> bool:
        try:
            return completion.complete(session, self.key, self.task.request.id, self.task.name, result, owed=self._owed)
        except IntegrityError:
            return False
        except DBAPIError as exc:
            # Another delivery changed the record while this one ran: where READ COMMITTED goes on, the stricter levels refuse.
            if is_lost_connection(exc) or not is_transient(exc):
                raise
            return False

    def _winner(self, session: Session) -> State:
        state = self.look()
        # One that another run has overtaken reports that run's result, or its body runs again.
        self._tell(ledger_of(session), "success" if state.kind == "completed" else "retry")
        if state.kind != "completed":
            raise Overtaken(self.owner())
        return state

    def _committed_after_all(self, exc: BaseException) -> State | None:
        """Look whether a COMMIT whose answer did not come was carried out.

        The driver's error has no SQLSTATE then, and the soft time limit may have cut the waiting short. An error that the
        database sent is an answer: it has rolled back. A serialization failure may mean that another run has won.
        """
        if not isinstance(exc, (DBAPIError, SoftTimeLimitExceeded)):
            return None
        try:
            state = self.look()
        except Exception:
            logger.warning("%s: looking for the outcome of its commit failed", self.owner(), exc_info=True)
            return None
        return state if state.kind == "completed" else None

    def look(self) -> State:
        """Say what the table says, in a session of its own."""
        state: State = self.in_own_session(lambda session: completion.look(session, self.key))
        return state

    def in_own_session(self, work: Callable[[Session], Any]) -> Any:
        """Do something in a session and transaction of its own and commit it."""
        session = self.task.open_session(self)
        try:
            result = work(session)
            session.commit()
        finally:
            close_quietly(session, self.owner)
        return result

    def fail_once(self, exc: BaseException) -> State | None:
        """End after the body raised; say so in the record, but for a failure.

        Returns:
            The completed state if this is how the work ends, or has ended; else None, and ``exc`` stands.
        """
        outcome = outcome_of(exc)
        if isinstance(exc, Replaced):
            return self.succeed_with("replaced", None)
        if outcome == "ignore":
            if "ignore" in self.task.outcomes_to_commit():
                return self.succeed_with("ignored", None)
            self._recording = True
            self.fail(exc)
            self._complete_aside("ignored")
            return State("completed", "ignored")
        self._recording = True
        self.fail(exc)
        if isinstance(exc, Reject) and not getattr(exc, "requeue", False):
            return record_death(self.task, self.key, error_text(exc), self.in_own_session)
        if isinstance(exc, Reject) and self._owed:
            self._count_end()
        return None

    def _count_end(self) -> None:
        """Say that this start has ended: the body asked the broker to deliver the message again, its process did not die."""
        try:
            self.in_own_session(lambda session: completion.count_end(session, self.key))
        except Exception:
            logger.warning("%s: its end could not be recorded; it counts as a start without an end", self.owner(), exc_info=True)

    def _complete_aside(self, ending: Ending) -> None:
        result = self._encoded(ending, None)

        def work(session: Session) -> None:
            completion.complete(session, self.key, self.task.request.id, self.task.name, result, owed=self._owed)

        # Another delivery that was ignored at the same time has written the record.
        with suppress(IntegrityError):
            insist(lambda: self.in_own_session(work))

    def replay(self, state: State) -> Any:
        """Report what the run that committed reported.

        Its callbacks and chain are in the outbox, not the tracer's to send. Those of another task with the same key are: they were
        not that run's.

        Raises:
            Ignore: That run replaced itself or raised Ignore; there is nothing to report.
            DeadTaskError: The task is dead.
        """
        if state.kind == "dead":
            raise DeadTaskError(self.task.name, self.key, state.error)
        if state.ending != "returned":
            raise Ignore(f"{self.owner()} was {state.ending} by the run that committed")
        request: Any = self.task.request
        if not request.is_eager and state.by in (None, request.id):
            request.callbacks = request.chain = None
        return state.value
