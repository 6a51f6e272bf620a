"""Keys of every type go through the type of their column, both ways; the class in the reference decides whose row it is."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import CHAR, Dialect, ForeignKey, Integer, Interval, Numeric, PickleType, String, Uuid
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from celery_alchemy import EntityNotFoundError, EntityReferenceError
from tests.entities.library import Library


class GUID(TypeDecorator[uuid.UUID]):
    """SQLAlchemy's own recipe: a UUID on PostgreSQL, 32 characters elsewhere.

    Source: https://docs.sqlalchemy.org/en/20/core/custom_types.html#backend-agnostic-guid-type
    """

    impl = CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.UUID())
        return dialect.type_descriptor(CHAR(32))

    def process_bind_param(self, value: uuid.UUID | None, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else value.hex

    def process_result_value(self, value: Any, dialect: Dialect) -> uuid.UUID | None:
        return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(value)


@dataclass(frozen=True)
class Isbn:
    """A value object."""

    digits: str


class IsbnType(TypeDecorator[Isbn]):
    """Keeps an ISBN as its digits."""

    impl = String(13)
    cache_ok = True

    def process_bind_param(self, value: Isbn | None, dialect: Dialect) -> str | None:
        return None if value is None else value.digits

    def process_result_value(self, value: str | None, dialect: Dialect) -> Isbn | None:
        return None if value is None else Isbn(value)


class Cents(TypeDecorator[decimal.Decimal]):
    """Keeps an amount as a number of cents."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: decimal.Decimal | None, dialect: Dialect) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Dialect) -> decimal.Decimal | None:
        return None if value is None else decimal.Decimal(value) / 100


class Upper(UserDefinedType[str]):
    """A type from the ground up: written in small letters, read in capitals."""

    cache_ok = True

    def get_col_spec(self, **kw: Any) -> str:
        return "VARCHAR(20)"

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        return lambda value: value.lower()

    def result_processor(self, dialect: Dialect, coltype: Any) -> Callable[[Any], Any]:
        return lambda value: value.upper()


class Money(Numeric[Any]):
    """A subclass of a type of SQLAlchemy's."""

    cache_ok = True


class Color(str, enum.Enum):
    """A text with a name."""

    RED = "red"


class Level(enum.IntEnum):
    """A number with a name."""

    HIGH = 3


class Code(str):
    """A text of a class of its own."""

    __slots__ = ()

    def __str__(self) -> str:
        return "not this"


#: The type of the column, the key as the caller has it, and as it is loaded.
KEYS: dict[str, tuple[Any, Any, Any]] = {
    "guid": (GUID(), uuid.UUID(int=7), uuid.UUID(int=7)),
    "value object": (IsbnType(), Isbn("9780141439587"), Isbn("9780141439587")),
    "cents": (Cents(), decimal.Decimal("1.50"), decimal.Decimal("1.50")),
    "own type": (Upper(), "ABC", "ABC"),
    "own numeric": (Money(30, 10), decimal.Decimal("12345678901234567.1234567891"), decimal.Decimal("12345678901234567.1234567891")),
    "str enum": (String(20), Color.RED, "red"),
    "int enum": (Integer(), Level.HIGH, 3),
    "str of a class": (String(20), Code("code"), "code"),
    "uuid": (Uuid(), uuid.UUID(int=7), uuid.UUID(int=7)),
    "uuid as text": (Uuid(as_uuid=False), str(uuid.UUID(int=7)), str(uuid.UUID(int=7))),
    "padded": (CHAR(10), "abc", "abc"),
    "variant": (String(40).with_variant(CHAR(40), "postgresql"), "abc", "abc"),
    "interval": (Interval(), dt.timedelta(days=3, microseconds=1), dt.timedelta(days=3, microseconds=1)),
}


def model_of(type_: Any) -> tuple[type[DeclarativeBase], Any]:
    """Make a base and a class whose key is of a type."""

    class Own(DeclarativeBase):
        """A table of one test."""

    class Thing(Own):
        """A row with that key."""

        __tablename__ = "thing"

        # SQLAlchemy 2.0 has the database count any numeric key.
        key: Mapped[Any] = mapped_column(type_, primary_key=True, autoincrement=False)
        note: Mapped[str] = mapped_column(String(20), default="")

    return Own, Thing


