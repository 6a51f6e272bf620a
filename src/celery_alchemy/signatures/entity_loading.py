"""Entities in the worker: a reference arrives as the row, loaded in the task's session.

Above ``entities.py``, which has made the references; ``requests/arguments.py`` calls this before a
body runs. The key of a ``once`` task is made here too, where no row is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from sqlalchemy import inspect
from sqlalchemy.orm import Session

from ..errors import EntityReferenceError
from .entities import EntityParameter, is_entity, reference_to
from .entity_rows import MARK, key_of_reference, named_mapper, rows_of
from .unresolved import IMPORT_IT

__all__ = ["key_arguments", "load", "refuse_unresolved"]


def load(
    session: Session,
    parameters: Iterable[EntityParameter],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments with references replaced by rows of the session.

    There is one SELECT for each parameter.

    Only rows of the class in the annotation, or of a class derived from it, are loaded; the name in
    a reference selects among these and is never imported.

    Raises:
        EntityNotFoundError: A row is not there.
        EntityReferenceError: A reference names another class, or its key does not fit.
    """
    return _replaced(
        parameters, args, kwargs, lambda parameter, value: _loaded(session, parameter, value)
    )


def refuse_unresolved(
    parameters: Iterable[EntityParameter],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
) -> None:
    """Refuse a reference for a parameter of which nobody knows the class: none could be loaded.

    Args:
        parameters: Those whose annotations cannot be resolved.
        args: Positional arguments as they came.
        kwargs: Keyword arguments as they came.

    Raises:
        EntityReferenceError: One of them got a reference, or a list or dict with one.
    """
    _replaced(parameters, args, kwargs, _without_references)


def _without_references(parameter: EntityParameter, value: object) -> object:
    inside: Iterable[object] = value if isinstance(value, (list, tuple)) else ()
    if isinstance(value, dict):
        inside = value.values()
    for item in (value, *inside):
        if isinstance(item, Mapping) and MARK in item:
            raise EntityReferenceError(
                str(item[MARK]),
                f"the annotation {parameter.unresolved!r} of {parameter.name!r} cannot be resolved"
                " at run time, so that nobody knows which rows it takes",
                IMPORT_IT,
            )
    return value


#: Several entities, or what stands for them.
_Several = Mapping[object, object] | Sequence[object]


def _replaced(
    parameters: Iterable[EntityParameter],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    replacement: Callable[[EntityParameter, object], Any],
) -> tuple[tuple[object, ...], dict[str, object]]:
    positional, named = list(args), dict(kwargs)
    for parameter in parameters:
        if parameter.rest:
            if parameter.index is not None:
                positional[parameter.index :] = replacement(
                    parameter, positional[parameter.index :]
                )
            else:
                rest = {
                    name: value
                    for name, value in named.items()
                    if name not in parameter.named_elsewhere
                }
                named.update(replacement(parameter, rest))
        elif parameter.index is not None and parameter.index < len(positional):
            positional[parameter.index] = replacement(parameter, positional[parameter.index])
        elif parameter.name in named:
            named[parameter.name] = replacement(parameter, named[parameter.name])
    return tuple(positional), named


def _loaded(session: Session, parameter: EntityParameter, value: object) -> object:
    if _is_several(value, parameter):
        return _loaded_several(session, parameter, value)
    reference = _as_reference(value)
    if reference is None:
        return value
    return _rows(session, parameter, [reference])[0]


def _rows(
    session: Session, parameter: EntityParameter, references: list[dict[str, object]]
) -> list[object]:
    may_miss = parameter.is_optional or parameter.items_optional
    return rows_of(
        session, parameter.entity, references, for_update=parameter.for_update, may_miss=may_miss
    )


def _is_several(value: object, parameter: EntityParameter) -> TypeGuard[_Several]:
    """Tell whether a value stands for several entities, in a message or in a direct call."""
    return (
        isinstance(value, Mapping if parameter.many is dict else (list, tuple))
        and parameter.many is not None
    )


def _loaded_several(session: Session, parameter: EntityParameter, value: _Several) -> object:
    names, items = (
        (list(value), list(value.values()))
        if parameter.many is dict and isinstance(value, Mapping)
        else (range(len(value)), list(value))
    )
    found = [_as_reference(item) for item in items]
    references = [reference for reference in found if reference is not None]
    if not references:
        return value
    if any(
        reference is None and not (item is None and parameter.items_optional)
        for item, reference in zip(items, found, strict=True)
    ):
        raise EntityReferenceError(
            parameter.entity.__name__,
            f"{parameter.name!r} holds other values beside entities",
            "Pass entities alone.",
        )
    rows = iter(_rows(session, parameter, references))
    filled = [
        (name, None if reference is None else next(rows))
        for name, reference in zip(names, found, strict=True)
    ]
    kept = [(name, row) for name, row in filled if row is not None or parameter.items_optional]
    return dict(kept) if parameter.many is dict else _gathered(parameter, (row for _, row in kept))


def _gathered(
    parameter: EntityParameter, items: Iterable[object]
) -> list[object] | tuple[object, ...]:
    """Return several entities as the body gets them, but for a dict."""
    return tuple(items) if parameter.many is tuple else list(items)


class KeyOnly:
    """What the key of a ``once`` task sees of an entity.

    These are the attributes of its primary key, typed as in the row.
    """

    def __init__(self, class_name: str, key: Mapping[str, object]) -> None:
        self.__dict__.update(key)
        self._shown = f"{class_name}({', '.join(map(str, key.values()))})"
        self._names = ", ".join(key)

    def __repr__(self) -> str:
        return self._shown

    def __getattr__(self, name: str) -> object:
        raise AttributeError(
            f"The key of a once task is made where no row is loaded: of {self._shown} it knows"
            f" {self._names}, and not {name}."
        )


def key_arguments(
    parameters: Iterable[EntityParameter], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments with references replaced by what the key of a ``once`` task sees.

    Raises:
        EntityReferenceError: A reference names another class, or its key does not fit.
    """
    return _replaced(parameters, args, kwargs, _key_only)


def _key_only(parameter: EntityParameter, value: object) -> object:
    if _is_several(value, parameter):
        one = replace(parameter, many=None)
        if parameter.many is dict and isinstance(value, Mapping):
            return {name: _key_only(one, item) for name, item in value.items()}
        return _gathered(parameter, (_key_only(one, item) for item in value))
    reference = _as_reference(value)
    if reference is None:
        return value
    mapper = named_mapper(inspect(parameter.entity), reference)
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    return KeyOnly(
        mapper.class_.__name__, dict(zip(names, key_of_reference(mapper, reference), strict=True))
    )


def _as_reference(value: object) -> dict[str, object] | None:
    """Return a reference: one that came in a message, or one to an instance.

    A direct call may pass an instance.
    """
    if isinstance(value, Mapping) and MARK in value:
        return dict(value)
    if is_entity(value):
        return reference_to(value, lambda class_: True)
    return None
