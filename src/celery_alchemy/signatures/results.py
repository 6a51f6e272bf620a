"""What a task may return: plain values, and no ORM objects.

Beside the request, at whose end ``requests/sync_body.py`` and ``requests/async_body.py`` ask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Row, inspect

from ..errors import EntityReturnedError
from .entities import is_entity

__all__ = ["PLAIN_TYPES", "refuse_entities"]

PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})

_CONTAINERS = (list, tuple, set, frozenset, Mapping, Row)


def refuse_entities(result: object, owner: Callable[[], str]) -> None:
    """Raise if a task's result is an ORM object, or holds one.

    It may hold one in lists, tuples, sets, dicts and rows, however deep.

    Raises:
        EntityReturnedError: It names the class and the primary key.
    """
    # Without recursion: what a task returns may be nested deeper than Python's stack is.
    waiting = [result]
    seen: set[int] = set()
    while waiting:
        value: Any = waiting.pop()
        if is_entity(value):
            state = inspect(value)
            key = state.identity if state.identity is not None else "not saved yet"
            raise EntityReturnedError(owner(), f"{type(value).__name__}({key})")
        # The type, for a mock with a spec gives its spec out for its class.
        kind = type(value)
        if not issubclass(kind, _CONTAINERS) or id(value) in seen:
            continue
        seen.add(id(value))
        inside = value.values() if issubclass(kind, Mapping) else value
        waiting.extend(item for item in inside if type(item) not in PLAIN_TYPES)
