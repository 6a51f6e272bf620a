"""Entities as arguments: what a caller passes as a mapped instance travels as a reference.

Beside ``injection.py``: parameters are read once when a task is made; arguments are encoded where a
call becomes a message. A reference is a plain dict of strings and numbers, so every serializer and
every canvas carries it. ``entity_loading.py`` makes rows of references.
"""

from __future__ import annotations

import inspect as python_inspect
import types
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
)
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sqlalchemy import MetaData, inspect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import InstanceState, Mapper

from ..errors import ConfigurationError, EntityReferenceError
from .entity_keys import to_plain
from .entity_rows import MARK, AnyMapper

__all__ = [
    "EntityParameter",
    "ForUpdate",
    "Missing",
    "belongs_to",
    "encoded",
    "entity_parameters",
    "is_entity",
    "models_from",
    "named_after",
    "reference_to",
]

Missing = Literal["fail", "ignore", "retry"]
Many = type[list[object]] | type[tuple[object, ...]] | type[dict[object, object]]


class ForUpdate:
    """Locks the row: ``book: Annotated[Book, ForUpdate]`` loads it with SELECT ... FOR UPDATE."""


@dataclass(frozen=True, slots=True)
class EntityParameter:
    """A parameter that is annotated with a mapped class.

    Attributes:
        name: Its name in the signature.
        index: Its place among the positional parameters that callers see; None if it is
            keyword-only.
        entity: The mapped class.
        many: How the body gets several entities: ``list``, ``tuple`` or ``dict``; None for one
            entity.
        is_optional: None is a value. It takes the place of a missing row; of several entities the
            missing ones are left out.
        items_optional: None is a value beside several entities, and takes the place of a missing
            row.
        for_update: The rows are locked.
        rest: It is ``*name`` or ``**name``.
        named_elsewhere: The parameters whose keywords ``**name`` does not take.
        unresolved: The text of an annotation of which nobody knows what class it means; None for
            one that is known.
    """

    name: str
    index: int | None
    entity: type[object]
    many: Many | None = None
    is_optional: bool = False
    items_optional: bool = False
    for_update: bool = False
    rest: bool = False
    named_elsewhere: frozenset[str] = frozenset()
    unresolved: str | None = None


def is_entity(value: object) -> bool:
    """Tell whether a value is an instance of a mapped class.

    A mock, which has every attribute, is not.
    """
    return isinstance(getattr(value, "_sa_instance_state", None), InstanceState)


#: Types of values that are no entities and hold none.
_HOLD_NOTHING = frozenset({type(None), bool, int, float, str, bytes})


_values: Callable[[Any], Iterable[object]] = dict.values
_CONTAINERS: frozenset[type] = frozenset({list, tuple, dict})

#: Levels after which containers are looked at once, and levels that are looked at; JSON takes as
#: many.
_DEEP, _DEEPEST = 20, 1000


# --- the caller's side ----------------------------------------------------------------------------


def encoded(value: object, allowed: Callable[[type], bool]) -> object:
    """Return a value with every entity in it replaced by its reference.

    Entities are found in lists, tuples and dicts as well.

    Args:
        value: Arguments as the caller gave them; returned as they are when they hold no entity.
        allowed: Says whether a mapped class may travel.

    Raises:
        EntityReferenceError: An entity has no primary key yet, is deleted, or its class may not
            travel.
    """
    kind = type(value)
    # Whatever is no container is not asked what it holds.
    members: Any = _values(value) if kind is dict else value
    if kind in _CONTAINERS and _HOLD_NOTHING.issuperset(map(type, members)):
        # As nearly all are: 1 us less than by levels.
        return value
    return _encoded(value, allowed) if _holds_entity(value) else value


def _holds_entity(value: object) -> bool:
    """Tell whether there is an entity in a value, or whether it is nested too deeply to tell.

    All that is nested equally deep is looked at together, without a step of Python for each
    container: rows of a few numbers, which most large arguments are, take less than JSON takes for
    them.
    """
    level: list[object] = [value]
    for depth in range(_DEEPEST):
        kinds = set(map(type, level)) - _HOLD_NOTHING
        if not kinds:
            return False
        if depth > _DEEP:
            # What holds itself grows from level to level.
            level = list({id(one): one for one in level}.values())
        inside: list[object] = []
        if kinds - _CONTAINERS:
            for one in level:
                if is_entity(one):
                    return True
                if type(one) not in _CONTAINERS and isinstance(one, (list, tuple)):
                    inside += one
        for kind in kinds & _CONTAINERS:
            found: list[Any] = [one for one in level if type(one) is kind]
            inside += chain.from_iterable(map(_values, found) if kind is dict else iter(found))
        level = inside
    return True


def _encoded(value: object, allowed: Callable[[type], bool]) -> object:
    if is_entity(value):
        return reference_to(value, allowed)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _encoded(item, allowed) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    changed = [_encoded(item, allowed) for item in value]
    return changed if isinstance(value, list) else tuple(changed)


