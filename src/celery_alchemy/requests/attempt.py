"""The life of a request: one attempt of one task, with one session and one transaction policy.

``sync_body.py`` opens a UnitOfWork around the task's body; here it commits or rolls back, closes,
and only then lets messages out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic

from celery.exceptions import Reject
from sqlalchemy import Connection
from sqlalchemy.orm import Session

from ..events import report_of, tell
from ..outbox.step_records import StepLog
from ..sessions.at_hand import AtHand, at_hand
from ..sessions.closing import abandon, commit, drop
from ..sessions.commits import commits_under_way
from ..sessions.scope import RequestRegistry
from ..sessions.sources import DEFERRED, is_open
from ..sessions.state import Ledger, ledger_of
from ..signatures.outcomes import Outcome, outcome_of
from .loop_call import aside
from .own_result import OwnResult
from .request_session import RequestSession

__all__ = ["AtHand", "UnitOfWork", "at_hand"]


class UnitOfWork(RequestSession):
    """One request's session and what becomes of it.

    Args:
        plan: What it needs of its task.
        outer: What was at hand before this request began.
        request: Celery's request; None for the one on top of the task's stack.
        timeout_at: ``time.monotonic()`` seconds at which the database ends its statements; None for
            what the time limits say.
    """

    # Said again for type checkers: these are the base's, and the end assigns them.
    used_session: Session | None
    ended_session: Session | None
    registry: RequestRegistry | None

    #: The steps of this run; None until it asks for the first one.
    steps: StepLog | None = None

    #: What the body returned, where the task's own COMMIT writes it.
    own_result: OwnResult | None = None

    #: True if the session was bound to a Connection: its transaction is somebody else's to end.
    is_in_callers_transaction: bool = False

    #: True while ``self.retry()`` runs, see ``deferring()``.
    is_deferring: bool = False

    _unsent: list[Callable[[], object]] | None = None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Have a message of ``self.retry()`` wait for the end of the transaction."""
        self.is_deferring = True
        try:
            yield
        finally:
            self.is_deferring = False

    def send_after_end(self, send: Callable[[], object]) -> None:
        """Call ``send`` when the transaction has ended, whichever way.

        It sends the message of ``self.retry()`` or ``self.replace()``.
        """
        self.pending = True
        if self._unsent is None:
            self._unsent = []
        self._unsent.append(send)

    def succeed(self) -> None:
        """End after the body returned: commit or roll back, close, send.

        Raises:
            Exception: What the database raised at the commit; the session is rolled back and closed
                then, and nothing is sent.
        """
        session, self.used_session = self.used_session, None
        # As _take_session() asks, which every request that uses its session would call.
        if session is not None and not self.is_borrowed and DEFERRED not in session.__dict__:
            self.ended_session = session
            plan = self.plan
            try:
                ledger = self._end_and_close(session, "success" in plan.commit_on)
            except BaseException as exc:
                self._tell(ledger_of(session), outcome_of(exc))
                raise
            plan.habit.note(uses_session=ledger is not None and ledger.statements > 0)
            self.registry = None
            if plan.listeners:
                self._tell(ledger, "success")
        if self._unsent is not None:
            self._send_unsent()

    def fail(self, exc: BaseException) -> None:
        """End after the body raised: by the policy for Retry, Ignore and Reject, else roll back.

        Close, send.

        After a ``succeed()`` that raised there is nothing left to end.

        Raises:
            Exception: What the database raised at a commit that the policy asked for.
        """
        session = self._take_session()
        if session is not None:
            self._end_failed(session, exc)
        if self._unsent is not None:
            self._send_unsent()

    def _end_failed(self, session: Session, exc: BaseException) -> None:
        """Commit by the policy or roll back, and close."""
        outcome = outcome_of(exc)
        try:
            if outcome in self.plan.commit_on:
                self._end_and_close(session, commits=True)
            else:
                self._abandon(session, exc)
        except BaseException as commit_exc:
            self._tell(ledger_of(session), outcome_of(commit_exc))
            raise
        self._tell(ledger_of(session), outcome)

    def _tell(self, ledger: Ledger | None, outcome: Outcome) -> None:
        # It has ended: whoever asks a registry from now on gets what that held before.
        self.registry = None
        plan = self.plan
        if plan.listeners and ledger is not None:
            tell(
                plan.listeners,
                report_of(plan.name, self.request.id, outcome, ledger, monotonic() - self.started),
            )

    def _take_session(self) -> Session | None:
        """Return the session if this request has one of its own and used it.

        From here on it has none.
        """
        session, self.used_session = self.used_session, None
        if session is None or self.is_borrowed or not is_open(session):
            return None
        self.ended_session = session
        return session

    def _end_and_close(self, session: Session, commits: bool) -> Ledger | None:
        ledger = ledger_of(session)
        if ledger is not None and ledger.ended_at is not None:
            ledger.goes_on(monotonic())
        # Without a commit, closing is the rollback: on a dead connection it fails, and the work is
        # none the worse.
        if commits and (session.in_transaction() or session.new):
            try:
                if self.own_result is not None:
                    self.own_result.write_by(session)
                self._commit(session)
            except BaseException as exc:
                self._unsent = None
                self._abandon(session, exc)
                raise
            if self.own_result is not None:
                self.own_result.is_committed()
        try:
            session.close()
        except Exception:  # noqa: BLE001 - every error must be seen here.
            drop(session, self.owner)
        return ledger

    def _commit(self, session: Session) -> None:
        commits = commits_under_way.get()
        if commits is not None and commits.request is self.request:
            commits.is_ending = True
        commit(session, self.owner)

    def _abandon(self, session: Session, exc: BaseException) -> None:
        self.is_in_callers_transaction = isinstance(session.bind, Connection)
        abandon(session, exc, self.owner)

    def _send_unsent(self) -> None:
        """Send what waited for the end of the transaction.

        Raises:
            Reject: A message could not be sent.
        """
        unsent, self._unsent = self._unsent or [], None
        if self.plan.is_async:
            aside(partial(_send_all, unsent))
        else:
            _send_all(unsent)


def _send_all(unsent: Sequence[Callable[[], object]]) -> None:
    for send in unsent:
        try:
            send()
        except Reject:
            raise
        except Exception as exc:
            # As Task.retry() does when its message cannot be sent: the request is rejected, not
            # retried for ever.
            raise Reject(exc, requeue=False) from exc
