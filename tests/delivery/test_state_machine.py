"""Any order of transactions, deliveries, crashes and relays: what is committed is sent, what is done is done once.

A reference model says what must be true; after every step the database and the broker are compared with it. The invariants have
the numbers by which the design names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.orm import Session, SessionTransaction

from celery_alchemy import enqueue, upkeep
from tests.delivery.stand import Crash, Effect, Sent, Stand
from tests.services.databases import Database

#: How the body of a delivery ends.
ENDS = st.sampled_from(["returns", "returns", "raises", "retries", "crashes", "crashes before its commit"])


@dataclass
class Level:
    """What a transaction or a SAVEPOINT has done so far: effects, and ids of once and plain tasks that it sent."""

    effects: list[str] = field(default_factory=list)
    sends: list[str] = field(default_factory=list)


class Delivery(RuleBasedStateMachine):
    """The machine: a stand, and beside it the model.

    Attributes:
        stand: Set by the test, one for all examples; each example empties it.
        reached: What the examples have reached so far; one that reaches nothing proves nothing.
    """

    stand: Stand
    reached: set[str]

    def __init__(self) -> None:
        super().__init__()
        self.session: Session | None = None
        self.savepoints: list[SessionTransaction] = []
        self.levels: list[Level] = []
        self.number = 0
        #: The model: effects of committed transactions, and tasks by id that were sent by them.
        self.effects: list[str] = []
        self.committed_sends: set[str] = set()
        #: Once tasks that were completed, and those that are dead.
        self.done: dict[str, Any] = {}
        self.dead: set[str] = set()
        self.pruned: set[str] = set()
        #: Every message that was ever taken out of the broker.
        self.taken: list[Sent] = []

    @initialize()
    def empty(self) -> None:
        self.stand.sent()
        for table in ("effect", "celery_outbox"):
            self.stand.database.execute(f"DELETE FROM {table}")
        # Something to deliver from the first step on.
        for _ in range(3):
            self.send(once=True)
        self.commit(broker_up=True)

    def name(self) -> str:
        self.number += 1
        return f"{self.number}"

    # --- a caller's transaction -------------------------------------------------------------------------------

    @rule()
    def write(self) -> None:
        name = self.name()
        self.open().add(Effect(name=name))
        self.open().flush()
        self.levels[-1].effects.append(name)

    @rule(once=st.sampled_from([True, True, False]))
    def send(self, once: bool) -> None:
        task = self.stand.app.tasks["work" if once else "effect"]
        result = enqueue(self.open(), task.s(self.name()))
        self.levels[-1].sends.append(result.id)

    @rule()
    def savepoint(self) -> None:
        self.savepoints.append(self.open().begin_nested())
        self.levels.append(Level())

    @precondition(lambda self: self.savepoints != [])
    @rule()
    def roll_back_to_savepoint(self) -> None:
        self.savepoints.pop().rollback()
        if self.levels.pop().sends:
            self.reached.add("send in a SAVEPOINT that was rolled back")

    @precondition(lambda self: self.savepoints != [])
    @rule()
    def release_savepoint(self) -> None:
        self.savepoints.pop().commit()
        released = self.levels.pop()
        self.levels[-1].effects += released.effects
        self.levels[-1].sends += released.sends

    @precondition(lambda self: self.session is not None)
    @rule(broker_up=st.booleans())
    def commit(self, broker_up: bool) -> None:
        publisher = self.publisher()
        publisher._paused_until = 0.0 if broker_up else float("inf")
        while self.savepoints:
            self.release_savepoint()
        self.open().commit()
        publisher._paused_until = 0.0
        self.effects += self.levels[0].effects
        self.committed_sends.update(self.levels[0].sends)
        self.end()

    @precondition(lambda self: self.session is not None)
    @rule(way=st.sampled_from(["rollback", "close", "invalidate"]))
    def roll_back(self, way: str) -> None:
        getattr(self.open(), way)()
        self.end()

    def end(self) -> None:
        self.open().close()
        self.session, self.savepoints, self.levels = None, [], []

    def open(self) -> Session:
        """Return the caller's session; its first act begins a transaction."""
        if self.session is None:
            self.session = Session(self.stand.alchemy.engine)
            self.levels = [Level()]
        return self.session

    def publisher(self) -> Any:
        outbox = self.stand.alchemy.outbox
        assert outbox is not None
        return outbox.publisher

    # --- workers ----------------------------------------------------------------------------------------------

    def idle(self) -> bool:
        """No transaction is open: SQLite has one writer, and a test waits for nobody."""
        return self.session is None

    def take(self) -> None:
        self.taken += self.stand.sent()

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), end=ENDS)
    def deliver(self, data: st.DataObject, end: str) -> None:
        """Deliver any message that was ever sent, the first time or again."""
        self.take()
        candidates = [sent for sent in self.taken if sent.task == "work" and sent.id not in self.pruned]
        if not candidates:
            return
        sent = data.draw(st.sampled_from(candidates))
        self.run(sent, end)

    def run(self, sent: Sent, end: str) -> None:
        runs: list[str] = []
        self.stand.app.conf.delivery_end = (end, runs)
        try:
            ended = self.stand.deliver(sent)
        except Crash:
            assert runs == [sent.id]
            self.reached.add("crash")
            return
        self.compare(sent, end, runs, ended)

    def compare(self, sent: Sent, end: str, runs: list[str], ended: Any) -> None:
        name = sent.args[0]
        self.reached.add(ended.state)
        if sent.id in self.done:
            self.reached.add("copy of a completed task")
            assert (ended.state, ended.value, runs) == ("SUCCESS", self.done[sent.id], [])  # I5
        elif sent.id in self.dead:
            self.reached.add("copy of a dead task")
            assert (ended.state, runs) == ("FAILURE", [])
        elif runs == []:
            # Its process was killed too often.
            self.reached.add("killed too often")
            assert ended.state == "FAILURE"
            self.dead.add(sent.id)
        elif end == "returns":
            assert (ended.state, ended.value) == ("SUCCESS", f"done {name}")
            self.done[sent.id] = ended.value
            self.effects.append(name)
            self.committed_sends.add(f"child of {name}")
        elif end == "retries":
            assert ended.state == "RETRY"
        else:
            assert ended.state == "FAILURE"
            self.dead.add(sent.id)

    @precondition(lambda self: self.idle())
    @rule()
    def revive(self) -> None:
        assert upkeep.revive(self.stand.alchemy.engine) == len(self.dead)
        self.dead.clear()

    # --- the relay and time -----------------------------------------------------------------------------------

    @precondition(lambda self: self.idle())
    @rule()
    def relay_step(self) -> None:
        self.stand.relay().step()

    @precondition(lambda self: self.idle())
    @rule()
    def leases_pass(self) -> None:
        self.stand.make_due()

    @precondition(lambda self: self.idle())
    @rule()
    def relay_dies_after_its_claim(self) -> None:
        from celery_alchemy.relay import claim_due

        with self.stand.alchemy.engine.begin() as connection:
            claim_due(connection, "a relay that is gone")

    @precondition(lambda self: self.idle())
    @rule()
    def broker_comes_back_empty(self) -> None:
        """Plain messages that nobody has taken are lost with it, as they are without the library; owed tasks are not."""
        for sent in self.stand.sent():
            self.taken.append(sent)

    @precondition(lambda self: self.idle())
    @rule()
    def prune(self) -> None:
        upkeep.prune_all(self.stand.alchemy.engine, 1)
        self.stand.database.execute("UPDATE celery_outbox SET completed_at = '2020-01-01 00:00:00' WHERE completed_at IS NOT NULL")
        assert upkeep.prune_all(self.stand.alchemy.engine, 1000) >= 0
        # Beyond the window nothing is promised for a copy.
        self.pruned.update(self.done)

    # --- what must be true ------------------------------------------------------------------------------------

    @precondition(lambda self: self.idle())
    @invariant()
    def effects_are_those_of_committed_transactions(self) -> None:
        """I3, I9: once each, and nothing of what rolled back or crashed."""
        assert self.stand.effects() == self.effects

    @invariant()
    def nothing_is_sent_by_what_did_not_commit(self) -> None:
        """I1."""
        self.take()
        ghosts = [sent for sent in self.taken if self.sender_of(sent) not in self.committed_sends]
        assert ghosts == []

    def sender_of(self, sent: Sent) -> str:
        name = str(sent.args[0])
        return name if name.startswith("child of ") else sent.id

    @precondition(lambda self: self.idle())
    @invariant()
    def nothing_that_was_committed_is_lost(self) -> None:
        """I2, I6: it was in the broker, or it is in the outbox."""
        self.take()
        kept = {row[0] for row in self.stand.database.rows("SELECT task_id FROM celery_outbox")}
        bodies = [bytes(row[0]).decode() for row in self.stand.database.rows("SELECT body FROM celery_outbox WHERE body IS NOT NULL")]
        sent = {self.sender_of(one) for one in self.taken}
        missing = self.committed_sends - sent - kept
        assert {send for send in missing if not any(f'"{send}"' in body for body in bodies)} == set()

    @precondition(lambda self: self.idle())
    @invariant()
    def once_tasks_are_owed_completed_or_dead(self) -> None:
        """I3, I4: exactly one of the three, each with the columns that belong to it."""
        rows = self.stand.database.rows(
            "SELECT task_id, completed_at IS NOT NULL, died_at IS NOT NULL, due_at IS NOT NULL FROM celery_outbox"
            " WHERE task_name = 'work'"
        )
        assert all(sum(map(bool, states)) == 1 for _, *states in rows)
        assert {row[0] for row in rows if row[2]} == self.dead
        assert {row[0] for row in rows if row[1]} == set(self.done) - self.pruned

    @precondition(lambda self: self.idle())
    @invariant()
    def no_connection_is_left(self) -> None:
        """I10."""
        assert self.stand.alchemy.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    def teardown(self) -> None:
        """Whatever happened, with the broker up and time passing all that was committed is sent, and done once."""
        if self.session is not None:
            self.end()
        self.revive()
        self.stand.make_due()
        self.stand.relay_all()
        self.take()
        names = {self.sender_of(sent) for sent in self.taken}
        assert self.committed_sends - names - set(self.done) == set()
        for sent in [sent for sent in self.taken if sent.task == "work" and sent.id not in self.pruned] * 2:
            self.run(sent, "returns")
        self.effects_are_those_of_committed_transactions()
        self.once_tasks_are_owed_completed_or_dead()


