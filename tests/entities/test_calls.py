"""However a task is called, its entities arrive as rows of its own session."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
from celery import Signature, Task, chain, group
from kombu.exceptions import EncodeError
from sqlalchemy import inspect
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import EntityReferenceError, EntityReturnedError, enqueue
from tests.entities.conftest import MakeLibrary
from tests.entities.library import Copy, Library, Reader, Work

pytestmark = pytest.mark.databases("sqlite")


def always_eager(library: Library, task: Any, work: Work) -> Any:
    """Send a task with `task_always_eager` on."""
    library.app.conf.task_always_eager = True
    return task.delay(work).get()


def delivered(send: Callable[[Any, Work], object]) -> Callable[[Library, Any, Work], Any]:
    """Send in some way, deliver, and return the last task's result."""

    def way(library: Library, task: Any, work: Work) -> Any:
        send(task, work)
        return library.run()[-1].result

    return way


def by_name(task: Any, work: Work) -> Any:
    """Make a signature as a program does that knows no more than the task's name."""
    return Signature(task.name, (work,), immutable=True, app=task.app)


WAYS: dict[str, Callable[[Library, Any, Work], Any]] = {
    "delay": delivered(lambda task, work: task.delay(work)),
    "apply_async with kwargs": delivered(lambda task, work: task.apply_async(kwargs={"work": work})),
    "s": delivered(lambda task, work: task.s(work).delay()),
    "si": delivered(lambda task, work: task.si(work).apply_async()),
    "partial": delivered(lambda task, work: task.s().delay(work)),
    "subtask": delivered(lambda task, work: task.subtask((work,)).delay()),
    "clone": delivered(lambda task, work: task.s().clone((work,)).delay()),
    "chain": delivered(lambda task, work: chain(task.s(work), task.si(work)).delay()),
    "chain with arguments": delivered(lambda task, work: chain(task.s(), task.si(work)).delay(work)),
    "group": delivered(lambda task, work: group(task.s(work), task.s(work=work)).delay()),
    "group with arguments": delivered(lambda task, work: group(task.s(), task.s()).delay(work)),
    "link": delivered(lambda task, work: task.apply_async((work,), link=task.si(work))),
    "send_task": delivered(lambda task, work: task.app.send_task(task.name, [work])),
    "send_task with kwargs": delivered(lambda task, work: task.app.send_task(task.name, kwargs={"work": work})),
    "signature by name": delivered(lambda task, work: task.app.signature(task.name, (work,)).delay()),
    "chain by name": delivered(lambda task, work: chain(by_name(task, work), by_name(task, work)).delay()),
    "group by name": delivered(lambda task, work: group(by_name(task, work), by_name(task, work)).delay()),
    "group in a chain by name": delivered(
        lambda task, work: chain(task.si(work), group(by_name(task, work), by_name(task, work))).delay()
    ),
    "link by name": delivered(lambda task, work: task.apply_async((work,), link=by_name(task, work))),
    "apply": lambda library, task, work: task.apply((work,)).get(),
    "apply of a signature": lambda library, task, work: task.s(work).apply().get(),
    "always eager": always_eager,
    "direct call": lambda library, task, work: task(work),
}


@pytest.mark.parametrize("way", WAYS)
def test_entity_is_loaded_in_the_tasks_session(library: Library, way: str) -> None:
    """The caller's instance stays with the caller."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def title_of(session: Session, work: Work) -> str:
        assert work is not emma
        assert inspect(work).session is session
        return work.title

    assert WAYS[way](library, title_of, emma) == "Emma"


def test_entity_by_the_name_of_another_services_task_becomes_a_reference(library: Library) -> None:
    """Nothing is known of that task here; one that could load no entity gets none, as before."""
    library.stored(emma := Work(title="Emma"))

    @library.task(base=Task, name="plain", lazy=False)
    def plain(work: Work) -> None: ...

    library.app.send_task("elsewhere.rename", [emma], {"others": [emma]})

    [sent] = library.messages()
    reference, [other] = sent.args[0], sent.kwargs["others"]
    assert isinstance(reference, dict)
    assert other == reference
    with pytest.raises(EntityReferenceError, match="flush"):
        library.app.send_task("elsewhere.rename", [Work(title="pending")])
    with pytest.raises(EncodeError):
        library.app.send_task("plain", [emma])


def test_entity_is_loaded_behind_a_decorators_own_argument(library: Library) -> None:
    """Its place is the one that callers give it."""
    library.stored(emma := Work(title="Emma"))

    def with_tenant(body: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(body)
        def call(tenant: str, *args: Any, **kwargs: Any) -> str:
            return f"{body(*args, **kwargs)} of {tenant}"

        return call

    @library.task()
    @with_tenant
    def title_of(session: Session, work: Work) -> str:
        assert inspect(work).session is session
        return work.title

    title_of.delay("acme", emma)

    assert library.run()[-1].result == "Emma of acme"


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
@pytest.mark.parametrize("way", ["delay", "chain", "apply", "direct call"])
def test_entity_is_loaded_in_the_session_of_an_async_task(library: Library, way: str) -> None:
    """An `async def` body gets the row, not an awaitable."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    async def title_of(session: AsyncSession, work: Work) -> str:
        assert inspect(work).session is session.sync_session
        return work.title

    assert WAYS[way](library, title_of, emma) == "Emma"


