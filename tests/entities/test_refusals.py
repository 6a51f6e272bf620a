"""What is no reference to a row that the task takes is refused, by the caller if it can be known there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Optional

import pytest
from celery.exceptions import MaxRetriesExceededError
from sqlalchemy import event

from celery_alchemy import ConfigurationError, EntityNotFoundError, EntityReferenceError
from celery_alchemy.signatures.entities import MARK
from tests.entities.conftest import MakeLibrary
from tests.entities.library import Base, Copy, ForeignBase, Library, Novel, Reader, Secret, Section, Work

if TYPE_CHECKING:
    from tests.entities.library import Work as HiddenWork

pytestmark = pytest.mark.databases("sqlite")


def reading(library: Library, **options: Any) -> Any:
    """Return a task that takes a work and returns its title."""

    @library.task(**options)
    def read(work: Work) -> str:
        return work.title

    return read


# --- missing rows ------------------------------------------------------------------------------------------------------------


def test_missing_row_fails_the_task(library: Library) -> None:
    """The error names the class and the key; the body does not run."""
    library.stored(emma := Work(title="Emma"))
    reading(library).delay(emma)
    library.database.execute("DELETE FROM work")

    [ended] = library.run()

    assert ended.state == "FAILURE"
    assert isinstance(ended.result, EntityNotFoundError)
    assert (ended.result.entity, ended.result.key) == ("Work", (emma.id,))


def test_missing_row_of_a_list_fails_the_task(library: Library) -> None:
    """A list is complete or it is not passed."""
    library.stored(*(works := [Work(title="a"), Work(title="b")]))

    @library.task()
    def count(works: list[Work]) -> int:
        return len(works)

    count.delay(works)
    library.database.execute("DELETE FROM work WHERE title = 'b'")
    [ended] = library.run()

    assert isinstance(ended.result, EntityNotFoundError)
    assert ended.result.key == (works[1].id,)


def test_missing_row_ignored_ends_the_task_without_its_body(library: Library) -> None:
    """`missing="ignore"` is Celery's Ignore."""
    library.stored(emma := Work(title="Emma"))
    reading(library, missing="ignore").delay(emma)
    library.database.execute("DELETE FROM work")

    assert [ended.state for ended in library.run()] == ["IGNORED"]


def test_missing_row_retried_finds_it_once_it_is_there(library: Library) -> None:
    """`missing="retry"` sends the same reference again."""
    library.stored(emma := Work(title="Emma"))
    read = reading(library, missing="retry", default_retry_delay=0)
    read.delay(emma)
    library.database.execute("DELETE FROM work")
    [message] = library.messages()
    [reference] = message.args
    first = library.trace(read, reference)
    library.stored(Work(id=emma.id, title="Emma"))

    assert first.state == "RETRY"
    assert [ended.result for ended in library.run()] == ["Emma"]


def test_missing_row_retried_fails_in_the_end(library: Library) -> None:
    """With the error that names the row, after `max_retries`."""
    library.stored(emma := Work(title="Emma"))
    reading(library, missing="retry", default_retry_delay=0, max_retries=2).delay(emma)
    library.database.execute("DELETE FROM work")

    ended = library.run()

    assert [each.state for each in ended] == ["RETRY", "RETRY", "FAILURE"]
    assert isinstance(ended[-1].result, EntityNotFoundError)
    assert not isinstance(ended[-1].result, MaxRetriesExceededError)


