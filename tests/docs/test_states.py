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

from celery_alchemy import Alchemy, completion, relay, upkeep
from celery_alchemy.message import Message
from celery_alchemy.outbox import Outbox, Row, settle
from celery_alchemy.tables import from_now, outbox

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "states.md"
NOTHING = "[*]"
KEY = "4c1f"

Edges = set[tuple[str, str, str]]
Act = Callable[["Bench"], None]


class Bench:
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

    def request(self, *, redelivered: bool = False) -> Context:
        """Return a delivery of the task that came past the outbox."""
        return Context(id=KEY, task="t", delivery_info={"redelivered": redelivered})


def _in_session(work: Callable[[Bench, Session, bool], object]) -> Act:
    def act(bench: Bench) -> None:
        there = bench.state() != NOTHING
        with Session(bench.engine) as session, session.begin():
            work(bench, session, there)

    return act


def _on_nothing(act: Act) -> Act:
    return lambda bench: act(bench) if bench.state() == NOTHING else None


def _on_a_row(act: Act) -> Act:
    return lambda bench: None if bench.state() == NOTHING else act(bench)


def _let_time_pass(bench: Bench) -> None:
    with bench.engine.begin() as connection:
        connection.execute(update(outbox).where(outbox.c.due_at > from_now(0)).values(due_at=from_now(-1)))


def _claim(bench: Bench) -> None:
    with bench.engine.begin() as connection:
        relay.claim_due(connection, "a relay's")


def _publish(bench: Bench) -> None:
    claim = bench.claim()
    with bench.engine.begin() as connection:
        settle(connection, [bench.claimed()], claim)


def _put_back(bench: Bench) -> None:
    claim = bench.claim()
    with bench.engine.begin() as connection:
        relay._put_back(connection, [(bench.claimed(), OSError("refused"))], claim, counts=True)


def _set_aside(bench: Bench) -> None:
    claim = bench.claim()
    with bench.engine.begin() as connection:
        relay._set_aside(connection, [(KEY, "refused")], claim)


def _prune(bench: Bench) -> None:
    with bench.engine.begin() as connection:
        old = update(outbox).where(outbox.c.completed_at.is_not(None)).values(completed_at=from_now(-100))
        connection.execute(old)
    if not relay.prune(bench.engine, 60) and bench.state() == "completed":
        raise AssertionError("a completed row that is older than the window was not pruned")


MESSAGE_ACTS: dict[str, Act] = {
    "committed": _on_nothing(_in_session(lambda b, session, there: b.outbox.write(session, [b.new()], "a caller's"))),
    "time": _let_time_pass,
    "claimed": _claim,
    "published": _on_a_row(_publish),
    "put back": _on_a_row(_put_back),
    "set aside": _on_a_row(_set_aside),
    "revived": lambda b: (upkeep.revive(b.engine), None)[1],
}
ONCE_ACTS: dict[str, Act] = {
    **MESSAGE_ACTS,
    "starts": _on_a_row(_in_session(lambda b, session, there: completion.start(session, KEY, 900, 5, b.request()))),
    "lost": _on_nothing(_in_session(lambda b, session, there: completion.start(session, KEY, 900, 5, b.request(redelivered=True)))),
    "completes": _in_session(lambda b, session, there: completion.complete(session, KEY, KEY, "t", "{}", owed=there)),
    "dies": _in_session(
        lambda b, session, there: (
            completion.die(session, KEY, "it failed") if there else completion.insert_dead(session, b.new(), "it failed")
        )
    ),
    "retried": _in_session(lambda b, session, there: completion.resend(session, b.new(), "a retry's")),
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
            bench = Bench(alchemy, once=once)
            with alchemy.engine.begin() as connection:
                connection.execute(outbox.delete())
            for earlier in way:
                acts[earlier](bench)
            before_row, before = bench.row(), bench.state()
            act(bench)
            after_row, after = bench.row(), bench.state()
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
    bench = Bench(alchemy, once=True)

    for act in ("lost", "starts", "time", "claimed"):
        ONCE_ACTS[act](bench)

    assert bench.state() == "counted"
    assert bench.row().deliveries == 3


def test_status_counts_every_row_that_is_on_its_way(alchemy: Alchemy) -> None:
    """A message that backs off is not lost from the numbers."""
    bench = Bench(alchemy, once=False)

    counts = {}
    for act in ("committed", "put back", "time"):
        MESSAGE_ACTS[act](bench)
        numbers = upkeep.status(alchemy.engine)
        del numbers["oldest_seconds"]
        counts[bench.state()] = {name: number for name, number in numbers.items() if number}

    assert counts == {"leased": {"leased": 1}, "backoff": {"waiting": 1}, "due": {"waiting": 1}}