@pytest.mark.databases("sqlite+aiosqlite")
@pytest.mark.parametrize(("missing", "state"), [("fail", "FAILURE"), ("ignore", "IGNORED"), ("retry", "RETRY")])
def test_missing_row_of_an_async_task_ends_as_its_option_says(library: Library, missing: str, state: str) -> None:
    """The same three ways as for a plain task."""
    library.stored(emma := Work(title="Emma"))
    ran: list[Work] = []

    @library.task(missing=missing, default_retry_delay=0, max_retries=1)
    async def read(session: AsyncSession, work: Work) -> None:
        ran.append(work)

    read.delay(emma)
    library.database.execute("DELETE FROM work")

    assert (library.run()[0].state, ran) == (state, [])


@pytest.mark.parametrize("way", ["map", "starmap", "chunks"])
def test_entities_travel_in_maps_and_chunks(library: Library, way: str) -> None:
    """Celery runs the task once for each of them, in one message."""
    library.stored(*(works := [Work(title="a"), Work(title="b")]))
    titles: list[str] = []

    @library.task()
    def note(work: Work) -> None:
        titles.append(work.title)

    if way == "map":
        note.map(works).delay()
    elif way == "starmap":
        note.starmap([(work,) for work in works]).delay()
    else:
        note.chunks([(work,) for work in works], 1)()
    for message in library.messages():
        library.app.tasks[message.task](*message.args, **message.kwargs)

    assert sorted(titles) == ["a", "b"]


@pytest.mark.parametrize("outbox", [True, False])
def test_entity_flushed_in_a_transaction_travels_on_its_commit(make_library: MakeLibrary, outbox: bool) -> None:
    """The key is known after the flush, the row is there when the task is sent."""
    library = make_library(outbox=outbox)
    library.alchemy.create_tables()

    @library.task()
    def title_of(work: Work) -> str:
        return work.title

    with library.alchemy.session() as session:
        session.add(emma := Work(title="Emma"))
        session.flush()
        title_of.delay_on_commit(emma)
        assert library.messages() == []
        session.commit()
    assert library.alchemy.drain()

    assert [ended.result for ended in library.run()] == ["Emma"]


def test_direct_call_with_the_callers_session_gets_the_callers_instance(library: Library) -> None:
    """A session has one object for one row."""
    library.stored(Work(id=1, title="Emma"))

    @library.task()
    def rename(session: Session, work: Work) -> None:
        work.title = "Persuasion"

    with library.alchemy.session() as session:
        emma = session.get_one(Work, 1)
        rename(emma, session=session)
        renamed = emma.title

    assert renamed == "Persuasion"


def test_once_task_takes_an_entity(make_library: MakeLibrary) -> None:
    """A second delivery of the message does nothing."""
    library = make_library(outbox=True)
    library.alchemy.create_tables()
    library.stored(emma := Work(title="Emma"))

    @library.task(once=True)
    def lengthen(work: Work) -> None:
        work.title += "!"

    for _ in range(2):
        lengthen.apply_async((emma,), task_id="one")
    states = [ended.state for ended in library.run()]

    assert states == ["SUCCESS", "SUCCESS"]
    assert library.database.scalar("SELECT title FROM work") == "Emma!"


def test_failure_record_takes_the_entity_too(library: Library) -> None:
    """In its own session, which commits what it changes."""
    library.stored(emma := Work(title="Emma"))

    def record(session: Session, exc: Exception, work: Work) -> None:
        work.title = f"{work.title}: {exc}"

    @library.task(record_failure=record)
    def fail(work: Work) -> None:
        work.title = "lost"
        raise LookupError("no such page")

    fail.delay(emma)
    [ended] = library.run()

    assert ended.state == "FAILURE"
    assert library.database.scalar("SELECT title FROM work") == "Emma: no such page"


def test_entity_of_an_expired_session_travels(library: Library) -> None:
    """A commit expires it; its key needs no refresh, for which a detached instance has no session."""
    with library.alchemy.session() as session:
        session.add(emma := Work(title="Emma"))
        session.commit()

    @library.task()
    def title_of(work: Work) -> str:
        return work.title

    title_of.delay(emma)

    assert [ended.result for ended in library.run()] == ["Emma"]


