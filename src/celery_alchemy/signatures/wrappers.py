"""The parameters of a body as those who call it see them: through the decorators around it.

Beneath ``injection.py``. ``inspect.signature()`` shows those of the innermost function, and a
decorator by ``functools.wraps`` may take some for itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

__all__ = ["Parameters", "parameters_of"]

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a body is called with.

    Attributes:
        all: In the order in which a caller gives them; without that of the task.
        behind: The names of those that stand behind parameters which a decorator takes by name.
            Whether it hands those on or keeps them, nobody can tell: the place of what follows is
            not known, and by name it arrives in any case.
        takers: The decorators' parameters of that kind which take no names for others.
    """

    all: Sequence[Parameter]
    behind: frozenset[str] = frozenset()
    takers: tuple[str, ...] = ()


def parameters_of(body: Callable[..., object], *, bound: bool) -> Parameters:
    """Return what a body is called with.

    Args:
        body: The function that the user wrote, or a wrapper with ``__wrapped__`` around it.
        bound: Its first parameter is the task.
    """
    is_method = inspect.ismethod(body)
    innermost = list(inspect.signature(body).parameters.values())
    seen = Parameters(innermost[1:] if bound and innermost else innermost)
    for layer in reversed(list(_wrappers(getattr(body, "__func__", body)))):
        own = list(layer.parameters.values())
        if (bound or is_method) and own and own[0].kind in _POSITIONAL:
            own = own[1:]
        seen = _through(own, seen)
    return seen


def _wrappers(function: Any) -> Iterator[inspect.Signature]:
    """Yield the own signatures of the decorators, the outermost first."""
    while hasattr(function, "__wrapped__") and not hasattr(function, "__signature__"):
        # One that is written in C, as functools.lru_cache, hands on what it gets.
        with suppress(ValueError):
            yield inspect.signature(function, follow_wrapped=False)
        function = function.__wrapped__


def _through(own: Sequence[Parameter], inner: Parameters) -> Parameters:
    """Return how a decorator is called.

    Args:
        own: Its parameters.
        inner: How it may call what it wraps.
    """
    kinds = {one.kind for one in own}
    named = [one for one in own if one.kind in _POSITIONAL]
    only_by_name = [one for one in own if one.kind is Parameter.KEYWORD_ONLY]
    taken = {one.name for one in (*named, *only_by_name)}
    takes_names = Parameter.VAR_KEYWORD in kinds
    rest = [
        reached
        for one in inner.all
        if one.name not in taken
        and (reached := _reached(one, Parameter.VAR_POSITIONAL in kinds, takes_names)) is not None
    ]
    behind, takers = inner.behind - taken, inner.takers
    if named:
        behind |= {one.name for one in rest}
        takers = takers if takes_names else (*takers, *(one.name for one in named))
    written = {one.name: one for one in inner.all}
    named = [_annotated(one, written.get(one.name)) for one in named]
    only_by_name = [_annotated(one, written.get(one.name)) for one in only_by_name]
    return Parameters(_in_order([*named, *rest, *only_by_name]), behind, takers)


def _reached(one: Parameter, takes_places: bool, takes_names: bool) -> Parameter | None:
    """Return a parameter as a decorator hands it on; None if it cannot."""
    if one.kind is Parameter.VAR_POSITIONAL:
        return one if takes_places else None
    if one.kind in (Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY):
        return one if takes_names else None
    if takes_places and takes_names:
        return one
    if takes_places:
        return one.replace(kind=Parameter.POSITIONAL_ONLY)
    is_reached = takes_names and one.kind is Parameter.POSITIONAL_OR_KEYWORD
    return one.replace(kind=Parameter.KEYWORD_ONLY) if is_reached else None


def _annotated(one: Parameter, written: Parameter | None) -> Parameter:
    """Return a decorator's parameter with what the function has written at the same one."""
    if written is None or one.annotation is not one.empty:
        return one
    return one.replace(annotation=written.annotation)


def _in_order(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return parameters as a signature may have them."""
    last = max(
        (n for n, one in enumerate(parameters) if one.kind is one.POSITIONAL_ONLY), default=-1
    )
    placed = [
        one.replace(kind=one.POSITIONAL_ONLY) if n < last else one
        for n, one in enumerate(parameters)
    ]
    ordered: list[Parameter] = []
    for one in sorted(placed, key=lambda one: one.kind):
        may_be_left_out = any(
            before.default is not before.empty for before in ordered if before.kind in _POSITIONAL
        )
        if one.kind in _POSITIONAL and may_be_left_out and one.default is one.empty:
            # It is given by name then, which a signature cannot say.
            ordered.append(one.replace(default=...))
        else:
            ordered.append(one)
    return ordered