def make_work(stand: Stand) -> None:
    """Make the once task of the machine; how it ends is told in the app's configuration."""

    @stand.task(name="work", once=True, bind=True, max_retries=None, default_retry_delay=0, max_deliveries=3)
    def work(self: Any, session: Session, name: str) -> str:
        end, runs = stand.app.conf.delivery_end
        runs.append(self.request.id)
        if end == "crashes":
            raise Crash
        session.add(Effect(name=name))
        stand.effect.delay_on_commit(f"child of {name}")
        session.flush()
        if end == "crashes before its commit":
            raise Crash
        if end == "raises":
            raise LookupError(name)
        if end == "retries":
            raise self.retry(countdown=0)
        return f"done {name}"


#: What the examples must have reached, on each database.
REACHED = {
    "SUCCESS",
    "FAILURE",
    "RETRY",
    "crash",
    "copy of a completed task",
    "copy of a dead task",
    "send in a SAVEPOINT that was rolled back",
}

EXAMPLES = {"sqlite": 15, "postgresql": 6, "mariadb": 6}


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_no_order_of_events_breaks_a_guarantee(database: Database, tmp_path: Path) -> None:
    """The same sequences at each run and on each database; fewer where each step costs more."""
    stand = Stand(database)
    make_work(stand)
    reached: set[str] = set()
    machine = type("DeliveryOnOneStand", (Delivery,), {"stand": stand, "reached": reached})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=EXAMPLES[database.name],
                stateful_step_count=40,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        stand.close()

    assert reached >= REACHED
