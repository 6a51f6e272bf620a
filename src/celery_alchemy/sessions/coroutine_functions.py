"""Which callables make a coroutine: functions, and objects whose ``__call__`` is an ``async def``.

Underneath all that must know whether to await what a callable of the user's returns.
"""

from __future__ import annotations

import functools
import inspect

__all__ = ["is_coroutine_function"]


def is_coroutine_function(function: object) -> bool:
    """Tell whether calling a function, a partial of one or an object makes a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or (
        not isinstance(function, type) and inspect.iscoroutinefunction(type(function).__call__)
    )
