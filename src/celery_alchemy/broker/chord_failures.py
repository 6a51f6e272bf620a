"""A chord that has failed and is a part of another one: that one is told.

Beneath ``chords.py``. Celery writes the failure down for the body alone, which never runs and so
never reports to the chord around it: that one would wait for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from celery import states
from celery.app.task import Context

from ..messages.celery_types import Fields
from .result_ends import EndingBackend

__all__ = ["FailingBackend"]


class FailingBackend(EndingBackend):
    """A result backend whose failed chords are failed parts of those around them."""

    def chord_error_from_stack(self, callback: Any, exc: Exception | None = None) -> Any:
        """Write that the body of a chord has failed, and note it where it is a part."""
        found = super().chord_error_from_stack(callback, exc)
        for part in _parts_in(callback):
            self.on_chord_part_return(part, states.FAILURE, exc)
        return found


def _parts_in(body: Mapping[str, Any]) -> Iterator[Context]:
    """Yield the requests that the last tasks of a body would have, of those that are parts."""
    kind, kwargs = body.get("subtask_type"), body.get("kwargs") or {}
    if kind == "chain":
        yield from _parts_in(kwargs["tasks"][-1])
    elif kind == "chord":
        yield from _parts_in(kwargs["body"])
    elif kind == "group":
        for task in kwargs["tasks"]:
            yield from _parts_in(task)
    else:
        options: Fields = body.get("options") or {}
        if options.get("chord"):
            yield Context(
                id=options.get("task_id"),
                chord=options["chord"],
                group=options.get("group_id"),
                group_index=options.get("group_index"),
            )
