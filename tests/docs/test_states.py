"""The drawn states of an outbox row are those of the code: every act is tried on every state."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from celery_alchemy import Alchemy
from celery_alchemy.databases.tables import from_now, outbox
from celery_alchemy.messages.message import Message
from celery_alchemy.operations import dead_tasks as upkeep
from celery_alchemy.outbox import relay
from celery_alchemy.outbox.outbox import Outbox, Row
from celery_alchemy.outbox.place import DEFAULT_PLACE, OutboxTable
from celery_alchemy.outbox.settlement import give_back, settle
from celery_alchemy.requests import once_records as completion
from celery_alchemy.requests.once_start import Start, begin

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "states.md"
NOTHING = "[*]"
KEY = "4c1f"

Edges = set[tuple[str, str, str]]
Act = Callable[["OneRow"], None]


class OneRow:
    """One row in a database, and what can be done with it.

    Args:
        alchemy: Its database holds no other row.
        once: The row is a ``once`` task's.
    """

    def __init__(self, alchemy: Alchemy, *, once: bool) -> None:
        assert alchemy.outbox is not None
        self.engine: Engine = alchemy.engine
        self.outbox: Outbox = alchemy.outbox
        self.once = once

    def row(self) -> Any:
        """Return the row as it is, None if there is none."""
        with self.engine.connect() as connection:
            return connection.execute(select(outbox)).one_or_none()

    def state(self) -> str:
        """Return the state's name as the page has it."""
        with self.engine.connect() as connection:
            is_due = (outbox.c.due_at <= from_now(0)).label("is_due")
            found: Any = connection.execute(select(outbox, is_due)).one_or_none()
        if found is None:
            return NOTHING
        if found.due_at is None:
            ended = "dead" if found.died_at is not None else "counted"
            return "completed" if found.completed_at is not None else ended
        assert found.completed_at is None
        assert found.died_at is None
        if found.is_due:
            return "due"
        unclaimed = "owed" if found.once else "backoff"
        return unclaimed if found.claim is None else "leased"

    def new(self) -> Row:
        """Return the row as a caller makes it."""
        message = Message(b"[[], {}, {}]", "application/json", "utf-8", "", "celery", headers={"id": KEY, "task": "t"})
        return Row(KEY, message, redeliver_seconds=900, max_deliveries=5) if self.once else Row(KEY, message)

    def claimed(self) -> relay.Claimed:
        """Return the row as the process that holds its claim has it."""
        row = self.new()
        return relay.Claimed(KEY, row.once, row.redeliver_seconds, sends=0, failures=0, message=row.message)

    def claim(self) -> str:
        """Return the token of the row's claim; one that no row has if nobody claims it."""
        row = self.row()
        return (row.claim if row is not None else None) or "nobody's"

    def start(self, *, redelivered: bool = False) -> Start:
        """Return a start of the task that came past the outbox."""
        request = Context(id=KEY, task="t", delivery_info={"redelivered": redelivered})
        return Start(KEY, request, wait_seconds=900, most=5)


def _in_session(work: Callable[[OneRow, Session, bool], object]) -> Act:
    def act(one: OneRow) -> None:
        there = one.state() != NOTHING
        with Session(one.engine) as session, session.begin():
            work(one, session, there)

    return act


def _in_table(work: Callable[[OneRow, OutboxTable, bool], object]) -> Act:
    def act(one: OneRow) -> None:
        there = one.state() != NOTHING
        with DEFAULT_PLACE.begin(one.engine) as table:
            work(one, table, there)

    return act


def _on_nothing(act: Act) -> Act:
    return lambda one: act(one) if one.state() == NOTHING else None


def _on_a_row(act: Act) -> Act:
    return lambda one: None if one.state() == NOTHING else act(one)


def _let_time_pass(one: OneRow) -> None:
    with one.engine.begin() as connection:
        connection.execute(update(outbox).where(outbox.c.due_at > from_now(0)).values(due_at=from_now(-1)))


def _claim(one: OneRow) -> None:
    with DEFAULT_PLACE.begin(one.engine) as table:
        relay.claim_due(table, "a relay's")


def _publish(one: OneRow) -> None:
    claim = one.claim()
    with DEFAULT_PLACE.begin(one.engine) as table:
        settle(table, [one.claimed()], [claim])


def _put_back(one: OneRow) -> None:
    claim = one.claim()
    with DEFAULT_PLACE.begin(one.engine) as table:
        relay._put_back(table, [(one.claimed(), OSError("refused"))], claim, counts=True)


def _give_back(one: OneRow) -> None:
    claim = one.claim()
    with one.engine.begin() as connection:
        give_back(connection, [one.claimed()], [claim])


def _set_aside(one: OneRow) -> None:
    claim = one.claim()
    with DEFAULT_PLACE.begin(one.engine) as table:
        relay._set_aside(table, [(KEY, "refused")], claim)


