"""A task gets the rows that its caller passed, loaded in its own session."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
from sqlalchemy import DateTime, Float, ForeignKey, LargeBinary, Numeric, String, Time, event, inspect
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from celery_alchemy import ForUpdate
from tests.entities.library import Copy, Genre, Library, Novel, Opening, Reader, Section, Work

pytestmark = pytest.mark.databases("sqlite", "postgresql", "mariadb")


@contextmanager
def selects(library: Library) -> Iterator[list[str]]:
    """Collect the SELECTs that the tasks' engine runs on the library's tables."""
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT") and "FROM" in statement:
            seen.append(statement)

    event.listen(library.alchemy.engine, "before_cursor_execute", note)
    yield seen
    event.remove(library.alchemy.engine, "before_cursor_execute", note)


def test_entity_beside_plain_values_is_loaded(library: Library) -> None:
    """`work: Work | int` serves callers that have an object and callers that have its key; a missing row is no None."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def title_of(session: Session, work: Work | int | str) -> str:
        return work.title if isinstance(work, Work) else f"{work!r}"

    for value in (emma, 7, "seven"):
        title_of.delay(value)
    delivered = [run.result for run in library.run()]
    title_of.delay(emma)
    library.database.execute("DELETE FROM work")

    assert delivered == ["Emma", "7", "'seven'"]
    assert library.run()[0].state == "FAILURE"


def test_entity_arrives_as_the_row_in_the_tasks_session(library: Library) -> None:
    """Through JSON; what the body changes on it is committed."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def rename(session: Session, work: Work, title: str) -> None:
        assert inspect(work).session is session
        work.title = title

    rename.delay(emma, "Persuasion")
    [ended] = library.run()

    assert ended.state == "SUCCESS"
    assert library.database.rows("SELECT id, title FROM work") == [(emma.id, "Persuasion")]


def test_entity_is_loaded_for_a_task_without_a_session_parameter(library: Library) -> None:
    """As a keyword, into a keyword-only parameter, of a bound task."""
    library.stored(emma := Work(title="Emma"))

    @library.task(bind=True)
    def title_of(self: Any, *, work: Work) -> str:
        assert inspect(work).session is self.session
        return work.title

    title_of.delay(work=emma)

    assert [ended.result for ended in library.run()] == ["Emma"]


def test_list_is_loaded_with_one_select_in_its_order(library: Library) -> None:
    """A row that is twice in the list is twice in the body's."""
    library.stored(*(works := [Work(title=title) for title in ("a", "b", "c")]))

    @library.task()
    def titles(works: list[Work]) -> str:
        return "".join(work.title for work in works)

    titles.delay([works[2], works[0], works[1], works[0]])
    with selects(library) as seen:
        [ended] = library.run()

    assert ended.result == "caba"
    assert len(seen) == 1


def test_list_with_composite_keys_is_loaded_with_one_select(library: Library) -> None:
    """Only the pairs that were passed, not all combinations of their parts."""
    library.stored(*(copies := [Copy(shelf=shelf, number=number) for shelf in "AB" for number in (1, 2)]))

    @library.task()
    def places(copies: list[Copy]) -> list[str]:
        return [f"{copy.shelf}{copy.number}" for copy in copies]

    places.delay([copies[3], copies[0]])
    with selects(library) as seen:
        [ended] = library.run()

    assert ended.result == ["B2", "A1"]
    assert len(seen) == 1


def test_several_are_loaded_with_one_select_in_every_shape(library: Library) -> None:
    """A dict keeps its keys, a tuple is one again, and `*works` and `**works` take no more SELECTs than a list."""
    library.stored(*(works := [Work(title=title) for title in "abc"]))
    a, b, c = works

    @library.task()
    def of_dict(works: dict[str, Work]) -> str:
        return "".join(f"{name}={work.title} " for name, work in works.items())

    @library.task()
    def of_tuple(works: tuple[Work, ...], others: Sequence[Work] = ()) -> str:
        assert isinstance(works, tuple)
        return "".join(work.title for work in (*works, *others))

    @library.task()
    def of_rest(session: Session, sign: str, *works: Work) -> str:
        assert all(work in session for work in works)
        return sign.join(work.title for work in works)

    @library.task()
    def of_keywords(sign: str, **works: Work) -> str:
        return "".join(f"{name}{sign}{work.title} " for name, work in works.items())

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], str, int]] = [
        (of_dict, ({"x": c, "y": a, "z": c},), {}, "x=c y=a z=c ", 1),
        (of_tuple, ((c, a),), {}, "ca", 1),
        (of_tuple, ([c],), {"others": [b, a]}, "cba", 2),
        (of_rest, ("-", b, a, b), {}, "b-a-b", 1),
        (of_rest, ("-",), {}, "", 0),
        (of_keywords, ("=",), {"x": c, "y": a}, "x=c y=a ", 1),
    ]
    for task, args, kwargs, expected, count in calls:
        task.delay(*args, **kwargs)
        with selects(library) as seen:
            [ended] = library.run()
        assert (ended.result, len(seen)) == (expected, count)