def task_for(library: Library, annotation: Any, take: Callable[[Any], Any], **options: Any) -> Any:
    """Make a task whose parameter is annotated with a class of the test's."""

    def body(thing: Any) -> Any:
        return take(thing)

    body.__annotations__["thing"] = annotation
    return library.task(**options)(body)


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.filterwarnings("ignore:Dialect .* does .not. support Decimal")
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("reloaded", [False, True], ids=["as assigned", "as loaded"])
def test_key_of_any_type_finds_its_row(library: Library, kind: str, reloaded: bool) -> None:
    """Of a row that was just written, and of one that was loaded, alone and in a list; its once key has the same value."""
    type_, key, loaded = KEYS[kind]
    if kind == "interval" and library.database.name == "mariadb":
        pytest.skip("MariaDB's DATETIME has no fraction by itself")
    if kind == "own numeric" and library.database.name == "sqlite":
        pytest.skip("SQLite keeps a decimal as a float")
    if kind == "int enum" and library.database.name == "mariadb" and sys.version_info < (3, 11):
        pytest.skip("PyMySQL writes the name of an IntEnum where str() gives it")
    base, thing_class = model_of(type_)
    base.metadata.drop_all(library.database.engine)
    base.metadata.create_all(library.database.engine)
    library.stored(thing := thing_class(key=key, note="found"), thing_class(key=_other(key), note="other"))
    if reloaded:
        with library.alchemy.session() as session:
            thing = session.query(thing_class).filter_by(note="found").one()
    found: list[Any] = []
    one = task_for(library, thing_class, lambda row: found.append((row.note, row.key)), name="one")
    many = task_for(library, list[thing_class], lambda rows: found.extend((row.note, row.key) for row in rows), name="many")

    one.delay(thing)
    many.delay([thing, thing])
    ended = library.run()
    base.metadata.drop_all(library.database.engine)

    assert [one.state for one in ended] == ["SUCCESS", "SUCCESS"]
    assert [note for note, _ in found] == ["found"] * 3
    shown = [value.strip() if kind in {"padded", "variant"} else value for _, value in found]
    assert shown == [loaded] * 3
    assert {type(value) for value in shown} == {type(loaded)}


def _other(key: Any) -> Any:
    """Return another key of the same type."""
    others = {
        uuid.UUID: uuid.UUID(int=8),
        Isbn: Isbn("1"),
        decimal.Decimal: decimal.Decimal("2.25"),
        dt.timedelta: dt.timedelta(days=9),
        Level: 9,
    }
    return others.get(type(key), str(uuid.UUID(int=8)) if isinstance(key, str) and len(key) == 36 else "XYZ")


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("type_", "key"),
    [(GUID(), uuid.UUID(int=7)), (IsbnType(), Isbn("9780141439587")), (Integer(), Level.HIGH)],
    ids=["guid", "value object", "enum"],
)
def test_key_of_a_once_task_sees_the_value_of_the_column(library: Library, type_: Any, key: Any) -> None:
    """Typed as the row has it, where no row is loaded."""
    base, thing_class = model_of(type_)
    base.metadata.create_all(library.database.engine)
    library.alchemy.create_tables()
    library.stored(thing := thing_class(key=key))
    seen: list[Any] = []

    def once(thing: Any) -> str:
        seen.append(thing.key)
        return str(thing.key)

    task_for(library, thing_class, lambda row: None, once=once, name="once").delay(thing)
    library.run()

    assert seen
    assert {type(value) for value in seen} == {type(key) if not isinstance(key, enum.Enum) else int}
    assert set(seen) == {key}


@pytest.mark.databases("sqlite")
def test_pickled_key_is_refused_in_the_call(library: Library) -> None:
    """A message must hold nothing that is code when it is read."""
    base, thing_class = model_of(PickleType())
    base.metadata.create_all(library.database.engine)
    library.stored(thing := thing_class(key="a"))

    with pytest.raises(EntityReferenceError, match="pickle"):
        task_for(library, thing_class, lambda row: None).delay(thing)


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("key", ["no uuid", 5, None, {"a": 1}, ["x"]], ids=str)
def test_crafted_key_of_a_users_type_is_refused(library: Library, key: Any) -> None:
    """What its own type raises is told as a key that does not fit."""
    base, thing_class = model_of(GUID())
    base.metadata.create_all(library.database.engine)
    task_for(library, thing_class, lambda row: None, name="take")
    library.app.send_task("take", [{"__celery_alchemy_entity__": "Thing", "key": [key]}])
    [ended] = library.run()

    assert isinstance(ended.result, EntityReferenceError if key is not None else EntityNotFoundError)


