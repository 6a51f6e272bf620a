"""The class of a task's requests in a worker's parent: ours, also where a task class has its own.

Underneath ``task.py``, which says at each binding what the worker is to take.
"""

from __future__ import annotations

from typing import Any

from celery.utils.imports import symbol_by_name

from ..errors import ConfigurationError

__all__ = ["REQUEST", "combine_requests"]

#: By name: the worker's code is imported in workers only.
REQUEST = "celery_alchemy.worker.parent:SessionRequest"

_CELERYS = "celery.worker.request:Request"


def combine_requests(cls: Any) -> None:
    """Have a task class with a ``Request`` of its own get one that is ours too.

    Without ours, nobody runs ``record_failure`` for a child that was lost, and nobody counts the
    starts of a ``once`` task.

    Args:
        cls: The class of a task. Its ``Request`` is read by the worker, which also imports it then.
    """
    written = [vars(base)["Request"] for base in cls.__mro__ if "Request" in vars(base)]
    own = [given for given in written if given not in (REQUEST, _CELERYS)]
    if own and not isinstance(own[0], _Combined):
        cls.Request = _Combined(own)


class _Combined:
    """Gives the worker the combined class when it asks the task for ``Request``."""

    def __init__(self, own: list[str | type]) -> None:
        self._own = own
        self._made: type | None = None

    def __get__(self, task: object, owner: object = None) -> type:
        if self._made is None:
            self._made = self._make(owner)
        return self._made

    def _make(self, owner: object) -> type:
        ours, celerys = symbol_by_name(REQUEST), symbol_by_name(_CELERYS)
        own: list[type] = [
            given if isinstance(given, type) else symbol_by_name(given) for given in self._own
        ]
        if any(issubclass(one, ours) for one in own):
            return own[0]
        try:
            if not all(issubclass(one, celerys) for one in own):
                raise TypeError(f"{own[0].__qualname__} is not derived from {_CELERYS}")
            # Ours in front: it always goes on to the next one, which is more than others promise.
            return type(own[0].__name__, (ours, *own), {"__module__": own[0].__module__})
        except TypeError as exc:
            raise ConfigurationError(
                f"The Request of task {getattr(owner, 'name', None)!r},"
                f" {own[0].__module__}.{own[0].__qualname__},"
                f" cannot be one class with the library's: {exc}.",
                f"Derive it from {REQUEST.replace(':', '.')}.",
            ) from exc