def test_missing_row_of_an_optional_parameter_is_none(library: Library) -> None:
    """The body decides what to do without it."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def is_gone(work: Work | None) -> bool:
        return work is None

    is_gone.delay(emma)
    library.database.execute("DELETE FROM work")

    assert [ended.result for ended in library.run()] == [True]


def test_unknown_missing_option_is_refused(library: Library) -> None:
    """The error names the three there are."""
    with pytest.raises(ConfigurationError, match="'fail', 'ignore', 'retry'"):
        reading(library, missing="skip").delay()


# --- what cannot be sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["delay", "s", "apply", "apply_async_on_commit", "direct call"])
def test_pending_entity_is_refused_with_the_advice_to_flush(library: Library, way: str) -> None:
    """It has no key yet; nothing is sent."""
    read = reading(library)
    with library.alchemy.session() as session:
        session.add(emma := Work(title="Emma"))
        calls: dict[str, Any] = {
            "delay": lambda: read.delay(emma),
            "s": lambda: read.s([{"deep": emma}]),
            "apply": lambda: read.apply((emma,)),
            "apply_async_on_commit": lambda: read.apply_async_on_commit((emma,)),
            "direct call": lambda: read(emma),
        }
        with pytest.raises(EntityReferenceError, match=r"flush\(\)"):
            calls[way]()

    assert library.messages() == []


@pytest.mark.parametrize("moment", ["marked", "flushed", "committed"])
def test_deleted_entity_is_refused(library: Library, moment: str) -> None:
    """From `session.delete()` on: the task could never find the row."""
    library.stored(Work(id=1, title="Emma"))
    read = reading(library)
    with library.alchemy.session() as session:
        emma = session.get_one(Work, 1)
        session.delete(emma)
        if moment == "flushed":
            session.flush()
        if moment == "committed":
            session.commit()
        with pytest.raises(EntityReferenceError, match="deleted"):
            read.delay(emma)

    assert library.messages() == []


@pytest.mark.parametrize("models", [Base, [Base], Base.metadata, Base.registry], ids=["base", "list", "metadata", "registry"])
def test_entity_of_a_class_that_is_not_a_model_is_refused(make_library: MakeLibrary, models: Any) -> None:
    """`models=` says what may travel, and a class of it does."""
    library = make_library(models=models)
    library.stored(secret := Secret(id=1), emma := Work(title="Emma"))

    @library.task()
    def take(what: Any) -> None:
        pass

    take.delay(emma)
    with pytest.raises(EntityReferenceError, match="models="):
        take.delay(secret)

    assert len(library.messages()) == 1


def test_models_of_several_bases_all_travel(make_library: MakeLibrary) -> None:
    """A list of bases is their union."""
    library = make_library(models=[Base, ForeignBase])
    library.stored(secret := Secret(id=1), emma := Work(title="Emma"))

    @library.task()
    def take(secret: Secret, work: Work) -> str:
        return f"{secret.id} {work.title}"

    take.delay(secret, emma)

    assert [ended.result for ended in library.run()] == ["1 Emma"]


def test_models_that_are_no_models_are_refused(make_library: MakeLibrary) -> None:
    """The error names what was given."""
    with pytest.raises(ConfigurationError, match="'str'"):
        make_library(models="shop.models")


# --- annotations that cannot be resolved -------------------------------------------------------------------------------------


@pytest.mark.parametrize("annotation", ["HiddenWork", "HiddenWork | None", "list[HiddenWork]", Optional["HiddenWork"]], ids=str)
def test_reference_for_an_unresolvable_annotation_is_refused(library: Library, annotation: Any) -> None:
    """The body would get the reference as it travels; the error names the parameter and the import."""
    library.stored(emma := Work(title="Emma"))

    def read(work: Any) -> None:
        raise AssertionError

    read.__annotations__["work"] = annotation
    library.task()(read).delay([emma] if "list" in str(annotation) else emma)

    [ended] = library.run()

    assert isinstance(ended.result, EntityReferenceError), repr(ended.result)
    assert "outside of `if TYPE_CHECKING" in str(ended.result)
    assert "HiddenWork" in str(ended.result)
    assert "'work'" in str(ended.result)


def test_plain_values_for_an_unresolvable_annotation_are_left_alone(library: Library) -> None:
    """So are an entity of a direct call, and a reference for a parameter that says what it takes."""

    @library.task()
    def read(work: HiddenWork, raw: dict[str, Any] | None = None, **more: HiddenWork) -> Any:
        return getattr(work, "title", work), raw, more

    library.stored(emma := Work(title="Emma"))
    reference = {MARK: "Work", "key": [emma.id]}

    assert library.trace(read, 1, raw=reference, other={"a": 1}).value == (1, reference, {"other": {"a": 1}})
    assert read(Work(title="Emma"))[0] == "Emma"
    assert isinstance(library.trace(read, 1, other=reference).value, EntityReferenceError)


# --- crafted messages --------------------------------------------------------------------------------------------------------


CRAFTED: dict[str, Any] = {
    "another class": {MARK: "Secret", "key": [1]},
    "unknown name": {MARK: "Nothing", "key": [1]},
    "path of a module": {MARK: "antigravity.fly", "key": [1]},
    "name that is no text": {MARK: ["Work"], "key": [1]},
    "no key": {MARK: "Work"},
    "key that is no list": {MARK: "Work", "key": "1"},
    "too few parts": {MARK: "Work", "key": []},
    "too many parts": {MARK: "Work", "key": [1, 2]},
    "part of another type": {MARK: "Work", "key": ["1 OR 1=1"]},
    "part that is a fraction": {MARK: "Work", "key": [1.5]},
    "part that is a dict": {MARK: "Work", "key": [{"id": 1}]},
}


@pytest.mark.parametrize("crafted", CRAFTED)
def test_crafted_reference_loads_and_imports_nothing(library: Library, crafted: str) -> None:
    """The task fails before its body, without a statement and without a new module."""
    library.stored(Work(id=1, title="Emma"), Secret(id=1))
    read = reading(library)
    statements: list[str] = []
    event.listen(library.alchemy.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))

    ended = library.trace(read, CRAFTED[crafted])

    assert ended.state == "FAILURE"
    assert isinstance(ended.value, EntityReferenceError), repr(ended.value)
    assert [statement for statement in statements if "FROM" in statement] == []
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("key", [5, "no uuid", [1], True, 1.5], ids=repr)
def test_crafted_key_that_is_no_uuid_is_refused(library: Library, key: Any) -> None:
    """Whatever type it has."""

    @library.task()
    def take(reader: Reader) -> None:
        raise AssertionError

    assert isinstance(library.trace(take, {MARK: "Reader", "key": [key]}).value, EntityReferenceError)


@pytest.mark.parametrize("key", ["DRAMA", "funny", 1, ["CRIME"]], ids=repr)
def test_crafted_key_that_is_no_enum_member_is_refused(library: Library, key: Any) -> None:
    """Members travel by their names."""

    @library.task()
    def take(section: Section) -> None:
        raise AssertionError

    assert isinstance(library.trace(take, {MARK: "Section", "key": [key]}).value, EntityReferenceError)


def test_crafted_reference_in_a_list_is_refused(library: Library) -> None:
    """One to another class, or no reference at all, beside a right one."""
    library.stored(Work(id=1, title="Emma"))

    @library.task()
    def count(works: list[Work]) -> int:
        return len(works)

    right = {MARK: "Work", "key": [1]}

    for wrong in ({MARK: "Secret", "key": [1]}, 1, None):
        assert isinstance(library.trace(count, [right, wrong]).value, EntityReferenceError), wrong


def test_reference_to_the_base_class_is_refused_for_a_subclass(library: Library) -> None:
    """A task that takes novels gets no other work, by either name."""
    library.stored(work := Work(title="Letters"))

    @library.task()
    def read(novel: Novel) -> str:
        return novel.title

    assert isinstance(library.trace(read, {MARK: "Work", "key": [work.id]}).value, EntityReferenceError)
    assert isinstance(library.trace(read, {MARK: "Novel", "key": [work.id]}).value, EntityNotFoundError)


def test_composite_key_with_a_part_missing_is_refused(library: Library) -> None:
    """A part alone would be many rows."""
    library.stored(Copy(shelf="A", number=1))

    @library.task()
    def take(copy: Copy) -> None:
        raise AssertionError

    assert isinstance(library.trace(take, {MARK: "Copy", "key": ["A"]}).value, EntityReferenceError)
