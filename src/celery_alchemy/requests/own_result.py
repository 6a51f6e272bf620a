"""The result of a task, and its part in a chord, that are written by the task's own COMMIT.

Beneath the unit of work, which writes it, and the backend, which finds it done.
"""

from __future__ import annotations

from dataclasses import dataclass

from celery.app.task import Context
from sqlalchemy.orm import Session

from ..outbox.chord_records import Chord, Part, may_note
from ..outbox.place import Place
from ..outbox.result_records import Record, ResultKeeper, keep, key_of
from .plan import Plan

__all__ = ["OwnResult", "committed_result", "has_result", "own_result"]

#: Where a request says that its result is committed. A request lives for one attempt.
_COMMITTED = "celery_alchemy_result"


@dataclass(slots=True)
class OwnResult:
    """A result on its way into the task's transaction.

    Attributes:
        request: The task's.
        value: What the body returned.
        record: What is kept of it; None if its result is ignored.
        part: What is noted of it; None for a task that is no part of a chord.
        keeper: The result backend.
        place: Where the table is.
        children: How many tasks the request had sent.
        chord: How far the part's chord has got; None until the part is noted.
    """

    request: Context
    value: object
    record: Record | None
    part: Part | None
    keeper: ResultKeeper
    place: Place
    children: int
    chord: Chord | None = None

    def write_by(self, session: Session) -> None:
        """Write it in a session's transaction, which is begun if there is only unsaved work."""
        if not session.in_transaction():
            session.begin()
        there = self.place.within(session)
        if self.record is not None:
            keep(there, key_of(self.request.id), self.record)
        if self.part is not None and may_note(there):
            # Nothing but the COMMIT may come after it: the other parts wait.
            session.flush()
            self.chord = self.keeper.note_within(session, self.request, self.part)

    def is_committed(self) -> None:
        """Say so to whoever would write it again."""
        setattr(self.request, _COMMITTED, self)
        self.keeper.tell()

    def is_all_of(self, task_id: object, value: object) -> bool:
        """Tell whether nothing has come to it since: another value, or callbacks that were sent."""
        same = self.record is not None and task_id == self.request.id and value is self.value
        return same and _children(self.request) == self.children


def own_result(plan: Plan, request: Context, outer: object, value: object) -> OwnResult | None:
    """Return the result of a task that its own transaction can write; None where it cannot.

    Args:
        plan: The task's.
        request: Celery's.
        outer: What was at hand before its request began.
        value: What its body returned.

    Raises:
        kombu.exceptions.EncodeError: The result serializer cannot carry the value.
    """
    if (
        not ResultKeeper.is_in_use
        or request.id is None
        or request.called_directly
        or request.is_eager
    ):
        return None
    if not has_result(plan, request):
        return None
    # A body that calls run() of its own task is still the one request.
    if plan.options.read_only or getattr(outer, "request", None) is request:
        return None
    backend = plan.task.backend
    home = plan.home
    if home is None or not isinstance(backend, ResultKeeper) or not backend.is_database_of(home):
        return None
    record = None if _is_ignored(plan, request) else backend.record_of_success(value, request)
    part = backend.part_of(request, value) if request.chord else None
    return OwnResult(request, value, record, part, backend, home.place, _children(request))


def has_result(plan: Plan, request: Context) -> bool:
    """Tell whether anything is written of a task that has returned."""
    return bool(request.chord) or not _is_ignored(plan, request)


def _is_ignored(plan: Plan, request: Context) -> bool:
    # Celery's Context has False for every request that does not say.
    ignores = vars(request).get("ignore_result")
    return bool(plan.task.ignore_result if ignores is None else ignores)


def committed_result(request: object) -> OwnResult | None:
    """Return the result that a request has committed; None if it has not."""
    found: OwnResult | None = getattr(request, _COMMITTED, None)
    return found


def _children(request: Context) -> int:
    return len(request.children or ())