def reference_to(entity: object, allowed: Callable[[type], bool]) -> dict[str, object]:
    """Return the reference to an entity.

    Raises:
        EntityReferenceError: It has no primary key yet, is deleted, or its class may not travel.
    """
    state = inspect(entity)
    name = type(entity).__name__
    if not allowed(type(entity)):
        raise EntityReferenceError(
            name,
            "its class is not one of the Alchemy's models",
            "Add its base to models=, or pass its key.",
        )
    if state.transient or state.pending:
        raise EntityReferenceError(
            name,
            "it has no row yet",
            "Add it to the session and flush() first; the task is sent on commit.",
        )
    if (
        state.deleted
        or state.was_deleted
        or (state.session is not None and entity in state.session.deleted)
    ):
        raise EntityReferenceError(
            name, "it is deleted", "Pass what the task needs to know of it as plain values."
        )
    try:
        key = [
            to_plain(part, column.type)
            for part, column in zip(state.identity, state.mapper.primary_key, strict=True)
        ]
    except Exception as exc:
        raise EntityReferenceError(
            name, f"its key cannot travel: {exc}", "Pass what finds the row as plain values."
        ) from exc
    return {MARK: name, "key": key}


def models_from(models: object) -> tuple[MetaData, ...]:
    """Return the MetaData of declarative bases, registries or MetaData, of one or of several.

    Raises:
        ConfigurationError: Something in it is none of these.
    """
    several = models if isinstance(models, (list, tuple, set)) else (models,)
    found = []
    for model in several:
        metadata = model if isinstance(model, MetaData) else getattr(model, "metadata", None)
        if not isinstance(metadata, MetaData):
            raise ConfigurationError(
                f"models holds a {type(model).__name__!r}.",
                "Give declarative bases, registries or MetaData.",
            )
        found.append(metadata)
    return tuple(found)


def belongs_to(class_: type, models: tuple[MetaData, ...]) -> bool:
    """Tell whether a mapped class is one of these models."""
    mapper = _mapper(class_)
    return mapper is not None and any(mapper.registry.metadata is metadata for metadata in models)


# --- the signature --------------------------------------------------------------------------------


def entity_parameters(
    signature: python_inspect.Signature, hints: Mapping[str, object]
) -> tuple[EntityParameter, ...]:
    """Find the parameters that are annotated with mapped classes.

    Args:
        signature: The signature that callers see.
        hints: The resolved annotations, with ``Annotated``.
    """
    found = []
    for index, parameter in enumerate(signature.parameters.values()):
        wanted = _wanted(hints.get(parameter.name, parameter.annotation))
        is_rest = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if wanted is not None and not (is_rest and wanted.many is not None):
            found.append(named_after(wanted, parameter, index, signature))
    return tuple(found)


def named_after(
    wanted: EntityParameter,
    parameter: python_inspect.Parameter,
    index: int,
    signature: python_inspect.Signature,
) -> EntityParameter:
    """Return a parameter without a name with that of a signature, and its place."""
    place = None if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) else index
    named = replace(wanted, name=parameter.name, index=place)
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return named
    many: Many = dict
    if parameter.kind is parameter.VAR_POSITIONAL:
        many = tuple
    others = frozenset(signature.parameters) - {parameter.name}
    return replace(_several(named, many), rest=True, named_elsewhere=others)


#: The annotations of several entities, and what the body gets.
_SEVERAL: dict[object, Many] = {
    **dict.fromkeys((list, Sequence, MutableSequence, Collection, Iterable), list),
    **dict.fromkeys((dict, Mapping, MutableMapping), dict),
    tuple: tuple,
}


def _wanted(annotation: object) -> EntityParameter | None:
    """Return what an annotation asks for, as a parameter without a name.

    None if it names no mapped class.
    """
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        wanted = _wanted(inner)
        locks = any(extra is ForUpdate or isinstance(extra, ForUpdate) for extra in extras)
        return replace(wanted, for_update=True) if wanted is not None and locks else wanted
    if origin in (Union, types.UnionType):
        members = get_args(annotation)
        found = [wanted for wanted in map(_wanted, members) if wanted is not None]
        # Beside it, an int, say, for callers that have the key only: that passes as it is.
        return replace(found[0], is_optional=type(None) in members) if len(found) == 1 else None
    if origin in _SEVERAL:
        many, inner = _SEVERAL[origin], get_args(annotation)
        if many is tuple and inner[1:] != (...,):
            return None
        wanted = _wanted(inner[-1] if many is dict else inner[0])
        return None if wanted is None or wanted.many is not None else _several(wanted, many)
    if isinstance(annotation, type) and _mapper(annotation) is not None:
        return EntityParameter("", None, annotation)
    return None


def _several(one: EntityParameter, many: Many) -> EntityParameter:
    return replace(one, many=many, is_optional=False, items_optional=one.is_optional)


def _mapper(class_: type) -> AnyMapper | None:
    try:
        mapper: object = inspect(class_)
    except NoInspectionAvailable:
        return None
    return mapper if isinstance(mapper, Mapper) else None