def test_none_beside_several_keeps_its_place(library: Library) -> None:
    """In a list of optional entities a row that is gone is None too, where an optional list leaves it out."""
    library.stored(*(works := [Work(title=title) for title in "abc"]))

    @library.task()
    def places(works: list[Work | None]) -> str:
        return "".join(work.title if work else "-" for work in works)

    @library.task()
    def left(works: list[Work] | None, more: dict[str, Work] | None) -> str:
        return "".join(work.title for work in works or ()) + "".join(more or ())

    places.delay([works[2], None, works[1], works[0]])
    left.delay(works, {"x": works[0], "y": works[1]})
    left.delay(None, None)
    library.database.execute("DELETE FROM work WHERE title = 'b'")

    assert [ended.result for ended in library.run()] == ["c--a", "acx", ""]


def test_empty_list_stays_one_without_a_select(library: Library) -> None:
    """There is nothing to load."""

    @library.task()
    def count(works: list[Work]) -> int:
        return len(works)

    count.delay([])
    with selects(library) as seen:
        [ended] = library.run()

    assert (ended.result, seen) == (0, [])


@pytest.mark.parametrize("given", [True, False], ids=["row", "None"])
def test_optional_entity_takes_a_row_or_none(library: Library, given: bool) -> None:
    """None is passed on as None."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def title_of(work: Work | None) -> str:
        return "none" if work is None else work.title

    title_of.delay(emma if given else None)

    assert [ended.result for ended in library.run()] == ["Emma" if given else "none"]


def test_composite_uuid_date_and_enum_keys_travel(library: Library) -> None:
    """Each arrives with its key in the type of its column."""
    rows = (Copy(shelf="A", number=7), Reader(id=uuid.uuid4()), Opening(day=dt.date(2026, 2, 28)), Section(genre=Genre.CRIME))
    library.stored(*rows)
    keys: list[Any] = []

    @library.task()
    def take(copy: Copy, reader: Reader, opening: Opening, section: Section) -> None:
        keys.extend([(copy.shelf, copy.number), reader.id, opening.day, section.genre])

    take.delay(*rows)
    [ended] = library.run()

    assert ended.state == "SUCCESS"
    assert keys == [("A", 7), rows[1].id, dt.date(2026, 2, 28), Genre.CRIME]


KEYS: dict[str, tuple[Any, Any]] = {
    "text": (String(20), "ISBN 1"),
    "bytes": (LargeBinary(), b"\x01\xff"),
    "time": (Time(), dt.time(23, 59, 1)),
    "moment": (DateTime(), dt.datetime(2026, 2, 28, 1, 2, 3, 456)),  # noqa: DTZ001 - as the column has it.
    "decimal": (Numeric(5, 2), decimal.Decimal("1.50")),
    "float": (Float(), 0.5),
}


@pytest.mark.databases("sqlite")
@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
@pytest.mark.parametrize("kind", KEYS)
def test_key_of_any_plain_type_travels(library: Library, kind: str) -> None:
    """It comes back as the value that it was."""
    type_, key = KEYS[kind]

    class Own(DeclarativeBase):
        """A table of one test."""

    class Thing(Own):
        """A row with that key."""

        __tablename__ = "thing"

        key: Mapped[Any] = mapped_column(type_, primary_key=True)

    def take(thing: Any) -> None:
        keys.append(thing.key)

    keys: list[Any] = []
    take.__annotations__["thing"] = Thing
    Own.metadata.create_all(library.database.engine)
    library.stored(thing := Thing(key=key))
    library.task()(take).delay(thing)
    library.run()

    assert keys == [key]
    assert type(keys[0]) is type(key)


def test_row_of_a_subclass_arrives_as_the_subclass(library: Library) -> None:
    """A parameter of the base class takes both, in one list too."""
    library.stored(novel := Novel(title="Emma"), work := Work(title="Letters"))

    @library.task()
    def kinds(work: Work, works: list[Work]) -> list[str]:
        return [type(each).__name__ for each in (work, *works)]

    kinds.delay(novel, [work, novel])

    assert [ended.result for ended in library.run()] == [["Novel", "Work", "Novel"]]


def test_two_entities_and_a_plain_value_keep_their_places(library: Library) -> None:
    """Also around a session that is not the first parameter."""
    library.stored(emma := Work(title="Emma"), copy := Copy(shelf="A", number=1))

    @library.task()
    def describe(work: Work, sign: str, session: Session, copy: Copy, count: int = 1) -> str:
        return f"{work.title}{sign}{copy.shelf}{count}"

    describe.delay(emma, "@", copy, count=3)

    assert [ended.result for ended in library.run()] == ["Emma@A3"]


def test_references_inside_dicts_and_lists_travel_as_data(library: Library) -> None:
    """A parameter that is not annotated gets the reference, for another task to take."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def title_of(work: Work) -> str:
        return work.title

    @library.task()
    def pass_on(data: dict[str, Any]) -> None:
        title_of.delay(data["works"][0])

    pass_on.delay({"works": [emma], "count": 1})

    assert [ended.result for ended in library.run()] == [None, "Emma"]


