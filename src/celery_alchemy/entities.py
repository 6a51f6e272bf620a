"""Entities as arguments: a mapped instance travels as a reference and arrives as the row, loaded in the worker's session.

Beside ``injection.py``: read once when a task is made; encodes where a call becomes a message, loads where a body is called. A
reference is a plain dict of strings and numbers, so every serializer and every canvas carries it.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import inspect as python_inspect
import types
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from sqlalchemy import MetaData, inspect, select, tuple_
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import InstanceState, Mapper, Session

from .errors import ConfigurationError, EntityNotFoundError, EntityReferenceError

__all__ = [
    "EntityParameter",
    "ForUpdate",
    "Missing",
    "belongs_to",
    "encoded",
    "entity_parameters",
    "is_entity",
    "key_arguments",
    "load",
    "models_from",
]

Missing = Literal["fail", "ignore", "retry"]
Many = type[list[Any]] | type[tuple[Any, ...]] | type[dict[Any, Any]]

MARK = "__celery_alchemy_entity__"


class ForUpdate:
    """Locks the row: ``book: Annotated[Book, ForUpdate]`` loads it with SELECT ... FOR UPDATE."""


@dataclass(frozen=True, slots=True)
class EntityParameter:
    """A parameter that is annotated with a mapped class.

    Attributes:
        name: Its name in the signature.
        index: Its place among the positional parameters that callers see; None if it is keyword-only.
        entity: The mapped class.
        many: How the body gets several entities: ``list``, ``tuple`` or ``dict``; None for one entity.
        is_optional: None is a value. It takes the place of a missing row; of several entities the missing ones are left out.
        items_optional: None is a value beside several entities, and takes the place of a missing row.
        for_update: The rows are locked.
        rest: It is ``*name`` or ``**name``.
        named_elsewhere: The parameters whose keywords ``**name`` does not take.
    """

    name: str
    index: int | None
    entity: type[Any]
    many: Many | None = None
    is_optional: bool = False
    items_optional: bool = False
    for_update: bool = False
    rest: bool = False
    named_elsewhere: frozenset[str] = frozenset()


def is_entity(value: object) -> bool:
    """Tell whether a value is an instance of a mapped class; a mock, which has every attribute, is not."""
    return isinstance(getattr(value, "_sa_instance_state", None), InstanceState)


# --- the caller's side -----------------------------------------------------------------------------------------------------


def encoded(value: Any, allowed: Callable[[type], bool]) -> Any:
    """Return a value with every entity in it, in lists, tuples and dicts as well, replaced by its reference.

    Args:
        value: Arguments as the caller gave them; returned as they are when they hold no entity.
        allowed: Says whether a mapped class may travel.

    Raises:
        EntityReferenceError: An entity has no primary key yet, is deleted, or its class may not travel.
    """
    if is_entity(value):
        return _reference(value, allowed)
    if isinstance(value, (list, tuple)):
        changed = [encoded(item, allowed) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, Mapping) and type(value) is dict:
        items = {key: encoded(item, allowed) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    return value


def _reference(entity: Any, allowed: Callable[[type], bool]) -> dict[str, Any]:
    state = inspect(entity)
    name = type(entity).__name__
    if not allowed(type(entity)):
        raise EntityReferenceError(name, "its class is not one of the Alchemy's models", "Add its base to models=, or pass its key.")
    if state.transient or state.pending:
        raise EntityReferenceError(name, "it has no row yet", "Add it to the session and flush() first; the task is sent on commit.")
    if state.deleted or state.was_deleted or (state.session is not None and entity in state.session.deleted):
        raise EntityReferenceError(name, "it is deleted", "Pass what the task needs to know of it as plain values.")
    return {MARK: name, "key": [_plain(part) for part in state.identity]}


def _plain(part: Any) -> Any:
    if isinstance(part, enum.Enum):
        return part.name
    if part is None or isinstance(part, (bool, int, str, float)):
        return part
    if isinstance(part, (dt.datetime, dt.date, dt.time)):
        return part.isoformat()
    return part.hex() if isinstance(part, bytes) else str(part)


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
            raise ConfigurationError(f"models holds a {type(model).__name__!r}.", "Give declarative bases, registries or MetaData.")
        found.append(metadata)
    return tuple(found)


def belongs_to(class_: type, models: tuple[MetaData, ...]) -> bool:
    """Tell whether a mapped class is one of these models."""
    mapper = _mapper(class_)
    return mapper is not None and any(mapper.registry.metadata is metadata for metadata in models)


# --- the signature -----------------------------------------------------------------------------------------------------------


def entity_parameters(signature: python_inspect.Signature, hints: Mapping[str, Any]) -> tuple[EntityParameter, ...]:
    """Find the parameters that are annotated with mapped classes.

    Args:
        signature: The signature that callers see.
        hints: The resolved annotations, with ``Annotated``.
    """
    found = []
    names = frozenset(signature.parameters)
    for index, parameter in enumerate(signature.parameters.values()):
        wanted = _wanted(hints.get(parameter.name, parameter.annotation))
        if wanted is None:
            continue
        place = None if parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) else index
        named = replace(wanted, name=parameter.name, index=place)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if wanted.many is not None:
                continue
            many: Many = tuple if parameter.kind is parameter.VAR_POSITIONAL else dict
            named = replace(_several(named, many), rest=True, named_elsewhere=names - {parameter.name})
        found.append(named)
    return tuple(found)


#: The annotations of several entities, and what the body gets.
_SEVERAL: dict[Any, Many] = {
    **dict.fromkeys((list, Sequence, MutableSequence, Collection, Iterable), list),
    **dict.fromkeys((dict, Mapping, MutableMapping), dict),
    tuple: tuple,
}


def _wanted(annotation: Any) -> EntityParameter | None:
    """Return what an annotation asks for, as a parameter without a name; None if it names no mapped class."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        wanted = _wanted(inner)
        locks = any(extra is ForUpdate or isinstance(extra, ForUpdate) for extra in extras)
        return replace(wanted, for_update=True) if wanted is not None and locks else wanted
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        wanted = _wanted(members[0]) if len(members) == 1 else None
        return None if wanted is None else replace(wanted, is_optional=True)
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