def _prune(one: OneRow) -> None:
    with one.engine.begin() as connection:
        old = update(outbox).where(outbox.c.completed_at.is_not(None)).values(completed_at=from_now(-100))
        connection.execute(old)
    if not relay.prune(one.engine, 60) and one.state() == "completed":
        raise AssertionError("a completed row that is older than the window was not pruned")


MESSAGE_ACTS: dict[str, Act] = {
    "committed": _on_nothing(_in_session(lambda one, session, there: one.outbox.write(session, [one.new()], "a caller's"))),
    "time": _let_time_pass,
    "claimed": _claim,
    "published": _on_a_row(_publish),
    "put back": _on_a_row(_put_back),
    "given back": _on_a_row(_give_back),
    "set aside": _on_a_row(_set_aside),
    "revived": lambda one: (upkeep.revive(one.engine), None)[1],
}
ONCE_ACTS: dict[str, Act] = {
    **MESSAGE_ACTS,
    "starts": _on_a_row(_in_table(lambda one, table, there: begin(table, one.start()))),
    "lost": _on_nothing(_in_table(lambda one, table, there: begin(table, one.start(redelivered=True)))),
    "completes": _in_table(lambda one, table, there: completion.complete(table, KEY, KEY, "t", "{}", owed=there)),
    "dies": _in_table(
        lambda one, table, there: (
            completion.die(table, KEY, "it failed", KEY) if there else completion.insert_dead(table, one.new(), "it failed")
        )
    ),
    "retried": _in_table(lambda one, table, there: completion.resend(table, one.new(), "a retry's")),
    "pruned": _prune,
}


@pytest.fixture
def alchemy() -> Iterator[Alchemy]:
    alchemy = Alchemy(Celery("states", broker="memory://"), "sqlite://", outbox=True)
    alchemy.create_tables()
    yield alchemy
    alchemy.engine.dispose()


def _ways_to_a_state(alchemy: Alchemy, acts: dict[str, Act], *, once: bool) -> Edges:
    """Try every act on every state that can be reached, and return the changes."""
    edges: Edges = set()
    ways: list[tuple[str, ...]] = [()]
    seen: set[tuple[object, ...]] = set()
    while ways:
        way = ways.pop(0)
        for name, act in acts.items():
            one = OneRow(alchemy, once=once)
            with alchemy.engine.begin() as connection:
                connection.execute(outbox.delete())
            for earlier in way:
                acts[earlier](one)
            before_row, before = one.row(), one.state()
            act(one)
            after_row, after = one.row(), one.state()
            if before == after and _without_times(before_row) == _without_times(after_row):
                continue
            edges.add((before, name, after))
            shape = (after, after_row is not None and (after_row.claim is None, after_row.body is None))
            if shape not in seen:
                seen.add(shape)
                ways.append((*way, name))
    return edges


def _without_times(row: Any) -> object:
    if row is None:
        return None
    return {name: value for name, value in row._mapping.items() if not name.endswith("_at")}


def _drawn(heading: str) -> Edges:
    """Return the arrows of the drawing under a heading; one may stand for several acts."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1]
    drawing = section.split("```mermaid\n", 1)[1].split("```", 1)[0]
    arrows = re.findall(r"(\S+) --> (\S+): (.+)", drawing)
    return {(source, act, target) for source, target, acts in arrows for act in acts.split(", ")}


def test_drawn_states_of_a_message_are_those_of_the_code(alchemy: Alchemy) -> None:
    """Whoever reads the drawing at night sees every way that a message can go, and none that it cannot."""
    assert _ways_to_a_state(alchemy, MESSAGE_ACTS, once=False) == _drawn("A message")


def test_drawn_states_of_a_once_task_are_those_of_the_code(alchemy: Alchemy) -> None:
    """The same for a task whose row stays until its work is committed."""
    assert _ways_to_a_state(alchemy, ONCE_ACTS, once=True) == _drawn("A `once` task")


def test_row_that_only_counts_starts_is_never_due(alchemy: Alchemy) -> None:
    """It has no message; a relay that took it would set the task aside as a corrupt row."""
    one = OneRow(alchemy, once=True)

    for act in ("lost", "starts", "time", "claimed"):
        ONCE_ACTS[act](one)

    assert one.state() == "counted"
    assert one.row().deliveries == 3


def test_status_counts_every_row_that_is_on_its_way(alchemy: Alchemy) -> None:
    """A message that backs off is not lost from the numbers."""
    one = OneRow(alchemy, once=False)

    counts = {}
    for act in ("committed", "put back", "time"):
        MESSAGE_ACTS[act](one)
        numbers = upkeep.status(alchemy.engine)
        del numbers["oldest_seconds"]
        counts[one.state()] = {name: number for name, number in numbers.items() if number}

    assert counts == {"leased": {"leased": 1}, "backoff": {"waiting": 1}, "due": {"waiting": 1}}