def test_entity_returned_from_a_task_is_refused(library: Library) -> None:
    """The row that was passed is no result; the error names it."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    def same(work: Work) -> Work:
        return work

    same.delay(emma)
    [ended] = library.run()

    assert ended.state == "FAILURE"
    assert isinstance(ended.result, EntityReturnedError)
    assert "Work" in str(ended.result)


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+asyncpg")
@pytest.mark.parametrize("by", ["entity", "reference"])
def test_entity_is_loaded_in_the_callers_own_async_session(library: Library, by: str) -> None:
    """A direct call with a session of the caller's loads the row in that one, and leaves the commit to the caller."""
    library.stored(emma := Work(title="Emma"))

    @library.task()
    async def rename(session: AsyncSession, work: Work, title: str) -> bool:
        work.title = title
        return work in session

    async def call() -> bool:
        async with library.alchemy.async_session() as own:
            work: Any = emma if by == "entity" else rename.s(emma, "x").args[0]
            loaded: bool = await rename(work, "Emma II", session=own)
            await own.rollback()
            await rename(work, "Emma III", session=own)
            await own.commit()
            return loaded

    assert asyncio.run(call()) is True
    assert library.database.scalar("SELECT title FROM work") == "Emma III"


# --- once=callable -----------------------------------------------------------------------------------------------------------


@pytest.mark.databases("sqlite", "postgresql", "mariadb")
@pytest.mark.parametrize("way", ["outbox", "plain", "direct call"])
def test_key_of_a_once_task_sees_the_primary_key_of_an_entity(make_library: MakeLibrary, way: str) -> None:
    """`once=lambda work: f"{work.id}"`: the same key where it is sent and where it runs, whoever sends it, and however often."""
    library = make_library(outbox=True)
    library.alchemy.create_tables()
    library.stored(emma := Work(id=7, title="Emma"), Work(id=8, title="Other"))
    seen: list[Any] = []

    def key(work: Any) -> str:
        seen.append(work.id)
        return f"lengthen:{work.id}"

    @library.task(once=key, name="lengthen")
    def lengthen(work: Work) -> None:
        work.title += "!"

    for _ in range(2):
        if way == "outbox":
            with library.alchemy.begin() as session:
                enqueue(session, lengthen.s(emma))
        elif way == "plain":
            lengthen.delay(emma)
        else:
            lengthen(emma)
    states = [ended.state for ended in library.run()]

    library.alchemy.drain(10)
    assert set(states) <= {"SUCCESS"}
    assert set(seen) == {7}
    assert library.database.rows("SELECT title FROM work ORDER BY id") == [("Emma!",), ("Other",)]
    assert library.database.scalar("SELECT id FROM celery_outbox") == "lengthen:lengthen:7"


@pytest.mark.databases("sqlite")
def test_key_sees_typed_and_composite_keys_in_lists_and_as_keywords(library: Library) -> None:
    """UUIDs are UUIDs again; None and plain values are as they are."""
    library.alchemy.create_tables()
    library.stored(copy := Copy(shelf="A", number=3), reader := Reader(), emma := Work(title="Emma"))
    seen: list[Any] = []

    def key(copy: Any, readers: Any, work: Any = None, times: int = 1) -> str:
        seen.append((copy.shelf, copy.number, [each.id for each in readers], work and work.id, times, repr(copy)))
        return f"{copy.shelf}{copy.number}"

    @library.task(once=key)
    def lend(copy: Copy, readers: list[Reader], work: Work | None = None, times: int = 1) -> None: ...

    lend.delay(copy, [reader], times=2)
    lend.delay(copy=copy, readers=[], work=emma)

    assert [ended.state for ended in library.run()] == ["SUCCESS", "SUCCESS"]
    assert seen[0] == ("A", 3, [reader.id], None, 2, "Copy(A, 3)")
    assert seen[-1] == ("A", 3, [], emma.id, 1, "Copy(A, 3)")


@pytest.mark.databases("sqlite")
def test_key_that_asks_for_more_than_the_primary_key_is_told_why(library: Library) -> None:
    """No row is loaded for it; the error says what is known."""
    library.alchemy.create_tables()
    library.stored(emma := Work(id=7, title="Emma"))

    @library.task(once=lambda work: work.title)
    def take(work: Work) -> None: ...

    take.delay(emma)
    [ended] = library.run()

    assert ended.state == "FAILURE"
    assert isinstance(ended.result, AttributeError)
    assert "of Work(7) it knows id, and not title" in str(ended.result)