@pytest.mark.databases("sqlite", "postgresql")
def test_composite_attribute_in_the_key_travels(library: Library) -> None:
    """The columns behind it are what is sent."""

    class Own(DeclarativeBase):
        """Tables of this test."""

    @dataclass(frozen=True)
    class Place:
        """Where a thing stands."""

        row: int
        seat: Any

    class Seat(Own):
        """A row whose key is a composite."""

        __tablename__ = "seat"

        row: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        seat: Mapped[Any] = mapped_column(IsbnType(), primary_key=True)
        place = composite(Place, "row", "seat")

    Own.metadata.drop_all(library.database.engine)
    Own.metadata.create_all(library.database.engine)
    library.stored(seat := Seat(row=3, seat=Isbn("4")), Seat(row=3, seat=Isbn("5")))
    found: list[Any] = []
    task_for(library, list[Seat], lambda seats: found.extend(seat.place for seat in seats)).delay([seat])
    library.run()
    Own.metadata.drop_all(library.database.engine)

    assert found == [Place(3, Isbn("4"))]


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
def test_concrete_classes_with_the_same_key_are_told_apart(library: Library) -> None:
    """Each has a table of its own, and the class in the reference says which: alone, in a list, locked or in a once key."""

    class Own(DeclarativeBase):
        """Tables of this test."""

    class Person(ConcreteBase, Own):
        """The base, with rows of its own."""

        __tablename__ = "person"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String(20))
        __mapper_args__ = {"polymorphic_identity": "person", "concrete": True}  # noqa: RUF012 - SQLAlchemy's way.

    class Author(Person):
        """A class with a table of its own."""

        __tablename__ = "author"

        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String(20))
        __mapper_args__ = {"polymorphic_identity": "author", "concrete": True}  # noqa: RUF012 - SQLAlchemy's way.

    Own.metadata.drop_all(library.database.engine)
    Own.metadata.create_all(library.database.engine)
    library.stored(person := Person(id=1, name="person"), author := Author(id=1, name="author"), only := Author(id=2, name="only"))
    found: list[Any] = []
    task_for(library, Person, lambda row: found.append(row.name), name="one").delay(person)
    library.app.tasks["one"].delay(author)
    task_for(library, list[Person], lambda rows: found.append([row.name for row in rows]), name="many").delay([author, person, only])
    ended = library.run()
    Own.metadata.drop_all(library.database.engine)

    assert [one.state for one in ended] == ["SUCCESS"] * 3
    assert found == ["person", "author", ["author", "person", "only"]]


@pytest.mark.databases("sqlite")
def test_row_of_a_joined_class_is_found_by_the_key_of_its_base(library: Library) -> None:
    """Its own column of the key has another name, and the base's is asked for."""

    class Own(DeclarativeBase):
        """Tables of this test."""

    class Item(Own):
        """The base."""

        __tablename__ = "item"

        id: Mapped[uuid.UUID] = mapped_column(GUID(), primary_key=True)
        kind: Mapped[str] = mapped_column(String(20))
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}  # noqa: RUF012 - SQLAlchemy's way.

    class Disc(Item):
        """A class with a table of its own that is joined."""

        __tablename__ = "disc"

        disc_id: Mapped[uuid.UUID] = mapped_column(GUID(), ForeignKey("item.id"), primary_key=True)
        __mapper_args__ = {"polymorphic_identity": "disc"}  # noqa: RUF012 - SQLAlchemy's way.

    Own.metadata.create_all(library.database.engine)
    library.stored(disc := Disc(id=uuid.UUID(int=3)))
    found: list[Any] = []
    task_for(library, Item, found.append, name="item").delay(disc)
    task_for(library, Disc, found.append, name="disc").delay(disc)
    library.run()

    assert [(type(row).__name__, row.id) for row in found] == [("Disc", uuid.UUID(int=3))] * 2
