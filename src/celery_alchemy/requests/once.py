"""The life of a ``once`` task's request.

Its writes are committed once, over any number of deliveries.

Beside ``attempt.py``: the same unit of work, with a start that looks whether the work is done, and
an end that records in the task's own transaction that it is. The record is written last, so that a
long task neither holds a lock on it nor pins the outbox's vacuum horizon; two runs at the same time
are decided by the row's lock, and the loser rolls back and reports the winner's result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from celery.app.task import Context
from celery.exceptions import Reject, SoftTimeLimitExceeded
from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from ..databases.transient import is_away, is_transient
from ..databases.trying_again import again, at_once
from ..error_texts import error_text
from ..errors import OnceCommitError
from ..outbox import step_records
from ..outbox.lone_statement import lends_its_own
from ..outbox.place import OutboxTable
from ..sessions.closing import abandon, close_quietly, commit
from ..sessions.commits import uncounted
from ..sessions.ledger import ledger_of
from ..sessions.releasing import uncommitted_changes
from ..signatures.outcomes import Replaced, outcome_of
from . import once_records as completion
from .attempt import AtHand, UnitOfWork
from .continuation import held_ids, hold_continuation
from .deliveries import ATTEMPTS, Overtaken, insist, record_death
from .loop_call import pause
from .once_guests import is_of_another, keep_owners_message
from .once_keys import nesting_of
from .once_records import Ending, State
from .once_report import report
from .once_start import Start, begin, begin_alone, is_held
from .own_result import OwnResult, has_result, own_result
from .plan import Plan
from .put_back import is_delivered_by_database

__all__ = ["OnceUnit"]

logger: logging.Logger = logging.getLogger("celery_alchemy.once")

_T = TypeVar("_T")


class OnceUnit(UnitOfWork):
    """One request of a ``once`` task.

    Args:
        plan: What it needs of its task.
        outer: What was at hand before this request began.
        request: Celery's request.
        key: The id of its row.
    """

    is_once = True

    own_result: OwnResult | None

    def __init__(self, plan: Plan, outer: AtHand | None, request: Context, key: str) -> None:
        super().__init__(plan, outer, request)
        self.key = key
        self._owed = False
        self._is_unseen = False
        self._is_guest = False
        self._counted_in: str | None = None
        self._recording = False

    def start(self) -> State:
        """Count the start, by itself, and say what the table says.

        Returns:
            A State; the body runs if it is ``"new"`` or ``"owed"``.

        Raises:
            ConfigurationError: The session knows no database for the library's table.
        """
        session = self.session
        bind = self.plan.required_home.place.bind_of(session)
        state = self._start_alone(bind) if lends_its_own(bind) else None
        if state is None:
            state = self._start_in(session)
        self._owed, self._is_unseen = state.kind == "owed", state.is_unseen
        self._is_guest = is_of_another(state, self.request)
        self._counted_in = state.counted_in
        if self._counted_in is not None:
            completion.note_counted(self.request)
        event.listen(session, "before_commit", self._refuse_commit)
        return state

    def _start_alone(self, engine: Engine) -> State | None:
        """Start without a transaction; None where that is for the session's to do."""
        driver = engine.dialect.loaded_dbapi
        try:
            return begin_alone(self.plan.required_home.place, engine, self._start_of())
        except (DBAPIError, driver.Error) as exc:
            # The session's transaction asks again, and reports what does not pass.
            logger.debug("%s: its start is tried again after %r", self.owner(), exc)
            return None

    def _start_in(self, session: Session) -> State:
        """Start in a transaction of the session's, which is committed."""

        def start() -> State:
            with uncounted(self.request):
                state = begin(self._table(session), self._start_of())
                session.commit()
            return state

        # After the last error whoever runs the unit ends it: the connection may be in mid-statement
        # or in mid-commit.
        return again(
            start, at_once(ATTEMPTS, _is_in_anothers_favour), lambda seconds: session.rollback()
        )

    def _follow(self, session: Session) -> None:
        """Have the next session too refuse commits that the body sends past it.

        Its listeners are carried over.
        """
        super()._follow(session)
        ledger = ledger_of(session)
        if ledger is not None:
            ledger.refuse_commits(self.owner())

    def _table(self, session: Session) -> OutboxTable:
        return self.plan.required_home.place.within(session)

    def _start_of(self) -> Start:
        plan, request = self.plan, self.request
        return Start(
            self.key,
            request,
            plan.redeliver_seconds(request.timelimit),
            plan.deliveries_allowed,
            is_taken=plan.required_home.is_broker,
            is_held=is_held(plan, request),
        )

    def _refuse_commit(self, session: Session) -> None:
        if (
            not self._recording
            and not session.in_nested_transaction()
            and uncommitted_changes(session)
        ):
            raise OnceCommitError(self.owner())

    def succeed_with(self, ending: Ending, value: object) -> State:
        """Record the completion, commit, close and send.

        Returns:
            The state that every delivery reports: this run's, or that of the run that committed
            first.

        Raises:
            Overtaken: The record changed and is open; nothing of this run was committed.
            OnceResultError: The value cannot be kept; nothing of this run was committed.
            Exception: What the database raised; nothing of this run was committed.
        """
        result, value = self._kept(ending, value)
        session = self.session
        self._recording = True
        try:
            if ending == "returned":
                hold_continuation(self.plan, self.request, session, value)
                self.own_result = own_result(self.plan, self.request, self.outer, value)
            session.flush()
            recorded = self._record(session, result)
            if recorded:
                with uncounted(self.request):
                    commit(session, self.owner)
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
        if self.own_result is not None:
            self.own_result.is_committed()
        self._take_session()
        close_quietly(session, self.owner)
        self._tell(ledger_of(session), "success")
        if self.steps is not None and ending == "returned":
            self.steps.report_unasked(self.owner)
        if self._unsent is not None:
            self._send_unsent()
        return State("completed", ending, value, held=tuple(held_ids(self.plan, self.request)))

    def overtaken(self) -> None:
        """End a run that another delivery has overtaken; the task is looked at again."""
        session = self._take_session()
        if session is not None:
            self._unsent = None
            self._abandon(session, Overtaken())
            self._tell(ledger_of(session), "retry")

    def _kept(self, ending: Ending, value: object) -> tuple[str, object]:
        # A direct call has no id, and is none of the other tasks with its key.
        by = self.request.id or "" if self._has_own_key else None
        held = held_ids(self.plan, self.request) if ending == "returned" else ()
        nesting = nesting_of(self.request) if ending == "replaced" and by is not None else 0
        return completion.kept(ending, value, by, held, self.owner(), nesting)

    @property
    def _has_own_key(self) -> bool:
        return self.plan.once is not None and self.plan.once.make_key is not None

    def _record(self, session: Session, result: str) -> bool:
        request, own = self.request, self.own_result
        # The note of a part may have to come after the COMMIT, and with it the end of the chord.
        is_left = has_result(self.plan, request) and (own is None or own.part is not None)
        is_message = not self._is_guest and is_delivered_by_database(self.plan, request)
        keeps = is_left and is_message
        try:
            table = self._table(session)
            if not self._complete(table, result, keeps=keeps):
                return False
            if self.steps is not None:
                step_records.forget(table, [self.key])
            if self.own_result is not None:
                self.own_result.write_by(session)
            return True
        except IntegrityError:
            return False
        except DBAPIError as exc:
            # Another delivery changed the record while this one ran: where READ COMMITTED goes on,
            # the stricter levels refuse.
            if is_away(exc) or not is_transient(exc):
                raise
            return False

    def _complete(self, table: OutboxTable, result: str, *, keeps: bool = False) -> bool:
        if self._is_guest:
            keep_owners_message(table, self.key, self.request)
        if self._counted_in not in (None, self.key):
            # A guest's starts were counted: with its end there is nothing more to count.
            completion.end_count(table, str(self._counted_in))
        return completion.complete(
            table,
            self.key,
            self.request.id,
            self.plan.name,
            result,
            owed=self._owed,
            keeps=keeps,
            unseen=self._is_unseen,
        )

    def _winner(self, session: Session) -> State:
        state = self.look()
        # One that another run has overtaken reports that run's result, or its body runs again.
        self._tell(ledger_of(session), "success" if state.kind == "completed" else "retry")
        if state.kind != "completed":
            raise Overtaken(self.owner())
        return state

    def _committed_after_all(self, exc: BaseException) -> State | None:
        """Look whether a COMMIT whose answer did not come was carried out.

        The driver's error has no SQLSTATE then, and the soft time limit may have cut the waiting
        short. An error that the database sent is an answer: it has rolled back. A serialization
        failure may mean that another run has won.
        """
        if not isinstance(exc, (DBAPIError, SoftTimeLimitExceeded)):
            return None
        try:
            state = self.look()
        except Exception:
            logger.warning(
                "%s: looking for the outcome of its commit failed", self.owner(), exc_info=True
            )
            return None
        return state if state.kind == "completed" else None

    def look(self) -> State:
        """Say what the table says, in a session of its own."""
        return self.in_own_session(lambda table: completion.look(table, self.key))

    def in_own_session(self, work: Callable[[OutboxTable], _T]) -> _T:
        """Do something with the records in a session and transaction of its own and commit it."""
        return self._in_another_session(lambda session: work(self._table(session)))

    def _in_another_session(self, work: Callable[[Session], _T]) -> _T:
        session = self.another_session()
        try:
            with uncounted(self.request):
                result = work(session)
                session.commit()
        except BaseException as exc:
            abandon(session, exc, self.owner)
            raise
        close_quietly(session, self.owner)
        return result

    def _insists_in_another(self, work: Callable[[Session], _T]) -> _T:
        return insist(lambda: self._in_another_session(work))

    def fail_once(self, exc: BaseException) -> State | None:
        """End after the body raised; say so in the record, but for a failure.

        Returns:
            The completed state if this is how the work ends, or has ended; else None, and ``exc``
            stands.
        """
        outcome = outcome_of(exc)
        if isinstance(exc, Replaced):
            return self.succeed_with("replaced", None)
        if outcome == "ignore":
            if "ignore" in self.plan.commit_on:
                return self.succeed_with("ignored", None)
            self._recording = True
            self.fail(exc)
            self._complete_aside("ignored")
            return State("completed", "ignored")
        self._recording = True
        self.fail(exc)
        if isinstance(exc, Reject) and not getattr(exc, "requeue", False):
            return self.record_death(error_text(exc))
        if isinstance(exc, Reject) and self._counted_in is not None:
            self._count_end(self._counted_in)
        return None

    def record_death(self, error: str) -> State | None:
        """Record that the task has failed for good, as ``deliveries.record_death()`` does."""
        rest = pause if self.plan.is_async else None
        return record_death(self.plan, self.request, self.key, error, self.in_own_session, rest)

    def _count_end(self, row_id: str) -> None:
        """Say that this start has ended.

        The body asked the broker to deliver the message again; its process did not die.
        """
        try:
            self.in_own_session(lambda table: completion.count_end(table, row_id))
        except Exception:
            logger.warning(
                "%s: its end could not be recorded; it counts as a start without an end",
                self.owner(),
                exc_info=True,
            )

    def _complete_aside(self, ending: Ending) -> None:
        result, _ = self._kept(ending, None)

        def work(table: OutboxTable) -> None:
            self._complete(table, result)
            if self.steps is not None:
                step_records.forget(table, [self.key])

        # Another delivery that was ignored at the same time has written the record.
        with suppress(IntegrityError):
            insist(lambda: self.in_own_session(work))

    def replay(self, state: State) -> object:
        """Report what the run that committed reported; as for ``report()``."""
        return report(
            self.plan, self.request, self.outer, self.key, state, self._insists_in_another
        )


def _is_in_anothers_favour(exc: Exception) -> bool:
    # Of two redelivered copies that start at once both have found no row, and one has written it.
    return isinstance(exc, IntegrityError) or is_transient(exc)
