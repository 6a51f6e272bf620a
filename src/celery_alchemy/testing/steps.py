"""Steps in tests: which ones ran, and tasks that begin in the middle.

Beneath the captured sends. What ran is noticed where the library commits a step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..errors import ConfigurationError
from ..messages.celery_types import App
from ..messages.message import Message
from ..outbox import step_records
from ..requests import once_records, steps
from ..requests.once_keys import once_row
from ..requests.step_unit import SteppedUnit
from ..task import SessionTask
from .points import replaced

__all__ = ["record_steps_of", "steps_run"]


@contextmanager
def steps_run() -> Iterator[list[str]]:
    """Give a list of the steps that run and are committed inside of the block, by name, in order.

    Those that are recorded are not among them.

    For tasks of this process, however they are called: ``sent.run()``, ``apply()`` or directly.
    """
    ran: list[str] = []
    original = steps.keep

    @functools.wraps(original)
    def keep(unit: SteppedUnit, name: str, value: object) -> object:
        try:
            return original(unit, name, value)
        finally:
            # Also where a fault strikes right behind its COMMIT.
            if unit.steps is not None and name in unit.steps.done:
                ran.append(name)

    with replaced(steps, "keep", keep):
        yield ran


def record_steps_of(app: App, message: Message, values: Mapping[str, object]) -> None:
    """Record steps of a task that was sent, as if an earlier run had done them and been killed.

    Args:
        app: Its app.
        message: Of a ``once`` task.
        values: What each step has returned, by its name, in order.

    Raises:
        ConfigurationError: The task is no ``once`` task.
        StepValueError: A value cannot be kept.
    """
    task = app.tasks[str(message.task_name)]
    home = task.home() if isinstance(task, SessionTask) else None
    row = None if home is None else once_row(task, home, message)
    if home is None or row is None:
        raise ConfigurationError(f"Task {task.name!r} records no steps.", "Give it once=True.")
    # A session of the Alchemy: in a test it may join the transaction of the test.
    with home.session() as session:
        table = home.place.within(session)
        if once_records.look(table, row.id).kind == "new":
            once_records.track(table, row.id, message.task_id, task.name, deliveries=1)
        for position, (name, value) in enumerate(values.items(), start=1):
            text, _ = step_records.kept_value(name, value, f"Task {task.name}[{message.task_id}]")
            step_records.insert_step(table, row.id, name, position, text)
        session.commit()
