"""Rows that references stand for: found by class and primary key, in one SELECT.

Between ``entities.py``, which takes references out of arguments, and ``entity_keys.py``, which
reads a key's parts.
"""

from __future__ import annotations

from sqlalchemy import inspect, select, tuple_
from sqlalchemy.orm import Mapper, Session

from ..errors import EntityNotFoundError, EntityReferenceError
from .entity_keys import from_plain

__all__ = ["MARK", "AnyMapper", "key_of_reference", "named_mapper", "rows_of"]

AnyMapper = Mapper[object]

#: The key of a reference's dict under which its class is named.
MARK = "__celery_alchemy_entity__"


def rows_of(
    session: Session,
    entity: type[object],
    references: list[dict[str, object]],
    *,
    for_update: bool,
    may_miss: bool,
) -> list[object]:
    """Return the rows that references stand for, in their order.

    It sends one SELECT, or one for each concrete class.

    Args:
        session: Where they are loaded.
        entity: The mapped class that is asked for; a reference may name one that is derived from
            it.
        references: As they came in a message.
        for_update: Lock the rows.
        may_miss: None takes the place of a row that is not there.

    Raises:
        EntityNotFoundError: A row is not there.
        EntityReferenceError: A reference names another class, or its key does not fit.
    """
    base = inspect(entity)
    named = [named_mapper(base, reference) for reference in references]
    keys = [
        key_of_reference(mapper, reference)
        for mapper, reference in zip(named, references, strict=True)
    ]
    # The rows of concrete classes are in tables of their own, in which the same key is another
    # row's.
    is_concrete = any(mapper.concrete for mapper in base.self_and_descendants)
    found: dict[tuple[object, object], object] = {}
    for mapper in dict.fromkeys(named if is_concrete else [base]):
        wanted = [
            key for key, of in zip(keys, named, strict=True) if of is mapper or not is_concrete
        ]
        rows = _selected(session, mapper, wanted, for_update=for_update)
        if is_concrete:
            rows = [row for row in rows if inspect(row).mapper is mapper]
        found.update(
            {
                (mapper, key): row
                for key, row in _by_key(
                    session, mapper, wanted, rows, for_update=for_update
                ).items()
            }
        )
    asked = [
        (mapper if is_concrete else base, key) for mapper, key in zip(named, keys, strict=True)
    ]
    missing = [(mapper, key) for mapper, key in asked if (mapper, key) not in found]
    if missing and not may_miss:
        raise EntityNotFoundError(missing[0][0].class_.__name__, tuple(missing[0][1]))
    return [found.get(one) for one in asked]


def _by_key(
    session: Session,
    mapper: AnyMapper,
    keys: list[tuple[object, ...]],
    rows: list[object],
    *,
    for_update: bool,
) -> dict[tuple[object, ...], object]:
    """Return the rows by the keys that were asked for.

    The database may know a row by another spelling of its key: CHAR is padded, a collation takes
    "A" for "a". What is left over then is asked for one by one.
    """
    found = {inspect(row).identity: row for row in rows}
    named = {key: found[key] for key in keys if key in found}
    others = list(dict.fromkeys(key for key in keys if key not in found))
    if not others or len(named) >= len(rows):
        return named
    if len(others) == 1 and len(rows) == 1:
        return {others[0]: rows[0]}
    for key in others:
        alone = _selected(session, mapper, [key], for_update=for_update)
        if len(alone) == 1:
            named[key] = alone[0]
    return named


def _selected(
    session: Session, mapper: AnyMapper, keys: list[tuple[object, ...]], *, for_update: bool
) -> list[object]:
    columns = [
        getattr(mapper.class_, mapper.get_property_by_column(c).key) for c in mapper.primary_key
    ]
    chosen = (
        columns[0].in_([key[0] for key in keys])
        if len(columns) == 1
        else tuple_(*columns).in_(keys)
    )
    statement = select(mapper.class_).where(chosen)
    if for_update:
        # Its own row alone: PostgreSQL refuses to lock what an outer join adds, of a lazy="joined"
        # relationship or of the tables of derived classes.
        statement = statement.with_for_update(of=list(mapper.tables)).execution_options(
            populate_existing=True
        )
    return list(session.scalars(statement).unique())


def named_mapper(base: AnyMapper, reference: dict[str, object]) -> AnyMapper:
    """Return the class that a reference names, among those that the parameter takes.

    Raises:
        EntityReferenceError: It is none of them.
    """
    name = reference.get(MARK)
    for mapper in base.self_and_descendants:
        if mapper.class_.__name__ == name:
            return mapper
    raise EntityReferenceError(
        str(name), f"the task takes {base.class_.__name__}", "Pass an entity of that class."
    )


def key_of_reference(mapper: AnyMapper, reference: dict[str, object]) -> tuple[object, ...]:
    """Return the key of a reference as a row of its class has it.

    Raises:
        EntityReferenceError: It does not fit.
    """
    name, parts = mapper.class_.__name__, reference.get("key")
    if not isinstance(parts, (list, tuple)) or len(parts) != len(mapper.primary_key):
        raise EntityReferenceError(
            name, "its key does not have the parts of the primary key", "Send it again."
        )
    try:
        return tuple(
            from_plain(part, column.type)
            for part, column in zip(parts, mapper.primary_key, strict=True)
        )
    except Exception as exc:
        raise EntityReferenceError(name, f"its key does not fit: {exc}", "Send it again.") from exc
