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
from collections.abc import Callable, Iterable, Mapping
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
        is_list: It takes a list of entities.
        is_optional: None is a value, and takes the place of a missing row.
        for_update: The rows are locked.
    """

    name: str
    index: int | None
    entity: type[Any]
    is_list: bool = False
    is_optional: bool = False
    for_update: bool = False


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
    for index, parameter in enumerate(signature.parameters.values()):
        wanted = _entity_annotation(hints.get(parameter.name, parameter.annotation))
        if wanted is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        place = None if parameter.kind is parameter.KEYWORD_ONLY else index
        found.append(EntityParameter(parameter.name, place, *wanted))
    return tuple(found)


def _entity_annotation(annotation: Any) -> tuple[type[Any], bool, bool, bool] | None:
    """Return class, is_list, is_optional and for_update of an annotation; None if it names no mapped class."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extras = get_args(annotation)
        wanted = _entity_annotation(inner)
        locks = any(extra is ForUpdate or isinstance(extra, ForUpdate) for extra in extras)
        return None if wanted is None else (*wanted[:3], wanted[3] or locks)
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        wanted = _entity_annotation(members[0]) if len(members) == 1 else None
        return None if wanted is None else (wanted[0], wanted[1], True, wanted[3])
    if origin is list:
        wanted = _entity_annotation(get_args(annotation)[0])
        return None if wanted is None or wanted[1] else (wanted[0], True, wanted[2], wanted[3])
    if isinstance(annotation, type) and _mapper(annotation) is not None:
        return (annotation, False, False, False)
    return None


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
        if parameter.index is not None and parameter.index < len(positional):
            positional[parameter.index] = replacement(parameter, positional[parameter.index])
        elif parameter.name in named:
            named[parameter.name] = replacement(parameter, named[parameter.name])
    return tuple(positional), named


def _loaded(session: Session, parameter: EntityParameter, value: Any) -> Any:
    if parameter.is_list and isinstance(value, (list, tuple)):
        found = [_as_reference(item) for item in value]
        references = [reference for reference in found if reference is not None]
        if not references:
            return value
        if len(references) < len(found):
            raise EntityReferenceError(
                parameter.entity.__name__, f"the list {parameter.name!r} holds other values beside entities", "Pass entities alone."
            )
        rows = _rows(session, parameter, references)
        return [row for row in rows if row is not None]
    reference = _as_reference(value)
    if reference is None:
        return value
    return _rows(session, parameter, [reference])[0]


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
    if parameter.is_list and isinstance(value, (list, tuple)):
        return [_key_only(replace(parameter, is_list=False), item) for item in value]
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
        statement = statement.with_for_update().execution_options(populate_existing=True)
    found = {inspect(row).identity: row for row in session.scalars(statement).unique()}
    missing = [key for key in keys if key not in found]
    if missing and not parameter.is_optional:
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