def _mapper(class_: type) -> Mapper[Any] | None:
    try:
        mapper: object = inspect(class_)
    except NoInspectionAvailable:
        return None
    return mapper if isinstance(mapper, Mapper) else None


# --- the worker's side -------------------------------------------------------------------------------------------------------


def load(
    session: Session, parameters: Iterable[EntityParameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with references replaced by rows of the session: one SELECT for each parameter.

    Only rows of the class in the annotation, or of a class derived from it, are loaded; the name in a reference selects among
    these and is never imported.

    Raises:
        EntityNotFoundError: A row is not there.
        EntityReferenceError: A reference names another class, or its key does not fit.
    """
    return _replaced(parameters, args, kwargs, lambda parameter, value: _loaded(session, parameter, value))


def _replaced(
    parameters: Iterable[EntityParameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    replacement: Callable[[EntityParameter, Any], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    positional, named = list(args), dict(kwargs)
    for parameter in parameters:
        if parameter.rest:
            if parameter.index is not None:
                positional[parameter.index :] = replacement(parameter, positional[parameter.index :])
            else:
                rest = {name: value for name, value in named.items() if name not in parameter.named_elsewhere}
                named.update(replacement(parameter, rest))
        elif parameter.index is not None and parameter.index < len(positional):
            positional[parameter.index] = replacement(parameter, positional[parameter.index])
        elif parameter.name in named:
            named[parameter.name] = replacement(parameter, named[parameter.name])
    return tuple(positional), named


def _loaded(session: Session, parameter: EntityParameter, value: Any) -> Any:
    if _is_several(parameter, value):
        return _loaded_several(session, parameter, value)
    reference = _as_reference(value)
    if reference is None:
        return value
    return _rows(session, parameter, [reference])[0]


def _is_several(parameter: EntityParameter, value: Any) -> bool:
    """Tell whether a value is what comes in a message, or in a direct call, for several entities."""
    return isinstance(value, Mapping if parameter.many is dict else (list, tuple)) and parameter.many is not None


def _loaded_several(session: Session, parameter: EntityParameter, value: Any) -> Any:
    names, items = (list(value), list(value.values())) if parameter.many is dict else (range(len(value)), list(value))
    found = [_as_reference(item) for item in items]
    references = [reference for reference in found if reference is not None]
    if not references:
        return value
    if any(
        reference is None and not (item is None and parameter.items_optional) for item, reference in zip(items, found, strict=True)
    ):
        raise EntityReferenceError(
            parameter.entity.__name__, f"{parameter.name!r} holds other values beside entities", "Pass entities alone."
        )
    rows = iter(_rows(session, parameter, references))
    filled = [(name, None if reference is None else next(rows)) for name, reference in zip(names, found, strict=True)]
    kept = [(name, row) for name, row in filled if row is not None or parameter.items_optional]
    return dict(kept) if parameter.many is dict else cast("Any", parameter.many)(row for _, row in kept)


class KeyOnly:
    """What the key of a ``once`` task sees of an entity: the attributes of its primary key, typed as in the row."""

    def __init__(self, class_name: str, key: Mapping[str, Any]) -> None:
        self.__dict__.update(key)
        self._shown = f"{class_name}({', '.join(map(str, key.values()))})"
        self._names = ", ".join(key)

    def __repr__(self) -> str:
        return self._shown

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The key of a once task is made where no row is loaded: of {self._shown} it knows {self._names}, and not {name}."
        )


def key_arguments(
    parameters: Iterable[EntityParameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with references replaced by what the key of a ``once`` task sees of them.

    Raises:
        EntityReferenceError: A reference names another class, or its key does not fit.
    """
    return _replaced(parameters, args, kwargs, _key_only)


def _key_only(parameter: EntityParameter, value: Any) -> Any:
    many: Any = parameter.many
    if _is_several(parameter, value):
        one = replace(parameter, many=None)
        if many is dict:
            return {name: _key_only(one, item) for name, item in value.items()}
        return many(_key_only(one, item) for item in value)
    reference = _as_reference(value)
    if reference is None:
        return value
    mapper = cast("Mapper[Any]", inspect(parameter.entity))
    names = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    return KeyOnly(parameter.entity.__name__, dict(zip(names, _key(mapper, reference), strict=True)))


def _as_reference(value: Any) -> dict[str, Any] | None:
    """Return a reference as it came in a message, or that of an instance that a direct call passed."""
    if isinstance(value, Mapping) and MARK in value:
        return dict(value)
    if is_entity(value):
        return _reference(value, lambda class_: True)
    return None


def _rows(session: Session, parameter: EntityParameter, references: list[dict[str, Any]]) -> list[Any]:
    mapper = cast("Mapper[Any]", inspect(parameter.entity))
    keys = [_key(mapper, reference) for reference in references]
    columns = [getattr(mapper.class_, mapper.get_property_by_column(c).key) for c in mapper.primary_key]
    chosen = columns[0].in_([key[0] for key in keys]) if len(columns) == 1 else tuple_(*columns).in_(keys)
    statement = select(mapper.class_).where(chosen)
    if parameter.for_update:
        # Its own row alone: PostgreSQL refuses to lock what a lazy="joined" relationship adds by an outer join.
        statement = statement.with_for_update(of=mapper.class_).execution_options(populate_existing=True)
    found = {inspect(row).identity: row for row in session.scalars(statement).unique()}
    missing = [key for key in keys if key not in found]
    if missing and not (parameter.is_optional or parameter.items_optional):
        raise EntityNotFoundError(mapper.class_.__name__, tuple(missing[0]))
    return [found.get(key) for key in keys]


def _key(mapper: Mapper[Any], reference: dict[str, Any]) -> tuple[Any, ...]:
    names = {sub.class_.__name__ for sub in mapper.self_and_descendants}
    name = reference.get(MARK)
    if not isinstance(name, str) or name not in names:
        raise EntityReferenceError(str(name), f"the task takes {mapper.class_.__name__}", "Pass an entity of that class.")
    parts = reference.get("key")
    if not isinstance(parts, (list, tuple)) or len(parts) != len(mapper.primary_key):
        raise EntityReferenceError(str(name), "its key does not have the parts of the primary key", "Send it again.")
    try:
        return tuple(_typed(part, column) for part, column in zip(parts, mapper.primary_key, strict=True))
    except (ValueError, TypeError, ArithmeticError, LookupError) as exc:
        raise EntityReferenceError(str(name), f"its key does not fit: {exc}", "Send it again.") from exc


def _typed(part: Any, column: Any) -> Any:
    """Return a part of a key as the type of its column; the texts are those of ``_plain``."""
    try:
        wanted = column.type.python_type
    except NotImplementedError:
        return part
    if part is None or isinstance(part, wanted):
        return part
    if issubclass(wanted, (dt.datetime, dt.date, dt.time)):
        return wanted.fromisoformat(part)
    if wanted in (bytes, uuid.UUID):
        return bytes.fromhex(part) if wanted is bytes else uuid.UUID(str(part))
    if issubclass(wanted, enum.Enum):
        return wanted[part]
    if wanted in (decimal.Decimal, int, str, float) and isinstance(part, (str, int) if wanted is int else (str, int, float)):
        return wanted(part)
    raise TypeError(f"{part!r} is no {wanted.__name__} that can travel")
