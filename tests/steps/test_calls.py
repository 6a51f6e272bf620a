"""Steps in eager and direct calls, and with every kind of function."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import step
from celery_alchemy.operations import dead_tasks
from tests.delivery.conftest import MakeStand
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.stand import Crash
from tests.steps.test_steps import Calls, send, steps_of


@pytest.mark.parametrize("way", ["direct", "apply", "eager"])
def test_calls_with_a_key_go_on_after_the_last_step(stand: OutboxStand, way: str) -> None:
    """A key made of the arguments finds what an earlier call has done, without any message."""
    calls = Calls(b=1)

    @stand.task(name="ingest", once=lambda document: f"{document}")
    def ingest(document: int) -> str:
        step("a", calls.write, "a")
        return step("b", calls.write, "b")

    def call() -> Any:
        if way == "direct":
            return ingest(7)
        stand.app.conf.task_always_eager = way == "eager"
        return (ingest.delay(7) if way == "eager" else ingest.apply((7,))).get()

    with pytest.raises(Crash):
        call()
    left = steps_of(stand)
    value = call()

    assert (left, value) == (["a"], "wrote b")
    assert calls.made == ["a", "b", "b"]
    assert (stand.effects(), steps_of(stand)) == (["a", "b"], [])


def test_direct_call_that_fails_is_dead_and_can_be_revived(stand: OutboxStand) -> None:
    """Its row, which its first step has made, gets the message that revives it."""
    broken = [True]

    @stand.task(name="ingest", once=lambda: "key")
    def ingest() -> str:
        step("a", lambda: None)
        if broken:
            raise LookupError("no such document")
        return "done"

    with pytest.raises(LookupError):
        ingest()
    [dead] = dead_tasks.dead(stand.alchemy.engine)
    broken.clear()
    dead_tasks.revive(stand.alchemy.engine)
    stand.relay_all()

    assert (dead["id"], dead["last_step"]) == ("ingest:key", "a")
    assert stand.deliver(stand.sent()[0]).value == "done"


@pytest.mark.databases("sqlite")
def test_call_without_a_delivery_behind_it_just_runs_the_functions(stand: OutboxStand) -> None:
    """A direct call without a key, or with the caller's session: the caller's transaction, and no records."""

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> tuple[Any, bool]:
        return step("a", Calls().write, "a"), session.in_transaction()

    value = ingest()
    with stand.alchemy.session() as session:
        borrowed = ingest(session=session)
        session.rollback()

    assert value == ("wrote a", True)
    assert borrowed == ("wrote a", True)
    assert (stand.effects(), steps_of(stand)) == (["a"], [])


@pytest.mark.databases("sqlite")
def test_every_kind_of_function_is_called_as_it_asks(stand: OutboxStand) -> None:
    """Methods, partials, keyword-only sessions, built-in functions; a session that is passed is not injected again."""

    class Library:
        def write(self, session: Session, name: str) -> str:
            session.add(Effect(name=name))
            return name

    def by_keyword(name: str, *, session: Session) -> str:
        return Library().write(session, name)

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> list[Any]:
        library = Library()
        return [
            step("method", library.write, "method"),
            step("partial", functools.partial(by_keyword, name="partial")),
            step("keyword", by_keyword, "keyword"),
            step("passed", library.write, session, "passed"),
            step("built-in", max, 1, 2),
            step("no signature", dict, a=1),
        ]

    ended = stand.deliver(send(stand, ingest))

    assert ended.value == ["method", "partial", "keyword", "passed", 2, {"a": 1}]
    assert stand.effects() == ["method", "partial", "keyword", "passed"]


@pytest.mark.databases("sqlite", "postgresql")
def test_step_inside_of_a_session_block_is_the_task_s(stand: OutboxStand) -> None:
    """A block has a session and a transaction of its own; the step is recorded and committed with the task's."""

    @stand.task(name="ingest", once=True)
    def ingest(session: Session) -> None:
        with stand.alchemy.session() as own:
            step("a", Calls().write, "a")
            assert own is not session
            assert not session.in_transaction()

    assert stand.deliver(send(stand, ingest)).state == "SUCCESS"
    assert stand.effects() == ["a"]


@pytest.mark.databases("sqlite", "postgresql")
def test_tasks_with_one_key_share_their_steps(stand: OutboxStand) -> None:
    """What a task has done that died half-way is not done again by another one with the same key."""
    calls = Calls(b=1)

    @stand.task(name="ingest", once=lambda: "key")
    def ingest() -> str:
        step("a", calls.write, "a")
        return step("b", calls.write, "b")

    first = send(stand, ingest)
    with pytest.raises(Crash):
        stand.deliver(first)
    second = stand.deliver(send(stand, ingest))

    assert (second.value, stand.deliver(first).value) == ("wrote b", "wrote b")
    assert (calls.made, stand.effects()) == (["a", "b", "b"], ["a", "b"])


@pytest.mark.databases("sqlite", "postgresql")
def test_schema_holds_the_steps_too(make_stand: MakeStand) -> None:
    """Both tables are in the schema that the Alchemy names, and the statements are sent there."""
    stand = make_stand()
    if stand.database.name == "sqlite":
        assert {"celery_outbox", "celery_steps"} <= set(stand.alchemy.metadata.tables)
        return
    stand.database.execute("DROP TABLE celery_steps")
    moved = make_stand(schema="library")
    moved.alchemy.create_tables()

    @moved.task(name="ingest", once=True)
    def ingest() -> None:
        step("a", lambda: None)
        seen.extend(moved.database.rows("SELECT name FROM library.celery_steps"))

    seen: list[Any] = []
    with moved.alchemy.begin():
        ingest.delay_on_commit()

    assert moved.deliver(moved.sent()[0]).state == "SUCCESS"
    assert seen == [("a",)]
    assert moved.database.rows("SELECT name FROM library.celery_steps") == []
