"""The parts of a primary key on their way through a message.

They go from what the row has to JSON and back, by the type of the column.

Beneath ``entities.py``. Nothing here asks a database: the caller's, which makes the reference, and
the worker's, which reads it, need not be connected, nor be of one kind.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import Enum, Interval, PickleType
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.types import TypeDecorator, TypeEngine

#: The type of a column.
ColumnType = TypeEngine[Any]

__all__ = ["from_plain", "to_plain"]

#: What types of the user's are asked with: on both sides the same, so that they agree on one form.
_DIALECT = DefaultDialect()
# Else it would make floats of decimals.
_DIALECT.supports_native_decimal = True


def to_plain(part: Any, type_: ColumnType) -> object:
    """Return a part of a key as JSON holds it.

    Args:
        part: As the row has it, or as it was assigned before the row was written: a ``str`` enum in
            a String column, say.
        type_: The type of its column.

    Raises:
        TypeError: Its type cannot travel.
    """
    if isinstance(type_, PickleType):
        raise TypeError("its key is a pickle, which a message must not hold")
    if isinstance(type_, TypeDecorator) and not isinstance(type_, Interval):
        bound = (
            type_.process_bind_param(part, _DIALECT)
            if _overrides(type_, "process_bind_param")
            else part
        )
        return to_plain(bound, type_.load_dialect_impl(_DIALECT))
    if not type(type_).__module__.startswith("sqlalchemy."):
        processor = type_.bind_processor(_DIALECT)
        part = part if processor is None else processor(part)
    return _name_of(part, type_) if isinstance(part, enum.Enum) else _plain(part)


def _overrides(type_: ColumnType, method: str) -> bool:
    return getattr(type(type_), method) is not getattr(TypeDecorator, method)


def _name_of(part: enum.Enum, type_: ColumnType) -> object:
    """Return the name of a member of an Enum column.

    A member that is a text or a number itself is returned as that.
    """
    if isinstance(type_, Enum):
        return part.name
    if isinstance(part, str):
        return str.__str__(part)
    return int(part) if isinstance(part, int) else part.value


def _plain(part: object) -> object:
    if part is None or isinstance(part, bool):
        return part
    # As themselves, for a class that is derived from them may be written in another way.
    for kind in (int, float):
        if isinstance(part, kind):
            return kind(part)
    if isinstance(part, str):
        return str.__str__(part)
    if isinstance(part, (dt.datetime, dt.date, dt.time)):
        return part.isoformat()
    if isinstance(part, dt.timedelta):
        return part // dt.timedelta(microseconds=1)
    return bytes(part).hex() if isinstance(part, (bytes, bytearray, memoryview)) else str(part)


def from_plain(part: object, type_: ColumnType) -> object:
    """Return a part of a key as a row has it; the texts are those of ``to_plain()``.

    Raises:
        Exception: It is no such text. The types of the user's own classes raise what they like.
    """
    if isinstance(type_, PickleType):
        raise TypeError("its key is a pickle, which a message must not hold")
    if isinstance(type_, TypeDecorator) and not isinstance(type_, Interval):
        value = from_plain(part, type_.load_dialect_impl(_DIALECT))
        return (
            type_.process_result_value(value, _DIALECT)
            if _overrides(type_, "process_result_value")
            else value
        )
    if not type(type_).__module__.startswith("sqlalchemy."):
        processor = type_.result_processor(_DIALECT, None)
        if processor is not None:
            return processor(part)
    return _typed(part, type_)


_READ: dict[type, Callable[[Any], object]] = {
    dt.datetime: dt.datetime.fromisoformat,
    dt.date: dt.date.fromisoformat,
    dt.time: dt.time.fromisoformat,
    dt.timedelta: lambda part: dt.timedelta(microseconds=part),
    bytes: bytes.fromhex,
    uuid.UUID: lambda part: uuid.UUID(str(part)),
}


def _typed(part: Any, type_: ColumnType) -> object:
    try:
        wanted = type_.python_type
    except NotImplementedError:
        return part
    if part is None or isinstance(part, wanted):
        return part
    if issubclass(wanted, enum.Enum):
        return wanted[part]
    read = _READ.get(wanted)
    if read is not None:
        return read(part)
    if wanted in (decimal.Decimal, int, str, float) and isinstance(
        part, (str, int) if wanted is int else (str, int, float)
    ):
        return wanted(part)
    raise TypeError(f"{part!r} is no {wanted.__name__} that can travel")
