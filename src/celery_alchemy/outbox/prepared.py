"""One of the package's constant statements as a driver gets it.

Beneath ``place.py`` and ``lone_statement.py``, which execute it: each ``once`` task sends two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import Insert, SelectBase, Update
from sqlalchemy.engine import Dialect

__all__ = ["Prepared", "Statement", "as_sent", "prepared"]

Statement = Insert | SelectBase | Update


@dataclass(frozen=True, slots=True)
class Prepared:
    """A statement and its parameters.

    Attributes:
        text: The statement for one database.
        defaults: Its parameters' own values.
        positions: The names of the parameters in their order; None where they go by name.
        converters: By the names of the parameters that the driver does not take as they are.
    """

    text: str
    defaults: Mapping[str, object]
    positions: tuple[str, ...] | None
    converters: Mapping[str, Callable[[object], object]]

    def values(self, given: Mapping[str, object]) -> dict[str, object] | tuple[object, ...]:
        """Return the parameters as the driver takes them."""
        named = {**self.defaults, **given}
        for name, convert in self.converters.items():
            named[name] = convert(named[name])
        return named if self.positions is None else tuple(named[name] for name in self.positions)


def as_sent(statement: Statement, dialect: Dialect) -> Prepared:
    """Return a statement as it is sent."""
    compiled = statement.compile(dialect=dialect)
    positions = compiled.positiontup
    converters = {}
    for bind, name in compiled.bind_names.items():
        convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
        if convert is not None:
            converters[name] = convert
    return Prepared(
        str(compiled),
        dict(compiled.params),
        None if positions is None else tuple(positions),
        converters,
    )


@lru_cache(maxsize=64)
def prepared(statement: Statement, dialect: Dialect) -> Prepared:
    """Return one of the package's constant statements as it is sent."""
    return as_sent(statement, dialect)