@pytest.mark.databases("postgresql", "mariadb")
@pytest.mark.parametrize("locked", [True, False])
def test_for_update_locks_the_row(library: Library, locked: bool) -> None:
    """While the body runs another transaction cannot have the row; without ForUpdate it can."""
    library.stored(emma := Work(title="Emma"))
    annotation: Any = Annotated[Work, ForUpdate] if locked else Work
    free: list[int] = []

    def look(work: Any) -> None:
        free.append(len(library.database.rows("SELECT id FROM work FOR UPDATE SKIP LOCKED")))

    look.__annotations__["work"] = annotation
    library.task()(look).delay(emma)
    [ended] = library.run()

    assert ended.state == "SUCCESS"
    assert free == [0 if locked else 1]


@pytest.mark.databases("postgresql", "mariadb")
def test_for_update_locks_the_row_of_a_class_that_loads_derived_ones_with_it(library: Library) -> None:
    """Their tables are the other side of an outer join too; a derived class is locked with its own row."""

    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __tablename__ = "item"
        __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item", "with_polymorphic": "*"}  # noqa: RUF012
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(String(20))

    class Film(Item):
        __tablename__ = "film"
        __mapper_args__ = {"polymorphic_identity": "film"}  # noqa: RUF012
        id: Mapped[int] = mapped_column(ForeignKey("item.id"), primary_key=True)

    Base.metadata.create_all(library.database.engine)
    library.stored(film := Film())
    free: list[int] = []

    def look(item: Any) -> None:
        free.extend(len(library.database.rows(f"SELECT id FROM {table} FOR UPDATE SKIP LOCKED")) for table in ("item", "film"))

    for class_ in (Item, Film):
        look.__annotations__["item"] = Annotated[class_, ForUpdate]
        library.task(name=class_.__name__)(look).delay(film)
    ended = library.run()

    assert [one.state for one in ended] == ["SUCCESS", "SUCCESS"]
    assert (free[0], *free[2:]) == (0, 0, 0)


@pytest.mark.databases("postgresql", "mariadb")
def test_for_update_locks_the_row_of_a_class_that_loads_others_by_a_join(library: Library) -> None:
    """PostgreSQL would refuse to lock the other side of the outer join, which nobody asked to have locked."""

    class Base(DeclarativeBase):
        pass

    class Author(Base):
        __tablename__ = "author"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Essay(Base):
        __tablename__ = "essay"
        id: Mapped[int] = mapped_column(primary_key=True)
        author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id"))
        author: Mapped[Author | None] = relationship(lazy="joined")

    Base.metadata.create_all(library.database.engine)
    library.stored(essay := Essay())
    free: list[int] = []

    def look(essay: Any) -> None:
        free.append(len(library.database.rows("SELECT id FROM essay FOR UPDATE SKIP LOCKED")))

    look.__annotations__["essay"] = Annotated[Essay, ForUpdate]
    library.task()(look).delay(essay)
    [ended] = library.run()

    assert ended.state == "SUCCESS"
    assert free == [0]
