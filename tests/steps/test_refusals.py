"""What no step can be, or be in, is refused with what to do, and leaves nothing."""

from __future__ import annotations

import inspect
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

from celery_alchemy import CallableError, EntityReturnedError, StepError, StepValueError, step
from celery_alchemy.outbox.step_records import MAX_VALUE_BYTES
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.steps.test_steps import send, steps_of

pytestmark = pytest.mark.databases("sqlite")


def refused(stand: OutboxStand, body: Any, **options: Any) -> BaseException:
    """Run a body as a once task, and return what it failed with."""

    def run(session: Session) -> None:
        body(session) if inspect.signature(body).parameters else body()

    task = stand.task(name=f"refused {uuid4()}", **{"once": True, **options})(run)
    ended = stand.deliver(send(stand, task))
    assert ended.state == "FAILURE"
    error: BaseException = ended.value
    return error


def write(session: Session, name: str) -> None:
    """Write an effect."""
    session.add(Effect(name=name))
    session.flush()


def test_name_that_is_used_twice_is_refused(stand: OutboxStand) -> None:
    """The second one could not be told from the first; the text shows how loops name theirs."""

    def body() -> None:
        for number in range(2):
            step("embed", lambda number=number: number)

    error = refused(stand, body)

    assert isinstance(error, StepError)
    assert 'f"embed {n}"' in str(error)


def test_name_that_is_used_twice_is_refused_when_it_is_recorded(stand: OutboxStand) -> None:
    """A run that goes on sees the same error as the first one."""

    def body() -> None:
        step("embed", write, "a")
        step("embed", write, "b")

    task = stand.task(name="refused", once=lambda: "key")(body)
    for _ in range(2):
        with pytest.raises(StepError, match="has been done in this run"):
            task()
        stand.database.execute("UPDATE celery_outbox SET died_at = NULL")

    assert stand.effects() == ["a"]


@pytest.mark.parametrize("name", ["", " parse", "a\0b", "x" * 256, 7, None])
def test_name_that_cannot_be_kept_is_refused(stand: OutboxStand, name: Any) -> None:
    """MySQL ignores white space at an end, PostgreSQL refuses a NUL; none of it shows up in production only."""
    error = refused(stand, lambda: step(name, lambda: None))

    assert isinstance(error, StepError)
    assert "cannot be kept" in str(error)


@pytest.mark.parametrize("function", [None, "text", 7], ids=str)
def test_function_that_cannot_be_called_is_refused(stand: OutboxStand, function: Any) -> None:
    """As what `step("parse", parse())` gives; the error names the step."""
    error = refused(stand, lambda: step("parse", function))

    assert isinstance(error, CallableError)
    assert "'parse'" in str(error)
    assert stand.effects() == []


def test_step_outside_of_a_once_task_is_refused(stand: OutboxStand) -> None:
    """In a plain task, and outside of any."""
    error = refused(stand, lambda: step("parse", lambda: None), once=False)

    assert isinstance(error, StepError)
    assert "once=True" in str(error)
    with pytest.raises(StepError, match="outside of a task"):
        step("parse", lambda: None)
    with stand.alchemy.begin(), pytest.raises(StepError, match="outside of a task"):
        step("parse", lambda: None)


def test_step_in_record_failure_is_refused(stand: OutboxStand) -> None:
    """It is no part of the work that the task's records are about."""
    seen: list[BaseException] = []

    def record(session: Session, exc: BaseException) -> None:
        try:
            step("note", lambda: None)
        except StepError as error:
            seen.append(error)

    def body() -> None:
        raise LookupError

    refused(stand, body, record_failure=record)

    assert "without `once`" in str(seen[0])


def test_open_savepoint_is_refused(stand: OutboxStand) -> None:
    """Around the step, and left open by its function."""

    def around(session: Session) -> None:
        with session.begin_nested():
            step("parse", lambda: None)

    def inside(session: Session) -> None:
        session.begin_nested()

    for body in (around, lambda: step("parse", inside)):
        error = refused(stand, body)
        assert isinstance(error, StepError)
        assert "begin_nested" in str(error)


def test_step_inside_of_a_step_is_refused(stand: OutboxStand) -> None:
    """Its commit would take half of the outer one's work with it."""

    def outer(session: Session) -> None:
        write(session, "outer")
        step("inner", write, "inner")

    error = refused(stand, lambda: step("outer", outer))

    assert isinstance(error, StepError)
    assert "'outer' runs" in str(error)
    assert stand.effects() == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1, 2}, "not JSON"),
        (object(), "not JSON"),
        ("x" * MAX_VALUE_BYTES, f"over the limit of {MAX_VALUE_BYTES}"),
    ],
    ids=["set", "object", "large"],
)
def test_value_that_cannot_be_kept_is_refused(stand: OutboxStand, value: Any, says: str) -> None:
    """Nothing of the step is committed; the text advises a table of one's own."""

    def work(session: Session) -> Any:
        write(session, "a")
        return value

    error = refused(stand, lambda: step("parse", work))

    assert isinstance(error, StepValueError)
    assert says in str(error)
    assert "a table of your own" in str(error)
    assert (stand.effects(), steps_of(stand)) == ([], [])


def test_entity_as_a_value_is_refused(stand: OutboxStand) -> None:
    """It belongs to the task's session; its key is what can be kept."""

    def work(session: Session) -> Effect:
        effect = Effect(name="a")
        session.add(effect)
        session.flush()
        return effect

    assert isinstance(refused(stand, lambda: step("parse", work)), EntityReturnedError)


def test_coroutine_function_in_a_plain_task_is_refused(stand: OutboxStand) -> None:
    """Its coroutine would be the value, and never run."""

    async def parse() -> None: ...

    error = refused(stand, lambda: step("parse", parse))

    assert isinstance(error, StepError)
    assert "async def" in str(error)
