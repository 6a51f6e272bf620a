"""How a step ends that is not committed as it should be, and what the task's body may make of it.

Between ``steps.py`` and ``step_unit.py``, which holds the transaction.
"""

from __future__ import annotations

import logging

from ..error_texts import note_step
from ..errors import StepError
from ..outbox.step_records import StepLog
from ..sessions.closing import roll_back
from ..signatures.outcomes import outcome_of
from .attempt import UnitOfWork
from .deliveries import Overtaken
from .step_unit import SteppedUnit

__all__ = ["failed", "log_of", "refuse_unended", "warn_of_look"]

logger: logging.Logger = logging.getLogger("celery_alchemy.steps")


def log_of(unit: UnitOfWork) -> StepLog:
    """Return the steps of a run."""
    if unit.steps is None:
        unit.steps = StepLog()
    return unit.steps


def failed(unit: UnitOfWork, name: str, exc: BaseException) -> None:
    """Note in which step an error came up, and undo what was written since the last one.

    A body that catches the error goes on from there.
    """
    log = log_of(unit)
    if isinstance(exc, Overtaken):
        # Whatever the body makes of it.
        log.was_overtaken = True
        return
    _note(log, name, exc)
    if isinstance(unit, SteppedUnit) and not _keeps_writes(unit, exc):
        roll_back(unit.session, exc, unit.owner)
        if log.committing == name:
            _look_for_commit(unit, log, name)


def _note(log: StepLog, name: str, exc: BaseException) -> None:
    """Say in which step an error came up, for whoever reads of the task's death."""
    outcome = outcome_of(exc)
    if outcome in ("failure", "reject") and isinstance(exc, Exception):
        note_step(exc, name)
    elif outcome == "failure":
        # Of a cancelled coroutine: what has cancelled it is not known here.
        log.broken_off = name


def _keeps_writes(unit: SteppedUnit, exc: BaseException) -> bool:
    """Tell whether what was written is left to the end of the request."""
    # A coroutine that is thrown away cannot wait for the database any more.
    is_thrown_away = unit.plan.is_async and isinstance(exc, GeneratorExit)
    return is_thrown_away or unit.ends_well_by(outcome_of(exc))


def _look_for_commit(unit: SteppedUnit, log: StepLog, name: str) -> None:
    """Find out whether the COMMIT of a step was carried out that something broke into."""
    log.committing = None
    try:
        unit.look_for_steps(waits=True)
    except Overtaken:
        log.was_overtaken = True
    except Exception:  # noqa: BLE001 - the error that broke in is raised.
        warn_of_look(unit, name)


def warn_of_look(unit: UnitOfWork, name: str) -> None:
    """Say in the log that a look has failed; to be called while its error is handled."""
    text = "%s: looking for the outcome of step %r failed"
    logger.warning(text, unit.owner(), name, exc_info=True)  # noqa: LOG014 - called by handlers.


def refuse_unended(unit: UnitOfWork) -> None:
    """Refuse to complete a task with a step under way, or one that was overtaken.

    Raises:
        StepError: Half of that step's work would be committed.
        Overtaken: The body has caught it, and went on without the step.
    """
    log = unit.steps
    if log is None:
        return
    if log.was_overtaken:
        raise Overtaken(unit.owner())
    if log.running is not None:
        raise StepError(
            log.running,
            unit.owner(),
            "is under way at the end of the body, and half of its work would be committed",
            "Await every step; `asyncio.gather()` leaves the others running when one fails.",
        )
