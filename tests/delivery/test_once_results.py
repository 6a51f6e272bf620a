"""Every delivery of a `once` task reports the same value: the first one too, in an app with any result serializer."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import uuid
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from celery_alchemy import OnceResultError
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.requests.event_loop import process_loop
from tests.delivery.outbox_stand import Effect, OutboxStand
from tests.delivery.test_once import WAYS, Start, start


class Size(enum.IntEnum):
    """A number with a name."""

    LARGE = 3


class Point(NamedTuple):
    """A tuple with names."""

    x: int
    y: int


class Float32:
    """A number that is no Python float, as NumPy's float32."""


SAME = {
    "tuple": ((1, (2, 3)), [1, [2, 3]]),
    "int keys": ({1: {2: "a"}}, {"1": {"2": "a"}}),
    "named tuple": (Point(1, 2), [1, 2]),
    "enum": (Size.LARGE, 3),
    "uuid": (uuid.UUID(int=7), uuid.UUID(int=7)),
    "moment": (dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc)),
    "decimal": ([Decimal("1.50")], [Decimal("1.50")]),
    "text": ("\ud800\0", "\ud800\0"),
}


@pytest.mark.databases("sqlite", "postgresql")
@pytest.mark.parametrize("name", SAME)
def test_every_delivery_reports_what_json_makes_of_the_result(stand: OutboxStand, name: str) -> None:
    """The first delivery does not say more than the ones that come after it can."""
    returned, reported = SAME[name]
    stand.app.conf.update(result_serializer="pickle", result_accept_content=["pickle", "json"])

    @stand.task(name="returns", once=True)
    def returns() -> Any:
        return returned

    sent = start(stand, returns)
    ended = [stand.deliver(sent).value for _ in range(2)]

    assert ended == [reported, reported]
    assert [type(value) for value in ended] == [type(reported)] * 2


@WAYS
@pytest.mark.databases("sqlite")
@pytest.mark.parametrize(
    ("value", "says"),
    [({1, 2}, "set"), (Float32(), "Float32"), ({(1, 2): 3}, "tuple"), (object, "type")],
    ids=["set", "float32", "tuple as key", "class"],
)
def test_result_that_json_cannot_hold_is_refused_before_anything_is_committed(
    stand: OutboxStand, begin: Start, value: Any, says: str
) -> None:
    """The error names its type; the task is dead and its writes are rolled back."""
    stand.app.conf.update(result_serializer="pickle", result_accept_content=["pickle", "json"])

    @stand.task(name="returns", once=True)
    def returns(session: Session) -> Any:
        session.add(Effect(name="ghost"))
        return value

    ended = stand.deliver(begin(stand, returns))

    assert (ended.state, type(ended.value)) == ("FAILURE", OnceResultError)
    assert says in str(ended.value)
    assert stand.effects() == []
    assert len(upkeep.dead(stand.alchemy.engine)) == 1


@pytest.mark.databases("sqlite")
def test_next_link_gets_what_every_delivery_reports(stand: OutboxStand) -> None:
    """A callback is sent from the task's own transaction, with the value as it is kept."""

    @stand.task(name="returns", once=True)
    def returns() -> Any:
        return {1: (2,)}

    @stand.task(name="takes")
    def takes(value: Any) -> str:
        return repr(value)

    sent = start(stand, returns, link=takes.s())
    stand.deliver(sent)
    [following] = stand.sent()

    assert following.args == [{"1": [2]}]


@pytest.mark.databases("sqlite")
def test_any_json_value_is_reported_alike(stand: OutboxStand) -> None:
    """Random values: the first and the second delivery agree."""
    returned: list[Any] = []

    @stand.task(name="returns", once=True)
    def returns() -> Any:
        return returned[-1]

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.decimals(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(value=values)
    def check(value: Any) -> None:
        returned.append(value)
        sent = start(stand, returns)
        first, second = stand.deliver(sent), stand.deliver(sent)
        assert first.value == second.value

    check()


@pytest.mark.databases("sqlite")
def test_async_task_reports_alike(stand: OutboxStand) -> None:
    """Its completion is written by the same rules."""

    @stand.task(name="returns", once=True)
    async def returns() -> Any:
        await asyncio.sleep(0)
        return {1: (2,)}

    sent = start(stand, returns)
    ended = [stand.deliver(sent) for _ in range(2)]
    process_loop.close()

    assert [one.value for one in ended] == [{"1": [2]}] * 2
