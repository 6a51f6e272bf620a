"""The functions of steps: how each is called, and what it is given of the task's.

Beneath ``steps.py``, which commits what they do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from weakref import WeakKeyDictionary

from sqlalchemy.orm import Session

from ..sessions.any_session import in_scope
from ..sessions.coroutine_functions import is_coroutine_function
from ..signatures.injection import Injection, injection_of, is_async_session_class
from .attempt import UnitOfWork

__all__ = ["called"]


def called(
    unit: UnitOfWork,
    name: str,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> object:
    """Call a step's function, with the task's session where it asks for one and was given none."""
    if any(_is_session(value) for value in (*args, *kwargs.values())):
        return function(*args, **kwargs)
    what = f"step {name!r} of {unit.plan.name}"
    try:
        injection = _injection_of(function, what)
    except ValueError:
        # Python knows no signature of some functions that are written in C.
        return function(*args, **kwargs)
    if injection.session is None:
        return function(*args, **kwargs)
    is_coroutine = is_coroutine_function(inspect.unwrap(function))
    session = unit.offered() if is_coroutine else unit.session
    filled_args, filled_kwargs = injection.fill(args, kwargs, session)
    return function(*filled_args, **filled_kwargs)


#: What functions ask for, by the function: to read a signature takes a sixth of a step's time.
_injections: WeakKeyDictionary[FunctionType, Injection] = WeakKeyDictionary()


def _injection_of(function: Callable[..., object], what: str) -> Injection:
    if not isinstance(function, FunctionType):
        return injection_of(function, bound=False, task_name=what)
    known = _injections.get(function)
    if known is None:
        known = injection_of(function, bound=False, task_name=what)
        _injections[function] = known
    return known


def _is_session(value: object) -> bool:
    value = in_scope(value)
    return isinstance(value, Session) or is_async_session_class(type(value))
