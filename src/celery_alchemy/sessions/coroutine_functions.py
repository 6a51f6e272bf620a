"""Which callables make a coroutine: functions, and objects whose ``__call__`` is an ``async def``.

Underneath all that must know whether to await what a callable of the user's returns.
"""

from __future__ import annotations

import functools
import inspect
import re
from types import CodeType
from typing import Any

__all__ = ["is_coroutine_function", "runs_what_it_wraps"]

#: What those are called that run a coroutine to its end: ``asyncio.run``, ``run_until_complete``,
#: ``async_to_sync``, ``anyio.run``, ``run_coroutine_threadsafe``, and what projects call theirs.
_RUNNERS = re.compile(r"(^|_)(run|sync|syncify|until|loop|threadsafe|wait)(_|$)")


def is_coroutine_function(function: object) -> bool:
    """Tell whether calling a function, a partial of one or an object makes a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or (
        not isinstance(function, type) and inspect.iscoroutinefunction(type(function).__call__)
    )


def runs_what_it_wraps(function: Any) -> bool:
    """Tell whether a decorator around an ``async def`` runs it, in an event loop of its own.

    Nobody but the decorator knows; the names that its code uses say what it most likely does.
    """
    while hasattr(function, "__wrapped__"):
        if not is_coroutine_function(function) and _names_runner(_code_of(function)):
            return True
        function = function.__wrapped__
    return False


def _code_of(function: object) -> object:
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        function = inspect.getattr_static(type(function), "__call__", None)
    return getattr(function, "__code__", None)


def _names_runner(code: object) -> bool:
    if not isinstance(code, CodeType):
        return False
    names = (*code.co_names, *code.co_freevars)
    return any(map(_RUNNERS.search, names)) or any(map(_names_runner, code.co_consts))
