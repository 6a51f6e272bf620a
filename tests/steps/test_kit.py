"""The testing kit knows steps: crashes at each, tasks that begin in the middle, and which ones ran."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from celery_alchemy import ConfigurationError, step
from celery_alchemy.testing import captured, crash_at, steps_run
from tests.delivery.outbox_stand import Effect, OutboxStand


def ingest_of(stand: OutboxStand) -> Any:
    """Make a task of two steps."""

    def write(session: Session, name: str) -> str:
        session.add(Effect(name=name))
        session.flush()
        return name

    @stand.task(name="ingest", once=True)
    def ingest() -> list[str]:
        return [step(name, write, name) for name in ("parse", "embed 0")]

    return ingest


@pytest.mark.parametrize("place", ["", ", before", ", after"])
@pytest.mark.parametrize("name", ["parse", "embed 0"])
def test_crash_at_a_step_is_survived(stand: OutboxStand, place: str, name: str) -> None:
    """Wherever the process dies around a step, each step's writes are there once, and none is run again that was committed."""
    ingest = ingest_of(stand)

    with (
        captured(stand.alchemy) as sent,
        crash_at(stand.alchemy, f"step {name}{place}", task=ingest),
    ):
        ingest.delay()
        first, second = sent.run()

    committed = ["parse", "embed 0"][: ["parse", "embed 0"].index(name) + (place == ", after")]
    assert (first.state, second.state) == ("LOST", "SUCCESS")
    assert list(first.steps) == committed
    assert [*committed, *second.steps] == ["parse", "embed 0"]
    assert stand.effects() == ["parse", "embed 0"]


@pytest.mark.databases("sqlite+aiosqlite", "postgresql+psycopg")
def test_crash_at_a_step_of_an_async_task_is_survived(stand: OutboxStand) -> None:
    """As for a plain one."""

    async def write(session: AsyncSession, name: str) -> None:
        session.add(Effect(name=name))

    @stand.task(name="ingest", once=True)
    async def ingest() -> None:
        await step("parse", write, "parse")
        await step("embed", write, "embed")

    with captured(stand.alchemy) as sent, crash_at(stand.alchemy, "step embed"):
        ingest.delay()
        first, second = sent.run()

    assert (first.state, first.steps, second.steps) == ("LOST", ("parse",), ("embed",))
    assert stand.effects() == ["parse", "embed"]


def test_task_begins_in_the_middle(stand: OutboxStand) -> None:
    """The recorded steps give their values and do not run."""
    ingest = ingest_of(stand)

    with captured(stand.alchemy) as sent:
        ingest.delay()
        sent[0].record_steps(parse="recorded")
        [run] = sent.run()

    assert (run.result, run.steps) == (["recorded", "embed 0"], ("embed 0",))
    assert stand.effects() == ["embed 0"]


@pytest.mark.databases("sqlite")
def test_steps_of_a_direct_call_are_seen(stand: OutboxStand) -> None:
    """Inside of the block, in the order of their commits."""
    ingest = ingest_of(stand)

    with steps_run() as ran:
        ingest.apply()

    assert ran == ["parse", "embed 0"]


@pytest.mark.databases("sqlite")
def test_steps_of_a_plain_task_cannot_be_recorded(stand: OutboxStand) -> None:
    """The error says that it needs once."""
    with captured(stand.alchemy) as sent:
        stand.effect.delay("a")
        with pytest.raises(ConfigurationError, match="once=True"):
            sent[0].record_steps(parse=1)
    with pytest.raises(ConfigurationError, match="step NAME"), crash_at(stand.alchemy, "steps"):
        pass
